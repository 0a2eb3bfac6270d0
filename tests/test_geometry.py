"""Cameras and motions: pytest tests/test_geometry.py"""

import numpy as np
import pytest

from lib.geometry import (
    KINDS,
    UNITS,
    Motion,
    angles_of,
    camera_pose,
    compose,
    coverage,
    decompose,
    dominant_component,
    dominant_motion,
    move_camera,
    pinhole,
    project,
    select_context,
    unproject,
    warp,
)
from lib.rooms import EYE, random_room, render


@pytest.mark.parametrize(
    "kind, amount",
    [("turn left", 1.0), ("dx", 0.0), ("dx", float("nan")), ("dangle", -float("inf"))],
)
def test_impossible_motions_are_refused(kind, amount):
    with pytest.raises(ValueError):
        Motion(kind, amount)


def test_a_motion_leads_where_its_sign_says():
    """From the identity pose (x right, y down, z forward): dx right, dy forward, dz up; dangle right, dphi up."""
    for sign in (1, -1):
        for kind, right, down, forward in (("dx", 1, 0, 0), ("dy", 0, 0, 1), ("dz", 0, -1, 0)):
            place = move_camera(np.eye(4), Motion(kind, sign * 1.0))[:3, 3]
            np.testing.assert_allclose(place, sign * np.array([right, down, forward]), atol=1e-12)
        for kind, look in (("dangle", (1, 0, 0)), ("dphi", (0, -1, 0))):
            ahead = move_camera(np.eye(4), Motion(kind, sign * 90.0))[:3, 2]
            np.testing.assert_allclose(ahead, sign * np.array(look), atol=1e-12)


def test_dominant_motion_finds_the_commanded_one_and_refuses_a_mixture():
    start = camera_pose(0.3, -1.2, 0.5, yaw=37)
    for kind in KINDS:
        for amount in (0.5, -1.7) if UNITS[kind] == "meters" else (15.0, -85.0):
            motion = Motion(kind, amount)
            assert dominant_motion(start, move_camera(start, motion)) == motion
    assert dominant_motion(start, move_camera(start, Motion("dangle", 180.0))) == Motion(
        "dangle", -180.0
    )
    both = move_camera(move_camera(start, Motion("dx", -1.0)), Motion("dangle", -25.0))
    assert dominant_motion(start, both) is None
    slight = move_camera(
        move_camera(start, Motion("dx", -1.0)), Motion("dangle", -4.0)
    )  # 4 degrees = 0.13 m
    assert dominant_motion(start, slight) == Motion("dx", -1.0)


def rolled(c2w, degrees):
    """A camera turned about its own axis."""
    a = np.radians(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
    return c2w @ turn


@pytest.mark.parametrize("roll", [0, 3, -20])
@pytest.mark.parametrize("pitch", [-40, -20, -5, 0, 15, 40])
def test_every_motion_comes_back_at_any_pitch(pitch, roll):
    start = rolled(camera_pose(0.3, -1.2, 0.5, 137, pitch), roll)
    np.testing.assert_allclose(angles_of(start), [137, pitch, roll], atol=1e-9)
    for kind in KINDS:
        for amount in (0.4, -2.5) if UNITS[kind] == "meters" else (15.0, -40.0):
            end = move_camera(start, Motion(kind, amount))
            want = [amount if other == kind else 0 for other in KINDS]
            np.testing.assert_allclose(decompose(start, end), [*want, 0], atol=1e-9)
            assert dominant_motion(start, end) == Motion(kind, amount)
            np.testing.assert_allclose(angles_of(end)[2], roll, atol=1e-9)
    for half in (180.0, -180.0):
        end = np.round(move_camera(start, Motion("dangle", half)), 6)  # as a file keeps it
        assert dominant_motion(np.round(start, 6), end) == Motion("dangle", -180.0)
    both = [0.7, -0.4, 0.2, 50, 10]
    np.testing.assert_allclose(decompose(start, compose(start, both))[:5], both, atol=1e-9)


def test_a_step_over_the_ground_is_forward_however_the_camera_looks():
    """By hand: from (0, -1.3, 0) a camera looks 20 degrees down along z, and stands a metre further at (0, -1.3, 1)."""
    start, end = camera_pose(0, -1.3, 0, 0, -20), camera_pose(0, -1.3, 1, 0, -20)
    np.testing.assert_allclose(decompose(start, end), [0, 1, 0, 0, 0, 0], atol=1e-12)
    # the camera's own axes say 0.94 m forward and 0.34 m up: no one motion
    np.testing.assert_allclose((np.linalg.inv(start) @ end)[:3, 3], [0, -0.342, 0.9397], atol=1e-4)
    np.testing.assert_allclose(move_camera(start, Motion("dy", 1.0)), end, atol=1e-12)
    # a quarter turn about the vertical; in its own axes it would also have rolled by 20 degrees
    pan = camera_pose(0, -1.3, 0, 90, -20)
    np.testing.assert_allclose(move_camera(start, Motion("dangle", 90.0)), pan, atol=1e-12)
    # it looks along x, down: cos 20 and sin 20 (y points down)
    np.testing.assert_allclose(pan[:3, 2], [0.9397, 0.342, 0], atol=1e-4)
    # raised by half a metre along gravity, and level after it pitched up by 20 degrees
    assert (move_camera(start, Motion("dz", 0.5))[:3, 3] == [0, -1.8, 0]).all()
    level = move_camera(start, Motion("dphi", 20.0))
    np.testing.assert_allclose(level, camera_pose(0, -1.3, 0), atol=1e-12)


def test_pitch_changes_nothing_of_what_one_motion_describes():
    rng = np.random.default_rng(0)
    places, yaws = rng.uniform(-1, 1, (60, 3)) * [1, 0.1, 1], rng.uniform(0, 60, 60)
    main = {}
    for pitch in (0, -20, 40):
        cameras = np.stack(
            [camera_pose(*at, yaw, pitch) for at, yaw in zip(places, yaws, strict=True)]
        )
        main[pitch] = dominant_component(decompose(cameras[:, None], cameras[None]))
    assert (main[0] >= 0).sum() > 150
    assert (main[0] == main[-20]).all() and (main[0] == main[40]).all()


def test_a_camera_that_looks_straight_down_has_no_heading():
    level = camera_pose(0, 0, 0)
    for pitch, heads in ((84.9, True), (-84.9, True), (85.1, False), (-85.1, False), (-90, False)):
        camera = camera_pose(0.5, 0, 0, 30, pitch)
        for pair in ((level, camera), (camera, level), (camera, camera_pose(2, 0, 0, 30, pitch))):
            assert np.isfinite(decompose(*pair)[5]) == heads
            assert heads or dominant_motion(*pair) is None
    # still it moves: where the top of its picture points (down) or the bottom (up), here 30 degrees right of z
    for pitch in (90, -90, 86):
        end = move_camera(camera_pose(0, 0, 0, 30, pitch), Motion("dy", 1.0))
        np.testing.assert_allclose(end[:3, 3], [0.5, 0, 0.75**0.5], atol=1e-12)
        turned = move_camera(end, Motion("dangle", 60.0))
        np.testing.assert_allclose(
            turned[:3, :3], camera_pose(0, 0, 0, 90, pitch)[:3, :3], atol=1e-9
        )
        back = move_camera(end, Motion("dphi", -float(pitch)))
        np.testing.assert_allclose(back[:3, :3], camera_pose(0, 0, 0, 30)[:3, :3], atol=1e-9)


def test_what_may_stand_beside_the_dominant_component():
    """Up to 0.15 m where 30 degrees count as a metre, and roll counts; a move bends by 20 degrees at most."""
    for delta, main, dominant in (
        ([1, 0, 0.14, 0, 0, 0], 0, 0),
        ([1, 0, 0.16, 0, 0, 0], -1, 0),
        ([-0.3, 0.10, 0, 0, 0, 0], 0, 0),  # 18 degrees
        ([-0.3, 0.12, 0, 0, 0, 0], -1, 0),  # 22 degrees
        ([-0.3, 0.08, 0.08, 0, 0, 0], -1, 0),  # 21 degrees
        ([0, 0, 1, 0, 4.4, 0], 2, 2),
        ([0, 0, 1, 0, 4.6, 0], -1, 2),
        ([0, 0, 0.14, -90, 4.4, 0], 3, 3),
        ([0, 0, 0.16, -90, 0, 0], -1, 3),
        ([0, 0, 0, 0, 45, 4.6], -1, 4),
        ([0, 1, 0, 0, 0, -7], -1, 1),
        ([0, 0, 0.1, 0, 0, 170], -1, 2),
        ([0, 1, 0, 0, 0, np.nan], -1, 1),
    ):
        assert dominant_component(np.array(delta, float)) == main, delta
        assert dominant_component(np.array(delta, float), np.inf) == dominant, delta
    for pitch in (0, -30):
        start, end = camera_pose(0, 0, 0, 0, pitch), camera_pose(0, 0, 1, 0, pitch)
        assert dominant_motion(start, rolled(end, 26)) is None
        assert dominant_motion(start, rolled(end, 4)) == Motion("dy", 1.0)


def test_decompose_tells_translation_in_the_axes_of_the_source():
    start = camera_pose(1.0, -1.0, 2.0, yaw=90)  # looks along +x
    np.testing.assert_allclose(
        decompose(start, camera_pose(3.0, -1.5, 1.9, yaw=120)), [0.1, 2, 0.5, 30, 0, 0], atol=1e-9
    )


def test_compose_is_the_inverse_of_decompose():
    start = camera_pose(1.0, -1.0, 2.0, yaw=90)
    delta = [0.3, -1.1, 0.2, 40.0, -12.0]
    np.testing.assert_allclose(decompose(start, compose(start, delta)), [*delta, 0], atol=1e-9)


def test_unproject_and_project_are_inverse():
    depth = np.random.default_rng(0).uniform(0.5, 4, (6, 6))
    camera, intrinsics = camera_pose(0.2, -1.1, 0.4, 33, 12), pinhole(6)
    pixel, z = project(unproject(depth, intrinsics, camera), intrinsics, camera)
    rows, columns = np.mgrid[:6, :6] + 0.5
    np.testing.assert_allclose(pixel, np.stack([columns, rows], -1), atol=1e-9)
    np.testing.assert_allclose(z, depth, atol=1e-9)


def test_depth_and_pose_reproject_to_sub_pixel():
    """The depth of one view, seen from another, lands on a surface of that depth: on smooth parts within 1 %."""
    room, a = random_room(5), camera_pose(0, -EYE, 0, 20)
    b = move_camera(a, Motion("dx", 0.4))
    views = render(room, np.stack([a, b]), size=64, supersample=1)
    pixel, z = project(unproject(views["depth"][0], pinhole(64), a), pinhole(64), b)
    inside = (z > 0) & (pixel > 1).all(-1) & (pixel < 63).all(-1)
    column, row = np.floor(pixel[inside].T).astype(int)
    offset = pixel[inside] - np.stack([column, row], -1) - 0.5
    inverse = 1 / views["depth"][1]  # linear in the image on every plane: interpolate it
    slope = np.stack(np.gradient(inverse)[::-1], -1)[row, column]
    there = 1 / (inverse[row, column] + (slope * offset).sum(-1))
    error = np.abs(there / z[inside] - 1)
    assert np.median(error) < 1e-3 and (error < 0.01).mean() > 0.85


def test_coverage_against_brute_force():
    """Cast a ray from each context eye to each target point: seen if nothing is in between and it falls in the image."""
    room, size = random_room(3), 24
    context = [camera_pose(0, -EYE, 0, yaw) for yaw in (0, 180)]
    target = move_camera(context[0], Motion("dx", 1.0))
    views = render(room, np.stack([*context, target]), size, supersample=1)
    points = unproject(views["depth"][2], pinhole(size), target)
    seen = np.zeros((size, size), bool)
    for camera in context:
        pixel, z = project(points, pinhole(size), camera)
        for r, c in np.argwhere((z > 0) & (pixel >= 0).all(-1) & (pixel < size).all(-1)):
            # a camera that looks straight at the point: its depth is the range
            eye = camera[:3, 3]
            toward = points[r, c] - eye
            side = np.cross([0, 1, 0], toward)
            down = np.cross(toward, side)
            axes = np.stack([axis / np.linalg.norm(axis) for axis in (side, down, toward)], 1)
            c2w = np.eye(4)
            c2w[:3, :3], c2w[:3, 3] = axes, eye
            reached = render(room, c2w, 1, supersample=1)["depth"][0, 0, 0]
            seen[r, c] |= reached > np.linalg.norm(toward) - 0.02
    _, found = warp(
        views["depth"][2],
        target,
        list(zip(views["rgb"][:2], views["depth"][:2], context, strict=True)),
        pinhole(size),
    )
    assert 0.2 < seen.mean() < 0.95  # the case has both kinds of pixels
    assert (found == seen).mean() > 0.95  # they differ only along edges, where a pixel is half seen
    assert abs(coverage(views["depth"][2], found) - coverage(views["depth"][2], seen)) < 0.04


def test_coverage_ignores_invalid_depth():
    depth = np.array([[0.0, 1.0], [1.0, 1.0]])
    assert coverage(depth, np.array([[False, True], [True, False]])) == pytest.approx(2 / 3)
    assert coverage(np.zeros((2, 2)), np.zeros((2, 2), bool)) == 0


def test_the_reference_is_shown_last_and_before_it_the_latest_others():
    assert select_context(4, 4, 4) == [0, 1, 2, 3]
    assert select_context(4, 2, 4) == [2, 3, 0, 1]  # a ring stays a ring
    assert select_context(9, 2, 4) == [6, 7, 8, 1]
    assert select_context(9, 8, 4) == [8, 5, 6, 7]
    assert select_context(9, 9, max_context=2) == [7, 8]
    assert select_context(3, 1, 1) == [0]
    for reference in (0, 3, -1):
        with pytest.raises(ValueError, match=f"no Image-{reference}.* numbered 1 to 2"):
            select_context(2, reference, 4)
