"""A room of lib/rooms.py told as a scan: what the tests of the readers start from."""

from functools import partial
from pathlib import Path

import numpy as np

from extras.scans.frames import Frame, Scene, collect
from lib.geometry import camera_pose, pinhole
from lib.images import save_image
from lib.records import write_json
from lib.rooms import EYE, random_room, render
from lib.streams import numpy_stream

Y_DOWN = (0, -1, 0)  # up in a room


def room_scene(seed: int, frames: int = 40, size: int = 64, pitch: float = 0.0) -> Scene:
    """A walk through a room, on a figure of eight in its middle, as a reader would give it; pitch > 0 looks up."""
    rng = numpy_stream("walk through a room", seed)
    room = random_room(seed)
    a, b, start = rng.uniform(0, 2 * np.pi, 3)
    t = np.linspace(0, 1, frames, endpoint=False)
    x = 0.8 * np.sin(2 * np.pi * t + a)
    z = 0.8 * np.sin(4 * np.pi * t + b)
    yaw = np.degrees(start) + 360 * t + 30 * np.sin(6 * np.pi * t + b)
    K, square, walk = pinhole(size), (size, size), []
    for i in range(frames):
        c2w = camera_pose(x[i], -EYE, z[i], yaw[i], pitch)
        load = partial(read_room, room, c2w, size, "rgb")
        load_depth = partial(read_room, room, c2w, size, "depth")
        walk.append(Frame(f"{i:06d}", c2w, K, square, load, K, square, load_depth))
    return collect(walk, up=Y_DOWN)._replace(dataset="rooms", id=f"room_{seed}")


def read_room(room, c2w: np.ndarray, size: int, kind: str) -> np.ndarray:
    """One view of a room: "rgb" (H, W, 3) uint8, or "depth" (H, W) float32 metres."""
    return render(room, c2w, size, supersample=2 if kind == "rgb" else 1)[kind][0]


def write_scan_folder(
    folder: Path, frames: list[Frame], up=Y_DOWN, pictures: str = ".jpg", per_metre: float = 1000
) -> None:
    """Frames as a plain folder (extras/scans/readers.py): rgb/<i>, depth/<i>.png and scene.json.

    up          (3,) of the frames' world, None: not said;  pictures   ".jpg", as scans have them, or ".png", which loses nothing
    per_metre   units of the 16-bit depth
    """
    rows = []
    for i, frame in enumerate(frames):
        row = {"image": f"rgb/{i}{pictures}", "depth": f"depth/{i}.png", "c2w": frame.c2w.tolist()}
        save_image(folder / row["image"], frame.image())
        save_image(folder / row["depth"], (per_metre * frame.depth()).round().astype(np.uint16))
        rows.append(row)
    info = {
        "frames": rows,
        "intrinsics": frames[0].intrinsics.tolist(),
        "depth_scale": per_metre,
    }
    if up is not None:
        info["up"] = list(up)
    write_json(folder / "scene.json", info)
