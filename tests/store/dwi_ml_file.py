"""A file in dwi_ml's one-file layout, written with h5py and numpy from the layout's description alone (nothing of jfr2020).

`write(path)` makes a file of three subjects and returns the truth: volumes as the file has them, (X,Y,Z,F), and streamlines
in RAS+ mm, float64, computed point by point. `old=True` leaves out what older files do not have.
As a script: `python tests/dwi_ml_file.py FILE.hdf5`.

Layout: root attributes; /<subject>/<volume>/data float32 (X,Y,Z,F) with affine of voxel CENTRES to RAS+ mm; /<subject>/<lines>/data
float32 (points,3), usually in voxels from the CORNER (voxel 0 spans 0..1), with offsets, lengths, euclidean_lengths,
data_per_streamline/, connectivity_matrix, connectivity_label_volume.
"""
import sys

import h5py
import numpy as np

CONFIG = {'input': {'type': 'volume', 'files': ['dwi/sh.nii.gz', 'anat/*__t1.nii.gz'], 'standardization': 'all',
                    'std_mask': ['masks/brain.nii.gz']},
          'wm_mask': {'type': 'volume', 'files': ['masks/wm.nii.gz'], 'standardization': 'none'},
          'tracts': {'type': 'streamlines', 'files': ['tractograms/*.trk'], 'dps_keys': ['bundle_id', 'weight'],
                     'connectivity_matrix': 'conn.npy', 'connectivity_nb_blocs': [4, 3, 2]},
          'ends': {'type': 'streamlines', 'files': "tractograms/o'ne.tck", 'dps_keys': None}}
SHAPES = {'subj-A': (7, 6, 5), 'subj-B': (5, 8, 6), 'subj-C': (6, 6, 6)}  # (X, Y, Z)
VOXEL = {'subj-A': (2., 1.5, 3.), 'subj-B': (1., 2.5, 1.25), 'subj-C': (2., 2., 2.)}  # mm
SPELLED = {  # (space, origin) of tracts and of ends; what a reader must take
    'subj-A': (('Space.VOX', 'Origin.TRACKVIS'), ('vox', 'corner')),
    'subj-B': (('VOX', 'center'), ('Space.RASMM', 'Origin.NIFTI')),
    'subj-C': (('voxmm', 'trackvis'), ('Space.RASMM', 'Origin.TRACKVIS'))}


def turn(x, y, z):
    "Rotation about x, then y, then z, degrees"
    (cx, sx), (cy, sy), (cz, sz) = ((np.cos(np.radians(a)), np.sin(np.radians(a))) for a in (x, y, z))
    return (np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]) @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
            @ np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]]))


def affine_of(subject):
    "(4,4) float64: voxel centre (i,j,k) -> RAS+ mm; oblique, B with a flipped first axis, C straight"
    A = np.eye(4)
    R = {'subj-A': turn(10, -20, 30), 'subj-B': turn(-5, 8, 100) @ np.diag([-1, 1, 1]), 'subj-C': np.eye(3)}[subject]
    A[:3, :3] = R * VOXEL[subject]  # columns times voxel sizes
    A[:3, 3] = {'subj-A': (-83.25, 12.5, -40.), 'subj-B': (31., -117.75, 9.5), 'subj-C': (100., -60., 7.)}[subject]
    return A


def mm_of(p, space, origin, A, size):
    "One stored point -> RAS+ mm, written out"
    space, origin = space.lower().replace('space.', ''), origin.lower().replace('origin.', '')
    half = .5 if origin in ('trackvis', 'corner') else 0.  # the corner of voxel 0 is half a voxel before its centre
    x, y, z = (float(v) for v in p)
    if space == 'voxmm': x, y, z = x/size[0], y/size[1], z/size[2]
    if space == 'rasmm': return [v - half*(A[r, 0] + A[r, 1] + A[r, 2]) for r, v in enumerate((x, y, z))]
    x, y, z = x - half, y - half, z - half
    return [A[r, 0]*x + A[r, 1]*y + A[r, 2]*z + A[r, 3] for r in range(3)]


def stored_lines(subject, which, rng):
    "Lines as stored, float32, in the space and origin of SPELLED; points lie inside the volume"
    space, origin = (s.lower() for s in SPELLED[subject][which])
    A, size, n = affine_of(subject), np.array(VOXEL[subject]), np.array(SHAPES[subject])
    out = []
    for count in ((3, 9, 2, 5, 1) if which == 0 else (4, 2)):
        vox = rng.uniform(0, n - 1, (count, 3))  # voxel centres
        corner = 'trackvis' in origin or 'corner' in origin
        if 'rasmm' in space: p = vox @ A[:3, :3].T + A[:3, 3] + (A[:3, :3].sum(1)/2 if corner else 0)
        else: p = (vox + (.5 if corner else 0)) * (size if 'voxmm' in space else 1)
        out.append(p.astype(np.float32))
    if subject == 'subj-A' and which == 0: out[2] = np.array([[.5, .5, .5], [3.5, 2.5, 1.5]], np.float32)  # voxel centres
    return out


def put_volume(group, data, A):
    group.attrs['type'] = 'volume'
    group.attrs['affine'] = A
    group.attrs['voxres'] = np.linalg.norm(A[:3, :3], axis=0).astype(np.float32)
    group.attrs['nb_features'] = data.shape[-1]
    group.create_dataset('data', data=data)


def put_lines(group, lines, mm, spelled, subject, trk, dps, old):
    A = affine_of(subject)
    attrs = dict(type='streamlines', space=spelled[0], origin=spelled[1], affine=A.astype(np.float32 if trk else np.float64),
                 dimensions=np.array(SHAPES[subject], np.int16), voxel_sizes=np.array(VOXEL[subject], np.float32),
                 voxel_order={'subj-A': 'RAS', 'subj-B': 'PLS', 'subj-C': 'RAS'}[subject])
    for k, v in attrs.items(): group.attrs[k] = v
    lengths = np.array([len(p) for p in lines], np.int64)
    group.create_dataset('data', data=np.concatenate(lines))
    group.create_dataset('offsets', data=np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64))
    group.create_dataset('lengths', data=lengths)
    group.create_dataset('euclidean_lengths', data=np.array(
        [np.linalg.norm(np.diff(p, axis=0), axis=1).sum() for p in mm], np.float32))
    if old: return
    per_line = group.create_group('data_per_streamline')
    for k, v in dps.items(): per_line.create_dataset(k, data=v)


def write(path, old=False):
    "Write the file; -> {subject: {group: dict}}, the truth in (X,Y,Z,F) and RAS+ mm float64"
    truth, rng = {}, np.random.default_rng(7)
    with h5py.File(path, 'w') as f:
        f.attrs['data_and_time'] = '21 November 2026 00:22:57'
        for k, v in dict(chosen_subjs=list(SHAPES), training_subjs=['subj-B', 'subj-A'], validation_subjs=['subj-C'],
                         testing_subjs=[]).items(): f.attrs[k] = v
        f.attrs['groups_config'] = str(CONFIG)
        f.attrs['step_size'], f.attrs['nb_points'], f.attrs['compress'] = .5, 'Not defined by user', 'Not defined by user'
        for s, shape in SHAPES.items():
            A, sub, t = affine_of(s), f.create_group(s), truth.setdefault(s, {})
            volumes = dict(input=rng.normal(size=(*shape, 3)).astype(np.float32),
                           wm_mask=(rng.random((*shape, 1)) > .5).astype(np.float32))
            if s == 'subj-C': volumes['only_here'] = np.full((*shape, 1), 2.5, np.float32)  # a group that others lack
            for name, data in volumes.items():
                put_volume(sub.create_group(name), data, A)
                t[name] = dict(data=data, affine=A)
            for which, name in enumerate(('tracts', 'ends')):
                trk, spelled = which == 0, SPELLED[s][which]
                lines = stored_lines(s, which, rng)
                read_A = A.astype(np.float32).astype(np.float64) if trk else A  # what the file says is what holds
                size = np.array(VOXEL[s], np.float32)
                mm = [np.array([mm_of(p, *spelled, read_A, size) for p in line]) for line in lines]
                n = len(lines)
                dps = dict(bundle_id=rng.integers(0, 4, (n, 1)).astype(np.float32),
                           weight=rng.random((n, 2)).astype(np.float32)) if trk else {}
                put_lines(sub.create_group(name), lines, mm, spelled, s, trk, dps, old)
                t[name] = dict(mm=mm, dps={} if old else dps, affine=read_A, shape=shape)
            if old: continue
            g, n = sub['tracts'], 24 if s != 'subj-C' else 4
            conn = np.triu(rng.random((n, n)) > .8)
            g.create_dataset('connectivity_matrix', data=conn)
            t['tracts']['connectivity'] = conn
            if s != 'subj-C':
                g.attrs['connectivity_matrix_type'], g.attrs['connectivity_nb_blocs'] = 'from_blocs', [4, 3, 2]
            else:
                g.attrs['connectivity_matrix_type'] = 'from_labels'
                t['tracts']['labels'] = rng.integers(0, 5, shape)
                g.create_dataset('connectivity_label_volume', data=t['tracts']['labels'])
    return truth


if __name__ == '__main__': write(sys.argv[1])
