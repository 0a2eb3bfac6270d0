"""Triples and questions: pytest tests/test_data.py"""

import json
from collections import Counter

import numpy as np
import pytest

import old_data as data
from extras.world2vlm.rewards import world2vlm
from extras.world2vlm.words import TASKS
from lib.geometry import (
    read_instruction,
)
from lib.images import load_image, save_image
from lib.records import SPLITS, save_jsonl
from lib.rooms import TrueRenderer, random_room, render

ROOMS = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    data.make_triples(out, rooms=6, held_out=2, threads=1)
    data.make_questions(out, rooms=ROOMS, held_out=(2, 2), threads=2)
    return out


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
