"""
Cameras, and the ten motions that the policy may command.

  axes      OpenCV: x right, y down, z forward, metres; c2w (4, 4) maps camera to world
  pinhole   a point (x, y, z) of the camera falls on pixel (fx x/z + cx, fy y/z + cy); pixel centres are at +0.5
  motion    one kind and one amount, along or about the axes of the reference camera
  words     "Base on the viewpoint of Image-2, move 1.5 meters to the left."  (the paper's wording of a move; it
            conditions the published checkpoint. The paper prints no turn: those phrases are ours.)
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# kind -> (phrase, unit, which component of (dx, dy, dz, yaw, pitch), the paper's (dx, dy, dz, dθ, dφ), sign)
TABLE = {
    "move left": ("move {} meters to the left", "meters", 0, -1.0),
    "move right": ("move {} meters to the right", "meters", 0, +1.0),
    "move up": ("move {} meters up", "meters", 1, -1.0),
    "move down": ("move {} meters down", "meters", 1, +1.0),
    "move forward": ("move {} meters forward", "meters", 2, +1.0),
    "move backward": ("move {} meters backward", "meters", 2, -1.0),
    "turn left": ("turn left {} degrees", "degrees", 3, -1.0),
    "turn right": ("turn right {} degrees", "degrees", 3, +1.0),
    "look up": ("look up {} degrees", "degrees", 4, +1.0),
    "look down": ("look down {} degrees", "degrees", 4, -1.0),
}
KINDS = tuple(TABLE)
DEGREES_PER_METER = 30.0  # components are compared at 1 m = 30 degrees, as the paper asks the cameras of a context to
# differ by 1 m and by 30 degrees


@dataclass(frozen=True)
class Motion:
    """One camera motion: a kind of `KINDS` and an amount > 0 in its unit (metres or degrees)."""

    kind: str
    amount: float

    def __post_init__(self):
        if self.kind not in TABLE:
            raise ValueError(f"unknown motion {self.kind!r}; the motions are: {', '.join(KINDS)}")
        if not (0 < self.amount < float("inf")):
            raise ValueError(
                f"the amount of '{self.kind}' must be a positive number, not {self.amount}"
            )

    @property
    def unit(self):
        return TABLE[self.kind][1]


class Query(NamedTuple):
    """One order to a simulator. A simulator is anything with `imagine(list of Query) -> list of (H, W, 3) uint8`."""

    images: list  # (H, W, 3) uint8 each: all images so far, imagined ones included
    reference: int  # 1-based number of the image the motion starts from
    instruction: str  # `instruction(motion, reference)`
    seed: int  # of the simulator's noise
    scene: dict | None = None  # rooms only: {"room": seed, "poses": one 4x4 list per image}


def select_context(images, reference, max_context):
    """Which images the simulator sees when there are many: the reference and its nearest neighbours in the list.

    returns (indices, reference): 0-based indices in list order (of two equally near the earlier), and the 1-based
    number of the reference among them. Raises ValueError if there is no such image.
    """
    if not 1 <= reference <= len(images):
        raise ValueError(
            f"there is no Image-{reference}: the images are numbered 1 to {len(images)}"
        )
    nearest = sorted(range(len(images)), key=lambda i: (abs(i + 1 - reference), i))[:max_context]
    return sorted(nearest), 1 + sorted(nearest).index(reference - 1)


# ---- words ----------------------------------------------------------------------------------------------------


def phrase(motion):
    """Motion -> words: "move 1.5 meters to the left", "turn left 30 degrees". `read_phrase` is its exact inverse."""
    return TABLE[motion.kind][0].format(repr(float(motion.amount)).removesuffix(".0"))


_NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
_PATTERNS = {kind: re.compile(row[0].format(_NUMBER)) for kind, row in TABLE.items()}


def read_phrase(text):
    """Words -> Motion. Raises ValueError with the list of phrases if `text` is none of them."""
    for kind, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(text.strip().removesuffix(".")):
            return Motion(kind, float(match[1]))
    known = "; ".join(row[0].format("<number>") for row in TABLE.values())
    raise ValueError(f"cannot read the motion {text!r}; write one of: {known}")


def instruction(motion, reference):
    """The sentence that conditions the simulator (the paper's overview figure)."""
    return f"Base on the viewpoint of Image-{reference}, {phrase(motion)}."


def renumbered(sentence, reference):
    """An `instruction` whose reference has another number among the images that are shown."""
    return re.sub(r"Image-\d+", f"Image-{reference}", sentence, count=1)


def read_instruction(text):
    """The inverse of `instruction`: sentence -> (reference, Motion)."""
    match = re.fullmatch(r"Base on the viewpoint of Image-(\d+), (.*)\.", text.strip())
    if not match:
        raise ValueError(
            f"cannot read the instruction {text!r}; it reads 'Base on the viewpoint of Image-2, …'"
        )
    return int(match[1]), read_phrase(match[2])


# ---- poses ----------------------------------------------------------------------------------------------------


def rotation(yaw=0.0, pitch=0.0):
    """Camera rotation (3, 3): yaw > 0 turns right, then pitch > 0 looks up; degrees."""
    a, b = np.radians(yaw), np.radians(pitch)
    turn = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    look = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return turn @ look


def pose(x, y, z, yaw=0.0, pitch=0.0):
    """c2w (4, 4) of a camera at (x, y, z) metres with yaw and pitch in degrees."""
    c2w = np.eye(4)
    c2w[:3, :3], c2w[:3, 3] = rotation(yaw, pitch), (x, y, z)
    return c2w


def matrix(c2w):
    """A pose as nested lists, for JSON."""
    return np.round(c2w, 6).tolist()


def move_camera(c2w, motion):
    """The pose after `motion`, told in the axes of the camera itself."""
    _, _, component, sign = TABLE[motion.kind]
    delta = np.zeros(5)
    delta[component] = sign * motion.amount
    return c2w @ pose(*delta)


def decompose(source, target):
    """The relative pose as (..., 6) dx, dy, dz, yaw, pitch, roll: metres and degrees in the source camera's axes.

    source, target   (..., 4, 4); their leading shapes broadcast
    """
    relative = np.linalg.inv(source) @ target
    right, forward = relative[..., :3, 0], relative[..., :3, 2]
    yaw = np.arctan2(forward[..., 0], forward[..., 2])
    yaw = np.where(
        yaw > np.pi - 1e-8, yaw - 2 * np.pi, yaw
    )  # half a turn is told as one to the left
    pitch = np.arctan2(-forward[..., 1], np.hypot(forward[..., 0], forward[..., 2]))
    # what is left of the rotation is roll: `right` along the first two columns of rotation(yaw, pitch)
    level = right[..., 0] * np.cos(yaw) - right[..., 2] * np.sin(yaw)
    ahead = right[..., 0] * np.sin(yaw) + right[..., 2] * np.cos(yaw)
    roll = np.arctan2(ahead * np.sin(pitch) + right[..., 1] * np.cos(pitch), level)
    angles = np.degrees(np.stack([yaw, pitch, roll], -1))
    return np.concatenate([relative[..., :3, 3], angles], -1)


def dominant_component(delta, slack=0.15, share=0.20):
    """Which one component tells a relative pose `delta` (..., 6) of `decompose` -> index (...), -1 where none does.

    Components are compared at 1 m = 30 degrees. None does if another one (roll counts) exceeds
    max(slack, share * dominant), since the words would not be true (ours: the paper takes the dominant one).
    """
    size = np.abs(delta) / np.array([1, 1, 1, *[DEGREES_PER_METER] * 3])
    main = size[..., :5].argmax(-1)
    largest = np.take_along_axis(size, main[..., None], -1)
    others = np.where(np.arange(6) == main[..., None], 0, size).max(-1)
    return np.where(others > np.maximum(slack, share * largest[..., 0]), -1, main)


def motion_of(delta, main):
    """The Motion of component `main` of one relative pose (6,), rounded to 0.1 m or 5 degrees; None if that is zero."""
    step = 0.1 if main < 3 else 5.0
    amount = round(round(abs(delta[main]) / step) * step, 1)
    kinds = [
        kind for kind, row in TABLE.items() if row[2] == main and row[3] == np.sign(delta[main])
    ]
    return Motion(kinds[0], amount) if amount > 0 else None


def dominant_motion(source, target):
    """The one motion that tells how the camera went from `source` to `target`, or None if no single one does."""
    delta = decompose(source, target)
    main = int(dominant_component(delta))
    return None if main < 0 else motion_of(delta, main)


# ---- pixels and points ----------------------------------------------------------------------------------------


def pinhole(size):
    """Intrinsics (3, 3) of a square image of `size` pixels with a field of view of 90 degrees."""
    focal = 0.5 * size / np.tan(np.radians(45))
    return np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1.0]])


def unproject(depth, intrinsics, c2w):
    """Depth along z (H, W) in metres -> world points (H, W, 3)."""
    rows, columns = np.mgrid[: depth.shape[0], : depth.shape[1]] + 0.5
    x = (columns - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (rows - intrinsics[1, 2]) / intrinsics[1, 1]
    return (np.stack([x, y, np.ones_like(x)], -1) * depth[..., None]) @ c2w[:3, :3].T + c2w[:3, 3]


def project(points, intrinsics, c2w):
    """World points (..., 3) -> (column, row) in pixels (..., 2) and depth along z (...)."""
    camera = (points - c2w[:3, 3]) @ c2w[:3, :3]
    z = camera[..., 2]
    safe = np.where(np.abs(z) < 1e-9, 1e-9, z)[..., None]
    return camera[..., :2] / safe * intrinsics[[0, 1], [0, 1]] + intrinsics[:2, 2], z


def visible(points, depth, intrinsics, c2w, tolerance=0.05):
    """Does a view see these points? It does if a point falls inside the image, in front of the camera, and one of the
    four pixels around it has its depth, within `tolerance` (metres, and the same share of the depth).

    points (..., 3) world;  depth (h, w) metres, 0 = invalid;  intrinsics (3, 3);  c2w (4, 4)
    returns error (...): how far the depth is off, inf where unseen; and the row and column (...) of that pixel.
    """
    (height, width), (pixel, z) = depth.shape, project(points, intrinsics, c2w)
    inside = (z > 1e-6) & (pixel >= 0).all(-1) & (pixel[..., 0] < width) & (pixel[..., 1] < height)
    best, rows, columns = np.full(z.shape, np.inf), np.zeros(z.shape, int), np.zeros(z.shape, int)
    pixel, z = pixel[inside], z[inside]
    error, where = np.full(z.shape, np.inf), np.zeros((2, *z.shape), int)
    for corner in ((-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)):
        column = np.clip(np.floor(pixel[..., 0] + corner[0]), 0, width - 1).astype(int)
        row = np.clip(np.floor(pixel[..., 1] + corner[1]), 0, height - 1).astype(int)
        there = depth[row, column]
        off = np.where(there > 0, np.abs(there - z) / (1 + z), np.inf)  # metres near, a share far
        better = off < np.minimum(error, tolerance)
        error, where = np.where(better, off, error), np.where(better, (row, column), where)
    best[inside], rows[inside], columns[inside] = error, *where
    return best, rows, columns


def warp(target_depth, target_c2w, context, intrinsics, tolerance=0.05):
    """What the context views know of the target view: the inverse warp by the target's depth.

    target_depth (H, W) metres, 0 = invalid;  context: list of (rgb uint8 (h, w, 3), depth (h, w), c2w), or with its
    own intrinsics behind them where they are not the target's. The view whose depth agrees best gives the colour
    (see `visible`).
    returns rgb (H, W, 3) uint8, black where unseen, and seen (H, W) bool.
    """
    points = unproject(target_depth, intrinsics, target_c2w)
    best = np.full(target_depth.shape, np.inf)
    colour = np.zeros((*target_depth.shape, 3), np.uint8)
    for rgb, depth, c2w, *own in context:
        error, row, column = visible(points, depth, own[0] if own else intrinsics, c2w, tolerance)
        better = error < best
        best, colour = (
            np.where(better, error, best),
            np.where(better[..., None], rgb[row, column], colour),
        )
    seen = np.isfinite(best) & (target_depth > 0)
    return np.where(seen[..., None], colour, 0).astype(np.uint8), seen


def coverage(target_depth, seen):
    """Share of the valid target pixels that some context view sees (paper: accepted if >= 0.85)."""
    valid = target_depth > 0
    return float(seen[valid].mean()) if valid.any() else 0.0


def fill_holes(view, seen):
    """Let pixels that nobody saw take the colour of the nearest one that was (in steps up, down, left, right)."""
    view, seen = view.copy(), seen.copy()
    while seen.any() and not seen.all():
        before, known = view.copy(), seen.copy()
        for axis, step in ((1, 1), (1, -1), (0, 1), (0, -1)):
            there = np.roll(known, step, axis)
            there[(slice(None),) * axis + (0 if step == 1 else -1,)] = (
                False  # np.roll wraps round: undo
            )
            take = there & ~seen
            view[take], seen[take] = np.roll(before, step, axis)[take], True
    return view
