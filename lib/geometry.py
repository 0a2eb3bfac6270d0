"""
Cameras, and the five motions that the policy may command.

  axes      OpenCV: x right, y down, z forward, metres; c2w (4, 4) maps camera to world, whose y points along gravity
  pinhole   a point (x, y, z) of the camera falls on pixel (fx x/z + cx, fy y/z + cy); pixel centres are at +0.5
  motion    one kind and one signed amount: moves are parallel to the ground or along gravity, yaw is about the
            vertical, only pitch is the camera's own (the paper's)
  words     lib/simulators.py: "Based on the last image, turn 45 degrees to the left."
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Array = np.ndarray


KINDS = ("dx", "dy", "dz", "dangle", "dphi")  # the paper's names, in the order of `decompose`
UNITS = dict(zip(KINDS, ("meters",) * 3 + ("degrees",) * 2, strict=True))
VERTICAL = 5.0  # degrees
# metres (4.5 degrees): how much of other motions the words of one motion may leave unsaid
SLACK = 0.15
BEND = 20.0  # degrees between a move and its words; the same as `consistency.DIRECTION`
DEGREES_PER_METER = 30.0  # compares components: the paper asks the cameras of a context to differ by 1 m and 30 degrees


@dataclass(frozen=True)
class Motion:
    """One camera motion: a kind of `KINDS` and a signed amount, not zero, in its unit.

    dx right (below zero: left), dy forward (backward), dz up (down), metres; dangle: yaw to the right (left), dphi:
    pitch up (down), degrees.
    """

    kind: str
    amount: float

    def __post_init__(self):
        if self.kind not in UNITS:
            raise ValueError(f"unknown motion {self.kind!r}; the motions are: {', '.join(KINDS)}")
        if self.amount == 0 or not np.isfinite(self.amount):
            raise ValueError(
                f"the amount of {self.kind} must be a finite number, not zero; it is {self.amount}"
            )

    @property
    def unit(self) -> str:
        return UNITS[self.kind]

    @property
    def way(self) -> str:
        """The kind with its sign: "-dangle" is a turn to the left, whatever its amount."""
        return ("+" if self.amount > 0 else "-") + self.kind


class Query(NamedTuple):
    """One order to a simulator. A simulator is anything with `imagine(list of Query) -> list of (H, W, 3) uint8`."""

    images: list  # (H, W, 3) uint8 each: all images so far, or some; imagined ones included
    reference: int  # 1-based number of the image the motion starts from
    instruction: str  # the sentence: `simulators.instruction`
    seed: int  # of the simulator's noise
    scene: dict | None = None  # rooms only: {"room": seed, "poses": one 4x4 list per image}
    # per image the call (lib/protocol) that imagined it, None of a given one; given ones come first. Empty: nobody knows
    provenance: Sequence = ()


def select_context(count: int, reference: int, max_context: int) -> list[int]:
    """Which of `count` images a simulator is shown, and in which order: the reference last, as in the paper's tool, and
    before it the latest others: the list is turned, so that a ring of views stays one.

    reference   its 1-based number.   returns 0-based indices, `max_context` at most. Raises ValueError if there is no
                such image
    """
    if not 1 <= reference <= count:
        raise ValueError(f"there is no Image-{reference}: the images are numbered 1 to {count}")
    others = [index for index in range(count) if index != reference - 1]
    latest = sorted([*others, reference - 1][-max_context:])
    place = latest.index(reference - 1) + 1
    return latest[place:] + latest[:place]


# ---- poses -----------------------------------------------------------------------------------------------------------


def camera_pose(x: float, y: float, z: float, yaw: float = 0.0, pitch: float = 0.0) -> Array:
    """c2w (4, 4) of a camera at (x, y, z) metres: yaw > 0 turns right, then pitch > 0 looks up; degrees."""
    a = np.radians(yaw)
    b = np.radians(pitch)
    about_y = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    c2w = np.eye(4)
    c2w[:3, :3] = about_y @ about_x
    c2w[:3, 3] = x, y, z
    return c2w


def as_lists(c2w: Array) -> list[list[float]]:
    """A pose as nested lists, for JSON; six decimals."""
    return np.round(c2w, 6).tolist()


def angles_of(c2w: Array) -> Array:
    """Heading (0 along z, > 0 right of it), pitch (> 0 up) and roll of cameras (..., 4, 4) -> (..., 3) degrees.

    A rotation is the three in this order. Within VERTICAL degrees of straight down or up a camera heads where the top
    (up: the bottom) of its picture points, and its roll is nan: no motion can be told of it (`dominant_component`).
    """
    down, look = c2w[..., :3, 1], c2w[..., :3, 2]
    vertical = np.abs(look[..., 1]) > np.cos(np.radians(VERTICAL)) + 1e-6
    ahead = np.where(vertical[..., None], -np.sign(look[..., 1:2]) * down, look)
    heading = np.arctan2(ahead[..., 0], ahead[..., 2])
    pitch = np.arctan2(-look[..., 1], np.hypot(look[..., 0], look[..., 2]))
    roll = np.where(vertical, np.nan, np.arctan2(c2w[..., 1, 0], c2w[..., 1, 1]))
    return np.degrees(np.stack([heading, pitch, roll], -1))


def delta_of(motion: Motion) -> Array:
    """The relative pose (5,) that a motion commands."""
    return motion.amount * np.eye(5)[KINDS.index(motion.kind)]


def compose(c2w: Array, delta: Array) -> Array:
    """The pose (4, 4) at a relative pose `delta` (dx, dy, dz, dangle, dphi), of the same roll: inverts `decompose`."""
    dx, dy, dz, dangle, dphi = delta
    level = camera_pose(*c2w[:3, 3], angles_of(c2w)[0])
    tilt = np.linalg.inv(level) @ c2w  # pitch and roll
    return level @ camera_pose(dx, -dz, dy, dangle, dphi) @ tilt


def move_camera(c2w: Array, motion: Motion) -> Array:
    """The pose (4, 4) after `motion`. Moves follow the heading of `angles_of`, which any camera has; roll stays."""
    return compose(c2w, delta_of(motion))


def decompose(source: Array, target: Array) -> Array:
    """The relative pose of cameras (..., 4, 4) as (..., 6): dx right and dy forward along the ground as the source
    heads, dz up, metres; the differences of `angles_of`, dangle right, dphi up, roll. Leading shapes broadcast."""
    start = angles_of(source)
    heading = np.radians(start[..., 0])
    x, y, z = np.moveaxis(target[..., :3, 3] - source[..., :3, 3], -1, 0)
    right = np.cos(heading) * x - np.sin(heading) * z
    forward = np.sin(heading) * x + np.cos(heading) * z
    turns = angles_of(target) - start
    # from -180 to 180: half a turn, whatever its last digits, is one to the left
    turns = turns - 360 * np.floor((turns + 180 + 1e-4) / 360)
    return np.concatenate([np.stack([right, forward, -y], -1), turns], -1)


def dominant_component(delta: Array, slack: float = SLACK) -> Array:
    """Which one component describes a relative pose `delta` (..., 6) of `decompose` -> index (...), -1 where none does.

    Components are compared at 1 m = 30 degrees. None does, since the words would not be true, if another one (roll
    counts, and may be unknown) exceeds `slack` metres, or if a move is bent by more than BEND (ours). With slack inf the
    dominant one always does (the paper's rule).
    """
    size = np.abs(delta) / np.array([1, 1, 1, *[DEGREES_PER_METER] * 3])  # (..., 6), in metres
    main = size[..., :5].argmax(-1)
    if np.isinf(slack):
        return main
    is_main = np.arange(6) == main[..., None]
    second = np.where(is_main, 0, size).max(-1)
    aside = np.linalg.norm(np.where(is_main, 0, size)[..., :3], axis=-1)
    straight = aside <= np.tan(np.radians(BEND)) * size[..., :3].max(-1)
    return np.where((second <= slack) & ((main >= 3) | straight), main, -1)  # nan is not below


def motion_along(delta: Array, component: int) -> Motion | None:
    """The Motion of one component of a relative pose (6,), rounded to 0.1 m or 5 degrees; None if that is zero."""
    step = 0.1 if component < 3 else 5.0
    amount = round(round(float(delta[component]) / step) * step, 1)
    return Motion(KINDS[component], amount) if amount else None


def dominant_motion(source: Array, target: Array) -> Motion | None:
    """The one motion that describes how the camera went from `source` to `target` (4, 4), or None if no single one does."""
    delta = decompose(source, target)
    component = int(dominant_component(delta))
    return None if component < 0 else motion_along(delta, component)


# ---- pixels and points -----------------------------------------------------------------------------------------------


def pinhole(size: int) -> Array:
    """Intrinsics (3, 3) of a square image of `size` pixels with a field of view of 90 degrees."""
    focal = 0.5 * size / np.tan(np.radians(45))
    return np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1.0]])


def unproject(depth: Array, intrinsics: Array, c2w: Array) -> Array:
    """Depth along z (H, W) in metres -> world points (H, W, 3)."""
    rows, columns = np.mgrid[: depth.shape[0], : depth.shape[1]] + 0.5
    x = (columns - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (rows - intrinsics[1, 2]) / intrinsics[1, 1]
    rays = np.stack([x, y, np.ones_like(x)], -1)  # (H, W, 3), z = 1
    return (rays * depth[..., None]) @ c2w[:3, :3].T + c2w[:3, 3]


def project(points: Array, intrinsics: Array, c2w: Array) -> tuple[Array, Array]:
    """World points (..., 3) -> (column, row) in pixels (..., 2) and depth along z (...)."""
    camera = (points - c2w[:3, 3]) @ c2w[:3, :3]
    z = camera[..., 2]
    safe_z = np.where(np.abs(z) < 1e-9, 1e-9, z)[..., None]
    return camera[..., :2] / safe_z * intrinsics[[0, 1], [0, 1]] + intrinsics[:2, 2], z


SURFACE = 0.05  # how far apart in depth two points may be and still count as one
# (column, row): what leads from a point to the four pixels around it
CORNERS = np.array([(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)])


def visible(points: Array, depth: Array, intrinsics: Array, c2w: Array) -> tuple[Array, Array]:
    """Does a view see these points? It does if a point falls inside the image, in front of the camera, and one of the
    four pixels around it has its depth, within SURFACE (metres, and the same share of the depth).

    points (..., 3) world;  depth (h, w) metres, 0 = invalid
    returns error (...): how far the depth is off, inf where unseen; and (row, column) (2, ...) of that pixel.
    """
    height, width = depth.shape
    pixel, z = project(points, intrinsics, c2w)
    inside = (z > 1e-6) & (pixel >= 0).all(-1) & (pixel < (width, height)).all(-1)
    z = z[inside][:, None]  # (n, 1)
    corners = np.floor(pixel[inside][:, None] + CORNERS)  # (n, 4, 2)
    column = np.clip(corners[..., 0], 0, width - 1).astype(int)
    row = np.clip(corners[..., 1], 0, height - 1).astype(int)
    there = depth[row, column]
    off = np.where(there > 0, np.abs(there - z) / (1 + z), np.inf)  # metres near, a share far
    best = np.arange(len(off)), off.argmin(-1)
    error = np.full(inside.shape, np.inf)
    index = np.zeros((2, *inside.shape), int)
    error[inside] = np.where(off[best] < SURFACE, off[best], np.inf)
    index[:, inside] = row[best], column[best]
    return error, index


def warp(
    target_depth: Array, target_c2w: Array, context: list, intrinsics: Array
) -> tuple[Array, Array]:
    """What the context views know of the target view: the inverse warp by the target's depth.

    target_depth (H, W) metres, 0 = invalid;  context: list of (rgb uint8 (h, w, 3), depth (h, w), c2w), or with its
    own intrinsics behind them where they are not the target's. The view whose depth agrees best gives the colour.
    returns rgb (H, W, 3) uint8, black where unseen, and a mask (H, W) bool of what some view sees.
    """
    points = unproject(target_depth, intrinsics, target_c2w)
    best_error = np.full(target_depth.shape, np.inf)
    colour = np.zeros((*target_depth.shape, 3), np.uint8)
    for rgb, depth, c2w, *own in context:
        error, (row, column) = visible(points, depth, *(own or [intrinsics]), c2w)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        colour = np.where(better[..., None], rgb[row, column], colour)
    mask = np.isfinite(best_error) & (target_depth > 0)
    return np.where(mask[..., None], colour, 0).astype(np.uint8), mask


def coverage(target_depth: Array, mask: Array) -> float:
    """Share of the valid target pixels that some context view sees (paper: accepted if >= 0.85)."""
    valid = target_depth > 0
    return float(mask[valid].mean()) if valid.any() else 0.0
