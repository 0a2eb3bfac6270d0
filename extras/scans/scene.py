"""
Scenes from disk: five scan datasets, a plain folder and the embedded rooms, all in one Frame contract.

  pose      c2w (4, 4) maps camera to world; OpenCV axes (x right, y down, z forward), metres
  pixels    centres at +0.5 (lib/geometry.py), so that a picture's scale multiplies its whole K. ScanNet, ScanNet++
            (iphone), Matterport3D and ARKitScenes count centres in whole numbers: HALF is added to their K
  depth     along the optical axis, float32 metres, 0 = invalid; always on the pixels of the image

Nothing is downloaded: --root is a folder that its user filled, after signing the dataset's terms. Below it

  scannet         scans/<id>/{color,depth,pose,intrinsic}/ as the official exporter writes them, or <id>.sens itself
  scannetpp       data/<id>/iphone/{pose_intrinsic_imu.json, rgb/, depth/}; the toolkit extracts the last two
  scannetpp_dslr  data/<id>/dslr/: undistorted pictures, and the depth rendered for them
  matterport      v1/scans/<house>/undistorted_{camera_parameters,color_images,depth_images}/
  arkitscenes     3dod/{Training,Validation}/<id>/<id>_frames/, or raw/{Training,Validation}/<id>/
  dl3dv           <batch>/<hash>/{transforms.json, images_4/}, and depth that is not in the dataset: see `dl3dv`
  folder          <id>/scene.json: your own scans, see `plain_folder`

A frame that cannot be used (no depth, lost tracking, a name given twice) is skipped and counted with the reason; a
scene without frames is refused. A picture is decoded when it is asked for, and refused then if it is truncated.
"""

import io
import json
import struct
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image

from lib.geometry import camera_pose, pinhole
from lib.rooms import EYE, random_room, render
from lib.streams import numpy_stream

HALF = np.array(
    [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]
)  # + K: pixel centres from whole numbers to +0.5
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # on the right of a c2w: y up, z back -> y down, z forward


@dataclass(frozen=True, eq=False)
class Frame:
    """One posed RGB-D picture, loaded when asked for. A `size` is (width, height); the default is the image's own.

    `image` and `depth` raise ValueError, a sentence, where a file is broken or has not the size of its scene.
    """

    name: str  # unique within the scene; names sort in capture order
    c2w: np.ndarray  # (4, 4) float64
    intrinsics: np.ndarray  # (3, 3) of the image
    size: tuple  # of the image
    load: Callable  # () -> (H, W, 3) uint8
    depth_intrinsics: (
        np.ndarray
    )  # (3, 3) of the depth camera, which may be another than the image's
    depth_size: tuple
    load_depth: Callable  # () -> (H', W') float32 metres

    def K(self, size=None):
        """Intrinsics (3, 3) of the image at `size`."""
        return scaled(self.intrinsics, self.size, size or self.size)

    def image(self, size=None):
        """(h, w, 3) uint8, antialiased where it shrinks."""
        pixels = self._sized("image", self.load(), self.size)
        return (
            pixels
            if size in (None, self.size)
            else np.array(Image.fromarray(pixels).resize(size, Image.LANCZOS))
        )

    def depth(self, size=None):
        """(h, w) float32 metres on the pixels of `image(size)`, 0 = invalid or outside the depth camera.

        Nearest neighbour on the ray of each pixel's centre: the mean of two depths would hang in mid-air.
        """
        measured = self._sized("depth", self.load_depth(), self.depth_size)
        K, D, (height, width) = self.K(size), self.depth_intrinsics, measured.shape
        column, row = (np.arange(n) + 0.5 for n in size or self.size)
        column = (column - K[0, 2]) / K[0, 0] * D[0, 0] + D[0, 2]
        row = (row - K[1, 2]) / K[1, 1] * D[1, 1] + D[1, 2]
        # rounded: a ray between two pixels goes to the right or lower one, whatever the last digits of K are
        column, row = (np.floor(np.round(x, 6)).astype(int) for x in (column, row))
        inside = ((row >= 0) & (row < height))[:, None] & ((column >= 0) & (column < width))
        return np.where(
            inside,
            measured[np.ix_(row.clip(0, height - 1), column.clip(0, width - 1))],
            np.float32(0),
        )

    def _sized(self, what, pixels, size):
        if pixels.shape[1::-1] != tuple(size):
            raise ValueError(
                "Frame {}: the {} has {} x {} pixels and should have {} x {}; fetch or extract it again.".format(
                    self.name, what, *pixels.shape[1::-1], *size
                )
            )
        return pixels


class Scene(NamedTuple):
    """The frames of one place, in capture order."""

    dataset: str
    id: str
    frames: list
    up: np.ndarray  # (3,) unit vector of the world
    metric: bool  # lengths are metres; if not, no motion may be told in metres
    skipped: dict  # reason -> number of frames left out
    note: str  # where depth and scale come from, if they were not measured; else ""


def scene_ids(dataset, root):
    """Sorted ids of the scenes below `root`. Raises ValueError, with the layout it looked for, if there is none."""
    return sorted({folder.name for folder in scene_folders(dataset, root)})


def read_scene(dataset, root, id):
    """One Scene; poses and sizes are read, pictures are not. Raises ValueError if it is missing, broken or empty."""
    folder = scene_folders(dataset, root, id)[0]
    try:
        return READERS[dataset][0](folder)._replace(dataset=dataset, id=id)
    except (ValueError, LookupError, TypeError, AttributeError, OSError, struct.error) as error:
        what = f"a file has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"The {dataset} scene {folder} cannot be used: {what}") from error


def scene_folders(dataset, root, id="*"):
    """Folders of all scenes, or of one (ARKitScenes: two copies that differ; the first counts, 3dod before raw)."""
    if dataset not in READERS:
        raise ValueError(f"There is no reader for {dataset!r}; there are: {', '.join(READERS)}.")
    if id != "*" and (Path(id).name != id or set(id) & set("*?[")):
        raise ValueError(f"{id!r} is not the id of a scene: that is the name of its folder.")
    _, places, marks = READERS[dataset]
    folders = [
        folder
        for place in places
        for folder in sorted(Path(root).glob(place.format(id)))
        if any(next(folder.glob(mark), None) for mark in marks)
    ]
    if not folders:
        scene = "<id>" if id == "*" else id
        wanted = " or ".join(f"{place.format(scene)}/{mark}" for place in places for mark in marks)
        raise ValueError(f"{root} holds no scene {scene} of {dataset}. Looked in it for {wanted}.")
    return folders


# ---- what the readers share -----------------------------------------------------------------------------------
# A reader lists a row for each frame: (name, path of the image, path of the depth, c2w, K), or why there is none.


def frames_of(rows, at=None, D=None, load=None, load_depth=None):
    """Rows -> list of Frames and, in the place of those that cannot be used, reasons.

    at    (width, height) that the rows' K belongs to; default the images' own, which is read once for all rows
    D     (3, 3) of the depth camera; default: it is the image's, and depth has K scaled to its size
    load, load_depth   (path) -> array; default `read_colour`, `read_depth`
    """
    rows = [row if isinstance(row, str) else unusable(*row[1:3]) or row for row in rows]
    whole = [row for row in rows if not isinstance(row, str)]
    if not whole:
        return rows
    size, depth_size = size_of([row[1] for row in whole]), size_of([row[2] for row in whole])
    if D is None and abs(size[0] * depth_size[1] / (size[1] * depth_size[0]) - 1) > 0.02:
        raise ValueError("depth of another shape than the image")
    for i, row in enumerate(rows):
        if not isinstance(row, str):
            name, image, depth, c2w, K = row
            rows[i] = Frame(
                name,
                c2w,
                scaled(K, at or size, size),
                size,
                partial(load or read_colour, image),
                scaled(K, at or size, depth_size) if D is None else D,
                depth_size,
                partial(load_depth or read_depth, depth),
            )
    return rows


def collect(found, up=None, metric=True, note=""):
    """Frames and reasons -> Scene (its name comes later): frames in the order of their names, faults counted.

    up   (3,) of the world; default: the mean of minus the cameras' y axes
    """
    frames, skipped = {}, Counter()
    for frame in found:
        reason = (
            frame
            if isinstance(frame, str)
            else fault(frame) or "name given twice" * (frame.name in frames)
        )
        if reason:
            skipped[reason] += 1
        else:
            frames[frame.name] = frame
    if not frames:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in skipped.items())
        raise ValueError(f"it has no usable frame ({reasons or 'it names none'}).")
    frames = [frames[name] for name in sorted(frames)]
    up = -np.mean([frame.c2w[:3, 1] for frame in frames], 0) if up is None else matrix(up, (3,))
    if not np.linalg.norm(up) > 1e-6:
        raise ValueError("its 'up' is no direction: three numbers, not all zero.")
    return Scene("", "", frames, up / np.linalg.norm(up), metric, dict(skipped), note)


def fault(frame):
    """What is wrong with a frame's pose or intrinsics, or ""."""
    turn, focal = frame.c2w[:3, :3], np.diag(frame.intrinsics)[:2]
    if not np.isfinite(frame.c2w).all():
        return "pose not finite"
    bent = max(np.abs(turn.T @ turn - np.eye(3)).max(), np.abs(frame.c2w[3] - [0, 0, 0, 1]).max())
    if bent > 1e-3 or np.linalg.det(turn) < 0:
        return "pose not rigid"
    return "" if np.isfinite(frame.intrinsics).all() and (focal > 0).all() else "bad intrinsics"


def unusable(image, depth):
    """Why a pair of paths (None: it left the scene) cannot be used, or ""."""
    if image is None or depth is None:
        return "path leaves the scene"
    return (
        "" if image.is_file() and depth.is_file() else "no depth" if image.is_file() else "no image"
    )


def inside(folder, path):
    """folder / path, or None if that leaves the folder (.., an absolute path, a symbolic link)."""
    whole = (folder / path).resolve()
    return whole if whole.is_relative_to(folder.resolve()) else None


def matrix(values, shape):
    """Numbers, or words of a text file, as float64 of `shape`; all NaN, which `fault` sees, if they are not that."""
    try:
        return np.array(values, np.float64).reshape(shape)
    except (TypeError, ValueError):
        return np.full(shape, np.nan)


def camera(fx, fy, cx, cy):
    """K (3, 3)."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], np.float64)


def scaled(K, size, to):
    """K of a picture that goes from `size` to `to`, both (width, height)."""
    return np.diag([to[0] / size[0], to[1] / size[1], 1]) @ K


def read_json(path):
    """A JSON file; ValueError if it is cut off."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again.") from None


def size_of(paths):
    """(width, height) of the first picture or .npy array that opens."""
    for path in paths:
        try:
            if path.suffix == ".npy":
                height, width = np.load(path, mmap_mode="r").shape
                return width, height
            with Image.open(path) as picture:
                return picture.size
        except (OSError, ValueError, EOFError):
            continue
    raise ValueError("no picture can be opened")


def decode(source, where, mode=None):
    """An image file (or its bytes) as an array, converted to `mode`. ValueError if it is truncated or no image."""
    try:
        with Image.open(source) as picture:
            return np.array(picture.convert(mode) if mode else picture)
    except (
        OSError,
        SyntaxError,
    ) as error:  # Pillow's words for a truncated file or no image at all
        raise ValueError(
            f"{where} cannot be read ({error}); it may be truncated: fetch or extract it again."
        ) from None


def read_colour(path):
    """(H, W, 3) uint8."""
    return decode(path, path, "RGB")


def read_depth(path, per_metre=1000):
    """(H, W) float32 metres from a 16-bit PNG in units of 1 / per_metre, or from a .npy in metres; 0 = invalid."""
    if path.suffix == ".npy":
        try:
            metres = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be read ({error}); write it again.") from None
    else:
        units = decode(path, path)
        if units.ndim != 2 or units.dtype == np.uint8:
            raise ValueError(f"{path} is no depth: that is a PNG of one channel and 16 bits.")
        metres = units / per_metre
    return np.where(np.isfinite(metres) & (metres > 0), metres, 0).astype(np.float32)


# ---- ScanNet --------------------------------------------------------------------------------------------------


def scannet(folder):
    """color/<i>.jpg, depth/<i>.png (mm), pose/<i>.txt (c2w; -inf where tracking was lost), intrinsic/; or the .sens."""
    if not (folder / "color").is_dir():
        return scannet_sens(next(folder.glob("*.sens")))
    K, D = (
        np.loadtxt(folder / f"intrinsic/intrinsic_{kind}.txt")[:3, :3] + HALF
        for kind in ("color", "depth")
    )
    rows = []
    for image in (path for path in folder.glob("color/*.jpg") if path.stem.isdigit()):
        text = folder / f"pose/{image.stem}.txt"
        rows.append(
            (
                f"{int(image.stem):06d}",
                image,
                folder / f"depth/{image.stem}.png",
                matrix(text.read_text().split(), (4, 4)),
                K,
            )
            if text.is_file()
            else "no pose"
        )
    return collect(frames_of(rows, D=D), up=(0, 0, 1))


def scannet_sens(path):
    """The published stream, version 4: a header, then of each frame the pose, JPEG colour and deflated uint16 depth."""
    found, end = [], path.stat().st_size
    with open(path, "rb") as file:

        def take(form):
            return struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))

        version, letters = take("IQ")
        if version != 4:
            raise ValueError(f"{path.name} has version {version}; this reads version 4.")
        file.seek(letters, 1)  # the sensor's name
        K, _, D, _ = (
            np.reshape(take("16f"), (4, 4))[:3, :3] + HALF for _ in range(4)
        )  # extrinsics: the identity
        *kinds, width, height, depth_width, depth_height, per_metre, count = take("iiIIIIfQ")
        if kinds != [2, 1]:
            raise ValueError(
                f"{path.name} has compressions {kinds}; this reads 2 (JPEG colour) and 1 (zlib depth)."
            )
        for i in range(count):
            c2w, (_, _, colour, depth), at = (
                np.reshape(take("16f"), (4, 4)),
                take("QQQQ"),
                file.tell(),
            )
            if file.seek(colour + depth, 1) > end:
                raise ValueError(f"{path.name} ends within frame {i} of {count}; copy it again.")
            found.append(
                Frame(
                    f"{i:06d}",
                    c2w.astype(np.float64),
                    K,
                    (width, height),
                    partial(read_sens_colour, path, at, colour),
                    D,
                    (depth_width, depth_height),
                    partial(read_sens_depth, path, at + colour, depth, depth_width, per_metre),
                )
            )
    return collect(found, up=(0, 0, 1))


def piece(path, at, count):
    """`count` bytes of a file, from byte `at`."""
    with open(path, "rb") as file:
        file.seek(at)
        return file.read(count)


def read_sens_colour(path, at, count):
    """(H, W, 3) uint8."""
    return decode(io.BytesIO(piece(path, at, count)), f"The image at byte {at} of {path}", "RGB")


def read_sens_depth(path, at, count, width, per_metre):
    """(H, W) float32 metres."""
    try:
        units = np.frombuffer(zlib.decompress(piece(path, at, count)), "<u2").reshape(-1, width)
    except (zlib.error, ValueError) as error:
        raise ValueError(
            f"The depth at byte {at} of {path} cannot be read ({error}); copy the file again."
        ) from None
    return (units / per_metre).astype(np.float32)


# ---- ScanNet++ ------------------------------------------------------------------------------------------------


def scannetpp(folder):
    """iphone: `aligned_pose` (c2w in the mesh's world; `pose` is in ARKit's own), `intrinsic` of 1920 x 1440 pixels."""
    folder = folder / "iphone"
    for made, packed in (("rgb", "rgb.mkv"), ("depth", "depth.bin")):
        if not (folder / made).is_dir():
            raise ValueError(
                f"{folder / made} is missing: extract {packed} with the ScanNet++ toolkit."
            )
    rows = [
        (
            name,
            folder / f"rgb/{name}.jpg",
            folder / f"depth/{name}.png",
            matrix(row.get("aligned_pose"), (4, 4)),
            matrix(row["intrinsic"], (3, 3)) + HALF,
        )
        for name, row in read_json(folder / "pose_intrinsic_imu.json").items()
    ]
    return collect(frames_of(rows, at=(1920, 1440)), up=(0, 0, 1))


def scannetpp_dslr(folder):
    """dslr/nerfstudio/transforms_undistorted.json (c2w, OpenGL), dslr/resized_undistorted_images/<file>, and what the
    toolkit renders from the mesh for these cameras: dslr/render_depth/<stem>.png (uint16 mm)."""
    # nerfstudio's world is the mesh's with x and y exchanged and z turned over; P is its own inverse
    P = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1.0]])
    folder = folder / "dslr"
    info, rows = read_json(folder / "nerfstudio/transforms_undistorted.json"), []
    if info["camera_model"] != "PINHOLE":
        raise ValueError(
            f"its pictures are {info['camera_model']}; undistort them with the ScanNet++ toolkit."
        )
    K = camera(info["fl_x"], info["fl_y"], info["cx"], info["cy"])
    for row in info["frames"] + info.get("test_frames", []):
        stem, c2w = (
            Path(row["file_path"]).stem,
            P @ matrix(row["transform_matrix"], (4, 4)) @ OPENGL,
        )
        image = inside(folder / "resized_undistorted_images", row["file_path"])
        rows.append(
            "marked as bad"
            if row.get("is_bad")
            else (stem, image, folder / f"render_depth/{stem}.png", c2w, K)
        )
    return collect(frames_of(rows, at=(info["w"], info["h"])), up=(0, 0, 1))


# ---- Matterport3D ---------------------------------------------------------------------------------------------


def matterport(folder):
    """A house: 18 views of every tripod, whose uuid begins their names. Depth in quarters of a millimetre.

    In the .conf an `intrinsics_matrix` holds for all `scan` lines until the next one, and its cy counts rows from the
    bottom of 1024; poses are c2w, OpenGL.
    """
    folders, K, rows = {}, np.full((3, 3), np.nan), []
    for line in next(folder.glob("undistorted_camera_parameters/*.conf")).read_text().splitlines():
        key, *words = line.split() or [""]
        if key == "intrinsics_matrix":
            K = matrix(words, (3, 3)) + HALF
            K[1, 2] = 1024 - K[1, 2]
        elif key == "scan":
            depth, image = (
                inside(folder, Path(folders[kind], name))
                for kind, name in zip(("depth", "color"), words)
            )
            rows.append((Path(words[1]).stem, image, depth, matrix(words[2:], (4, 4)) @ OPENGL, K))
        elif key.endswith("_directory"):
            folders[key.removesuffix("_directory")] = words[0]
    return collect(
        frames_of(rows, at=(1280, 1024), load_depth=partial(read_depth, per_metre=4000)),
        up=(0, 0, 1),
    )


# ---- ARKitScenes ----------------------------------------------------------------------------------------------


def arkitscenes(folder):
    """lowres_wide/, lowres_depth/ (mm), lowres_wide_intrinsics/, lowres_wide.traj (world to *camera*, 10 a second).

    A frame takes the pose nearest to its time stamp, at most 5 ms away, or is skipped; the official loader would keep
    the pose before. Captures held sideways or upside down are turned upright, all frames alike.
    """
    folder, rows = next(folder.glob("*_frames"), folder), []  # 3dod has one folder more than raw
    lines = [
        matrix(line.split(), (7,))
        for line in (folder / "lowres_wide.traj").read_text().splitlines()
    ]
    lines = np.array([line for line in lines if np.isfinite(line[0])]).reshape(-1, 7)
    stamps = np.round(1000 * lines[:, 0])  # milliseconds
    for image in folder.glob("lowres_wide/*.png"):
        video, _, seconds = image.stem.rpartition("_")
        ms = round(1000 * float(seconds))
        pincams = [
            folder / f"lowres_wide_intrinsics/{video}_{(ms + off) / 1000:.3f}.pincam"
            for off in (0, -1, 1)
        ]
        pincam = next((path for path in pincams if path.is_file()), None)
        nearest = np.abs(stamps - ms).argsort()[:1]
        if pincam is None or len(nearest) == 0 or abs(stamps[nearest[0]] - ms) > 5:
            rows.append("no intrinsics" if pincam is None else "no pose near the time stamp")
            continue
        K = (
            camera(*matrix(pincam.read_text().split(), (6,))[2:]) + HALF
        )  # width and height come first
        line = lines[nearest[0]]
        rows.append(
            (
                f"{ms / 1000:012.3f}",
                image,
                folder / "lowres_depth" / image.name,
                camera_at(line[1:4], line[4:]),
                K,
            )
        )
    scene = collect(frames_of(rows, load_depth=read_sure_depth), up=(0, 0, 1))
    skies = np.array(
        [frame.c2w[2, :3] for frame in scene.frames]
    )  # the world's up in each camera's axes
    upright_after = np.array(
        [[0, -1, 0], [-1, 0, 0], [0, 1, 0], [1, 0, 0]]
    )  # ... 0, 1, 2, 3 quarter turns clockwise
    turns = int(
        np.bincount((skies @ upright_after.T).argmax(1)).argmax()
    )  # the majority's, or sizes would mix
    return scene._replace(frames=[turned(frame, turns) for frame in scene.frames])


def read_sure_depth(path):
    """(H, W) float32 metres; 0 where confidence/, if the capture has it, is not 2, the highest."""
    sure = path.parents[1] / "confidence" / path.name
    metres = read_depth(path)
    return (
        np.where(decode(sure, sure) == 2, metres, np.float32(0)) if sure.parent.is_dir() else metres
    )


def camera_at(turn, shift):
    """c2w of the map [R | shift] from world to camera; `turn` is R's axis times its angle in radians (Rodrigues)."""
    angle = np.linalg.norm(turn)
    x, y, z = turn / max(angle, 1e-12)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    R = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    c2w = np.eye(4)
    c2w[:3, :3], c2w[:3, 3] = R.T, -R.T @ shift
    return c2w


def turned(frame, times):
    """The frame after quarter turns clockwise of its image, depth, K and camera; the camera's place stays."""
    Q = np.array(
        [[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]
    )  # the new x axis is the old -y
    for _ in range(times):
        K, D = (
            camera(K[1, 1], K[0, 0], height - K[1, 2], K[0, 2])
            for K, (_, height) in (
                (frame.intrinsics, frame.size),
                (frame.depth_intrinsics, frame.depth_size),
            )
        )
        frame = replace(
            frame,
            c2w=frame.c2w @ Q,
            intrinsics=K,
            size=frame.size[::-1],
            depth_intrinsics=D,
            depth_size=frame.depth_size[::-1],
        )
    return replace(
        frame,
        load=partial(read_turned, frame.load, times),
        load_depth=partial(read_turned, frame.load_depth, times),
    )


def read_turned(load, times):
    """What `load` returns, after quarter turns clockwise."""
    return np.rot90(load(), -times).copy()


# ---- DL3DV ----------------------------------------------------------------------------------------------------


def dl3dv(folder):
    """Pictures with COLMAP's poses: the dataset has no depth and no metres. They come from beside transforms.json:

      depth/<stem of the image>.png   of the undistorted image: uint16, thousandths of a length; or .npy, float lengths
      depth.json                      {"scale": metres per unit of the poses or null, "how": "where depth comes from"}
    With a scale, depth is in metres and the poses are multiplied by it. With null, both are in the unit of the poses,
    and the scene is not metric. extras/scans/depth.py writes these files with a depth network.
    """
    folder = dl3dv_folder(folder)
    if not (folder / "depth.json").is_file():
        raise ValueError(
            "DL3DV has no depth. Put depth/<image>.png or .npy and depth.json beside transforms.json, or "
            "let `python data.py depth --root DIR` estimate them."
        )
    info = read_json(folder / "depth.json")
    if info.get("refused"):
        raise ValueError(info["refused"])
    scale = info["scale"]
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(
            f"depth.json has the scale {scale}; that is a positive number of metres, or null."
        )
    unit = (
        f"a unit of its poses is {scale:.4g} m" if scale else "lengths are in the unit of its poses"
    )
    return collect(
        dl3dv_frames(*dl3dv_rows(folder), scale or 1),
        metric=bool(scale),
        note=f"{info['how']}; {unit}",
    )


def dl3dv_folder(folder):
    """Where transforms.json is: in colmap/ in the sample, in nerfstudio/ in the benchmark."""
    return next(path.parent for mark in READERS["dl3dv"][2] if (path := folder / mark).is_file())


def dl3dv_rows(folder):
    """Rows with poses in COLMAP's unit, the size of the full pictures that K belongs to, and how to load an image."""
    info, rows = read_json(folder / "transforms.json"), []
    pictures = next(
        (
            name
            for name in ("images_4", "images_8", "images_2", "images")
            if (folder / name).is_dir()
        ),
        None,
    )
    if pictures is None:
        raise ValueError("there is no images_4/ (960P) or images_8/ (480P) beside transforms.json.")
    full, K = (info["w"], info["h"]), camera(info["fl_x"], info["fl_y"], info["cx"], info["cy"])
    distortion = tuple(info.get(key, 0.0) for key in ("k1", "k2", "p1", "p2"))
    for row in info["frames"]:
        named = Path(row["file_path"])  # images/frame_00001.png
        depth = folder / f"depth/{named.stem}.npy"
        rows.append(
            (
                named.stem,
                inside(folder, Path(pictures, *named.parts[1:])),
                depth if depth.is_file() else depth.with_suffix(".png"),
                matrix(row["transform_matrix"], (4, 4)) @ OPENGL,
                K,
            )
        )
    return rows, full, partial(read_undistorted, K=K, size=full, distortion=distortion)


def dl3dv_frames(rows, full, load, scale):
    """Frames whose poses are multiplied by `scale`."""
    return frames_of([(*files, longer(c2w, scale), K) for *files, c2w, K in rows], full, load=load)


def longer(c2w, scale):
    """c2w in a world `scale` times as large."""
    return np.concatenate([c2w[:, :3], c2w[:, 3:] * [[scale], [scale], [scale], [1]]], 1)


def read_undistorted(path, K, size, distortion):
    """(H, W, 3) uint8 of a pinhole camera, from a picture with OpenCV's distortion (k1, k2, p1, p2).

    K at `size` is both cameras'. Bilinear; a ray that leaves the picture takes the colour of its border.
    """
    pixels, (k1, k2, p1, p2) = read_colour(path), distortion
    if not any(distortion):
        return pixels
    height, width = pixels.shape[:2]
    K = scaled(K, size, (width, height))
    x = (np.arange(width) + 0.5 - K[0, 2]) / K[0, 0]
    y = ((np.arange(height) + 0.5 - K[1, 2]) / K[1, 1])[:, None]
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2 * r2
    column = (
        (x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)) * K[0, 0] + K[0, 2] - 0.5
    )  # 0 is a pixel's centre
    row = (y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y)) * K[1, 1] + K[1, 2] - 0.5
    column, row = column.clip(0, width - 1), row.clip(0, height - 1)
    left, top = column.astype(int).clip(0, width - 2), row.astype(int).clip(0, height - 2)
    right_share, low_share = (column - left)[..., None], (row - top)[..., None]
    high, low = (
        pixels[r, left] * (1 - right_share) + pixels[r, left + 1] * right_share
        for r in (top, top + 1)
    )
    return np.round(high * (1 - low_share) + low * low_share).astype(np.uint8)


# ---- a plain folder, and the rooms ----------------------------------------------------------------------------


def plain_folder(folder):
    """Your own scans: <id>/scene.json and the files it names, all below its folder.

      {"frames": [{"image": "rgb/0.jpg", "depth": "depth/0.png", "c2w": [4 rows of 4], "intrinsics": [3 rows of 3]}],
       "intrinsics": [3 rows of 3],     of all frames that give none
       "depth_scale": 1000,             units of a 16-bit depth PNG per metre (default 1000); a .npy holds float metres
       "up": [0, 0, 1],                 of your world (default: the mean of minus the cameras' y axes)
       "metric": true}                  false if the unit of length is not known (default true)
    Frames stand in capture order. c2w: camera to world, OpenCV axes. Intrinsics are the image's, in pixels, with
    centres at +0.5: the middle of the picture is (W / 2, H / 2). Depth is along the optical axis, 0 = unknown, from the
    image's own camera; it may have fewer pixels, in the same proportion.
    """
    info, found, named = read_json(folder / "scene.json"), [], set()
    load_depth = partial(read_depth, per_metre=info.get("depth_scale", 1000))
    for i, row in enumerate(info["frames"]):
        image, depth = (inside(folder, row[kind]) for kind in ("image", "depth"))
        K = matrix(row.get("intrinsics", info.get("intrinsics")), (3, 3))
        row = (f"{i:06d}_{Path(row['image']).stem}", image, depth, matrix(row["c2w"], (4, 4)), K)
        try:
            found += (
                ["name given twice"]
                if image and image in named
                else frames_of([row], load_depth=load_depth)
            )
        except ValueError as reason:  # a picture that does not open, or of another shape
            found.append(str(reason))
        named.add(image)
    metric = info.get("metric", True)
    return collect(
        found, info.get("up"), metric, "" if metric else "lengths are in an unknown unit"
    )


def room_scene(seed, frames=40, size=64):
    """A walk through a room of lib/rooms.py, on a figure of eight in its middle, as a reader would give it."""
    rng = numpy_stream("walk through a room", seed)
    room, (a, b, start), t = (
        random_room(seed),
        rng.uniform(0, 2 * np.pi, 3),
        np.linspace(0, 1, frames, endpoint=False),
    )
    x, z = 0.8 * np.sin(2 * np.pi * t + a), 0.8 * np.sin(4 * np.pi * t + b)
    yaw = np.degrees(start) + 360 * t + 30 * np.sin(6 * np.pi * t + b)
    poses, K = [camera_pose(x[i], -EYE, z[i], yaw[i]) for i in range(frames)], pinhole(size)
    found = [
        Frame(
            f"{i:06d}",
            c2w,
            K,
            (size, size),
            partial(read_room, room, c2w, size, "rgb"),
            K,
            (size, size),
            partial(read_room, room, c2w, size, "depth"),
        )
        for i, c2w in enumerate(poses)
    ]
    return collect(found, up=(0, -1, 0))._replace(dataset="rooms", id=f"room_{seed}")


def read_room(room, c2w, size, kind):
    """One view of a room: "rgb" (H, W, 3) uint8, or "depth" (H, W) float32 metres."""
    return render(room, c2w, size, supersample=2 if kind == "rgb" else 1)[kind][0]


# dataset -> (reader: folder -> Scene, where scenes stand below the root, which files tell a scene)
READERS = {
    "scannet": (scannet, ("{}", "scans/{}", "scans_test/{}"), ("color", "*.sens")),
    "scannetpp": (scannetpp, ("{}", "data/{}"), ("iphone/pose_intrinsic_imu.json",)),
    "scannetpp_dslr": (
        scannetpp_dslr,
        ("{}", "data/{}"),
        ("dslr/nerfstudio/transforms_undistorted.json",),
    ),
    "matterport": (matterport, ("{}", "v1/scans/{}"), ("undistorted_camera_parameters/*.conf",)),
    "arkitscenes": (
        arkitscenes,
        ("3dod/*/{}", "raw/*/{}", "Training/{}", "Validation/{}", "{}"),
        ("*_frames/lowres_wide.traj", "lowres_wide.traj"),
    ),
    "dl3dv": (
        dl3dv,
        ("{}", "*K/{}"),
        tuple(f"{place}transforms.json" for place in ("", "colmap/", "nerfstudio/")),
    ),
    "folder": (plain_folder, ("{}",), ("scene.json",)),
}
