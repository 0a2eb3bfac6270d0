"""The true renderer made worse on purpose: by what it is told, and by nothing else."""

import numpy as np
import pytest

from lib.geometry import Motion, Query
from lib.rooms import TrueRenderer, random_room, render, ring
from lib.simulators import instruction, load_simulator
from lib.streams import numpy_stream


def queries(turn: float, count: int = 12) -> list[Query]:
    """Turns to the right in as many rooms."""
    orders = []
    for room in range(count):
        poses = ring(numpy_stream("questions of a room", room))
        scene = {"room": room, "poses": [pose.tolist() for pose in poses]}
        image = render(random_room(room), poses[0])["rgb"][0]
        sentence = instruction(Motion("dangle", turn))
        orders.append(Query([image], 1, sentence, seed=room, scene=scene))
    return orders


def test_without_errors_it_is_the_true_renderer():
    expected = TrueRenderer().imagine(queries(30))
    views = load_simulator("truth:0:0").imagine(queries(30))
    np.testing.assert_array_equal(views, expected)


def test_a_yaw_error_turns_too_far_to_either_side():
    views = load_simulator("truth:20:0").imagine(queries(30))
    sides = []
    for turn in (10, 50):
        expected = TrueRenderer().imagine(queries(turn))
        sides.append([bool((a == b).all()) for a, b in zip(views, expected, strict=True)])
    assert all(left != right for left, right in zip(*sides, strict=True))
    assert any(sides[0]) and any(sides[1])


def test_missing_objects_are_left_out_of_a_view():
    whole = load_simulator("truth:0:0").imagine(queries(30))
    half = load_simulator("truth:0:50").imagine(queries(30))
    empty = load_simulator("truth:0:100").imagine(queries(30))

    def colourful(views):
        spread = np.ptp(np.stack(views).astype(int), axis=-1)  # walls are muted
        return (spread > 70).mean()

    assert colourful(empty) == 0 < 0.2 * colourful(whole) < colourful(half) < 0.8 * colourful(whole)


@pytest.mark.parametrize("name", ["truth:20", "truth:a:b", "truth:10:120", "truth:1:2:3"])
def test_a_name_that_means_nothing_gets_a_sentence(name):
    with pytest.raises(SystemExit, match="truth:20:40"):
        load_simulator(name)
