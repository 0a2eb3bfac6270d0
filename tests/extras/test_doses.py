"""A dose is recovered as it was commanded."""

import numpy as np
import pytest

import data
from extras.report.doses import DOSES, along, chained_rows, dose_response, measure_chains
from lib.answers import imagine_targets, load_triples
from lib.consistency import recover_all
from lib.geometry import Motion, camera_pose, move_camera
from lib.rooms import EYE, TrueRenderer, random_room, render


def test_doses_are_told_with_their_quartiles():
    rows = [{"motion": {"kind": "dx", "amount": -2.0}} for _ in range(5)]
    recovered = np.zeros((5, 5))
    recovered[:, 0] = [-4.0, 0, -1.0, -3.0, -2.0]
    (point,) = dose_response(rows, recovered, [])["-dx"]["points"]
    assert (point["low"], point["median"], point["high"]) == (1, 2, 3)


def doses(of=lambda motion: motion, ways=("-dangle", "+dangle", "-dx", "+dy")):
    """Rows of DOSES for one room, and the true views from where `of(motion)` leads; None: nowhere."""
    room, context = (
        random_room(5_000_003),
        [camera_pose(0.1, -EYE, -0.1, 17.0 - 90 * k) for k in range(4)],
    )
    motions = [motion for motion in DOSES if motion.way in ways][::2]
    rows = [
        {
            "room": 5_000_003,
            "reference": 1,
            "context_c2w": [c2w.tolist() for c2w in context],
            "motion": {"kind": motion.kind, "amount": motion.amount},
        }
        for motion in motions
    ]
    poses = [
        move_camera(context[0], of(motion)) if of(motion) else context[0] for motion in motions
    ]
    return rows, list(render(room, np.stack(poses))["rgb"])


def test_the_true_renderer_goes_as_far_as_it_is_told():
    rows, views = doses()
    for way, told in dose_response(
        rows, recover_all(rows, views)[0], [Motion("dangle", -45.0)]
    ).items():
        assert told["slope"] == pytest.approx(1, abs=0.04), way
        for point in told["points"]:
            assert point["within"] == 1 and point["n"] == 1
            assert point["median"] == pytest.approx(
                point["amount"], abs=3 if "dangle" in way else 0.08
            )
            assert point["trained"] == (way == "-dangle" and point["amount"] == 45)


@pytest.mark.parametrize("share", [0.5, 0])
def test_a_camera_that_goes_half_the_way_or_not_at_all(share):
    rows, views = doses(
        lambda motion: Motion(motion.kind, share * motion.amount) if share else None
    )
    for kind, dose in dose_response(rows, recover_all(rows, views)[0], DOSES).items():
        assert dose["slope"] == pytest.approx(share, abs=0.06), kind
        assert all(point["trained"] for point in dose["points"])


def test_turning_at_random_is_no_following():
    """The range of a turn is the same for all commands; one centred on the command would give random turns slope 1."""
    rng = np.random.default_rng(0)
    rows = [
        {"motion": {"kind": "dangle", "amount": -degrees}} for degrees in range(15, 181, 15)
    ] * 60
    random = np.zeros((len(rows), 5))
    random[:, 3] = rng.uniform(-180, 180, len(rows))
    told = dose_response(rows, random, [])["-dangle"]
    assert abs(told["slope"]) < 0.25
    assert along(Motion("dangle", -180.0), np.array([0, 0, 0, 175.0, 0])) == pytest.approx(185)
    assert along(Motion("dangle", 15.0), np.array([0, 0, 0, -30.0, 0])) == pytest.approx(-30)
    assert along(Motion("dx", -1.0), np.array([-0.8, 0.3, 0, 0, 0])) == pytest.approx(0.8)


def test_a_chain_goes_on_from_the_simulators_own_view(tmp_path):
    data.make_triples(tmp_path, rooms=1, held_out=12, threads=1)
    rows = load_triples(tmp_path / "triples_test.jsonl")
    seconds = chained_rows(TrueRenderer(), rows, tmp_path / "views")
    assert 0 < len(seconds) < len(rows) and {len(row["context"]) for row in seconds} == {5}
    for row in seconds[::9]:
        own = render(random_room(row["room"]), np.array(row["context_c2w"][4]))["rgb"][0]
        assert np.abs(row["context"][4].astype(int) - own).max() <= 1
    views = imagine_targets(TrueRenderer(), seconds, tmp_path / "views")
    scores = measure_chains(rows, {"truth": tmp_path / "views"})["truth"]
    assert len(views) == scores["n"] and scores["tight"] > 0.95
    assert scores["turns"]["median_degrees"] < 1 and scores["moves"]["median_meters"] < 0.05
