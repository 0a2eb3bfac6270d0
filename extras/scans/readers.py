"""
One reader for each dataset of scans: the folder of a scan -> Scene (its name comes later, extras/scans/scene.py).

ScanNet, ScanNet++, Matterport3D and ARKitScenes count pixel centres in whole numbers: HALF is added to their K.
Poses of Matterport3D and of transforms.json have OpenGL's axes.
"""

import json
import os
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy import ndarray

from extras.scans.depth_files import read_depth
from extras.scans.frames import (
    Frame,
    FrameFiles,
    Scene,
    Size,
    array_of,
    collect,
    frames_of,
    scaled,
)
from lib.images import PictureError, decoding, read

HALF = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])  # + K: centres from whole numbers to +0.5
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # on the right of a c2w: y up, z back -> y down, z forward
CAMERA_KEYS = "fl_x fl_y cx cy w h k1 k2 k3 k4 p1 p2 camera_model is_fisheye".split()
TRANSFORMS = ("transforms.json", "colmap/transforms.json", "nerfstudio/transforms.json")  # DL3DV's


def inside(folder, path):
    """folder / path, or None if that leaves the folder (.., an absolute path, a symbolic link)."""
    whole = (folder / path).resolve()
    return whole if whole.is_relative_to(folder.resolve()) else None


def load_json(path: Path) -> dict:
    """A JSON file; ValueError if it is cut off."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again.") from None


def frames_in(info: dict) -> list[dict]:
    """The frames that a JSON file names; ValueError if they are no list of objects."""
    frames = info["frames"]
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise ValueError('its "frames" must be a list of objects, one for each picture.')
    return frames


def camera_matrix(fx, fy, cx, cy):
    """K (3, 3)."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], np.float64)


def camera_of(frame):
    """What a frame of a transforms.json says of its camera, if it has one of its own."""
    return {key: frame[key] for key in CAMERA_KEYS if key in frame}


def opencv():
    """The module cv2. Raises ValueError where it is missing: it is an extra."""
    try:
        import cv2
    except ImportError:
        raise ValueError("OpenCV is missing. Type: pip install opencv-python-headless") from None
    return cv2


# ---- ScanNet -------------------------------------------------------------------------------------------------------------


def scannet(folder: Path) -> Scene:
    """color/<i>.jpg, depth/<i>.png (mm), pose/<i>.txt (c2w; -inf where tracking was lost), intrinsic/; or the .sens."""
    if not (folder / "color").is_dir():
        return scannet_sens(next(folder.glob("*.sens")))
    K = np.loadtxt(folder / "intrinsic/intrinsic_color.txt")[:3, :3] + HALF
    depth_K = np.loadtxt(folder / "intrinsic/intrinsic_depth.txt")[:3, :3] + HALF
    rows = []
    for image in folder.glob("color/*.jpg"):
        if not image.stem.isdigit():
            continue
        pose_file = folder / f"pose/{image.stem}.txt"
        if not pose_file.is_file():
            rows.append("no pose")
            continue
        c2w = array_of(pose_file.read_text().split(), (4, 4))
        depth = folder / f"depth/{image.stem}.png"
        rows.append(FrameFiles(f"{int(image.stem):06d}", image, depth, c2w, K))
    return collect(frames_of(rows, depth_K=depth_K))


def scannet_sens(path: Path) -> Scene:
    """The published stream, version 4: a header, then of each frame the pose, JPEG colour and deflated uint16 depth."""
    frames, end = [], path.stat().st_size
    with open(path, "rb") as file:
        version, letters = unpack(file, "IQ")
        if version != 4:
            raise ValueError(f"{path.name} has version {version}; this reads version 4.")
        file.seek(letters, os.SEEK_CUR)  # the sensor's name
        K, _, depth_K, _ = np.reshape(unpack(file, "64f"), (4, 4, 4))[:, :3, :3] + HALF
        kinds = unpack(file, "ii")
        if kinds != (2, 1):
            raise ValueError(
                f"{path.name} has compressions {list(kinds)}; this reads 2 (JPEG colour) and 1 (zlib depth)."
            )
        size, depth_size = unpack(file, "II"), unpack(file, "II")
        per_metre, count = unpack(file, "fQ")
        for i in range(count):
            *numbers, _, _, colour_bytes, depth_bytes = unpack(file, "16fQQQQ")  # _: time stamps
            start = file.tell()
            if file.seek(colour_bytes + depth_bytes, os.SEEK_CUR) > end:
                raise ValueError(f"{path.name} ends within frame {i} of {count}; copy it again.")
            load = partial(read_sens_colour, path, start, colour_bytes)
            load_depth = partial(
                read_sens_depth, path, start + colour_bytes, depth_bytes, depth_size, per_metre
            )
            c2w = np.reshape(numbers, (4, 4))
            frames.append(Frame(f"{i:06d}", c2w, K, size, load, depth_K, depth_size, load_depth))
    return collect(frames)


def unpack(file, form):
    """The next numbers of a file, as `struct` names their kinds; little-endian, without gaps."""
    return struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))


def file_bytes(path, start, count):
    """`count` bytes of a file, from byte `start`."""
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(count)


def read_sens_colour(path, start, count):
    """(H, W, 3) uint8."""
    try:
        return read(file_bytes(path, start, count))
    except PictureError as error:
        raise PictureError(f"The image at byte {start} of {path}: {error}") from None


def read_sens_depth(path, start, count, size, per_metre):
    """(H, W) float32 metres."""
    with decoding(f"The depth at byte {start} of {path}"):
        whole = 2 * size[0] * size[1]  # bytes: more is not unpacked
        units = zlib.decompressobj().decompress(file_bytes(path, start, count), whole + 1)
        units = np.frombuffer(units, "<u2").reshape(size[1], size[0])
        return (units / per_metre).astype(np.float32)


# ---- ScanNet++ -----------------------------------------------------------------------------------------------------------


def scannetpp(folder: Path) -> Scene:
    """iphone: `aligned_pose` (c2w in the mesh's world; `pose` is in ARKit's own), `intrinsic` of 1920 x 1440 pixels."""
    folder = folder / "iphone"
    for extracted, packed in (("rgb", "rgb.mkv"), ("depth", "depth.bin")):
        if not (folder / extracted).is_dir():
            raise ValueError(
                f"{folder / extracted} is missing: extract {packed} with the ScanNet++ toolkit."
            )
    rows = []
    for name, info in load_json(folder / "pose_intrinsic_imu.json").items():
        image, depth = folder / f"rgb/{name}.jpg", folder / f"depth/{name}.png"
        c2w = array_of(info.get("aligned_pose"), (4, 4))
        K = array_of(info["intrinsic"], (3, 3)) + HALF
        rows.append(FrameFiles(name, image, depth, c2w, K))
    return collect(frames_of(rows, at=(1920, 1440)))


# ---- Matterport3D --------------------------------------------------------------------------------------------------------


def matterport(folder: Path) -> Scene:
    """A house: 18 views of every tripod, whose uuid begins their names. Depth in quarters of a millimetre.

    In the .conf an `intrinsics_matrix` holds for all `scan` lines until the next one, and its cy counts rows from the
    bottom of 1024; poses are c2w, OpenGL.
    """
    folders, rows = {}, []
    K = np.full((3, 3), np.nan)
    for line in next(folder.glob("undistorted_camera_parameters/*.conf")).read_text().splitlines():
        key, *words = line.split() or [""]
        if key.endswith("_directory"):
            folders[key] = words[0]
        elif key == "intrinsics_matrix":
            K = array_of(words, (3, 3)) + HALF
            K[1, 2] = 1024 - K[1, 2]
        elif key == "scan":
            depth = inside(folder, Path(folders["depth_directory"], words[0]))
            image = inside(folder, Path(folders["color_directory"], words[1]))
            c2w = array_of(words[2:], (4, 4)) @ OPENGL
            rows.append(FrameFiles(Path(words[1]).stem, image, depth, c2w, K))
    load_depth = partial(read_depth, per_metre=4000)
    return collect(frames_of(rows, at=(1280, 1024), load_depth=load_depth))


# ---- ARKitScenes ---------------------------------------------------------------------------------------------------------


def arkitscenes(folder: Path) -> Scene:
    """lowres_wide/, lowres_depth/ (mm), lowres_wide_intrinsics/, lowres_wide.traj (world to *camera*, 10 a second)."""
    folder = next(folder.glob("*_frames"), folder)  # 3dod has one folder more than raw
    lines = (folder / "lowres_wide.traj").read_text().splitlines()
    poses = np.reshape([array_of(line.split(), (7,)) for line in lines], (-1, 7))
    poses = poses[np.isfinite(poses[:, 0])]
    rows = [arkit_row(folder, image, poses) for image in folder.glob("lowres_wide/*.png")]
    return collect(frames_of(rows, load_depth=read_arkit_depth))


def arkit_row(folder, image, poses):
    """A frame takes the pose nearest to its time stamp, at most 5 ms away; the official loader would keep the one before.

    poses   (n, 7): seconds, then R's axis times its angle in radians and t of the map [R | t] from world to camera
    """
    video, _, seconds = image.stem.rpartition("_")
    ms = round(1000 * float(seconds))
    names = [f"{video}_{(ms + late) / 1000:.3f}.pincam" for late in (0, -1, 1)]
    files = [folder / "lowres_wide_intrinsics" / name for name in names]
    pincam = next((file for file in files if file.is_file()), None)
    if pincam is None:
        return "no intrinsics"
    gaps = np.abs(np.round(1000 * poses[:, 0]) - ms)  # milliseconds
    if not len(gaps) or gaps.min() > 5:
        return "no pose near the time stamp"
    _, _, *numbers = array_of(pincam.read_text().split(), (6,))  # width and height come first
    pose = poses[gaps.argmin()]
    w2c = np.eye(4)
    w2c[:3, :3] = opencv().Rodrigues(pose[1:4])[0]
    w2c[:3, 3] = pose[4:]
    depth = folder / "lowres_depth" / image.name
    K = camera_matrix(*numbers) + HALF
    return FrameFiles(f"{ms / 1000:012.3f}", image, depth, np.linalg.inv(w2c), K)


def read_arkit_depth(path):
    """(H, W) float32 metres; with confidence/, if the capture has it."""
    confidence = path.parents[1] / "confidence" / path.name
    return read_sure_depth(path, confidence if confidence.parent.is_dir() else None)


def read_sure_depth(path, confidence, per_metre=1000):
    """(H, W) float32 metres; 0 where the picture `confidence`, if there is one, is not 2, ARKit's highest.

    At edges ARKit's depth bridges what is near and far, and says so: of a phone's scan without it, nothing is verified.
    """
    metres = read_depth(path, per_metre)
    if confidence is None:
        return metres
    return np.where(read(confidence)[..., 0] == 2, metres, np.float32(0))


# ---- nerfstudio, COLMAP, DL3DV -------------------------------------------------------------------------------------------


def nerfstudio(folder: Path) -> Scene:
    """Pictures with COLMAP's poses, without depth and metres. They come from beside transforms.json:

      depth/<stem of the image>.png   of the undistorted image: uint16, thousandths of a length; or .npy, float lengths;
                                      or what a frame's depth_file_path names
      depth.json                      {"scale": metres per unit of the poses or null, "how": "where depth comes from"}
    With a scale, depth is in metres and the poses are multiplied by it. With null, both are in the unit of the poses,
    and the scene is not metric. extras/scans/depth.py writes these files with a depth network.
    """
    folder = transforms_folder(folder)
    if not (folder / "depth.json").is_file():
        raise ValueError(
            "it has no depth. Put depth/<image>.png or .npy and depth.json beside transforms.json, or "
            "let `python -m extras.scans.depth --root DIR` estimate them."
        )
    info = load_json(folder / "depth.json")
    if info.get("refused"):
        raise ValueError(info["refused"])
    scale = info["scale"]
    unit = "lengths are in the unit of its poses"
    if scale is not None:
        if not 0 < scale < float("inf"):
            raise ValueError(
                f"depth.json has the scale {scale}; that is a positive number of metres, or null."
            )
        unit = f"a unit of its poses is {scale:.4g} m"
    frames = nerfstudio_frames(folder, scale or 1)
    return collect(frames, None, scale is not None, f"{info['how']}; {unit}")


def transforms_folder(folder: Path) -> Path:
    """Where transforms.json is: in DL3DV's sample in colmap/, in its benchmark in nerfstudio/."""
    files = [folder / name for name in TRANSFORMS]
    return next(file.parent for file in files if file.is_file())


def nerfstudio_rows(folder: Path) -> tuple[list[FrameFiles], Size, Callable]:
    """Rows with poses in COLMAP's unit, the size that their K belongs to, and how to load a picture."""
    info = load_json(folder / "transforms.json")
    frames = frames_in(info)
    info = camera_of(frames[0] if frames else {}) | info
    model = info.get("camera_model", "OPENCV")
    wide = info.get("is_fisheye") or any(info.get(f"k{i}") for i in range(3, 7))
    if wide or model not in ("OPENCV", "PINHOLE"):
        raise ValueError(f"its camera_model {model} is another than OPENCV's k1, k2, p1, p2.")
    rows = []
    smaller = [name for name in ("images_4", "images_8", "images_2") if (folder / name).is_dir()]
    K = camera_matrix(info["fl_x"], info["fl_y"], info["cx"], info["cy"])
    size = (info["w"], info["h"])
    distortion = np.array([info.get(key, 0.0) for key in ("k1", "k2", "p1", "p2")])
    for frame in frames:
        if not camera_of(frame).items() <= info.items():
            raise ValueError(
                f"{frame['file_path']} has a camera of its own; this reads one for all."
            )
        name = Path(frame["file_path"])  # images/frame_00001.png
        image = Path(smaller[0], *name.parts[1:]) if smaller else name
        depth = frame.get("depth_file_path", f"depth/{name.stem}.npy")
        if not (folder / depth).is_file():
            depth = f"depth/{name.stem}.png"
        c2w = array_of(frame["transform_matrix"], (4, 4)) @ OPENGL
        rows.append(FrameFiles(name.stem, inside(folder, image), inside(folder, depth), c2w, K))
    return rows, size, partial(read_undistorted, K=K, size=size, distortion=distortion)


def nerfstudio_frames(folder: Path, scale: float) -> list[Frame | str]:
    """Frames whose poses are multiplied by `scale`, their pictures without distortion."""
    rows, size, load = nerfstudio_rows(folder)
    rows = [row._replace(c2w=rescaled(row.c2w, scale)) for row in rows]
    frames = frames_of(rows, at=size, load=load)
    for frame in frames:
        if isinstance(frame, Frame):  # a stretched K is never right
            width, height = frame.size
            if abs(width * size[1] / (height * size[0]) - 1) > 0.02:
                raise ValueError(
                    f"its pictures of {width} x {height} are no {size[0]} x {size[1]} made smaller."
                )
    return frames


def rescaled(c2w: ndarray, scale: float) -> ndarray:
    """c2w in a world `scale` times as large."""
    c2w = c2w.copy()
    c2w[:3, 3] *= scale
    return c2w


def read_undistorted(path, K, size, distortion):
    """(H, W, 3) uint8 of a pinhole camera with the same K; what left the picture has the colour of its border.

    K at `size`, with centres at +0.5;  distortion   (k1, k2, p1, p2) of OpenCV
    """
    pixels = read(path)
    if not distortion.any():
        return pixels
    cv2 = opencv()
    to = pixels.shape[1::-1]
    K = scaled(K, size, to) - HALF  # OpenCV counts centres in whole numbers
    with decoding(f"The image {path}"):
        x, y = cv2.initUndistortRectifyMap(K, distortion, None, K, to, cv2.CV_32FC1)
        return cv2.remap(pixels, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


# ---- a plain folder ------------------------------------------------------------------------------------------------------


def plain_folder(folder: Path) -> Scene:
    """Your own scans: <id>/scene.json and the files it names, all below its folder; docs/scans.md has the layout."""
    info = load_json(folder / "scene.json")
    frames, images = [], set()
    for i, frame in enumerate(frames_in(info)):
        image, depth = inside(folder, frame["image"]), inside(folder, frame["depth"])
        confidence = inside(folder, frame["confidence"]) if "confidence" in frame else None
        if confidence is None and "confidence" in frame:
            frames.append("path leaves the scene")
            continue
        if image is not None and image in images:
            frames.append("name given twice")
            continue
        images.add(image)
        intrinsics = frame.get("intrinsics", info.get("intrinsics"))
        if intrinsics is None:
            frames.append("no intrinsics")
            continue
        K = array_of(intrinsics, (3, 3))
        name = f"{i:06d}_{Path(frame['image']).stem}"
        row = FrameFiles(name, image, depth, array_of(frame["c2w"], (4, 4)), K)
        per_metre = info.get("depth_scale", 1000)
        load_depth = partial(read_sure_depth, confidence=confidence, per_metre=per_metre)
        try:
            frames += frames_of([row], load_depth=load_depth)
        except ValueError as reason:  # a picture that does not open, or of another shape
            frames.append(str(reason))
    metric = info.get("metric", True)
    note = "" if metric else "lengths are in an unknown unit"
    return collect(frames, info.get("up"), metric, note)
