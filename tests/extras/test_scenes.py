"""
The readers of scans, each on a room that the test writes in the dataset's own layout: pytest tests/test_scenes.py

The room is known, so a wrong axis, unit, inversion or intrinsic shows. Its pictures are not square and the optical axis
is beside their middle: an exchange of width and height, or of cx and cy, shows too.
"""

import json
import os
import re
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from room_scan import Y_DOWN, read_room, room_scene, write_scan_folder

from extras.scans.depth import depth_network, disagreement, estimate_depth, scale_of
from extras.scans.frames import collect, frames_of, scaled, up_of, y_down
from extras.scans.readers import OPENGL
from extras.scans.scene import READERS, read_scene, scene_ids
from lib.geometry import angles_of, coverage, decompose, dominant_motion, pinhole, warp
from lib.rooms import random_room, render

SEED, SIZE, ROWS, COLUMNS = 4, 80, slice(20, 68), slice(5, 69)
WIDTH, HEIGHT = 64, 48
HALF = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
# from a room's world, where y points down, to the one of most datasets
Z_UP = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])
INDICES = (0, 2, 4, 6, 8, 10, 20, 100, 101, 102)  # as text, 10 and 100 come before 2


ESTIMATE = "the mean up of the cameras, levelled by their x axes"


def in_room(frame):
    """The pose of a frame of `truth` in the room's own world."""
    return np.linalg.inv(Z_UP) @ frame.c2w


def crop(load):
    return load()[ROWS, COLUMNS]


@pytest.fixture(scope="module")
def truth():
    """Ten frames of a room in a z-up world, 64 x 48 with the optical axis at (35, 20), kept in memory."""
    frames, K = [], pinhole(SIZE) - [[0, 0, COLUMNS.start], [0, 0, ROWS.start], [0, 0, 0]]
    for frame in room_scene(SEED, frames=36, size=SIZE).frames[: len(INDICES)]:
        image, depth = crop(frame.load), crop(frame.load_depth)
        frames.append(
            replace(
                frame,
                c2w=Z_UP @ frame.c2w,
                intrinsics=K,
                size=(WIDTH, HEIGHT),
                load=lambda x=image: x,
                depth_intrinsics=K,
                depth_size=(WIDTH, HEIGHT),
                load_depth=lambda x=depth: x,
            )
        )
    return frames


# ---- writers: a room in each layout -------------------------------------------------------------------------------


def jpeg(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "jpeg", quality=97, subsampling=0)


def png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "png")


def units(depth, per_metre=1000):
    return np.round(depth * per_metre).astype(np.uint16)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def table(numbers):
    return "\n".join(" ".join(repr(float(x)) for x in row) for row in np.atleast_2d(numbers)) + "\n"


def four(K):
    whole = np.eye(4)
    whole[:3, :3] = K
    return whole


def fine_depth(frame):
    """Depth of ScanNet's depth camera: another K and another shape than the colour's. Every third of its pixels lies
    on the ray of a colour pixel, so nearest neighbours are exact."""
    depth = render(random_room(SEED), in_room(frame), 3 * SIZE, supersample=1)["depth"][0]
    return depth[45:225, 9:231], pinhole(3 * SIZE) - [[0, 0, 9], [0, 0, 45], [0, 0, 0]]


def write_scannet(root, frames):
    folder = root / "scans" / "scene0000_00"
    for i, frame in zip(INDICES, frames, strict=False):
        depth, D = fine_depth(frame)
        jpeg(folder / f"color/{i}.jpg", frame.image())
        png(folder / f"depth/{i}.png", units(depth))
        text(folder / f"pose/{i}.txt", table(frame.c2w))
    text(folder / "intrinsic/intrinsic_color.txt", table(four(frame.K() - HALF)))
    text(folder / "intrinsic/intrinsic_depth.txt", table(four(D - HALF)))
    return "scannet", "scene0000_00"


def write_sens(root, frames):
    path, (_, D) = root / "scene0000_00" / "scene0000_00.sens", fine_depth(frames[0])
    parts = [struct.pack("<IQ", 4, 9), b"Structure"]
    for M in (four(frames[0].K() - HALF), np.eye(4), four(D - HALF), np.eye(4)):
        parts.append(struct.pack("<16f", *M.ravel()))
    parts.append(struct.pack("<iiIIIIfQ", 2, 1, WIDTH, HEIGHT, 222, 180, 1000.0, len(frames)))
    for i, frame in enumerate(frames):
        jpeg(root / "tmp.jpg", frame.image())
        colour, depth = (
            (root / "tmp.jpg").read_bytes(),
            zlib.compress(units(fine_depth(frame)[0]).tobytes()),
        )
        parts += [
            struct.pack("<16f", *frame.c2w.ravel()),
            struct.pack("<QQQQ", i, i, len(colour), len(depth)),
            colour,
            depth,
        ]
    path.parent.mkdir()
    path.write_bytes(b"".join(parts))
    return "scannet", "scene0000_00"


def write_scannetpp(root, frames):
    folder, rows = root / "data" / "0a7cc12c0e" / "iphone", {}
    for i, frame in zip(INDICES, frames, strict=False):
        name = f"frame_{i:06d}"
        jpeg(folder / f"rgb/{name}.jpg", frame.image())
        png(folder / f"depth/{name}.png", units(frame.depth()))
        K = scaled(frame.K(), (WIDTH, HEIGHT), (1920, 1440)) - HALF
        rows[name] = {
            "timestamp": i / 60,
            "pose": np.eye(4).tolist(),
            "intrinsic": K.tolist(),
            "imu": {},
            "aligned_pose": frame.c2w.tolist(),
        }
    text(folder / "pose_intrinsic_imu.json", dict(reversed(rows.items())))
    return "scannetpp", "0a7cc12c0e"


def nerfstudio(frames, names, world, **more):
    """transforms.json of cameras in another world: OpenGL axes, K at four times the size."""
    K = frames[0].K((4 * WIDTH, 4 * HEIGHT))
    return {
        "w": 4 * WIDTH,
        "h": 4 * HEIGHT,
        "fl_x": K[0, 0],
        "fl_y": K[1, 1],
        "cx": K[0, 2],
        "cy": K[1, 2],
        **more,
        "frames": [
            {"file_path": name, "transform_matrix": (world @ frame.c2w @ OPENGL).tolist()}
            for name, frame in zip(names, frames, strict=False)
        ],
    }


P = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1.0]])


def write_matterport(root, frames):
    folder, house = root / "v1" / "scans" / "17DRP5sb8fy", "17DRP5sb8fy"
    K = scaled(frames[0].K(), (WIDTH, HEIGHT), (1280, 1024)) - HALF
    lines = [
        "dataset matterport",
        f"n_images {len(frames)}",
        "depth_directory  undistorted_depth_images",
        "color_directory undistorted_color_images",
        "",
        f"intrinsics_matrix {K[0, 0]} 0  {K[0, 2]}  0 {K[1, 1]} {1023 - K[1, 2]}  0 0 1",
    ]
    for i, frame in enumerate(frames):
        image, depth = (
            f"{i // 6:032x}_{kind}1_{i % 6}.{end}" for kind, end in (("i", "jpg"), ("d", "png"))
        )
        jpeg(folder / "undistorted_color_images" / image, frame.image())
        png(folder / "undistorted_depth_images" / depth, units(frame.depth(), 4000))
        lines.insert(
            6,
            f"scan {depth} {image}  " + " ".join(map(repr, (frame.c2w @ OPENGL).ravel().tolist())),
        )
    text(folder / f"undistorted_camera_parameters/{house}.conf", "\n".join(lines) + "\n")
    return "matterport", house


def rotation_vector(R):
    angle = np.arccos(np.clip((np.trace(R) - 1) / 2, -1, 1))
    axis = np.array([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]])
    return angle * axis / (2 * np.sin(angle))


# §5.5 told backwards: how a camera is held whose pictures k clockwise quarter turns make upright
# k -> its axes in the upright camera's, as columns; fx fy cx cy (whole-number centres) from the upright K and w x h
HELD = {
    0: (np.eye(3), lambda K, w, h: K),
    1: (
        [[0, -1, 0], [1, 0, 0], [0, 0, 1]],
        lambda K, w, h: flat(K[1, 1], K[0, 0], K[1, 2], w - 1 - K[0, 2]),
    ),
    2: (
        np.diag([-1, -1, 1]),
        lambda K, w, h: flat(K[0, 0], K[1, 1], w - 1 - K[0, 2], h - 1 - K[1, 2]),
    ),
    3: (
        [[0, 1, 0], [-1, 0, 0], [0, 0, 1]],
        lambda K, w, h: flat(K[1, 1], K[0, 0], h - 1 - K[1, 2], K[0, 2]),
    ),
}


def flat(fx, fy, cx, cy):
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def write_arkit(root, frames, held=0, layout="3dod"):
    folder = root / layout / "Training" / "47331606"
    folder = folder / "47331606_frames" if layout == "3dod" else folder
    lines, (Q, new_K) = [], HELD[held]
    for i, frame in enumerate(frames):
        stamp = f"47331606_{99.9 + 0.1 * i:.3f}"  # 99.9 comes before 100.0, as text it does not
        K = new_K(frame.K() - HALF, WIDTH, HEIGHT)
        w2c = np.linalg.inv(frame.c2w @ four(Q))
        image, depth = (
            np.ascontiguousarray(np.rot90(x, held)) for x in (frame.image(), frame.depth())
        )
        png(folder / f"lowres_wide/{stamp}.png", image)
        png(folder / f"lowres_depth/{stamp}.png", units(depth))
        if layout == "raw":
            sure = np.full(depth.shape, 2, np.uint8)
            sure[0, 0] = 1
            png(folder / f"confidence/{stamp}.png", sure)
        text(
            folder / f"lowres_wide_intrinsics/{stamp}.pincam",
            table([*depth.shape[::-1], K[0, 0], K[1, 1], K[0, 2], K[1, 2]]),
        )
        lines.append(table([99.9 + 0.1 * i, *rotation_vector(w2c[:3, :3]), *w2c[:3, 3]]))
    text(folder / "lowres_wide.traj", "".join(lines))
    return "arkitscenes", "47331606"


SCALE = 2.5  # metres per unit of COLMAP's poses
TILTED = (
    np.array([[2, -2, 1, 9], [1, 2, 2, 3], [-2, -1, 2, 6], [0, 0, 0, 3]]) / 3
)  # a rotation and a shift


def shrunk(frames, factor):
    return [
        replace(frame, c2w=frame.c2w / ([[1, 1, 1, factor]] * 3 + [[1] * 4])) for frame in frames
    ]


def write_dl3dv(root, frames, scale=SCALE, depth=True, inner="", **distortion):
    """depth False: the dataset as published; scale None: depth in the unit of the poses."""
    folder, names = (
        root / "1K" / "0b3f9a" / inner,
        [f"images/frame_{i + 1:05d}.png" for i in range(len(frames))],
    )
    small = shrunk(frames, SCALE)
    for name, frame in zip(names, frames, strict=False):
        png(folder / name.replace("images", "images_4"), frame.image())
        if depth:
            png(
                folder / name.replace("images", "depth"),
                units(frame.depth(), 1000 if scale else 1000 / SCALE),
            )
    info = nerfstudio(
        small,
        names,
        TILTED,
        camera_model="OPENCV",
        k1=0,
        k2=0,
        p1=0,
        p2=0,
        applied_transform=TILTED[:3].tolist(),
    )
    info["frames"].reverse()
    text(folder / "transforms.json", info | distortion)
    if depth:
        text(folder / "depth.json", {"scale": scale, "how": "rendered"})
    return "dl3dv", "0b3f9a"


def write_nerfstudio(root, frames):
    """As `ns-process-data` writes it: no smaller pictures, and depth where every frame says."""
    folder = write_dl3dv(root, frames, inner="nerfstudio") and root / "1K/0b3f9a/nerfstudio"
    folder.rename(root / "my_scan")
    folder = root / "my_scan"
    (folder / "images_4").rename(folder / "images")
    (folder / "depth").rename(folder / "depths")
    info = json.loads((folder / "transforms.json").read_text())
    for frame in info["frames"]:
        frame["depth_file_path"] = frame["file_path"].replace("images", "depths")
    text(folder / "transforms.json", info)
    return "nerfstudio", "my_scan"


def write_plain(root, frames):
    """One depth map as .npy, with intrinsics of its own."""
    folder = root / "my_scan"
    write_scan_folder(folder, frames, [0, 0, 2], per_metre=5000)
    info = json.loads((folder / "scene.json").read_text())
    np.save(folder / "depth/0.npy", frames[0].depth())
    info["frames"][0] |= {"depth": "depth/0.npy", "intrinsics": frames[0].K().tolist()}
    text(folder / "scene.json", info)
    return "folder", "my_scan"


WRITERS = {
    "scannet": write_scannet,
    "scannet .sens": write_sens,
    "scannetpp": write_scannetpp,
    "matterport": write_matterport,
    "arkitscenes": write_arkit,
    "arkitscenes raw": partial(write_arkit, layout="raw"),
    "dl3dv": write_dl3dv,
    "dl3dv sample": partial(write_dl3dv, inner="colmap"),
    "nerfstudio": write_nerfstudio,
    "folder": write_plain,
    **{f"arkitscenes held {k}": partial(write_arkit, held=k) for k in (1, 2, 3)},
}


@pytest.fixture(scope="module", params=list(WRITERS))
def read(request, truth, tmp_path_factory):
    """One layout, written and read: (its name, Scene)."""
    root = tmp_path_factory.mktemp("scene")
    dataset, id = WRITERS[request.param](root, truth)
    assert scene_ids(dataset, root) == [id]
    return request.param, read_scene(dataset, root, id)


# ---- the same room comes out of every layout ------------------------------------------------------------------------


def test_every_layout_gives_the_rooms_cameras_in_capture_order(read, truth):
    layout, scene = read
    assert len(scene.frames) == len(truth) and scene.skipped == {} and scene.metric
    assert [frame.name for frame in scene.frames] == sorted({frame.name for frame in scene.frames})
    for frame, true in zip(scene.frames, truth, strict=True):
        assert frame.c2w.dtype == np.float64
        # level cameras: y points down in every world; elsewhere than in COLMAP's the whole pose is known
        assert np.abs(frame.c2w[:3, 1] - [0, 1, 0]).max() < 1e-5
        if layout.split()[0] not in ("dl3dv", "nerfstudio"):
            assert np.abs(frame.c2w - in_room(true)).max() < 1e-5
        assert frame.size == (WIDTH, HEIGHT) and np.abs(frame.K() - true.K()).max() < 1e-4
    how = {"dl3dv": ESTIMATE, "nerfstudio": ESTIMATE, "folder": "up as scene.json gives it"}
    assert scene.gravity == how.get(layout.split()[0], "z up, as the dataset has it")


def test_every_layout_gives_the_rooms_pictures_and_metres(read, truth):
    layout, scene = read
    for frame, true in zip(scene.frames, truth, strict=True):
        image, depth = frame.image(), frame.depth()
        assert image.dtype == np.uint8
        assert depth.dtype == np.float32
        assert depth.shape == (HEIGHT, WIDTH)
        assert np.abs(image.astype(int) - true.image()).mean() < 2
        error = np.abs(depth - true.depth())
        if layout == "arkitscenes raw":  # one pixel was not sure
            assert depth[0, 0] == 0
            error[0, 0] = 0
        assert error.max() <= 0.5 / {"matterport": 4000, "folder": 5000}.get(layout, 1000) + 1e-5


def test_views_agree_and_wrong_axes_would_not(read):
    """Check 2 of the fact sheet: points of one view lie on the depth of the next."""
    _, scene = read
    views = [frame.camera() for frame in scene.frames]
    pairs = [
        (one, other)
        for one in range(10)
        for other in range(10)
        if 0.2 < disagreement(views[one], views[other])[1] < 0.8
    ]
    right = [disagreement(views[one], views[other])[0] for one, other in pairs]
    views = [view._replace(c2w=view.c2w @ OPENGL) for view in views]
    wrong = [disagreement(views[one], views[other])[0] for one, other in pairs]
    assert len(pairs) > 20 and np.median(right) < 0.01 and np.median(wrong) > 0.1


def test_every_layout_gives_the_rooms_triples(read, truth):
    _, scene = read
    for a, b in [(i, j) for i in range(len(truth)) for j in (i - 1, i + 1) if 0 <= j < len(truth)]:
        covered = []
        for frames in (truth, scene.frames):
            context = [(frames[a].image(), frames[a].depth(), frames[a].c2w)]
            _, seen = warp(frames[b].depth(), frames[b].c2w, context, frames[b].K())
            covered.append(coverage(frames[b].depth(), seen))
            way = decompose(frames[a].c2w, frames[b].c2w)
        assert abs(covered[0] - covered[1]) <= 0.005
        pair = in_room(truth[a]), in_room(truth[b])
        assert np.abs(way - decompose(*pair)).max() < 1e-3
        read_pair = scene.frames[a].c2w, scene.frames[b].c2w
        assert dominant_motion(*read_pair) == dominant_motion(*pair)


def test_pictures_of_another_size_keep_their_rays(read, truth):
    _, scene = read
    frame, true, size = scene.frames[1], truth[1], (32, 16)  # another shape, too
    assert np.allclose(frame.K(size), np.diag([1 / 2, 1 / 3, 1]) @ true.K(), atol=1e-4)
    assert frame.image(size).shape == (16, 32, 3)
    assert np.abs(frame.image(size).astype(int) - true.image(size)).mean() < 2
    # the depth is the room's on the ray of each new pixel, as near as a pixel of the depth camera is wide
    row, column = np.mgrid[:16, :32]
    row, column = ((row + 0.5) * 3).astype(int), ((column + 0.5) * 2).astype(int)
    patch = np.stack([true.depth()[row - r, column - c] for r in (0, 1) for c in (0, 1)])
    depth = frame.depth(size)
    assert ((depth >= patch.min(0) - 1e-3) & (depth <= patch.max(0) + 1e-3)).mean() > 0.98


# ---- frames and rooms -----------------------------------------------------------------------------------------------


def test_depth_outside_the_depth_camera_is_invalid(truth):
    """The depth camera sees the middle half of the image, and no more is made up."""
    true = truth[0]
    narrow = replace(
        true,
        load_depth=lambda: true.depth()[12:36, 16:48],
        depth_size=(32, 24),
        depth_intrinsics=true.K() - [[0, 0, 16], [0, 0, 12], [0, 0, 0]],
    )
    depth = narrow.depth()
    assert (depth[12:36, 16:48] == true.depth()[12:36, 16:48]).all()
    assert (depth > 0).sum() == 32 * 24


def test_gravity_is_the_named_axis_or_found_from_cameras_that_look_down(tmp_path):
    """All look down 20 degrees, in a world with z up: what the reader gives looks down 20 degrees as well.

    A tenth of the walk heads in a sector of 40 degrees, where the mean of the cameras' ups is 20 degrees off.
    """
    walk = room_scene(SEED, size=16, pitch=-20)
    for name, up, frames, most in (
        ("named", Z_UP[:3, :3] @ Y_DOWN, 2, 0),
        ("whole", None, 40, 0.1),
        ("part", None, 5, 5),
    ):
        z_up = [replace(frame, c2w=Z_UP @ frame.c2w) for frame in walk.frames[:frames]]
        write_scan_folder(tmp_path / name, z_up, up)
        scene = read_scene("folder", tmp_path, name)
        pitches = angles_of(np.stack([frame.c2w for frame in scene.frames]))[:, 1]
        assert np.abs(pitches + 20).max() <= most + 1e-6
        assert scene.gravity == (ESTIMATE if up is None else "up as scene.json gives it")


def test_cameras_that_all_head_one_way_have_their_mean_up():
    one = room_scene(SEED, frames=1, pitch=-20).frames * 3
    np.testing.assert_allclose(up_of(one), -one[0].c2w[:3, 1], atol=1e-9)


def test_a_world_is_turned_so_that_y_points_down():
    for up in ([0, 0, 1], [0, -3, 0], [0, 1, 0], [1, 0, 0], [0.1, -0.7, 0.7]):
        turn = y_down(np.array(up, float))[:3, :3]
        np.testing.assert_allclose(turn @ up / np.linalg.norm(up), Y_DOWN, atol=1e-12)
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(turn) > 0.999
    assert (y_down(np.array([0.0, -1, 0])) == np.eye(4)).all()
    assert (y_down(np.array([0.0, 0, 1])) == np.linalg.inv(Z_UP)).all()


def test_a_room_is_a_scene_and_repeats():
    one, same, other = room_scene(5), room_scene(5), room_scene(6)
    assert len(one.frames) == 40 and one.metric and one.id == "room_5"
    places = np.array([frame.c2w[:3, 3] for frame in one.frames])
    assert np.hypot(places[:, 0], places[:, 2]).max() <= 1.2
    steps = [decompose(a.c2w, b.c2w) for a, b in pairwise(one.frames)]
    assert np.abs(steps)[:, :3].max() < 0.4 and np.abs(steps)[:, 3].max() < 30  # smooth
    assert (one.frames[7].image() == same.frames[7].image()).all()
    assert (one.frames[7].c2w == same.frames[7].c2w).all()
    assert np.abs(one.frames[7].c2w - other.frames[7].c2w).max() > 0.1
    view = render(random_room(5), one.frames[7].c2w, 64)
    assert (one.frames[7].image() == view["rgb"][0]).all()
    assert (one.frames[7].depth() == view["depth"][0]).all()


# ---- fixtures of the fact sheet (§3.3, 4.3, 5.3, 7) -----------------------------------------------------------------

GREY, ONE_METRE = (
    np.full((HEIGHT, WIDTH, 3), 128, np.uint8),
    np.full((HEIGHT, WIDTH), 1000, np.uint16),
)
PLAIN_K = flat(40, 40, 31.5, 23.5)


def rows_of(c2w):
    """A pose in the dataset's own world, z up."""
    return (Z_UP @ c2w)[:3].round(9).tolist()


def test_scannet_fixture(tmp_path):
    """Indices 0, 2, 10; tracking lost at 2; 1500 is 1.5 m."""
    folder = tmp_path / "scene0000_00"
    for i in (0, 2, 10):
        jpeg(folder / f"color/{i}.jpg", GREY)
        png(folder / f"depth/{i}.png", np.full((HEIGHT, WIDTH), 1500, np.uint16))
        text(folder / f"pose/{i}.txt", table(np.full((4, 4), -np.inf) if i == 2 else np.eye(4)))
    for kind in ("color", "depth"):
        text(folder / f"intrinsic/intrinsic_{kind}.txt", table(four(PLAIN_K)))
    scene = read_scene("scannet", tmp_path, "scene0000_00")
    assert [frame.name for frame in scene.frames] == ["000000", "000010"]
    assert scene.skipped == {"pose not finite": 1}
    assert (scene.frames[0].depth() == 1.5).all() and scene.frames[0].K()[0, 2] == WIDTH / 2


def test_scannetpp_fixture(tmp_path):
    """Frames 0, 10, 20 and no image for 20; fx 1440 is 192 at the depth's size; `pose` is not the pose."""
    folder, rows = tmp_path / "0a7cc12c0e" / "iphone", {}
    for i in (0, 10, 20):
        aligned = np.eye(4)
        aligned[0, 3] = i
        rows[f"frame_{i:06d}"] = {
            "pose": np.eye(4).tolist(),
            "aligned_pose": aligned.tolist(),
            "intrinsic": flat(1440, 1440, 959.5, 719.5).tolist(),
        }
        png(folder / f"depth/frame_{i:06d}.png", np.full((192, 256), 1500, np.uint16))
    for i in (0, 10):
        jpeg(folder / f"rgb/frame_{i:06d}.jpg", np.full((1440, 1920, 3), 90, np.uint8))
    text(folder / "pose_intrinsic_imu.json", rows)
    scene = read_scene("scannetpp", tmp_path, "0a7cc12c0e")
    assert [frame.c2w[0, 3] for frame in scene.frames] == [0, 10]
    assert scene.skipped == {"no image": 1}
    frame = scene.frames[1]
    assert np.allclose(frame.depth_intrinsics, flat(192, 192, 128, 96)) and frame.K()[0, 0] == 1440
    assert np.allclose(frame.K((256, 192)), frame.depth_intrinsics)
    assert (frame.depth((256, 192)) == 1.5).all()


def test_matterport_fixture(tmp_path):
    """Two intrinsics lines with 6 + 1 scan lines, double blanks and a blank line; 4000 is 1 m; cy from the bottom."""
    folder = tmp_path / "house"
    lines = [
        "dataset matterport",
        "n_images  7",
        "color_directory undistorted_color_images",
        "depth_directory  undistorted_depth_images",
    ]
    names = [f"0a_1_{yaw}" for yaw in range(6)] + ["0b_1_0"]
    for i, name in enumerate(names):
        image, depth = name.replace("_1_", "_i1_") + ".jpg", name.replace("_1_", "_d1_") + ".png"
        jpeg(folder / "undistorted_color_images" / image, np.full((1024, 1280, 3), 90, np.uint8))
        png(folder / "undistorted_depth_images" / depth, np.full((1024, 1280), 4000, np.uint16))
        if i in (0, 6):
            fx = 1076.45 + i
            lines += ["", f"intrinsics_matrix  {fx} 0 631.116  0 1077.19 509.202  0 0 1"]
        lines.append(f"scan {depth}  {image} 1 0 0 2  0 0 -1 0  0 1 0 1.5  0 0 0 1")
    text(folder / "undistorted_camera_parameters/house.conf", "\n".join(lines))
    scene = read_scene("matterport", tmp_path, "house")
    assert [frame.name for frame in scene.frames] == [f"0a_i1_{yaw}" for yaw in range(6)] + [
        "0b_i1_0"
    ]
    assert [frame.K()[0, 0] for frame in scene.frames] == [1076.45] * 6 + [1082.45]
    assert scene.frames[0].K()[:2, 2] == pytest.approx([631.116 + 0.5, 513.798 + 0.5])
    assert (scene.frames[6].depth() == 1).all()
    c2w = scene.frames[0].c2w
    assert rows_of(c2w) == [[1, 0, 0, 2], [0, 0, 1, 0], [0, -1, 0, 1.5]]
    assert (Z_UP @ c2w @ [0, 0, 3, 1])[:3] == pytest.approx([2, 3, 1.5])


def arkit(folder, stamps, traj, early=0.0):
    for stamp in stamps:
        png(folder / f"lowres_wide/1_{stamp:.3f}.png", GREY)
        png(folder / f"lowres_depth/1_{stamp:.3f}.png", ONE_METRE)
        text(
            folder / f"lowres_wide_intrinsics/1_{stamp - early:.3f}.pincam",
            f"{WIDTH} {HEIGHT} 40 40 31.5 23.5\n",
        )
    text(folder / "lowres_wide.traj", traj)


def test_arkitscenes_fixture(tmp_path):
    """The pose of the image's stamp, or of at most 5 ms beside it; a pincam 1 ms early; no pose is carried on."""
    turn = np.pi / 2
    arkit(
        tmp_path / "Validation/1/1_frames",
        (100.0, 100.004, 100.204),
        f"100.000 {turn} 0 0 1 2 3\n\n",
        early=0.001,
    )
    scene = read_scene("arkitscenes", tmp_path, "1")
    assert len(scene.frames) == 2 and scene.skipped == {"no pose near the time stamp": 1}
    for frame in scene.frames:
        assert rows_of(frame.c2w) == [[1, 0, 0, -1], [0, 0, 1, -3], [0, -1, 0, 2]]
        assert (frame.depth() == 1).all()


def test_arkitscenes_upside_down_capture_is_turned_as_one(tmp_path):
    """Two of three frames are upside down; the third, upright, is turned with them: sizes never mix."""
    traj = "".join(
        f"{stamp} {table(vector).strip()} 0 0 0\n"
        for stamp, vector in (
            (100, [np.pi / 2, 0, 0]),
            (101, [-np.pi / 2, 0, 0]),
            (102, [-np.pi / 2, 0, 0]),
        )
    )
    arkit(tmp_path / "1", (100, 101, 102), traj)
    picture = GREY.copy()
    picture[0, 0] = 0
    png(tmp_path / "1/lowres_wide/1_101.000.png", picture)
    frames = read_scene("arkitscenes", tmp_path, "1").frames
    # where each camera's y axis points
    assert [round(frame.c2w[1, 1]) for frame in frames] == [-1, 1, 1]
    assert frames[1].image()[-1, -1, 0] == 0 and frames[1].image()[0, 0, 0] == 128


def test_dl3dv_fixture(tmp_path):
    """fl_x 3000 of 3840 pixels is 750 of 960; `images/` means images_4/; no depth is said, not returned as zeros."""
    folder = tmp_path / "1K" / "abc"
    png(folder / "images_4/frame_00001.png", np.full((540, 960, 3), 90, np.uint8))
    text(
        folder / "transforms.json",
        {
            "camera_model": "OPENCV",
            "w": 3840,
            "h": 2160,
            "fl_x": 3000,
            "fl_y": 3000,
            "cx": 1920,
            "cy": 1080,
            "frames": [
                {"file_path": f"images/frame_0000{i}.png", "transform_matrix": np.eye(4).tolist()}
                for i in (2, 1)
            ],
        },
    )
    with pytest.raises(
        ValueError, match=r"it has no depth. Put .* or let `python -m extras.scans.depth"
    ):
        read_scene("dl3dv", tmp_path, "abc")
    (folder / "depth").mkdir()
    np.save(folder / "depth/frame_00001.npy", np.ones((540, 960)))
    text(folder / "depth.json", {"scale": None, "how": "by hand"})
    scene = read_scene("dl3dv", tmp_path, "abc")
    assert np.allclose(scene.frames[0].K(), flat(750, 750, 480, 270))
    assert (scene.frames[0].depth() == 1).all()
    # OpenGL's camera is upright in a world whose y points up
    assert np.allclose(scene.frames[0].c2w, np.eye(4))
    assert not scene.metric and scene.note == "by hand; lengths are in the unit of its poses"
    assert scene.skipped == {"no image": 1}


# ---- DL3DV: distortion, scale, depth --------------------------------------------------------------------------------


def test_dl3dv_undoes_the_lens(tmp_path, truth):
    """A picture whose colour is a function of the ray, seen through a lens, comes back as a pinhole sees it."""
    k1, k2, p1, p2 = 0.08, -0.02, 0.004, -0.006
    K, (row, column) = truth[0].K(), np.mgrid[:HEIGHT, :WIDTH] + 0.5
    ray = np.stack([(column - K[0, 2]) / K[0, 0], (row - K[1, 2]) / K[1, 1]])

    def lens(x, y):
        r2 = x * x + y * y
        radial = 1 + k1 * r2 + k2 * r2**2
        return np.stack(
            [
                x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
                y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
            ]
        )

    def colour(x, y):
        return (
            np.stack([128 + 100 * x, 128 + 100 * y, 128 + 60 * (x - y)], -1)
            .clip(0, 255)
            .round()
            .astype(np.uint8)
        )

    undone = ray
    for _ in range(50):
        undone = undone - (lens(*undone) - ray)
    dataset, id = write_dl3dv(tmp_path, truth[:1], k1=k1, k2=k2, p1=p1, p2=p2)
    png(tmp_path / "1K" / id / "images_4" / "frame_00001.png", colour(*undone))
    image, straight = read_scene(dataset, tmp_path, id).frames[0].image(), colour(*ray)
    inner = (slice(4, -4), slice(4, -4))  # rays of the border left the picture
    assert np.abs(image.astype(int) - straight)[inner].max() <= 2
    assert np.abs(colour(*undone).astype(int) - straight)[inner].max() >= 5


def test_dl3dv_without_a_scale_is_not_metric_and_still_consistent(tmp_path, truth):
    dataset, id = write_dl3dv(tmp_path, truth, scale=None)
    scene = read_scene(dataset, tmp_path, id)
    assert not scene.metric and "unit of its poses" in scene.note
    assert np.abs(scene.frames[2].depth() * SCALE - truth[2].depth()).max() < 0.002
    views = [frame.camera() for frame in scene.frames[:2]]
    assert disagreement(*views)[0] < 0.01


@pytest.fixture(scope="module")
def walk():
    """A whole walk, its pictures in memory."""
    return [
        replace(frame, load_depth=partial(np.copy, frame.load_depth()))
        for frame in room_scene(SEED, size=48).frames
    ]


def test_the_scale_of_poses_is_found_from_metric_depth(walk):
    scale, off = scale_of(shrunk(walk, 0.03))
    assert scale == pytest.approx(0.03, rel=0.02) and off < 0.02


def test_the_scale_survives_a_networks_errors(walk):
    """Every frame by itself 10 % too near or too far, as monocular networks are."""
    rng, frames = np.random.default_rng(0), []
    for frame in shrunk(walk, 3.0):
        wrong = frame.load_depth() * np.float32(np.exp(rng.normal(0, 0.1)))
        frames.append(replace(frame, load_depth=lambda x=wrong: x))
    scale, off = scale_of(frames)
    assert scale == pytest.approx(3.0, rel=0.1) and 0.02 < off < 0.15


def test_no_scale_where_nothing_shows_it(walk):
    """One frame; cameras that only turn; depth that belongs to other frames."""
    room = random_room(SEED)
    turning, foreign = [], []
    for frame in walk[:8]:
        c2w = np.c_[frame.c2w[:, :3], [0, -1.3, 0, 1]]
        load_depth = partial(read_room, room, c2w, 48, "depth")
        turning.append(replace(frame, c2w=c2w, load_depth=load_depth))
    for k, other in enumerate(np.random.default_rng(0).permutation(10)):
        foreign.append(replace(walk[k], load_depth=walk[other].load_depth))
    for frames in (walk[:1], turning, foreign):
        assert scale_of(frames)[0] is None


class Oracle:
    """A depth network that knows the room: of a picture it has seen before it tells the true depth."""

    def __init__(self, frames, stop_after=None):
        self.frames, self.calls, self.stop_after = frames, 0, stop_after

    def __call__(self, pixels):
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        return min(
            self.frames, key=lambda frame: np.abs(frame.image().astype(int) - pixels).sum()
        ).depth()


def test_depth_is_estimated_resumed_and_fixes_the_scale(tmp_path, truth):
    dataset, id = write_dl3dv(tmp_path, truth, depth=False)
    with pytest.raises(KeyboardInterrupt):
        estimate_depth(tmp_path, id, "oracle", predict=Oracle(truth, stop_after=4))
    with pytest.raises(ValueError, match="in part; run `python -m extras.scans.depth"):
        read_scene(dataset, tmp_path, id)
    rest = Oracle(truth)
    info = estimate_depth(tmp_path, id, "oracle", predict=rest)
    assert rest.calls == len(truth) - 4
    assert info["scale"] == pytest.approx(SCALE, rel=0.05)
    assert not info["refused"]
    assert estimate_depth(tmp_path, id, "oracle", predict=rest) == info
    assert rest.calls == len(truth) - 4
    scene = read_scene(dataset, tmp_path, id)
    assert scene.metric and f"by oracle; a unit of its poses is {info['scale']:.4g} m" in scene.note
    way = decompose(scene.frames[0].c2w, scene.frames[1].c2w)
    true = decompose(in_room(truth[0]), in_room(truth[1]))
    assert np.allclose(way[:3], true[:3], rtol=0.05, atol=1e-3)
    assert np.allclose(way[3:], true[3:], atol=1e-3)
    with pytest.raises(ValueError, match="depth from elsewhere .*oracle.*Remove"):
        estimate_depth(tmp_path, id, "another", predict=rest)


def test_depth_that_contradicts_the_poses_is_refused(tmp_path, truth):
    dataset, id = write_dl3dv(tmp_path, truth, depth=False)
    picture = tmp_path / "1K" / id / "images_4/frame_00003.png"
    picture.write_bytes(picture.read_bytes()[:200])
    noise = np.random.default_rng(0)
    info = estimate_depth(
        tmp_path, id, "noise", predict=lambda pixels: noise.uniform(0.5, 5, pixels.shape[:2])
    )
    assert info["scale"] is None and info["refused"]
    with pytest.raises(ValueError, match="fix no scale"):
        read_scene(dataset, tmp_path, id)
    assert (
        len(list((tmp_path / "1K" / id / "depth").glob("*.png"))) == len(truth) - 1
    )  # a broken picture has none


def test_a_transformers_network_gives_metres_of_the_pictures_size(tmp_path):
    """A random Depth Anything of the published architecture, small; a relative one is refused."""
    from transformers import (
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        Dinov2Config,
        DPTImageProcessor,
    )

    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
    )
    shape = dict(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    for kind in ("metric", "relative"):
        config = DepthAnythingConfig(**shape, depth_estimation_type=kind, max_depth=20)
        DepthAnythingForDepthEstimation(config).save_pretrained(tmp_path / kind)
        DPTImageProcessor(
            size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14
        ).save_pretrained(tmp_path / kind)
    depth = depth_network(tmp_path / "metric", "cpu")(GREY)
    assert depth.shape == (HEIGHT, WIDTH)
    assert depth.dtype == np.float32
    assert (depth >= 0).all()
    assert (depth <= 20).all()
    with pytest.raises(ValueError, match="relative depth only"):
        depth_network(tmp_path / "relative", "cpu")


# ---- bad input: skipped and counted, or refused with a sentence -----------------------------------------------------


@pytest.fixture
def scan(tmp_path, truth):
    """A plain folder of four frames, and a function that writes its scene.json anew and reads it."""
    write_plain(tmp_path, truth[:4])
    path = tmp_path / "my_scan" / "scene.json"
    info = json.loads(path.read_text())

    def again():
        text(path, info)
        return read_scene("folder", tmp_path, "my_scan")

    return path.parent, info, again


def test_a_truncated_picture_is_refused_when_it_is_read(scan):
    folder, _, again = scan
    whole = (folder / "rgb/2.jpg").read_bytes()
    (folder / "rgb/2.jpg").write_bytes(whole[:-100])  # its header still opens
    scene = again()
    assert len(scene.frames) == 4 and scene.frames[1].image().shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(ValueError, match="2.jpg cannot be read .*truncated"):
        scene.frames[2].image()
    (folder / "rgb/2.jpg").write_bytes(b"")
    assert again().skipped == {"no picture can be opened": 1}


def test_depth_of_a_wrong_size_or_kind_is_refused(tmp_path, scan, truth):
    folder, _, again = scan
    png(
        folder / "depth/1.png", np.full((HEIGHT // 2, WIDTH // 2), 10000, np.uint16)
    )  # half the size is fine
    png(folder / "depth/2.png", np.full((WIDTH, HEIGHT), 1000, np.uint16))  # on its side is not
    png(folder / "depth/3.png", np.full((HEIGHT, WIDTH), 100, np.uint8))
    scene = again()
    assert scene.skipped == {"depth of another shape than the image": 1}
    assert (scene.frames[1].depth() == 2).all()
    with pytest.raises(ValueError, match="3.png cannot be read .it is no depth: .* 16 bits"):
        scene.frames[2].depth()
    (folder / "depth/0.npy").write_bytes((folder / "depth/0.npy").read_bytes()[:300])
    with pytest.raises(ValueError, match="0.npy cannot be read"):
        scene.frames[0].depth()
    dataset, id = write_scannetpp(tmp_path, truth)
    png(tmp_path / "data" / id / "iphone/depth/frame_000002.png", ONE_METRE[::2, ::2].copy())
    frames = read_scene(dataset, tmp_path, id).frames
    with pytest.raises(
        ValueError, match="frame_000002: the depth has 32 x 24 pixels and should have 64 x 48"
    ):
        frames[1].depth()
    assert frames[2].depth().shape == (HEIGHT, WIDTH)


def test_impossible_poses_and_cameras_are_counted(scan):
    _, info, again = scan
    info["frames"][0]["c2w"][1][1] = float("nan")
    info["frames"][1]["c2w"] = np.diag([1, 1, -1, 1]).tolist()  # a mirror
    info["frames"][2]["intrinsics"] = [[0, 0, 0]] * 3
    scene = again()
    assert scene.skipped == {"pose not finite": 1, "pose not rigid": 1, "bad intrinsics": 1}
    assert len(scene.frames) == 1
    info["frames"][3]["c2w"] = [[1, 2], [3]]
    with pytest.raises(
        ValueError,
        match=r"scene .*my_scan cannot be used: .*no usable frame \(2 x pose not finite, ",
    ):
        again()
    info["frames"] = []
    with pytest.raises(ValueError, match="no usable frame"):
        again()


def test_missing_intrinsics_and_wrong_frames_are_sentences(scan):
    _, info, again = scan
    info.pop("intrinsics", None)
    for frame in info["frames"]:
        frame.pop("intrinsics", None)
    with pytest.raises(ValueError, match=f"{len(info['frames'])} x no intrinsics"):
        again()
    for wrong in ("rgb", {"0": {}}, ["rgb/0.jpg"]):
        info["frames"] = wrong
        with pytest.raises(ValueError, match='its "frames" must be a list of objects'):
            again()


def test_a_name_given_twice_counts_once(tmp_path, scan, truth):
    _, info, again = scan
    info["frames"].append(info["frames"][1])
    scene = again()
    assert len(scene.frames) == 4 and scene.skipped == {"name given twice": 1}
    dataset, id = write_scannet(tmp_path, truth)
    folder = tmp_path / "scans" / id
    for file in ("color/2.jpg", "depth/2.png", "pose/2.txt"):
        (folder / file.replace("2.", "02.")).write_bytes((folder / file).read_bytes())
    scene = read_scene(dataset, tmp_path, id)
    assert len(scene.frames) == len(truth) and scene.skipped == {"name given twice": 1}


def test_paths_that_leave_the_scene_are_not_followed(tmp_path, scan, truth):
    folder, info, again = scan
    jpeg(tmp_path / "outside.jpg", GREY)
    (folder / "rgb/link.jpg").symlink_to(tmp_path / "outside.jpg")
    info["frames"][0]["image"] = "../outside.jpg"
    info["frames"][1]["image"] = str(tmp_path / "outside.jpg")
    info["frames"][2]["image"] = "rgb/link.jpg"
    assert again().skipped == {"path leaves the scene": 3}
    dataset, id = write_nerfstudio(tmp_path / "other", truth)
    path = tmp_path / "other" / id / "transforms.json"
    path.write_text(path.read_text().replace("images/frame_00002.png", "../../outside.jpg"))
    assert read_scene(dataset, path.parents[1], id).skipped == {"path leaves the scene": 1}


def test_depth_of_a_plain_folder_is_kept_where_its_confidence_is_highest(scan, truth):
    folder, info, again = scan
    confidence = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 3
    png(folder / "confidence/1.png", confidence)
    info["frames"][1]["confidence"] = "confidence/1.png"
    info["frames"][2]["confidence"] = "../outside.png"
    info["frames"][3]["confidence"] = "confidence/3.png"
    scene = again()
    assert scene.skipped == {"path leaves the scene": 1}
    sure = np.where(confidence == 2, truth[1].depth(), 0)
    np.testing.assert_allclose(scene.frames[1].depth(), sure, atol=1e-3)
    with pytest.raises(ValueError, match="confidence/3.png"):
        scene.frames[2].depth()


def test_a_camera_held_sideways_is_turned_upright_in_a_plain_folder(scan, truth):
    """Pictures that lie on their left side: their x axis points down, as a phone in portrait stores them."""
    folder, info, again = scan
    turned = np.array([[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    K = truth[0].K()
    sideways = [[K[1, 1], 0, K[1, 2]], [0, K[0, 0], WIDTH - K[0, 2]], [0, 0, 1]]
    for i, frame in enumerate(info["frames"]):
        jpeg(folder / frame["image"], np.rot90(truth[i].image()).copy())
        np.save(folder / f"depth/{i}.npy", np.rot90(truth[i].depth()))
        c2w = (np.array(frame["c2w"]) @ np.linalg.inv(turned)).tolist()
        frame |= {"depth": f"depth/{i}.npy", "c2w": c2w, "intrinsics": sideways}
    for frame, true in zip(again().frames, truth, strict=False):
        np.testing.assert_allclose(frame.c2w, in_room(true), atol=1e-5)
        np.testing.assert_allclose(frame.K(), true.K())
        np.testing.assert_allclose(frame.depth(), true.depth())
        assert np.abs(frame.image().astype(int) - true.image()).mean() < 2


def test_missing_files_of_a_frame_are_counted(tmp_path, truth):
    dataset, id = write_scannet(tmp_path, truth)
    for file in ("color/0.jpg", "depth/2.png", "pose/4.txt"):
        (tmp_path / "scans" / id / file).unlink()
    text(tmp_path / "scans" / id / "pose/6.txt", "1 0 0")  # cut off
    scene = read_scene(dataset, tmp_path, id)
    assert scene.skipped == {"no depth": 1, "no pose": 1, "pose not finite": 1}
    assert len(scene.frames) == len(truth) - 4


def test_a_broken_sens_file_is_refused(tmp_path, truth):
    dataset, id = write_sens(tmp_path, truth[:2])
    path = tmp_path / id / f"{id}.sens"
    whole = path.read_bytes()
    for content, sentence in (
        (whole[:-40], "ends within frame 1 of 2"),
        (b"\3" + whole[1:], "version 3"),
        (whole[:50], "cannot be used"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            read_scene(dataset, tmp_path, id)
    path.write_bytes(whole[:-40] + bytes(40))
    frame = read_scene(dataset, tmp_path, id).frames[1]
    assert frame.image().shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(ValueError, match="The depth at byte .* cannot be read"):
        frame.depth()


def test_what_is_not_unpacked_or_not_there_is_said(tmp_path, truth):
    for dataset in READERS:
        with pytest.raises(
            ValueError, match=f"holds no scene <id> of {dataset}. Looked in it for .*<id>/"
        ):
            scene_ids(dataset, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no reader for 'kitti'; there are: scannet, "):
        scene_ids("kitti", tmp_path)
    dataset, id = write_scannetpp(tmp_path, truth[:2])
    with pytest.raises(ValueError, match="holds no scene other of scannetpp"):
        read_scene(dataset, tmp_path, "other")
    with pytest.raises(ValueError, match="not the id of a scene"):
        read_scene(dataset, tmp_path / "data", f"../data/{id}")
    (tmp_path / "data" / id / "iphone/rgb").rename(tmp_path / "away")
    with pytest.raises(ValueError, match="extract rgb.mkv with the ScanNet.. toolkit"):
        read_scene(dataset, tmp_path, id)
    (tmp_path / "data" / id / "iphone/pose_intrinsic_imu.json").write_text('{"frame_000000": {')
    (tmp_path / "away").rename(tmp_path / "data" / id / "iphone/rgb")
    with pytest.raises(ValueError, match="is not JSON"):
        read_scene(dataset, tmp_path, id)
    dataset, id = write_nerfstudio(tmp_path / "other", truth[:4])
    path = tmp_path / "other" / id / "transforms.json"
    path.write_text(path.read_text().replace("fl_x", "focal"))
    with pytest.raises(ValueError, match="a file has no 'fl_x'"):
        read_scene(dataset, path.parents[1], id)


def test_cameras_of_nerfstudio_are_obeyed_or_refused(tmp_path, truth):
    dataset, id = write_dl3dv(tmp_path, truth[:3])
    path = tmp_path / "1K" / id / "transforms.json"
    info = json.loads(path.read_text())
    expected = [frame.K() for frame in read_scene(dataset, tmp_path, id).frames]

    def read(each=(), first=(), **whole):
        frames = [frame | dict(each) for frame in info["frames"]]
        frames[0] |= dict(first)
        text(path, {key: value for key, value in (info | whole).items() if value is not None})
        text(path, json.loads(path.read_text()) | {"frames": frames})
        return read_scene(dataset, tmp_path, id)

    camera = {key: info[key] for key in ("fl_x", "fl_y", "cx", "cy", "w", "h")}
    # the same camera with every frame, and none for all
    scene = read(each=camera, **dict.fromkeys(camera))
    np.testing.assert_allclose([frame.K() for frame in scene.frames], expected)
    with pytest.raises(ValueError, match="has a camera of its own"):
        read(each=camera, first={"fl_x": 1.1 * info["fl_x"]})
    with pytest.raises(ValueError, match="has a camera of its own"):
        read(first={"k1": 0.1})
    for fisheye in ({"camera_model": "OPENCV_FISHEYE"}, {"is_fisheye": True}, {"k4": 0.01}):
        with pytest.raises(ValueError, match="is another than OPENCV's"):
            read(**fisheye)
        with pytest.raises(ValueError, match="is another than OPENCV's|a camera of its own"):
            read(first=fisheye)
    turned = {"w": info["h"], "h": info["w"]}
    with pytest.raises(ValueError, match="are no .* made smaller"):
        read(**turned)
    with pytest.raises(ValueError, match="3 x intrinsics of a picture of another shape"):
        read(cx=info["cy"], cy=info["cx"])


def recipe(word, folder):
    """Run the block of docs/scans.md that holds a word, in a folder; then read what it wrote."""
    page = (Path(__file__).parents[2] / "docs/scans.md").read_text()
    (code,) = [block for block in re.findall("~~~python\n(.*?)~~~", page, re.S) if word in block]
    paths = {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=os.environ | paths, check=True)
    return read_scene("folder", folder.parent, folder.name).frames


def test_the_recipes_of_phones_give_the_cameras_of_a_room(tmp_path, truth):
    folder = tmp_path / "capture"
    # upright cameras in a world whose y points up, half a turn about x and about z: quaternions x, y, z, w
    poses = [[1, 0, 0, 0, 1, 2, 3], [0, 0, 1, 0, 4, 5, 6]]
    about_x, about_z = np.diag([1, -1, -1]), np.diag([-1, -1, 1])
    K = truth[0].K()
    for i in range(2):
        jpeg(folder / f"rgb/{i:06d}.jpg", truth[i].image())
        png(folder / f"depth/{i:06d}.png", units(truth[i].depth()))
        png(folder / f"confidence/{i:06d}.png", np.full((HEIGHT, WIDTH), 2, np.uint8))
    lines = ["timestamp, frame, x, y, z, qx, qy, qz, qw, fx, fy, cx, cy, distortion_center_x, ..."]
    for i, pose in enumerate(poses):
        numbers = [*pose[4:], *pose[:4], 1600.0, 1600.0, 960.0, 720.0]
        lines.append(f"{i}, {i:06d}, " + ", ".join(map(str, numbers)) + ", , ")
    text(folder / "odometry.csv", "\n".join(lines))
    text(folder / "camera_matrix.csv", "\n".join(", ".join(map(str, row)) for row in K))
    frames = recipe("odometry.csv", folder)
    turn = y_down(np.array([0.0, 1, 0]))
    for i, rotation in enumerate((about_x, about_z)):
        c2w = np.linalg.inv(turn) @ frames[i].c2w
        np.testing.assert_allclose(c2w[:3, :3], rotation, atol=1e-9)
        np.testing.assert_allclose(c2w[:3, 3], poses[i][4:], atol=1e-9)
        np.testing.assert_allclose(frames[i].K(), K, atol=1e-9)
        assert np.abs(frames[i].depth() - truth[i].depth()).max() < 1e-3


def test_the_recipe_of_3d_scanner_app_gives_the_cameras_of_a_room(tmp_path, truth):
    """Two frames, in ARKit's world (y up) with OpenGL's camera, and one that has no picture."""
    folder, K = tmp_path / "capture", truth[0].K()
    poses = np.stack([np.diag([1.0, 1, 1, 1]), np.diag([-1.0, 1, -1, 1])])
    poses[:, :3, 3] = [[1, 2, 3], [4, 5, 6]]
    for i in range(3):
        info = {
            "cameraPoseARFrame": poses[i % 2].ravel().tolist(),
            "intrinsics": K.ravel().tolist(),
        }
        text(folder / f"frame_0000{i}.json", info)
        png(folder / f"depth_0000{i}.png", units(truth[i].depth()))
        png(folder / f"conf_0000{i}.png", np.full((HEIGHT, WIDTH), i + 1, np.uint8))
    for i in range(2):
        jpeg(folder / f"frame_0000{i}.jpg", truth[i].image())
    frames = recipe("cameraPoseARFrame", folder)
    assert len(frames) == 2
    for i, axes in enumerate(([1, -1, -1], [-1, -1, 1])):
        c2w = np.linalg.inv(y_down(np.array([0.0, 1, 0]))) @ frames[i].c2w
        np.testing.assert_allclose(c2w[:3, :3], np.diag(axes), atol=1e-9)
        np.testing.assert_allclose(c2w[:3, 3], poses[i, :3, 3], atol=1e-9)
        np.testing.assert_allclose(frames[i].K(), K, atol=1e-9)
    assert (frames[0].depth() == 0).all()  # of confidence 1
    assert np.abs(frames[1].depth() - truth[1].depth()).max() < 1e-3


def test_the_recipe_of_record3d_gives_the_cameras_of_a_room(tmp_path, truth):
    """Two frames and one without files, in ARKit's world (y up) with OpenGL's camera; K stands column by column."""
    folder, K = tmp_path / "capture", truth[0].K()
    poses = [[0, 0, 0, 1, 1, 2, 3], [0, 1, 0, 0, 4, 5, 6], [0, 0, 0, 1, 7, 8, 9]]
    for i in range(2):
        jpeg(folder / f"rgb/{i}.jpg", truth[i].image())
        (folder / "depth").mkdir(exist_ok=True)
        (folder / f"depth/{i}.exr").touch()
        np.save(folder / f"depth/{i}.npy", truth[i].depth())
    text(folder / "metadata.json", {"poses": poses, "K": K.T.ravel().tolist()})
    # stands in for the package: channels by name, each with its pixels
    text(
        folder / "OpenEXR.py",
        "import numpy\nfrom types import SimpleNamespace as Channel\nclass File:\n"
        "    def __init__(self, path): self.path = path.replace('.exr', '.npy')\n"
        "    def channels(self): return {'R': Channel(pixels=numpy.load(self.path))}\n",
    )
    frames = recipe("metadata.json", folder)
    for i, axes in enumerate(([1, -1, -1], [-1, -1, 1])):
        c2w = np.linalg.inv(y_down(np.array([0.0, 1, 0]))) @ frames[i].c2w
        np.testing.assert_allclose(c2w[:3, :3], np.diag(axes), atol=1e-9)
        np.testing.assert_allclose(c2w[:3, 3], poses[i][4:], atol=1e-9)
        np.testing.assert_allclose(frames[i].K(), K, atol=1e-9)
        assert np.abs(frames[i].depth() - truth[i].depth()).max() < 1e-6


def test_the_recipe_of_a_kinect_carries_depth_to_the_colour_camera(tmp_path):
    """A wall at 2 m, square to the depth camera, with a point of 1 m in the middle: 25 mm beside, 13 pixels at 525.5 / 1 m."""
    pytest.importorskip("cv2")
    folder = tmp_path / "kitchen"
    depth = np.full((480, 640), 2000, np.uint16)
    depth[235:246, 315:326] = 1000
    depth[:10] = 65535
    png(folder / "frame-000000.depth.png", depth)
    jpeg(folder / "frame-000000.color.jpg", np.full((480, 640, 3), 99, np.uint8))
    text(folder / "frame-000000.pose.txt", table(np.eye(4)))
    (frame,) = recipe("COLOUR", folder)
    rows, columns = np.nonzero(np.abs(frame.depth() - 1) < 0.1)
    shift = [columns.mean() + 0.5 - 320, rows.mean() + 0.5 - 240]
    # the camera's place, then its turn about y and x (degrees to pixels)
    pixel = 525.5 * np.pi / 180
    expected = [525.5 * -0.0253 + 0.06 * pixel, 525.5 * 0.0052 - 0.45 * pixel]
    np.testing.assert_allclose(shift, expected, atol=1.0)
    known = frame.depth() > 0
    assert (
        0.7 < known.mean() < 0.85
        and np.abs(frame.depth()[known & (frame.depth() > 1.5)] - 2).max() < 0.05
    )


def test_most_pictures_decide_which_size_is_odd(tmp_path, truth):
    dataset, id = write_scannet(tmp_path, truth[:4])
    first = tmp_path / "scans" / id / "color/0.jpg"
    jpeg(first, np.zeros((30, 20, 3), np.uint8))
    frames = read_scene(dataset, tmp_path, id).frames
    assert [frame.size for frame in frames] == [(WIDTH, HEIGHT)] * 4
    assert frames[1].image().shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(ValueError, match="image has 20 x 30 pixels and should have 64 x 48"):
        frames[0].image()


def test_an_arkit_capture_without_poses_is_refused(tmp_path):
    arkit(tmp_path / "1", (100.0,), "")
    with pytest.raises(ValueError, match="1 x no pose near the time stamp"):
        read_scene("arkitscenes", tmp_path, "1")


def test_up_must_be_a_direction(scan):
    _, info, again = scan
    info["up"] = [0, 0, 0]
    with pytest.raises(ValueError, match="'up' is no direction"):
        again()
    with pytest.raises(ValueError, match="no usable frame"):
        collect(frames_of([]))


def test_only_lenses_and_rotation_vectors_take_opencv(tmp_path, scan, truth, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)  # as where it is not installed
    _, _, again = scan
    assert again().frames[0].image().shape == (HEIGHT, WIDTH, 3)
    dataset, id = write_dl3dv(tmp_path, truth[:2])
    frame = read_scene(dataset, tmp_path, id).frames[0]
    assert np.abs(frame.image().astype(int) - truth[0].image()).mean() < 2
    dataset, id = write_arkit(tmp_path, truth[:2])
    with pytest.raises(
        ValueError, match="OpenCV is missing. Type: pip install opencv-python-headless"
    ):
        read_scene(dataset, tmp_path, id)
