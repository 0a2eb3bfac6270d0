"""
A room of lib/rooms.py told as a scan: what the tests of the readers start from, and an example to run

  python -m tests.extras.room_scan --out scans      a hand-held Kinect's scan of a room, in the layout `folder`
  python data.py triples --dataset folder --root scans --out out/scans --apart 0.5 20
"""

import argparse
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


# ---- a hand-held Kinect ----------------------------------------------------------------------------------------------

SIDE, WIDTH, HEIGHT, FOCAL = 160, 120, 92, 80.0  # cut out of rendered pictures of SIDE x SIDE
BASELINE = 0.075  # metres from the infrared projector to its camera: what only one of them sees has no depth
STEP = 0.0028  # 1 / metres, of disparity
FAR = 4.0  # metres: no depth beyond


def write_kinect(folder: Path, seed: int, frames: int = 80, registered: bool = True) -> None:
    """A walk through a room as a Kinect gives it: pitch and roll wander, pictures are smeared along the way and noisy, depth
    is quantised, ragged at edges and has holes, poses are off by 0.2 degrees and 5 mm.

    registered   False: depth is the depth camera's, 2.5 cm to the left, of a focal length 11 % longer; nothing says so
    """
    rng = numpy_stream("walk through a room", seed)
    room, rows = random_room(seed), []
    phases = rng.uniform(0, 2 * np.pi, 5)
    focal = FOCAL if registered else FOCAL * 585 / 525
    beside = camera_pose(0 if registered else -0.025, 0, 0)
    for i in range(frames):
        place = hand_held(phases, i / frames)
        smear = range(-3, 4) if i % 10 == 5 else range(2)  # pixels, while the shutter is open
        sharp = cut(render(room, place, SIDE, supersample=1)["rgb"][0], FOCAL)
        rgb = np.mean([np.roll(sharp, pixels, 1) for pixels in smear], 0)
        rgb = np.clip(rgb + rng.normal(0, 3, rgb.shape), 0, 255).round().astype(np.uint8)
        depth = render(room, place @ beside, SIDE, supersample=1)["depth"][0]
        units = kinect_depth(cut(depth, focal), focal, rng)
        c2w = place @ camera_pose(*rng.normal(0, 0.005, 3), *rng.normal(0, 0.2, 2))
        rows.append({"image": f"rgb/{i}.jpg", "depth": f"depth/{i}.png", "c2w": c2w.tolist()})
        save_image(folder / rows[-1]["image"], rgb)
        save_image(folder / rows[-1]["depth"], units)
    K = [[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]]
    write_json(folder / "scene.json", {"frames": rows, "intrinsics": K, "up": Y_DOWN})


def hand_held(phases, t):
    """c2w (4, 4) at a time from 0 to 1 of a walk on a figure of eight; the camera looks down a little, pitches and rolls."""
    a, b, c, d, start = phases
    turn = 2 * np.pi * t
    yaw = np.degrees(start + turn) + 30 * np.sin(3 * turn + b)
    pitch = -12 + 4 * np.sin(5 * turn + c)
    roll = np.radians(3 * np.sin(4 * turn + d))
    place = 0.8 * np.sin(turn + a), -EYE + 0.05 * np.sin(7 * turn), 0.8 * np.sin(2 * turn + b)
    about_z = np.eye(4)
    about_z[:2, :2] = [[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]]
    return camera_pose(*place, yaw, pitch) @ about_z


def cut(picture, focal):
    """The middle of a rendered picture as a camera of WIDTH x HEIGHT and this focal length sees it; nearest pixels."""
    rows = SIDE / 2 + (np.arange(HEIGHT) + 0.5 - HEIGHT / 2) * SIDE / 2 / focal
    columns = SIDE / 2 + (np.arange(WIDTH) + 0.5 - WIDTH / 2) * SIDE / 2 / focal
    return picture[np.ix_(rows.astype(int), columns.astype(int))]


def kinect_depth(depth, focal, rng):
    """Depth (H, W) metres as the sensor's 16-bit millimetres, 0 = unknown."""
    rows, columns = np.indices(depth.shape)
    rows = np.clip(rows + rng.integers(-1, 2, depth.shape), 0, HEIGHT - 1)  # edges are ragged
    columns = np.clip(columns + rng.integers(-1, 2, depth.shape), 0, WIDTH - 1)
    inverse = 1 / depth[rows, columns]
    hidden = rng.random(depth.shape) < 0.01
    for pixels in range(1, 10):
        hidden |= focal * BASELINE * (np.roll(inverse, pixels, 1) - inverse) > pixels
    inverse = STEP * np.round((inverse + rng.normal(0, STEP / 2, depth.shape)) / STEP)
    metres = 1 / inverse
    return np.where(hidden | (metres > FAR), 0, 1000 * metres).round().astype(np.uint16)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="scans", help="folder of the scan's folder")
    parser.add_argument("--seed", type=int, default=0, help="of the room and the walk")
    args = parser.parse_args()
    write_kinect(Path(args.out) / f"room_{args.seed}", args.seed)
