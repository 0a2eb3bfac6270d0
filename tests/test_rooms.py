"""The renderer against scenes computed by hand: pytest tests/test_rooms.py"""

import numpy as np
import pytest

from lib.geometry import Motion, Query, camera_pose, move_camera, pinhole
from lib.rooms import COLOURS, EYE, Room, Thing, TrueRenderer, random_room, render
from lib.simulators import instruction


def room_with(*things):
    return Room(8.0, 8.0, 2.8, (0, 1, 2, 3), 0, 0, things)


CHAIR = Thing("cabinet", "red", 0.0, 2.5, 0.0, 0.5, 1.6)  # its front is the plane z = 2


def test_a_chair_at_2_m_stands_at_1_m_after_moving_1_m_forward():
    """The worked example that readers of the paper know."""
    eye = camera_pose(0, -EYE, 0)
    for camera, depth in ((eye, 2.0), (move_camera(eye, Motion("dy", 1.0)), 1.0)):
        view = render(room_with(CHAIR), camera, size=33)
        assert view["ids"][0, 16, 16] == 1 and view["depth"][0, 16, 16] == pytest.approx(
            depth, abs=1e-5
        )
        wide = (view["ids"][0, 16] == 1).sum()  # 1 m wide at `depth`: focal / depth pixels
        assert abs(wide - pinhole(33)[0, 0] / depth) <= 1


def test_turning_left_moves_the_scene_to_the_right():
    eye = camera_pose(0, -EYE, 0)
    columns = []
    for camera in (eye, move_camera(eye, Motion("dangle", -20.0))):
        columns.append(np.argwhere(render(room_with(CHAIR), camera)["ids"][0] == 1)[:, 1].mean())
    assert columns[1] > columns[0] + 4


def test_looking_up_moves_the_scene_down_and_walls_stand_where_they_stand():
    eye = camera_pose(0, -EYE, 0)
    view = render(room_with(), np.stack([eye, move_camera(eye, Motion("dphi", 90.0))]), size=33)
    assert view["depth"][0, 16, 16] == pytest.approx(4.0, abs=1e-4)  # the wall of an 8 m room
    assert view["depth"][1, 16, 16] == pytest.approx(2.8 - EYE, abs=1e-4)  # the ceiling


@pytest.mark.parametrize(
    "kind, half, depth", [("barrel", 0.4, 2.1), ("ball", 0.4, None), ("table", 0.4, 2.1)]
)
def test_distances_to_round_and_compound_things(kind, half, depth):
    """Straight ahead at height 0.4: a barrel's and a table leg's near side, a ball's surface."""
    thing = Thing(kind, "blue", 0.0, 2.5, 0.0, half, 1.2)
    level = camera_pose(0, -0.4, 0)
    found = render(room_with(thing), level, size=33)["depth"][0, 16, 16]
    leg = 2.5 - 0.45 * half
    assert found == pytest.approx({"barrel": 2.1, "ball": 2.1, "table": leg}[kind], abs=1e-4)


def test_nearer_things_hide_farther_ones_and_colour_follows():
    near, far = (
        Thing("barrel", "green", 0.0, 1.5, 0.0, 0.3, 1.6),
        Thing("cabinet", "red", 0.0, 3.0, 0.0, 0.5, 1.6),
    )
    view = render(room_with(far, near), camera_pose(0, -EYE, 0), size=33)
    assert view["ids"][0, 16, 16] == 2
    red, green, blue = view["rgb"][0, 16, 16].astype(int)
    assert green > red + 40 and green > blue + 40


def test_supersampling_changes_colour_only():
    room, camera = random_room(2), camera_pose(0.1, -EYE, 0.1, 40)
    one, four = render(room, camera, supersample=1), render(room, camera, supersample=2)
    assert (one["depth"] == four["depth"]).all() and (one["ids"] == four["ids"]).all()
    assert 0 < np.abs(one["rgb"].astype(int) - four["rgb"]).mean() < 6


def test_rooms_repeat_and_differ():
    assert random_room(4) == random_room(4) and random_room(4) != random_room(5)
    for seed in range(20):
        room = random_room(seed)
        assert len({thing.colour for thing in room.things}) == len(room.things) and set(
            t.colour for t in room.things
        ) <= set(COLOURS)
        for thing in room.things:  # inside the walls, and out of the middle where cameras stand
            assert (
                abs(thing.x) + thing.half <= room.width / 2
                and abs(thing.z) + thing.half <= room.length / 2
            )
            assert np.hypot(thing.x, thing.z) - thing.half > 1.2


@pytest.mark.parametrize("pitch", [0, -20, 90])
def test_the_true_renderer_obeys_the_instruction(pitch):
    room, start = random_room(9), camera_pose(0, -EYE, 0, 10, pitch)
    motion = Motion("dangle", 45.0)
    given = render(room, start)["rgb"][0]
    query = Query([given], 1, instruction(motion, 1), 0, {"room": 9, "poses": [start.tolist()]})
    (view,) = TrueRenderer().imagine([query])
    there = camera_pose(0, -EYE, 0, 55, pitch)
    assert np.abs(view.astype(int) - render(room, there)["rgb"][0]).max() <= 1
