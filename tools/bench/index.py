"Indexing the headers of 10,000 files: the walk beside pydicom, and the whole of `find_series`."
import os, tempfile
from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmread

from jfr2020.ground.geometry import Geometry
from jfr2020.dicom.header import read_header
from jfr2020.dicom.series import find_series
from jfr2020.dicom.writing import write_series
from jfr2020.ground.volume import CTVolume
from tools.bench import interleaved, table

SERIES, SLICES, PRIVATE = 25, 400, 3500 # private bytes, so that a header has the 6 kB of a scanner's


def like_a_scanner(ds, k):
    "Some 100 elements, sequences and private blocks, as scanners write them"
    texts = ('InstitutionName', 'StationName', 'ProtocolName', 'DeviceSerialNumber', 'SoftwareVersions', 'StudyDescription',
             'RequestedProcedureDescription', 'PerformedProcedureStepDescription', 'ImageComments', 'OperatorsName')
    for t in texts: setattr(ds, t, 'synthetic')
    for t in ('Content', 'Acquisition', 'Series', 'InstanceCreation'): setattr(ds, f'{t}Date', '20200101'); setattr(ds, f'{t}Time', '101112.5')
    for t in ('DataCollectionDiameter', 'ReconstructionDiameter', 'DistanceSourceToDetector', 'DistanceSourceToPatient', 'TableHeight',
              'GantryDetectorTilt', 'ExposureTime', 'XRayTubeCurrent', 'Exposure', 'GeneratorPower', 'FocalSpots', 'CTDIvol',
              'WindowCenter', 'WindowWidth', 'SliceLocation', 'SmallestImagePixelValue', 'LargestImagePixelValue'): setattr(ds, t, 0)
    for t in ('ReferencedStudySequence', 'ReferencedImageSequence', 'SourceImageSequence', 'RequestAttributesSequence'):
        item = Dataset()
        item.ReferencedSOPClassUID = item.ReferencedSOPInstanceUID = '1.2.3.4'
        setattr(ds, t, [item])
    block = ds.private_block(0x0029, 'SYNTHETIC HEADER', create=True)
    for i in range(20): block.add_new(i, 'LO', 'private')
    block.add_new(0x30, 'OB', bytes(PRIVATE))


def make_tree(top):
    "25 series of 400 small slices each: one is written, the others are its bytes under another UID"
    ct = CTVolume(np.zeros((SLICES, 16, 16), 'i2'), Geometry.from_spacing((SLICES, 16, 16), (1, .7, .7)))
    paths = write_series(ct, top/'0', edit=like_a_scanner)
    uid = str(dcmread(paths[0], stop_before_pixels=True).SeriesInstanceUID).encode()
    for s in range(1, SERIES):
        (top/f'{s}').mkdir()
        for p in paths: (top/f'{s}'/p.name).write_bytes(p.read_bytes().replace(uid, uid[:-2] + b'%02d' % s))
    return sorted(p for p in top.rglob('*') if p.is_file())


def raw(path):
    fd = os.open(path, os.O_RDONLY)
    os.fstat(fd); os.read(fd, 16384); os.close(fd)


KEYS = ('SeriesInstanceUID', 'SOPInstanceUID', 'Modality', 'ImagePositionPatient', 'ImageOrientationPatient', 'PixelSpacing',
        'SliceThickness', 'Rows', 'Columns', 'RescaleSlope', 'RescaleIntercept', 'InstanceNumber', 'ConvolutionKernel', 'KVP')


def rows_by_walk(files):
    for p in files:
        h = read_header(p)
        for k in KEYS: h.get(k)


def rows_by_pydicom(files):
    for p in files:
        ds = dcmread(p, stop_before_pixels=True)
        for k in KEYS: ds.get(k)


def main():
    with tempfile.TemporaryDirectory() as d:
        files = make_tree(Path(d))
        size = read_header(files[0]).offset
        times = interleaved({
            'read_header, 14 values': lambda: rows_by_walk(files),
            'pydicom stop_before_pixels, 14 values': lambda: rows_by_pydicom(files),
            'read_header alone': lambda: [None for p in files if not read_header(p)],
            'pydicom stop_before_pixels alone': lambda: [None for p in files if not dcmread(p, stop_before_pixels=True)],
            'find_series: headers, all checks, geometry': lambda: find_series(d),
            'open, read 16 KiB, close': lambda: [raw(p) for p in files]}, rounds=3)
    table(f'index {len(files)} files, headers of {size} bytes', times, 'read_header, 14 values', 'pydicom >= 10 x read_header')


if __name__ == '__main__': main()
