"""Triples and questions: pytest tests/test_data.py"""

import json
from collections import Counter

import numpy as np
import pytest

import data
from extras.world2vlm.rewards import world2vlm
from extras.world2vlm.words import TASKS
from lib import questions
from lib.geometry import (
    Motion,
    decompose,
    dominant_motion,
    instruction,
    move_camera,
    read_instruction,
)
from lib.images import load_image, save_image
from lib.records import SPLITS, save_jsonl
from lib.rooms import TrueRenderer, random_room, render

ROOMS = 24
RING_0 = [
    "1_turn_right_90",
    "1_turn_right_135",
    "1_turn_right_45",
    "1_turn_left_135",
    "1_turn_left_180",
    "1_turn_left_90",
    "1_move_right_0.5",
    "1_move_forward_1",
]


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
        for row in data.load_jsonl(made / f"{name}.jsonl"):
            room = random_room(row["room"] if "room" in row else row["scene"]["room"])
            for path, view in zip(row[images], render(room, np.array(poses(row)))["rgb"]):
                assert np.abs(load_image(path).astype(int) - view).max() <= 1


def test_a_triple_is_what_its_words_say(made):
    rows = data.load_jsonl(made / "triples_train.jsonl")
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

    row = data.load_jsonl(made / "triples_train.jsonl")[0]
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


def test_shuffled_is_the_ring_in_another_order_and_six_is_a_finer_ring():
    orders = set()
    for seed in range(40):
        ring, shuffled, six = (
            data.LAYOUTS[name](np.random.default_rng(seed)) for name in ("ring", "shuffled", "six")
        )
        order = tuple(next(i for i in range(4) if np.array_equal(ring[i], c2w)) for c2w in shuffled)
        assert sorted(order) == [0, 1, 2, 3]
        orders.add(order)
        for views, step in ((ring, 90), (six, 60)):
            turns = [decompose(a, b) for a, b in zip(views, views[1:] + views[:1])]
            np.testing.assert_allclose(turns, [[0, 0, 0, -step, 0, 0]] * (360 // step), atol=1e-6)
    assert len(orders) > 15  # of 24


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


@pytest.mark.parametrize("layout", ["shuffled", "six", "apart"])
def test_triples_of_a_layout_are_what_they_say(layout, tmp_path):
    rows = [row for seed in range(3) for row in data.room_triples(seed, tmp_path, layout)]
    assert len(rows) > 10 and {len(row["context"]) for row in rows} == {6 if layout == "six" else 4}
    assert min(row["coverage"] for row in rows) >= 0.85
    for row in rows[::4]:
        poses, target, motion = (
            [np.array(p) for p in row["context_c2w"]],
            np.array(row["target_c2w"]),
            row["motion"],
        )
        np.testing.assert_allclose(
            move_camera(poses[row["reference"] - 1], Motion(**motion)), target, atol=1e-5
        )
        seen = render(random_room(row["room"]), np.stack([*poses, target]))["rgb"]
        for path, view in zip([*row["context"], row["target"]], seen):
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
    assert [row["id"].split("/")[1] for row in rows] == RING_0


def test_folders_of_layouts(tmp_path, monkeypatch):
    for layout in data.LAYOUTS:
        for size in (32, 64):
            assert data.layout_of(data.folder_of(layout, size)) == (layout, size)
    assert data.layout_of("/x/mine") == data.layout_of("out/data") == ("ring", 32)
    assert (
        data.parse_args(["triples", "--layout", "apart", "--size", "64"]).out == "out/data-apart-64"
    )
    assert data.parse_args([]).out == "out/data"
    with pytest.raises(SystemExit):
        data.parse_args(["questions", "--layout", "six"])
    made = []
    monkeypatch.setattr(
        data, "make_triples", lambda folder, **more: made.append((folder.name, more))
    )
    data.ensure(tmp_path / "data-six", ["triples"], threads=1)
    assert made == [("data-six", {"threads": 1, "layout": "six", "size": 32})]


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


def test_answers_are_true_and_an_unseen_view_is_needed(made):
    """Look through the commanded camera: the answer is what stands there, and the reference image says otherwise."""
    rows, counts = data.load_jsonl(made / "questions_train.jsonl"), Counter()
    for row in rows:
        answer = row["options"]["ABCD".index(row["answer"])].split(". ")[1]
        poses = [np.array(p) for p in row["scene"]["poses"]]
        counts[row["category"], row["needs_view"]] += 1
        if row["category"] == "camera-camera":
            assert dominant_motion(*poses).kind == "move " + answer.split()[-1]
            continue
        camera = (
            poses[row["shown_by"] - 1]
            if row["shown_by"]
            else move_camera(
                poses[row["motion"]["image"] - 1],
                Motion(row["motion"]["kind"], row["motion"]["amount"]),
            )
        )
        room, found = true_facts(row, camera)
        assert room.things[found[row["ask"]]].colour == answer
        if row["needs_view"]:
            assert (
                found[row["ask"]]
                != true_facts(row, poses[row["motion"]["image"] - 1])[1][row["ask"]]
            )
        if row["category"] == "rotation":  # the turn ends exactly where the given image stands
            turned = move_camera(
                poses[row["motion"]["image"] - 1],
                Motion(row["motion"]["kind"], row["motion"]["amount"]),
            )
            np.testing.assert_allclose(turned, camera, atol=1e-5)
    assert set(c for c, _ in counts) == {
        "camera-object",
        "object-object",
        "region",
        "camera-camera",
        "rotation",
    }
    need = sum(n for (_, needs), n in counts.items() if needs)
    assert abs(need / len(rows) - 0.5) < 0.05


def test_letters_are_balanced_and_options_differ(made):
    rows = data.load_jsonl(made / "questions_train.jsonl")
    letters = Counter(row["answer"] for row in rows)
    assert max(letters.values()) - min(letters.values()) <= 2 and len(letters) == 4
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
        "seen": [0, 1],
    }
    ids[10:20, 20:30] = 3  # as large as thing 1, two columns left of thing 2
    assert questions.facts(ids, 3)["largest"] is None
    assert questions.facts(np.zeros((32, 32), int), 3)["largest"] == -1


def test_mindcube_layout(made, tmp_path):
    data.make_mindcube(tmp_path, made / "questions_test.jsonl")
    rows = [
        json.loads(line)
        for line in (tmp_path / "raw" / "MindCube_tinybench.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 8 and all(
        (tmp_path / image).exists() for row in rows for image in row["images"]
    )
    assert all(
        row["id"].startswith(("rotation_", "around_"))
        and f" {row['gt_answer']}. " in row["question"]
        for row in rows
    )


# ---- World2VLM ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def motions(tmp_path_factory):
    out = tmp_path_factory.mktemp("motions")
    data.make_world2vlm(out, rooms=10, held_out=(3, 3), threads=2)
    return out


def test_world2vlm_s_questions_are_complete_and_true(motions, made):
    """Pictures are what the cameras of "scene" see, every answer earns full reward, splits share no room."""
    rooms, others = {}, {row["room"] for row in data.load_jsonl(made / "triples_train.jsonl")}
    for split in SPLITS:
        rows = data.load_jsonl(motions / f"questions_{split}.jsonl")
        rooms[split] = {row["scene"]["room"] for row in rows}
        assert rows and len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            assert row.keys() == {
                "id",
                "bench",
                "images",
                "question",
                "options",
                "answer",
                "category",
                "kind",
                "needs_view",
                "weight",
                "negative",
                "scene",
            }
            assert (row["bench"], row["kind"], row["options"], row["weight"]) == (
                "world2vlm",
                "na",
                [],
                1,
            )
            assert world2vlm(row["category"], row["answer"], row["answer"])[
                "total"
            ] == pytest.approx(1)
            assert (
                len(row["images"])
                == len(row["scene"]["poses"])
                == (1 if row["category"] == "D2" else 2)
            )
        for row in rows[::20]:
            true = render(random_room(row["scene"]["room"]), np.array(row["scene"]["poses"]))["rgb"]
            assert all(
                np.abs(load_image(path).astype(int) - view).max() <= 1
                for path, view in zip(row["images"], true)
            )
    assert {
        task
        for row in data.load_jsonl(motions / "questions_train.jsonl")
        for task in [row["category"]]
    } == set(TASKS)
    sets = [others, *rooms.values()]
    assert sum(map(len, sets)) == len(set.union(*sets)) and len(rooms["train"]) == 10


def test_world2vlm_s_labels_are_balanced_over_the_whole_split(motions):
    rows = data.load_jsonl(motions / "questions_train.jsonl")
    said = Counter(
        (row["category"], row["answer"]) for row in rows if row["category"] in ("A4", "D2", "D4")
    )
    assert (
        said["A4", "true"] == said["A4", "false"] > 5 and said["D2", "yes"] == said["D2", "no"] > 0
    )
    ways = Counter(" ".join(row["answer"].split()[:2]) for row in rows if row["category"] == "A1")
    assert len(ways) == 4 and len(set(ways.values())) == 1


def test_world2vlm_s_files_are_the_same_again(motions, tmp_path):
    data.make_world2vlm(tmp_path, rooms=10, held_out=(3, 3), threads=1)
    for split in SPLITS:
        assert (tmp_path / f"questions_{split}.jsonl").read_bytes() == (
            motions / f"questions_{split}.jsonl"
        ).read_bytes()


def test_a_world_model_teaches_what_it_imagines(motions, tmp_path, monkeypatch):
    """Pictures are its own, motions those that it has seen, and the weight says how far its two tries agree.

    What is held out stays true.
    """

    class Blurred:
        asked = []

        def imagine(self, queries):
            self.asked.append(len(queries))
            views = TrueRenderer().imagine(queries)
            return [
                np.random.default_rng(query.seed).normal(view, 10).clip(0, 255).astype(np.uint8)
                for query, view in zip(queries, views)
            ]

    monkeypatch.setattr("world_model.WorldModel.load", lambda *where: Blurred())
    (tmp_path / "wm").mkdir()
    data.make_world2vlm(tmp_path, str(tmp_path / "wm"), rooms=9, held_out=(3, 3))
    assert Blurred.asked[0] == 8 * 2 * 8  # eight rooms, two tries, eight programs each
    rows = data.load_jsonl(tmp_path / "questions_train.jsonl")
    assert not any("backward 0" in row["answer"] or "backward 1" in row["answer"] for row in rows)
    assert all(0.5 < row["weight"] < 1 for row in rows)
    for file in ("questions_val.jsonl", "questions_test.jsonl"):
        assert (tmp_path / file).read_bytes() == (motions / file).read_bytes()
    with pytest.raises(SystemExit, match="python train_wm.py"):
        data.main(["world2vlm", "--teacher", str(tmp_path / "none"), "--out", str(tmp_path)])


def test_a_world_model_teaches_from_scans(tmp_path, monkeypatch):
    """From every context with a scale, by steps that a teacher can do; its pictures come in the size of the scan's."""

    class Teacher:
        motions = []

        def imagine(self, queries):
            self.motions += [read_instruction(query.instruction)[1] for query in queries]
            return [
                np.random.default_rng(query.seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
                for query in queries
            ]

    monkeypatch.setattr("world_model.WorldModel.load", lambda *where: Teacher())
    (tmp_path / "wm").mkdir()
    for n in range(4):
        save_image(tmp_path / f"{n}.png", np.full((50, 66, 3), 40 * n, np.uint8))
    for split in SPLITS:
        save_jsonl(
            tmp_path / f"triples_{split}.jsonl",
            [
                {
                    "context": [f"{n}.png", f"{n + 1}.png"],
                    "reference": 2,
                    "scene": f"scannet/{split}{n}",
                    "metric": n != 1,
                    "context_intrinsics": [[[33, 0, 33], [0, 33, 25], [0, 0, 1]]] * 2,
                }
                for n in (0, 0, 1, 2)
            ],
        )
    command = [
        "world2vlm",
        "--anchors",
        str(tmp_path),
        "--teacher",
        str(tmp_path / "wm"),
        "--out",
        str(tmp_path / "out"),
    ]
    data.main([*command, "--limit", "1"])
    first = len(Teacher.motions)
    log = tmp_path / "out" / "records_train.jsonl"
    log.write_text(log.read_text() + '{"torn')
    data.main(command)
    both = len(Teacher.motions)
    data.main(command)
    assert (
        1.5 * first < both < 2.5 * first and len(Teacher.motions) == both
    )  # what was done is not done again
    assert max(motion.amount for motion in Teacher.motions if motion.unit == "meters") == 1.0
    assert max(motion.amount for motion in Teacher.motions if motion.unit == "degrees") == 45.0
    for split in SPLITS:
        rows = data.load_jsonl(tmp_path / "out" / f"questions_{split}.jsonl")
        assert {row["cluster"] for row in rows} <= {
            f"scannet/{split}0",
            f"scannet/{split}2",
        } and rows
        assert {row["category"] for row in rows} <= {"A1", "A2", "A3", "A4"}
        for row in rows:
            assert load_image(row["images"][-1]).shape == (50, 66, 3)
            assert load_image(row["images"][0])[0, 0, 0] in (40, 120)
    with pytest.raises(SystemExit):
        data.main(["world2vlm", "--anchors", str(tmp_path)])  # nobody renders scans truly


def test_a_teacher_without_scans_to_start_from_is_told(made, tmp_path, monkeypatch):
    """Rooms' triples name no metric scale: six empty files are no success."""
    monkeypatch.setattr("world_model.WorldModel.load", lambda *where: None)
    (tmp_path / "wm").mkdir()
    with pytest.raises(
        SystemExit, match="No question was made: --anchors .* must hold triples of scans"
    ):
        data.main(
            [
                "world2vlm",
                "--anchors",
                str(made),
                "--teacher",
                str(tmp_path / "wm"),
                "--out",
                str(tmp_path),
            ]
        )


def test_mining_does_not_drop_another_corpus(tmp_path, monkeypatch):
    def mine(corpus, out):
        rows = [
            {"id": f"{corpus}/{i}", "images": [], "options": ["A. red", "B. blue"]}
            for i in range(40)
        ]
        save_jsonl(tmp_path / corpus / "questions_train.jsonl", rows)
        data.mine(tmp_path / corpus / "questions_train.jsonl", tmp_path / out, "policy")

    def mined(out):
        return [
            row["id"]
            for split in ("train", "val")
            for row in data.load_jsonl(tmp_path / out / f"questions_{split}.jsonl")
        ]

    monkeypatch.setattr(
        data,
        "ask_often",
        lambda questions, out, asked: save_jsonl(
            out / "answers.jsonl",
            [{"id": question["id"], "right": 0, **asked} for question in questions],
        ),
    )
    mine("vst", "mined")
    with pytest.raises(SystemExit, match="holds questions of something else, .* --out of its own"):
        mine("sensenova", "mined")
    mine("sensenova", "other")
    mine("vst", "mined")  # the same again may be made anew
    assert {id.split("/")[0] for id in mined("mined")} == {"vst"} and len(mined("mined")) == len(
        mined("other")
    ) == 40


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--at-most", "9", "--samples", "2"], "--at-most 9 of --samples 2: must be"),
        (["--at-most", "-1"], "--at-most -1 of"),
        (["--at-most", "5"], "none or all questions are kept"),
    ],
)
def test_mining_that_keeps_all_or_none_is_refused(words, sentence, capsys):
    with pytest.raises(SystemExit):
        data.parse_args(["mine", "--questions", "q", "--policy", "p", *words])
    assert sentence in capsys.readouterr().err
    assert (
        data.parse_args(["mine", "--questions", "q", "--policy", "p", "--at-most", "4"]).at_most
        == 4
    )


def test_folders_that_cannot_be_are_told_before_anything_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below/it"):
        with pytest.raises(
            SystemExit, match=f"--out .*{out} cannot be a folder: .*/file is a file"
        ):
            data.main(["triples", "--rooms", "1", "--out", str(tmp_path / out)])
    for root in ("nowhere", "file"):
        for command in (
            ["triples", "--dataset", "scannet"],
            ["corpus", "--corpus", "vst"],
            ["depth"],
        ):
            with pytest.raises(SystemExit, match=f"--root .*{root} is no folder"):
                data.main(
                    [*command, "--root", str(tmp_path / root), "--out", str(tmp_path / "out")]
                )


def test_the_papers_numbers_stand_in_one_place():
    rules = data.Rules()
    assert (data.MIN_COVERAGE, data.MIN_METERS, data.MIN_DEGREES) == (0.85, 1.0, 30.0)
    assert (
        data.parse_args(["triples"]).coverage == rules.coverage
        and rules.apart_degrees == data.MIN_DEGREES
    )


def test_bad_files_stop_with_a_sentence(made, tmp_path):
    broken = tmp_path / "broken.png"
    source = next((made / "questions").rglob("1.png"))
    broken.write_bytes(source.read_bytes()[:200])
    with pytest.raises(SystemExit, match="truncated"):
        load_image(broken)
    with pytest.raises(SystemExit, match="python data.py questions"):
        data.load_jsonl(tmp_path / "questions_train.jsonl")
    (tmp_path / "questions_train.jsonl").write_text('{"id": 1}\n{"id"')
    with pytest.raises(SystemExit, match="line 2"):
        data.load_jsonl(tmp_path / "questions_train.jsonl")
