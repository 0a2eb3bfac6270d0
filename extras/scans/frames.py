"""
What a scan is: frames, each a posed picture with depth, in one contract for every dataset and for rooms.

  pose      c2w (4, 4) maps camera to world; OpenCV axes (x right, y down, z forward), metres
  world     y points down, along gravity, as in rooms: `collect` turns the world of the dataset
  pixels    centres at +0.5 (lib/geometry.py), so that a picture's scale multiplies its whole K
  depth     along the optical axis, float32 metres, 0 = invalid; always on the pixels of the image

A reader (extras/scans/readers.py) lists a `FrameFiles` for every frame, or a sentence that says why there is none.
`frames_of` turns rows into Frames, `collect` turns Frames into a Scene. A frame that cannot be used (no depth, lost
tracking, a name that comes twice) is skipped and counted with the reason; a scene without frames is refused. A picture
is decoded when it is asked for, and refused then if it is truncated.
"""

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from PIL import Image

from extras.scans.depth_files import read_depth, size_in_header
from lib.images import PictureError, read

Size = tuple[int, int]  # (width, height)
Z_UP = (0, 0, 1)  # of most datasets' worlds
SAMPLE = 25  # pictures whose headers tell the size of all
CENTRED = 0.15  # of the sides: an optical axis further from the middle is another picture's
PULL = 0.01  # of the mean up, against the x axes


class PosedView(NamedTuple):
    """A frame in memory, at one size; what `lib.geometry.warp` takes as a context view."""

    rgb: ndarray  # (H, W, 3) uint8
    depth: ndarray  # (H, W) metres, 0 = invalid
    c2w: ndarray  # (4, 4)
    intrinsics: ndarray  # (3, 3)


class Camera(NamedTuple):
    """What a frame knows of space, at one size; what `lib.geometry.unproject` and `visible` take."""

    depth: ndarray  # (H, W) metres, 0 = invalid
    K: ndarray  # (3, 3)
    c2w: ndarray  # (4, 4)


@dataclass(frozen=True, eq=False)
class Frame:
    """One posed RGB-D picture, loaded when asked for.

    `image` and `depth` raise ValueError, a sentence, where a file is broken or has not the size of its scene.
    """

    name: str  # unique within the scene; names sort in capture order
    c2w: ndarray  # (4, 4) float64
    intrinsics: ndarray  # (3, 3) of the image
    size: Size  # of the image
    load: Callable[[], ndarray]  # (H, W, 3) uint8
    depth_intrinsics: ndarray  # (3, 3) of the depth camera, which may be another than the image's
    depth_size: Size
    load_depth: Callable[[], ndarray]  # (H', W') float32 metres

    def K(self, size: Size | None = None) -> ndarray:
        """Intrinsics (3, 3) of the image at `size`; the default is its own."""
        return scaled(self.intrinsics, self.size, size or self.size)

    def image(self, size: Size | None = None) -> ndarray:
        """(h, w, 3) uint8, antialiased where it shrinks."""
        pixels = self.checked("image", self.load(), self.size)
        if size in (None, self.size):
            return pixels
        return np.array(Image.fromarray(pixels).resize(size, Image.LANCZOS))

    def depth(self, size: Size | None = None) -> ndarray:
        """(h, w) float32 metres on the pixels of `image(size)`, 0 = invalid or outside the depth camera.

        Nearest neighbour on the ray of each pixel's centre: the mean of two depths would hang in mid-air.
        """
        metres = self.checked("depth", self.load_depth(), self.depth_size)
        K = self.K(size)
        depth_K = self.depth_intrinsics
        indices, inside = [], []
        for axis, length in enumerate(size or self.size):  # columns, then rows
            ray = (np.arange(length) + 0.5 - K[axis, 2]) / K[axis, axis]
            pixel = ray * depth_K[axis, axis] + depth_K[axis, 2]
            # rounded: a ray between two pixels goes to the right or lower one, whatever the last digits of K are
            index = np.floor(np.round(pixel, 6)).astype(int)
            last = self.depth_size[axis] - 1
            indices.append(index.clip(0, last))
            inside.append((index >= 0) & (index <= last))
        nearest = metres[np.ix_(indices[1], indices[0])]
        return np.where(inside[1][:, None] & inside[0], nearest, np.float32(0))

    def camera(self, size: Size | None = None) -> Camera:
        """Depth, intrinsics and pose at `size`."""
        return Camera(self.depth(size), self.K(size), self.c2w)

    def view(self, size: Size) -> PosedView:
        """Picture, depth, pose and intrinsics at `size`."""
        return PosedView(self.image(size), self.depth(size), self.c2w, self.K(size))

    def checked(self, what, pixels, size):
        """The pixels; ValueError if they have not the size of their scene."""
        height, width = pixels.shape[:2]
        if (width, height) != tuple(size):
            raise ValueError(
                f"Frame {self.name}: the {what} has {width} x {height} pixels and should have "
                f"{size[0]} x {size[1]}; fetch or extract it again."
            )
        return pixels


class Scene(NamedTuple):
    """The frames of one place, in capture order."""

    dataset: str
    id: str
    frames: list[Frame]
    gravity: str  # how its direction is known
    metric: bool  # lengths are metres; if not, no motion may be told in metres
    skipped: dict[str, int]  # reason -> number of frames left out
    note: str  # where depth and scale come from, if they were not measured; else ""


class FrameFiles(NamedTuple):
    """What a reader knows of a frame before any picture is opened."""

    name: str
    image: Path | None  # None: the path leaves the scene
    depth: Path | None
    c2w: ndarray  # (4, 4)
    K: ndarray  # (3, 3)


# ---- numbers and files ---------------------------------------------------------------------------------------------------


def scaled(K: ndarray, size: Size, to: Size) -> ndarray:
    """K of a picture that goes from `size` to `to`."""
    return np.diag([to[0] / size[0], to[1] / size[1], 1]) @ K


def array_of(values, shape: tuple) -> ndarray:
    """Numbers, or words of a text file, as float64 of `shape`; all NaN, which is a fault, if they are not that."""
    try:
        return np.array(values, np.float64).reshape(shape)
    except (TypeError, ValueError):
        return np.full(shape, np.nan)


def pose_of_quaternion(quaternion, place) -> ndarray:
    """c2w (4, 4) of a unit quaternion (x, y, z, w) and a place (3,), as phones write them."""
    x, y, z, w = quaternion
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    c2w = np.eye(4)
    c2w[:3, :3] += 2 * (w * cross + cross @ cross)
    c2w[:3, 3] = place
    return c2w


def evenly(items: list, count: int) -> list:
    """At most `count` of some items, in their order, evenly spread from the first to the last."""
    chosen = np.unique(np.linspace(0, len(items) - 1, count).astype(int))
    return [items[k] for k in chosen]


def size_of(paths):
    """(width, height) of most pictures or .npy arrays, of some that are evenly spread."""
    sizes = Counter()
    for path in evenly(paths, SAMPLE):
        with contextlib.suppress(PictureError):
            sizes[size_in_header(path)] += 1
    if not sizes:
        raise ValueError("no picture can be opened")
    return sizes.most_common(1)[0][0]


def thousandths(depth: ndarray) -> ndarray:
    """(H, W) depth as a uint16 picture; what does not fit is 0, unknown."""
    units = np.round(1000 * np.nan_to_num(depth, posinf=0, neginf=0))
    return np.where((units > 0) & (units <= 65535), units, 0).astype(np.uint16)


# ---- rows to frames to a scene -------------------------------------------------------------------------------------------


def frames_of(
    rows: list[FrameFiles | str],
    at: Size | None = None,
    depth_K: ndarray | None = None,
    load: Callable = read,
    load_depth: Callable = read_depth,
) -> list[Frame | str]:
    """Frames and, in the place of those that cannot be used, reasons.

    at        the size that the rows' K belongs to; default the images' own, which is that of most of them
    depth_K   (3, 3) of the depth camera; default: it is the image's, and depth has K scaled to its size
    """
    rows = [row if isinstance(row, str) else fault_of_files(row) or row for row in rows]
    usable = [row for row in rows if isinstance(row, FrameFiles)]
    if not usable:
        return rows
    size = size_of([row.image for row in usable])
    depth_size = size_of([row.depth for row in usable])
    if depth_K is None and abs(size[0] * depth_size[1] / (size[1] * depth_size[0]) - 1) > 0.02:
        raise ValueError("depth of another shape than the image")
    frames = []
    for row in rows:
        if isinstance(row, FrameFiles):
            same_K = scaled(row.K, at or size, depth_size)
            row = Frame(
                name=row.name,
                c2w=row.c2w,
                intrinsics=scaled(row.K, at or size, size),
                size=size,
                load=partial(load, row.image),
                depth_intrinsics=same_K if depth_K is None else depth_K,
                depth_size=depth_size,
                load_depth=partial(load_depth, row.depth),
            )
        frames.append(row)
    return frames


def collect(frames: list[Frame | str], up=Z_UP, metric: bool = True, note: str = "") -> Scene:
    """Frames and reasons -> Scene (its name comes later): frames in the order of their names, faults counted.

    up   (3,) of the frames' world, which is turned so that y points down; None: `up_of` them
    """
    by_name, skipped = {}, Counter()
    for frame in frames:
        reason = frame if isinstance(frame, str) else fault_of_camera(frame)
        if reason:
            skipped[reason] += 1
        elif frame.name in by_name:
            skipped["name given twice"] += 1
        else:
            by_name[frame.name] = frame
    if not by_name:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in skipped.items())
        raise ValueError(f"it has no usable frame ({reasons or 'it names none'}).")
    frames = [by_name[name] for name in sorted(by_name)]
    gravity = "z up, as the dataset has it" if up is Z_UP else "up as scene.json gives it"
    if up is None:
        gravity = "the mean up of the cameras, levelled by their x axes"
        up = up_of(frames)
    turn = y_down(array_of(up, (3,)))
    frames = upright([replace(frame, c2w=turn @ frame.c2w) for frame in frames])
    return Scene("", "", frames, gravity, metric, dict(skipped), note)


def upright(frames: list[Frame]) -> list[Frame]:
    """The frames of a camera that was held sideways or upside down, turned so that most are upright; all alike, or their
    sizes would mix. Their world's y points down."""
    # where each camera has the sky; the rows: after 0, 1, 2 or 3 quarter turns clockwise it is above
    skies = np.array([-frame.c2w[1, :3] for frame in frames])
    above_after = np.array([[0, -1, 0], [-1, 0, 0], [0, 1, 0], [1, 0, 0]])
    turns = np.bincount((skies @ above_after.T).argmax(1)).argmax()
    for _ in range(turns):
        frames = [quarter_turn(frame) for frame in frames]
    return frames


def quarter_turn(frame):
    """The frame after a quarter turn clockwise of its image, depth, K and camera; the camera's place stays."""
    old_axes = np.array([[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])  # x is -y
    return replace(
        frame,
        c2w=frame.c2w @ old_axes,
        intrinsics=quarter_turn_of_K(frame.intrinsics, frame.size),
        size=frame.size[::-1],
        load=partial(read_turned, frame.load),
        depth_intrinsics=quarter_turn_of_K(frame.depth_intrinsics, frame.depth_size),
        depth_size=frame.depth_size[::-1],
        load_depth=partial(read_turned, frame.load_depth),
    )


def quarter_turn_of_K(K, size):
    """Intrinsics of a picture of `size` after a quarter turn clockwise."""
    return np.array([[K[1, 1], 0, size[1] - K[1, 2]], [0, K[0, 0], K[0, 2]], [0, 0, 1]])


def read_turned(load):
    """What `load` returns, after a quarter turn clockwise."""
    return np.rot90(load(), -1).copy()


def up_of(frames: list[Frame]) -> ndarray:
    """The up (3,) of a world that nobody named: what is most square to the cameras' x axes, and near their mean up.

    The mean alone is 13 degrees off where cameras look down by 20 along half a circle; the x axes of cameras that
    do not roll lie level however they look. Cameras that all head one way do not fix it: there the mean decides.
    """
    rotations = np.stack([frame.c2w[:3, :3] for frame in frames])
    right = rotations[:, :, 0]  # (n, 3)
    mean = -rotations[:, :, 1].mean(0)
    mean /= max(np.linalg.norm(mean), 1e-9)
    tilt = right.T @ right / len(right) + PULL * (np.eye(3) - np.outer(mean, mean))
    up = np.linalg.eigh(tilt)[1][:, 0]  # of the smallest eigenvalue
    return up * np.sign(up @ mean)


def y_down(up: ndarray) -> ndarray:
    """The rotation (4, 4) that takes a world's `up` (3,) to -y; the identity where it is that. ValueError for zeros."""
    length = np.linalg.norm(up)
    if not length > 1e-6:
        raise ValueError("its 'up' is no direction: three numbers, not all zero.")
    up = up / length
    right = np.eye(3)[np.abs(up).argmin()]  # the axis that is most level
    right = right - right @ up * up
    right /= np.linalg.norm(right)
    turn = np.eye(4)
    turn[:3, :3] = right, -up, np.cross(right, -up)
    return turn


def fault_of_camera(frame):
    """What is wrong with a frame's pose or intrinsics, or ""."""
    if not np.isfinite(frame.c2w).all():
        return "pose not finite"
    rotation = frame.c2w[:3, :3]
    skew = np.abs(rotation.T @ rotation - np.eye(3)).max()
    last_row = np.abs(frame.c2w[3] - [0, 0, 0, 1]).max()
    if max(skew, last_row) > 1e-3 or np.linalg.det(rotation) < 0:
        return "pose not rigid"
    focal = np.diag(frame.intrinsics)[:2]
    if not np.isfinite(frame.intrinsics).all() or not (focal > 0).all():
        return "bad intrinsics"
    off = np.abs(frame.intrinsics[:2, 2] / frame.size - 0.5).max()
    return "intrinsics of a picture of another shape" if off > CENTRED else ""


def fault_of_files(files):
    """Why a frame's files cannot be used, or ""."""
    if files.image is None or files.depth is None:
        return "path leaves the scene"
    if not files.image.is_file():
        return "no image"
    return "" if files.depth.is_file() else "no depth"
