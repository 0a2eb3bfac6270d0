"""
A simulator that needs no training: the given views as a point cloud, looked at from the commanded pose. Rooms only.

  python evaluate.py --bench rooms --simulator tuned reprojection

It is what geometry alone can do with exact depth: nothing is invented where no given view looks.
"""

import numpy as np

from lib.geometry import Array, Query, move_camera, pinhole, project, unproject
from lib.rooms import random_room, render
from lib.simulators import read_instruction


class Reprojection:
    """Training-free: every pixel of a given view is a small square in space, painted into the commanded view.

    Depth belongs to given views alone (an imagined one adds no points, though a motion may start from it). In rooms it
    is rendered at the pose of the view; an image counts as given if it shows what stands at its pose.
    """

    def imagine(self, queries: list[Query]) -> list[Array]:
        """Queries with `scene` -> (H, W, 3) uint8 each. Raises ValueError without a scene."""
        return [self.reproject(query) for query in queries]

    def reproject(self, query: Query) -> Array:
        """One query -> (H, W, 3) uint8."""
        if query.scene is None:
            raise ValueError(
                "reprojection works in rooms only: this question carries no depth and no poses"
            )
        _, motion = read_instruction(query.instruction)
        poses = np.array(query.scene["poses"])
        size = len(query.images[0])
        true = render(random_room(query.scene["room"]), poses, size)
        positions, colours = [], []
        for image, rgb, depth, c2w in zip(
            query.images, true["rgb"], true["depth"], poses, strict=True
        ):
            if np.abs(image - rgb.astype(float)).mean() < 1:
                xyz, rgb = points(image, depth, c2w)
                positions.append(xyz)
                colours.append(rgb)
        target = move_camera(poses[query.reference - 1], motion)
        view, covered = splat(np.concatenate(positions), np.concatenate(colours), target, size)
        return fill_holes(view, covered)


def points(rgb: Array, depth: Array, c2w: Array, fine: int = 3) -> tuple[Array, Array]:
    """A view as coloured points: each pixel becomes fine² of them -> world points (n, 3), colours (n, 3) uint8."""
    rgb = rgb.repeat(fine, 0).repeat(fine, 1)
    depth = depth.repeat(fine, 0).repeat(fine, 1)
    xyz = unproject(depth, pinhole(len(depth)), c2w)
    return xyz[depth > 0], rgb[depth > 0]


def splat(xyz: Array, colours: Array, c2w: Array, size: int) -> tuple[Array, Array]:
    """Paint points into a view of `size` pixels, the nearest on top -> rgb (H, W, 3) uint8, covered (H, W) bool."""
    pixel, z = project(xyz, pinhole(size), c2w)
    column, row = np.floor(pixel).astype(int).T
    inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    visible = np.flatnonzero((z > 0.05) & inside)
    far_to_near = visible[np.argsort(-z[visible], kind="stable")]  # the last one written stays
    view = np.zeros((size, size, 3), np.uint8)
    covered = np.zeros((size, size), bool)
    view[row[far_to_near], column[far_to_near]] = colours[far_to_near]
    covered[row[far_to_near], column[far_to_near]] = True
    return view, covered


def fill_holes(view: Array, mask: Array) -> Array:
    """Let pixels outside `mask` (H, W) take the colour of the nearest one inside (in steps up, down, left, right)."""
    view = view.copy()
    known = mask.copy()
    while known.any() and not known.all():
        view_before = view.copy()
        known_before = known.copy()
        for axis, step in ((1, 1), (1, -1), (0, 1), (0, -1)):
            from_there = np.roll(known_before, step, axis)
            edge = 0 if step == 1 else -1  # np.roll wraps round: undo
            from_there[(slice(None),) * axis + (edge,)] = False
            take = from_there & ~known
            view[take] = np.roll(view_before, step, axis)[take]
            known |= take
    return view


def warped_views(rows: list[dict]) -> list[Array]:
    """Rows of `answers.load_triples` -> their context warped by the target's true depth and pose, holes filled.

    No bar: a simulator need not beat what it is not told.
    """
    return [fill_holes(row["warp"][..., :3], row["warp"][..., 3] > 0) for row in rows]
