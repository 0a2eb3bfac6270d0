"""Triples and questions: pytest tests/test_data.py"""

import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

import data
from lib import questions
from lib.geometry import (
    Motion,
    angles_of,
    decompose,
    dominant_motion,
    move_camera,
)
from lib.images import load_image
from lib.protocol import call_poses, motion_in
from lib.records import load_jsonl
from lib.rooms import COLOURS, random_room, render
from lib.simulators import instruction

ROOMS = 24
RING_0 = ["1_dphi_-5", "1_dangle_-170", "1_dx_-1", "1_dx_0.1", "1_dangle_105", "1_dangle_165"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    data.make_triples(out, rooms=6, held_out=2, threads=1)
    data.make_questions(out, rooms=ROOMS, held_out=(2, 2), threads=2)
    return out


def test_every_file_shows_what_its_row_says(made):
    """Triples and questions of a held-out room stand at different spots: neither may overwrite the other's pictures."""
    for name, images, poses in (
        ("triples_test", "context", lambda row: row["context_c2w"]),
        ("questions_test", "images", lambda row: row["scene"]["poses"]),
    ):
        for row in load_jsonl(made / f"{name}.jsonl"):
            room = random_room(row["room"] if "room" in row else row["scene"]["room"])
            views = render(room, np.array(poses(row)))["rgb"]
            for path, view in zip(row[images][:4], views, strict=False):
                assert np.abs(load_image(path).astype(int) - view).max() <= 1
            for path, view in zip(row[images][4:], views[4:], strict=True):
                assert np.abs(load_image(path).astype(int) - view).mean() < 12  # softened


def test_a_triple_is_what_its_words_say(made):
    rows = load_jsonl(made / "triples_train.jsonl")
    assert len(rows) > 20
    for row in rows[:12]:
        context, target = [np.array(p) for p in row["context_c2w"]], np.array(row["target_c2w"])
        motion = Motion(**row["motion"])
        assert (
            dominant_motion(context[row["reference"] - 1], target) == motion
            and row["coverage"] >= 0.85
        )
        assert row["instruction"] == instruction(motion, row["reference"])
        assert (
            np.abs(
                load_image(row["target"]).astype(int)
                - render(random_room(row["room"]), target)["rgb"][0]
            ).max()
            <= 1
        )


def test_the_warp_shows_the_target_where_the_context_sees_it(made):
    from PIL import Image

    row = load_jsonl(made / "triples_train.jsonl")[0]
    warped = np.array(Image.open(row["warp"]))
    seen = warped[..., 3] > 127
    assert seen.mean() >= 0.8
    error = np.abs(warped[..., :3].astype(int) - load_image(row["target"])).mean(-1)[seen]
    assert np.median(error) < 8


# ---- layouts --------------------------------------------------------------------------------------------------------


def yaw_of(c2w):
    return np.degrees(np.arctan2(c2w[0, 2], c2w[2, 2]))


def test_cameras_apart_keep_the_papers_distances():
    for seed in range(40):
        poses = data.LAYOUTS["apart"](np.random.default_rng(seed))
        for i in range(4):
            for j in range(i):
                turn = abs(yaw_of(poses[i]) - yaw_of(poses[j])) % 360
                assert (
                    np.linalg.norm(poses[i][:3, 3] - poses[j][:3, 3]) >= 1
                    and min(turn, 360 - turn) >= 30
                )
        assert all(data.stands_free(c2w) for c2w in poses)


@pytest.mark.parametrize("layout", data.RINGS)
def test_a_ring_closes_after_four_left_turns(layout):
    pitches = []
    for seed in range(10):
        views = data.RINGS[layout](np.random.default_rng(seed))
        turns = [decompose(a, b) for a, b in zip(views, views[1:] + views[:1], strict=True)]
        np.testing.assert_allclose(turns, [[0, 0, 0, -90, 0, 0]] * 4, atol=1e-6)
        pitches.append(angles_of(views[0])[1])
    low, high = (10, 25) if layout == "pitched" else (0, 0)
    assert low - 1e-9 <= np.abs(pitches).min() and np.abs(pitches).max() <= high + 1e-9
    assert layout == "level" or min(pitches) < 0 < max(pitches)


def covered_by_hand(row, size=32, fine=256):
    """Share of the target's pixels whose point stands in the depth map (8 times finer) of some context camera."""
    room, target = random_room(row["room"]), np.array(row["target_c2w"])
    depth, seen = render(room, target, size)["depth"][0], np.zeros((size, size), bool)
    side = (np.arange(size) + 0.5) / (size / 2) - 1  # 90 degrees: from -1 to 1 at z = 1
    rays = np.stack([*np.meshgrid(side, side), np.ones((size, size))], -1)
    points = (rays * depth[..., None]) @ target[:3, :3].T + target[:3, 3]
    for c2w in np.array(row["context_c2w"]):
        x, y, z = np.moveaxis((points - c2w[:3, 3]) @ c2w[:3, :3], -1, 0)
        inside = (z > 0) & (abs(x) < z) & (abs(y) < z)
        column, line = (
            np.clip((fine / 2 * (1 + w / np.where(z > 0, z, 1))).astype(int), 0, fine - 1)
            for w in (x, y)
        )
        there = render(room, c2w, fine, supersample=1)["depth"][0][line, column]
        seen |= inside & (abs(there - z) < 0.05 * (1 + z))
    return seen.mean()


@pytest.mark.parametrize("layout", data.LAYOUTS)
def test_triples_of_all_cameras_are_what_they_say(layout, tmp_path):
    rows = [row for seed in range(4) for row in data.room_triples(seed, tmp_path, layout)]
    lengths = {"ring": {4, 5}, "apart": {4}}[layout]
    assert len(rows) > 10 and {len(row["context"]) for row in rows} == lengths
    assert min(row["coverage"] for row in rows) >= 0.85
    for row in rows[::4]:
        poses, target = np.array(row["context_c2w"]), np.array(row["target_c2w"])
        moved = move_camera(poses[row["reference"] - 1], Motion(**row["motion"]))
        np.testing.assert_allclose(moved, target, atol=1e-5)
        seen = render(random_room(row["room"]), np.stack([*poses, target]))["rgb"]
        for path, view in zip(
            [*row["context"][:4], row["target"]], seen[[0, 1, 2, 3, -1]], strict=True
        ):
            assert np.abs(load_image(tmp_path / path).astype(int) - view).max() <= 1
        assert data.stands_free(target)
        assert covered_by_hand(row) == pytest.approx(row["coverage"], abs=0.05)


def test_a_refused_target_is_badly_seen(tmp_path, monkeypatch):
    """Without the bar the same rooms give more triples, and those are the ones that the context does not cover."""
    kept = {row["id"] for seed in range(3) for row in data.room_triples(seed, tmp_path, "apart")}
    monkeypatch.setattr(data, "MIN_COVERAGE", 0.0)
    every = [row for seed in range(3) for row in data.room_triples(seed, tmp_path, "apart")]
    refused = [row for row in every if row["id"] not in kept]
    assert refused and all(covered_by_hand(row) < 0.9 for row in refused)


def test_larger_pictures_of_the_same_triples(tmp_path):
    small, large = (data.room_triples(1, tmp_path / str(size), size=size) for size in (32, 64))
    assert [(row["id"], row["target_c2w"]) for row in small] == [
        (row["id"], row["target_c2w"]) for row in large
    ]
    coarse, fine = (
        load_image(tmp_path / str(size) / small[0]["target"]).astype(int) for size in (32, 64)
    )
    assert fine.shape == (64, 64, 3)
    assert np.abs(fine.reshape(32, 2, 32, 2, 3).mean((1, 3)) - coarse).mean() < 4


def test_the_ring_stays_what_it_was(tmp_path):
    """What models have been trained on: a layout more may not move the random draws of the first."""
    rows = data.room_triples(0, tmp_path)
    assert [row["id"].split("/")[1] for row in rows[:6]] == RING_0


def test_every_layout_has_a_folder_of_its_own():
    folders = [data.folder_of(layout, size) for layout in data.LAYOUTS for size in (32, 64)]
    assert len(set(folders)) == len(folders) and folders[0] == "out/data"
    assert data.parse_args([]).out == data.parse_args(["questions"]).out == "out/data"
    args = data.parse_args(["--rooms", "3", "triples", "--layout", "apart", "--size", "64"])
    assert (args.out, args.rooms) == ("out/data-apart-64", 3)
    with pytest.raises(SystemExit):
        data.parse_args(["questions", "--layout", "apart"])


def test_some_amounts_are_never_trained_on_and_some_rooms_look_up_or_take_a_second_step(tmp_path):
    trained = [row for seed in range(24) for row in data.room_triples(seed, tmp_path)]
    unseen = set(data.MOTIONS) - set(data.TRAINED)
    assert {abs(motion.amount) for motion in unseen} == {20, 65, 110, 155, 0.4, 0.9}
    assert not unseen & {Motion(**row["motion"]) for row in trained}
    asked = [
        row for seed in range(24) for row in data.room_triples(seed, tmp_path, motions=data.MOTIONS)
    ]
    assert len(unseen & {Motion(**row["motion"]) for row in asked}) > 5
    pitches = {round(angles_of(np.array(row["context_c2w"][0]))[1]) for row in trained}
    assert 0 in pitches and min(pitches) <= -10 and max(pitches) >= 10
    steps = [row for row in trained if any(row["provenance"])]
    assert 0.2 < len(steps) / len(trained) < 0.6
    for row in steps:
        poses = call_poses({"poses": row["context_c2w"][:4]}, row["provenance"][4:])
        assert row["provenance"][:4] == [None] * 4
        np.testing.assert_allclose(poses, row["context_c2w"], atol=1e-5)
        assert row["reference"] == 5


def test_what_is_missing_is_made_and_the_rest_stays(made, tmp_path, monkeypatch):
    commands = []
    for name in ("make_triples", "make_questions"):
        monkeypatch.setattr(data, name, lambda *_, name=name, **__: commands.append(name))
    data.main(["--out", str(made)])
    assert commands == []
    data.main(["--out", str(tmp_path)])
    assert commands == ["make_triples", "make_questions"]


def test_same_seed_same_files_whatever_the_number_of_processes(made, tmp_path):
    data.make_questions(tmp_path, rooms=ROOMS, held_out=(2, 2), threads=1)
    assert (tmp_path / "questions_train.jsonl").read_bytes() == (
        made / "questions_train.jsonl"
    ).read_bytes()


def test_rooms_of_the_four_sets_are_disjoint(made):
    def rooms(name):
        rows = map(json.loads, (made / f"{name}.jsonl").read_text().splitlines())
        return {row["scene"]["room"] if "question" in row else row["room"] for row in rows}

    sets = [
        rooms(name)
        for name in ("triples_train", "questions_train", "questions_val", "questions_test")
    ]
    assert all(sets) and sum(map(len, sets)) == len(set.union(*sets))
    assert rooms("triples_val") == rooms("questions_val") and rooms("triples_test") == rooms(
        "questions_test"
    )


def true_facts(row, camera):
    room = random_room(row["scene"]["room"])
    return room, questions.facts(render(room, camera)["ids"][0], len(room.things))


@pytest.mark.parametrize("layout", ["level", pytest.param("pitched", marks=pytest.mark.slow)])
def test_answers_are_true_and_an_unseen_view_is_needed(layout, made, tmp_path):
    """Look through the commanded camera: the answer is what stands there, and the reference image says otherwise."""
    folder = made
    if layout != "level":
        folder = tmp_path
        data.make_questions(folder, rooms=ROOMS, held_out=(1, 1), threads=1, layout=layout)
    rows, counts = load_jsonl(folder / "questions_train.jsonl"), Counter()
    for row in rows:
        answer = row["options"]["ABCD".index(row["answer"])].split(". ")[1]
        poses = [np.array(p) for p in row["scene"]["poses"]]
        assert (abs(angles_of(poses[0])[1]) > 9) == (layout == "pitched")
        counts[row["category"], row["needs_view"]] += 1
        *_, camera = call_poses(row["scene"], row["ideal"])
        if not row["ideal"]:
            camera = poses[row["shown_by"] - 1]
        room, found = true_facts(row, camera)
        assert room.things[found[row["ask"]]].colour == answer
        if row["needs_view"] and row["category"] != "walking":
            start = poses[row["ideal"][0]["reference_image"] - 1]
            assert found[row["ask"]] != true_facts(row, start)[1][row["ask"]]
        elif row["ideal"]:  # the turn ends exactly where the given image stands
            np.testing.assert_allclose(poses[row["shown_by"] - 1], camera, atol=1e-5)
    assert {"commanded", "turning"} <= {category for category, _ in counts}
    for family in ("commanded", "turning"):
        assert 1 / 2 <= counts[family, True] / counts[family, False] <= 2


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Questions whose view must be found, of 100 rooms, before and after the balance."""
    out = tmp_path_factory.mktemp("found")
    families = ("turning", "walking")
    rows = []
    for seed in range(1_000_000, 1_000_100):
        rows += data.room_questions(seed, out, families)
    data.save_jsonl(out / "questions_train.jsonl", rows)
    rows = load_jsonl(out / "questions_train.jsonl")
    assert {len(row["ideal"]) for row in rows} == {0, 1, 2}
    return rows


def cameras_after(row, calls, slack=0):
    """The camera after some of the ideal calls, which all follow one another, each turn `slack` degrees off."""
    first = row["ideal"][0]["reference_image"] if row["ideal"] else row["shown_by"]
    camera = np.array(row["scene"]["poses"][first - 1])
    camera = move_camera(camera, Motion("dangle", slack)) if slack else camera
    for call in calls:
        camera = move_camera(camera, motion_in(call))
    return camera


def test_the_ideal_calls_show_the_answer_7_5_degrees_to_either_side_and_one_call_less_does_not(
    found,
):
    for row in found:
        answer = row["options"]["ABCD".index(row["answer"])].split(". ")[1]

        def shown(calls, slack=0, row=row):
            room, there = true_facts(row, cameras_after(row, calls, slack))
            thing = there[row["ask"]]
            return None if thing in (None, -1) else room.things[thing].colour

        assert {shown(row["ideal"], slack) for slack in (-7.5, 0, 7.5)} == {answer}
        for left_out in range(len(row["ideal"])):
            assert shown(row["ideal"][:left_out] + row["ideal"][left_out + 1 :]) != answer
        assert row["needs_view"] == bool(row["ideal"]) == (row["shown_by"] is None)
        assert [call["reference_image"] for call in row["ideal"][1:]] in ([], [5])


def test_the_turn_brings_the_named_object_where_the_words_say(found):
    """By the camera's heading before a walk, and by the images: one alone shows the object, as far from its middle."""
    sides = {"straight ahead": 0, "on your right": 90, "behind you": 180, "on your left": 270}
    for row in found:
        colour, side = re.search(
            r"the (\w+) object is (straight ahead|behind you|on your \w+)", row["question"]
        ).groups()
        turns = [call for call in row["ideal"] if call["motion_type"] == "dangle"]
        camera = cameras_after(row, turns)
        room = random_room(row["scene"]["room"])
        thing = next(thing for thing in room.things if thing.colour == colour)
        bearing = np.degrees(np.arctan2(thing.x - camera[0, 3], thing.z - camera[2, 3]))
        off = bearing - yaw_of(camera) - sides[side]
        assert abs((off + 180) % 360 - 180) <= 5
        angles = [view["angle"][colour] for view in row["shows"][:4] if colour in view["angle"]]
        assert angles == [turns[0]["value"] if turns else 0]
        assert f" {colour}" not in str(row["options"])


def test_words_tell_neither_whether_to_turn_nor_which_way(found):
    ways = defaultdict(Counter)
    for row in data.balance_wordings(found):
        wording = " ".join(word for word in row["question"].split() if word not in COLOURS)
        turns = [call["value"] for call in row["ideal"] if call["motion_type"] == "dangle"]
        ways[row["category"], wording][np.sign(sum(turns))] += 1
    assert all(2 * count[-1] == 2 * count[1] == count[0] for count in ways.values())
    assert {family for family, _ in ways} == {"turning", "walking"}


def test_no_picture_is_shown_twice_and_every_view_is_what_its_calls_lead_to(found):
    views = [path for row in found for path in row["views"]]
    assert len(set(views)) == len(views) > 20
    for row in found[::4]:
        assert len({*row["images"], *row["views"]}) == 4 + len(row["ideal"])
        cameras = call_poses(row["scene"], row["ideal"])
        pictures = render(random_room(row["scene"]["room"]), cameras)["rgb"]
        for path, rgb in zip([*row["images"], *row["views"]], pictures, strict=True):
            assert np.abs(load_image(path).astype(int) - rgb).max() <= 1


def test_a_family_does_not_depend_on_the_others(tmp_path):
    alone = data.room_questions(3, tmp_path, ["turning"])
    among = data.room_questions(3, tmp_path, ["commanded", "walking", "turning"])
    assert alone and alone == [row for row in among if row["category"] == "turning"]


def test_letters_are_balanced_and_options_differ(made):
    rows = load_jsonl(made / "questions_train.jsonl")
    letters = Counter(row["answer"] for row in rows)
    assert all(0.15 < letters[letter] / len(rows) < 0.35 for letter in "ABCD")
    assert all(len({option[3:] for option in row["options"]}) == 4 for row in rows)


def test_facts_of_a_picture_drawn_by_hand():
    """Thing 1: a 10 x 10 square at the left; thing 2: 5 x 5 at the right; the centre is empty."""
    ids = np.zeros((32, 32), int)
    ids[10:20, 0:10], ids[10:15, 26:31] = 1, 2
    found = questions.facts(ids, 3)
    assert found == {
        "largest": 0,
        "leftmost": 0,
        "rightmost": 1,
        "left": 0,
        "centre": -1,
        "right": 1,
        "angle": {0: -30, 1: 45},
    }
    ids[10:20, 20:30] = 3  # as large as thing 1, two columns left of thing 2
    assert questions.facts(ids, 3)["largest"] is None
    assert questions.facts(np.zeros((32, 32), int), 3)["largest"] == -1


def test_folders_that_cannot_be_stop_with_a_sentence_before_anything_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below/it"):
        with pytest.raises(
            SystemExit, match=f"--out .*{out} cannot be a folder: .*/file is a file"
        ):
            data.main(["triples", "--rooms", "1", "--out", str(tmp_path / out)])


def test_a_folder_without_scans_stops_with_a_sentence(tmp_path):
    pytest.importorskip("extras.scans.dataset")
    (tmp_path / "file").write_text("")
    for root in ("nowhere", "file"):
        command = ["triples", "--dataset", "scannet", "--root", str(tmp_path / root)]
        with pytest.raises(SystemExit, match=f"--root .*{root} is no folder"):
            data.main([*command, "--out", str(tmp_path / "out")])


def test_the_papers_numbers_are_the_same_for_rooms_and_scans():
    papers = (data.MIN_COVERAGE, data.MIN_METERS, data.MIN_DEGREES)
    rules = pytest.importorskip("extras.scans.triples").Rules()
    assert papers == (0.85, 1.0, 30.0)
    assert papers == (rules.coverage, rules.apart_meters, rules.apart_degrees)


def test_bad_files_stop_with_a_sentence(made, tmp_path):
    broken = tmp_path / "broken.png"
    source = next((made / "questions").rglob("1.png"))
    broken.write_bytes(source.read_bytes()[:200])
    with pytest.raises(SystemExit, match="truncated"):
        load_image(broken)
    with pytest.raises(SystemExit, match=r"gone\.png does not exist\.$"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(SystemExit, match="python data.py questions"):
        load_jsonl(tmp_path / "questions_train.jsonl")
    (tmp_path / "questions_train.jsonl").write_text('{"id": 1}\n{"id"')
    with pytest.raises(SystemExit, match="line 2"):
        load_jsonl(tmp_path / "questions_train.jsonl")
