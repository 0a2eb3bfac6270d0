"""
The camera that sees known points of the world at given pixels, though many of the matches are wrong: RANSAC over three
matches at a time (P3P), judged by how many others agree, and Gauss-Newton on all that do.

All in focal lengths: a point (x, y, z) of the camera falls on (x/z, y/z). Three points are enough also where all lie on
one wall; the linear solution, of six, is not unique there.
"""

import numpy as np

from lib.geometry import project
from lib.streams import numpy_stream

NEAR = (
    0.02  # focal lengths (1.1 degrees): a match agrees with a camera; what is imagined is not sharp
)
LEAST, SHARE = 12, 0.1  # a camera needs so many matches that agree, and this share of all
TRIALS, JUDGES = 500, 300  # RANSAC: triples of matches that are tried; matches that judge each


def three_points(world, rays):
    """Cameras that see three points along three rays: Grunert's P3P, as Haralick et al. (1994) write it.

    world (h, 3, 3), rays (h, 3, 3) unit vectors in the camera's axes; the second axis counts points
    returns c2w (m, 4, 4): up to four per triple, none where the three are in line
    """
    a2, b2, c2 = (((world[:, i] - world[:, j]) ** 2).sum(-1) for i, j in ((1, 2), (0, 2), (0, 1)))
    A, B, C = (
        (rays[:, i] * rays[:, j]).sum(-1) for i, j in ((1, 2), (0, 2), (0, 1))
    )  # cosines between the rays
    with np.errstate(all="ignore"):
        p, q, a, c = (a2 - c2) / b2, (a2 + c2) / b2, a2 / b2, c2 / b2
        # the third distance is v times the first one; v solves a quartic, highest power first
        quartic = np.stack(
            [
                (p - 1) ** 2 - 4 * c * A**2,
                4 * (p * (1 - p) * B - (1 - q) * A * C + 2 * c * A**2 * B),
                2
                * (
                    p**2
                    - 1
                    + 2 * p**2 * B**2
                    + 2 * (1 - c) * A**2
                    - 4 * q * A * B * C
                    + 2 * (1 - a) * C**2
                ),
                4 * (-p * (1 + p) * B + 2 * a * C**2 * B - (1 - q) * A * C),
                (1 + p) ** 2 - 4 * a * C**2,
            ],
            -1,
        )  # (h, 5)
        companion = np.tile(np.eye(4, k=-1), (len(world), 1, 1))
        companion[:, 0] = -quartic[:, 1:] / quartic[:, :1]
        usable = np.isfinite(companion).all((1, 2))
        roots = np.linalg.eigvals(companion[usable])  # (h', 4) complex
        p, A, B, C, b2 = (x[usable, None] for x in (p, A, B, C, b2))
        v = roots.real
        u = ((p - 1) * v**2 - 2 * p * B * v + 1 + p) / (
            2 * (C - v * A)
        )  # the second over the first
        first = np.sqrt(b2 / (1 + v**2 - 2 * v * B))
        distances = np.stack([first, u * first, v * first], -1)  # (h', 4, 3)
        there = (np.abs(roots.imag) < 0.01) & (distances > 0).all(-1)
        triple, _ = np.nonzero(there)
        camera = distances[there][..., None] * rays[usable][triple]  # (m, 3, 3)
        corner, turn = (
            world[usable][triple],
            axes_of(world[usable][triple]) @ axes_of(camera).transpose(0, 2, 1),
        )
    c2w = np.tile(np.eye(4), (len(camera), 1, 1))
    c2w[:, :3, :3], c2w[:, :3, 3] = turn, corner[:, 0] - (turn @ camera[:, 0, :, None])[..., 0]
    return c2w[np.isfinite(c2w).all((1, 2))]


def axes_of(triangle):
    """Three points (m, 3, 3) -> an orthonormal frame that is fixed to their triangle (m, 3, 3), axes as columns."""
    x, side = triangle[:, 1] - triangle[:, 0], triangle[:, 2] - triangle[:, 0]
    z = np.cross(x, side)
    frame = np.stack([x, np.cross(z, x), z], -1)
    return frame / np.linalg.norm(frame, axis=1, keepdims=True)


def off(c2w, points, plane):
    """How far cameras (m, 4, 4) see points (n, 3) from where they should, plane (n, 2) -> (m, n) in focal lengths."""
    camera = points @ c2w[:, :3, :3] - c2w[:, None, :3, 3] @ c2w[:, :3, :3]  # (m, n, 3)
    z = camera[..., 2]
    gap = np.linalg.norm(camera[..., :2] / np.where(z > 1e-6, z, 1)[..., None] - plane, axis=-1)
    return np.where(z > 1e-6, gap, np.inf)


def refine(c2w, points, plane, rounds=10):
    """Gauss-Newton on the reprojection error of the points that agree, which are chosen anew in each round."""
    for _ in range(rounds):
        near = off(c2w[None], points, plane)[0] < NEAR
        if near.sum() < 3:
            break
        seen, z = project(points[near], np.eye(3), c2w)  # (n, 2), (n,)
        x, y, one, nil = seen[:, 0], seen[:, 1], np.ones(len(z)), np.zeros(len(z))
        # columns: a step of the camera along its x, y, z; a small turn about them
        slope = np.stack(
            [
                np.stack([-one / z, nil, x / z, x * y, -1 - x**2, y], -1),
                np.stack([nil, -one / z, y / z, 1 + y**2, -x * y, -x], -1),
            ],
            1,
        )  # (n, 2, 6)
        step = np.linalg.lstsq(slope.reshape(-1, 6), (plane[near] - seen).ravel(), rcond=None)[0]
        turn = np.eye(3) + np.cross(np.eye(3), step[3:])
        left, _, right = np.linalg.svd(turn)  # the nearest rotation
        change = np.eye(4)
        change[:3, :3], change[:3, 3] = left @ right, step[:3]
        c2w = c2w @ change
    return c2w


def pose_from_matches(points, pixels, K, seed=0):
    """The camera that sees world points (n, 3) at pixels (n, 2) -> (c2w (4, 4), agreeing (n,) bool), or None.

    K (3, 3) intrinsics of the view. RANSAC over triples of matches; the winner is refined on all that agree. None if
    fewer than LEAST or than SHARE of the matches agree. The same matches give the same camera.
    """
    least, rng = max(LEAST, SHARE * len(points)), numpy_stream("pose of a match", seed)
    if len(points) < least:
        return None
    plane = (pixels - K[:2, 2]) / K[[0, 1], [0, 1]]
    rays = np.column_stack([plane, np.ones(len(plane))])
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    triples = np.argsort(rng.random((TRIALS, min(len(points), JUDGES))), 1)[
        :, :3
    ]  # three different ones each
    judges = rng.permutation(len(points))[:JUDGES]
    cameras = three_points(points[judges[triples]], rays[judges[triples]])
    if not len(cameras):
        return None
    agree = (off(cameras, points[judges], plane[judges]) < NEAR).sum(1)
    c2w = refine(cameras[agree.argmax()], points, plane)
    agreeing = off(c2w[None], points, plane)[0] < NEAR
    return (c2w, agreeing) if agreeing.sum() >= least else None
