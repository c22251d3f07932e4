"An enhanced multi-frame CT file, as small as the readers allow."
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from jfr2020.ground.geometry import lps2ras

ENHANCED_CT = '1.2.840.10008.5.1.4.1.1.2.1'


def item(**tags):
    ds = Dataset()
    for k, v in tags.items(): setattr(ds, k, v)
    return ds


def write_enhanced(ct, path, skip=None, order=None, slopes=None):
    "Write `ct` as one multi-frame file, its frames in any `order`, without frame `skip`"
    A, path = lps2ras(ct.geometry.affine), Path(path)
    frames = [k for k in (range(ct.shape[0]) if order is None else order) if k != skip]
    ds = item(SOPClassUID=ENHANCED_CT, SOPInstanceUID='1.2.7', Modality='CT', StudyInstanceUID='1.2', SeriesInstanceUID='1.2.5',
              FrameOfReferenceUID='1.2.6', ImageType=['ORIGINAL', 'PRIMARY', 'VOLUME', 'NONE'], SamplesPerPixel=1, Rows=ct.shape[1],
              Columns=ct.shape[2], NumberOfFrames=len(frames), BitsAllocated=16, BitsStored=12, HighBit=11, PixelRepresentation=0,
              PhotometricInterpretation='MONOCHROME2')
    spacing = [float(s) for s in ct.spacing]
    shared = dict(PixelMeasuresSequence=item(PixelSpacing=spacing[1:], SliceThickness=spacing[0]),
                  PlaneOrientationSequence=item(ImageOrientationPatient=[float(v) for v in (*A[:3, 2]/spacing[2], *A[:3, 1]/spacing[1])]),
                  CTReconstructionSequence=item(ConvolutionKernel='B35f'), CTXRayDetailsSequence=item(KVP=120),
                  CTImageFrameTypeSequence=item(FrameType=['ORIGINAL', 'PRIMARY', 'VOLUME', 'NONE']))
    ds.SharedFunctionalGroupsSequence = [item(**{k: [v] for k, v in shared.items()})]
    per, planes = [], []
    for k in frames:
        slope = (slopes or {}).get(k, 1)
        planes.append(np.rint((ct.data[k].astype(float)+1024)/slope).astype('<u2'))
        per.append(item(PlanePositionSequence=[item(ImagePositionPatient=[float(v) for v in A[:3, 3]+k*A[:3, 0]])],
                        PixelValueTransformationSequence=[item(RescaleSlope=slope, RescaleIntercept=-1024, RescaleType='HU')]))
    ds.PerFrameFunctionalGroupsSequence = per
    ds.PixelData = np.stack(planes).tobytes()
    ds['PixelData'].VR = 'OW'
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, ENHANCED_CT
    ds.file_meta.MediaStorageSOPInstanceUID = '1.2.7'
    ds.save_as(path, enforce_file_format=True)
    return path
