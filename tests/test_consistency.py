"""The measuring instrument, measured: true views near the ceiling, and every known error costs what it should."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from experiments.simulator import difference
from lib import consistency as instrument
from lib.answers import trivial_views, true_renders
from lib.consistency import (
    classify,
    compare,
    content_counts,
    content_of,
    delta_of,
    describe,
    per_view,
    pose_error,
    pose_errors,
    recover,
    recover_all,
    score_views,
    scores_of,
)
from lib.geometry import (
    UNITS,
    Motion,
    Query,
    camera_pose,
    compose,
    move_camera,
)
from lib.rooms import COLOURS, EYE, random_room, render
from lib.simulators import (
    find_weights,
    instruction,
    load_simulator,
)

MOTIONS = [
    Motion("dangle", -45.0),
    Motion("dangle", 135.0),
    Motion("dphi", 20.0),
    Motion("dx", -1.0),
    Motion("dy", 0.5),
]
ROOMS = range(5_000_072, 5_000_072 + 6)


def triples():
    rows = []
    for seed in ROOMS:
        room, context = (
            random_room(seed),
            [camera_pose(0.1, -EYE, -0.1, 17.0 - 90 * k) for k in range(4)],
        )
        images = render(room, np.stack(context))["rgb"]
        for motion in MOTIONS:
            target = move_camera(context[1], motion)
            view = render(room, target)["rgb"][0]
            rows.append(
                {
                    "id": f"{seed}/{motion.kind}",
                    "room": seed,
                    "reference": 2,
                    "context": list(images),
                    "target": view,
                    "motion": {"kind": motion.kind, "amount": motion.amount},
                    "target_c2w": target.tolist(),
                    "context_c2w": [c2w.tolist() for c2w in context],
                    "warp": np.dstack([view, np.full((32, 32), 255, np.uint8)]),
                }
            )
    return rows


ROWS = triples()


def content_scores(views, true):
    """`content_of` all views (n, H, W, 3) together, as numbers."""
    counts = content_counts(views, true).sum(0)
    return {key: float(value) for key, value in content_of(counts).items()}


@pytest.mark.slow
def test_true_renders_are_perfect_and_the_trivial_ones_are_not():
    views = {"true": [row["target"] for row in ROWS]}
    trivial, oracles = trivial_views(ROWS), {"true render": true_renders(ROWS)}
    result = compare(ROWS, {"simulators": views, "baselines": trivial, "oracles": oracles})
    for perfect in (result["simulators"]["true"], *result["oracles"].values()):
        assert perfect["pose"] == 1 and perfect["content"] == pytest.approx(1)
    assert result["simulators"]["true"]["moves"]["median_meters"] < 0.05
    assert result["simulators"]["true"]["turns"]["median_degrees"] < 1
    for name, trivial in result["baselines"].items():
        assert trivial["pose"] < 0.3 and trivial["content"] < 0.8, name
    assert result["baselines"]["mean image"]["content"] < 0.2


@pytest.mark.slow
def test_pose_falls_step_by_step_as_the_camera_is_off():
    shares, offs, rows = (
        [],
        (4, 8, 13),
        [row for row in ROWS if UNITS[row["motion"]["kind"]] == "degrees"][:12],
    )
    lists = [
        [
            render(
                random_room(row["room"]), np.array(row["target_c2w"]) @ camera_pose(0, 0, 0, off)
            )["rgb"][0]
            for row in rows
        ]
        for off in offs
    ]
    for off, views, found in zip(offs, lists, recover_all(rows, *lists), strict=True):
        turns = score_views(rows, views, found)["turns"]
        assert turns["median_degrees"] == pytest.approx(off, abs=1.5)
        shares.append(turns["pose"])
    assert shares[:2] == [1, 1] and shares[2] < 0.1


def test_content_falls_step_by_step_as_things_go_missing_or_change_colour():
    true, missing, painted = np.stack([row["target"] for row in ROWS]), [], []
    for row in ROWS:
        room = random_room(row["room"])
        pixels = np.bincount(
            render(room, row["target_c2w"])["ids"].ravel(), minlength=len(room.things) + 1
        )[1:]
        largest, spare = (
            room.things[pixels.argmax()],
            set(COLOURS) - {thing.colour for thing in room.things},
        )
        kept = tuple(thing for thing in room.things if thing is not largest)
        for views, things in (
            (missing, kept),
            (painted, (*kept, replace(largest, colour=min(spare)))),
        ):
            views.append(render(replace(room, things=things), row["target_c2w"])["rgb"][0])
    for wrong in (missing, painted):  # in a third of the views, in two thirds, in all
        runs = [content_scores(np.stack(wrong[:k] + list(true[k:])), true) for k in (0, 10, 20, 30)]
        assert runs[0]["content"] == 1 and runs[-1]["content"] < 0.5
        for key in ("recall", "topology", "content"):
            assert all(a[key] > b[key] + 0.05 for a, b in pairwise(runs)), key
    invented = [content_scores(np.stack(views), true)["precision"] for views in (missing, painted)]
    assert invented[0] > 0.9 > invented[1]


def test_the_pose_never_asks_a_depth_nor_the_target(monkeypatch):
    rows = ROWS[:5]
    views, bare = (
        [row["target"] for row in rows],
        [{key: row[key] for key in ("room", "reference", "context_c2w")} for row in rows],
    )
    (want,) = recover_all(rows, views)
    seen = instrument.render
    monkeypatch.setattr(instrument, "render", lambda *a, **k: {"rgb": seen(*a, **k)["rgb"]})
    np.testing.assert_array_equal(recover_all(bare, views)[0], want)


def test_a_mirrored_view_keeps_its_objects_and_loses_their_order():
    true = np.stack([row["target"] for row in ROWS])
    mirrored = content_scores(true[:, :, ::-1], true)
    assert mirrored["precision"] == mirrored["recall"] == 1 and mirrored["topology"] == 0
    assert mirrored["content"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("pitch", [0, -20])
def test_refinement_finds_poses_between_the_grid_points(pitch):
    room, reference = random_room(5_000_001), camera_pose(0.1, -EYE, -0.1, 17.0, pitch)
    deltas = np.array([[0.83, 0.12, 0, 0, 0], [0, 0, 0, -62.3, 1.7], [0.04, -0.66, -0.03, 3, 0]])
    views = np.stack([render(room, compose(reference, delta))["rgb"][0] for delta in deltas])
    found = recover(room, reference, views)
    assert np.abs(found - deltas)[:, :3].max() < 0.15 and np.abs(found - deltas)[:, 3:].max() < 3


def test_thresholds_of_a_pose():
    left, turn = delta_of(Motion("dx", -1.0)), delta_of(Motion("dangle", 90.0))
    for delta, within in (
        ([-1, 0, 0, 0, 0], True),
        ([-1.29, 0, 0, 0, 0], True),
        ([-1.31, 0, 0, 0, 0], False),
        ([-0.95, 0, 0.3, 0, 0], True),
        ([-0.9, 0, 0.4, 0, 0], False),
        ([1, 0, 0, 0, 0], False),
        ([0, 0, 0, 0, 0], False),
    ):
        assert pose_error(left, np.array(delta, float))["within"] is within, delta
    for delta, within in (
        ([0, 0, 0, 99, 0], True),
        ([0, 0, 0, 101, 0], False),
        ([0, 0, 0, 90, 11], False),
        ([0, 0, 0, -90, 0], False),
    ):
        assert pose_error(turn, np.array(delta, float))["within"] is within, delta
    assert pose_error(delta_of(Motion("dangle", -180.0)), np.array([0, 0, 0, 175.0, 0]))["within"]
    for amount, found, tight in (
        (-1.0, -0.81, True),
        (-1.0, -0.79, False),
        (-0.2, -0.27, True),
        (-0.2, -0.11, False),
    ):
        error = pose_error(delta_of(Motion("dx", amount)), np.array([found, 0, 0, 0, 0]))
        assert error["tight"] is tight and error["within"], (amount, found)
    for amount, found, tight in ((90, 98, True), (90, 80, False), (5, 7, True), (5, 9, False)):
        error = pose_error(delta_of(Motion("dangle", amount)), np.array([0, 0, 0, found, 0]))
        assert error["tight"] is tight and error["within"], (amount, found)


def test_equal_pictures_of_two_rooms_are_not_confused():
    grey = np.full((32, 32, 3), 90, np.uint8)
    alone = [recover_all([row], [grey])[0][0] for row in (ROWS[0], ROWS[-1])]
    np.testing.assert_allclose(recover_all([ROWS[0], ROWS[-1]], [grey, grey])[0], alone)


def test_colours_agree_with_instance_ids():
    """Where the whole pixel belongs to one thing, its colour is read right; walls and floors show none."""
    names = list(COLOURS)
    for seed in ROOMS:
        room = random_room(seed)
        view = render(room, camera_pose(0, -EYE, 0, 40), supersample=1)
        classes, ids = classify(view["rgb"])[0], view["ids"][0]
        want = np.array([-1] + [names.index(thing.colour) for thing in room.things])[ids]
        assert (classes == want).all()


def test_describe_does_not_depend_on_the_size_of_a_view():
    room = random_room(5_000_002)
    small, large = (
        describe(render(room, camera_pose(0, -EYE, 0, 40), size)["rgb"]) for size in (32, 96)
    )
    np.testing.assert_allclose(small.count, large.count, atol=12)
    np.testing.assert_array_equal(small.dominant, large.dominant)


# ---- differences and doses ------------------------------------------------------------------------------------------


def test_scores_are_sums_over_single_views():
    views = [row["context"][0] if i % 3 else row["target"] for i, row in enumerate(ROWS)]
    found = recover_all(ROWS, views)[0]
    result = score_views(ROWS, views, found)
    each = per_view(ROWS, views, pose_errors(ROWS, found))
    assert {key: pytest.approx(value) for key, value in scores_of(each.sum(0)).items()} == {
        key: result[key] for key in scores_of(each.sum(0))
    }
    assert result["mse"] == pytest.approx(
        np.mean(
            [
                np.square((a / 127.5 - 1) - (row["target"] / 127.5 - 1)).mean()
                for a, row in zip(views, ROWS, strict=True)
            ]
        ),
        rel=1e-4,
    )
    assert (
        result["content"]
        == content_scores(np.stack(views), np.stack([row["target"] for row in ROWS]))["content"]
    )


def views_of_rooms(share, rooms=60, each=6, spread=0.0, seed=0):
    """(n, 10) as `per_view` gives it: in every room a share of about `share` is right in pose; content is all right."""
    rng = np.random.default_rng(seed)
    right = rng.random((rooms, each)) < share + spread * rng.choice([-1, 1], (rooms, 1))
    return np.column_stack(
        [
            np.ones(rooms * each),
            right.ravel(),
            right.ravel(),
            np.full(rooms * each, 0.1),
            np.ones((rooms * each, 6)),
        ]
    ), np.repeat(np.arange(rooms), each)


def test_difference_and_its_interval():
    (good, rooms), (bad, _) = views_of_rooms(0.9), views_of_rooms(0.5, seed=1)
    gap, low, high = difference(good, bad, rooms)["tight"]
    assert gap == pytest.approx(good[:, 1].mean() - bad[:, 1].mean()) and 0 < low < gap < high < 0.6
    assert difference(good, good, rooms)["tight"] == (0, 0, 0) and difference(good, bad, rooms)[
        "mse"
    ] == (0, 0, 0)
    spread, _ = views_of_rooms(0.5, spread=0.4)  # rooms that are right or wrong as a whole say less
    width, narrow = (
        np.diff(difference(values, good, rooms)["tight"][1:]) for values in (spread, bad)
    )
    assert width > 1.3 * narrow


def test_the_interval_is_of_95_percent():
    """400 rooms of one view each, half of them right: 1.96 standard errors of 0.025 to either side."""
    n, wrong, error, content = np.ones(400), np.zeros(400), np.full(400, 0.1), np.ones((400, 6))
    values = np.column_stack([n, wrong, np.arange(400) % 2, error, content])
    sure = np.column_stack([n, wrong, wrong, error, content])
    gap, low, high = difference(values, sure, np.arange(400))["tight"]
    assert (gap, low, high) == pytest.approx(
        (0.5, 0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.005
    )


def test_the_nearest_context_view_is_nearest_in_metres_and_degrees():
    """The commanded camera is 1 m from one context view and 20 degrees, two thirds of a metre, from the other."""
    row = {
        "reference": 1,
        "motion": {"kind": "dangle", "amount": -90.0},
        "context": [np.full((2, 2, 3), level, np.uint8) for level in (0, 1, 2)],
        "context_c2w": [camera_pose(0, 0, 0), camera_pose(1, 0, 0, -90), camera_pose(0, 0, 0, -70)],
    }
    (view,) = trivial_views([row])["nearest context view"]
    assert view[0, 0, 0] == 2


# ---- training-free simulators ---------------------------------------------------------------------------------------


def query(row, motion, images=None, poses=None):
    motion = Motion(**row["motion"]) if motion is None else motion
    return Query(
        images or row["context"],
        2,
        instruction(motion, 2),
        0,
        {"room": row["room"], "poses": poses or row["context_c2w"]},
    )


def test_simulators_by_name(tmp_path, monkeypatch):
    assert load_simulator("none") is None and load_simulator("truth").imagine(
        [query(ROWS[0], None)]
    )[0].shape == (
        32,
        32,
        3,
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="train_wm.py"):
        find_weights("tuned")
    (tmp_path / "out/demo/wm").mkdir(parents=True)
    (tmp_path / "out/demo/wm/config.json").write_text("{}")
    assert (
        find_weights("tuned") == "out/demo/wm" and find_weights("tuned", "elsewhere") == "elsewhere"
    )
    assert find_weights("my/model") == "my/model"


# ---- known errors ----

ERRORS = ("none", "10 degrees", "20 degrees", "0.3 m", "0.6 m", "removed", "moved", "recoloured")


def wrong_view(row, error):
    """The target view of a triple, rendered with one `error` of ERRORS.

    degrees      the camera is turned further to the right by so many
    m            the camera stands so far aside: at a right angle to a commanded move, to its right otherwise
    removed, moved, recoloured   the thing that fills most of the view is gone; stands 40 degrees further round the
                 camera, to the right, as far away; has a colour that no thing of the room has
    """
    room = random_room(row["room"])
    c2w = np.array(row["target_c2w"])
    if error.endswith("degrees"):
        c2w = c2w @ camera_pose(0, 0, 0, float(error.split()[0]))
    elif error.endswith(" m"):
        metres = float(error.split()[0])
        sideways = row["motion"]["kind"] == "dx"
        c2w = c2w @ (camera_pose(0, 0, metres) if sideways else camera_pose(metres, 0, 0))
    elif error != "none":
        room = changed_room(room, c2w, error)
    return render(room, c2w, len(row["target"]))["rgb"][0]


def changed_room(room, c2w, error):
    """The room without the thing that fills most of the view, or with another in its place; see `wrong_view`."""
    ids = render(room, c2w)["ids"].ravel()
    pixels = np.bincount(ids, minlength=len(room.things) + 1)[1:]
    thing = room.things[pixels.argmax()]
    things = [other for other in room.things if other is not thing]
    if error == "moved":
        camera = c2w[:3, 3]
        turn = camera_pose(0, 0, 0, 40)[:3, :3]
        x, _, z = camera + turn @ (np.array([thing.x, 0, thing.z]) - camera)
        things.append(replace(thing, x=x, z=z))
    elif error == "recoloured":
        spare = min(set(COLOURS) - {other.colour for other in room.things})
        things.append(replace(thing, colour=spare))
    return replace(room, things=tuple(things))


@pytest.mark.slow
def test_both_metrics_fall_step_by_step_with_errors_of_known_size():
    lists = {error: [wrong_view(row, error) for row in ROWS[:20]] for error in ERRORS}
    told = compare(ROWS[:20], {"known": lists})["known"]
    assert (
        list(told) == list(ERRORS)
        and told["none"]["pose"] == 1
        and told["none"]["content"] == pytest.approx(1)
    )
    steps = {"turns": ("none", "10 degrees", "20 degrees"), "moves": ("none", "0.3 m", "0.6 m")}
    for family, errors in steps.items():
        for key in ("pose", "content"):
            shares = [told[error][family][key] for error in errors]
            assert all(a > b for a, b in pairwise(shares)), (family, key, shares)
        assert told[errors[2]][family]["pose"] < 0.1
        assert all(a["mse"] < b["mse"] for a, b in pairwise([told[e] for e in errors]))
    for degrees in (10, 20):
        assert told[f"{degrees} degrees"]["turns"]["median_degrees"] == pytest.approx(
            degrees, abs=1
        )
    assert told["0.3 m"]["moves"]["median_meters"] == pytest.approx(0.3, abs=0.05)
    for changed in ("removed", "moved", "recoloured"):
        assert told[changed]["content"] < 0.75
    assert (
        told["removed"]["precision"] > 0.9 > told["recoloured"]["precision"]
    )  # nothing is invented
    assert told["moved"]["recall"] > told["removed"]["recall"] + 0.2  # it is there, elsewhere
