"""World2VLM's questions about rooms and scans as files: pytest tests/test_world2vlm_data.py.  CPU, 10 s."""

from collections import Counter

import numpy as np
import pytest

import data
from extras.world2vlm import questions
from extras.world2vlm.questions import make_room_questions
from extras.world2vlm.rewards import world2vlm
from extras.world2vlm.words import TASKS
from lib.images import load_image, save_image
from lib.records import SPLITS, load_jsonl, save_jsonl
from lib.rooms import TrueRenderer, random_room, render
from lib.simulators import read_instruction


@pytest.fixture(scope="module")
def motions(tmp_path_factory):
    out = tmp_path_factory.mktemp("motions")
    make_room_questions(out, rooms=10, held_out=(3, 3), threads=2)
    return out


def test_the_questions_are_complete_and_true(motions):
    """Pictures are what the cameras of "scene" see, every answer earns full reward, splits share no room."""
    rooms = {}
    for split in SPLITS:
        rows = load_jsonl(motions / f"questions_{split}.jsonl")
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
                for path, view in zip(row["images"], true, strict=True)
            )
    assert {
        task for row in load_jsonl(motions / "questions_train.jsonl") for task in [row["category"]]
    } == set(TASKS)
    sets = list(rooms.values())
    assert sum(map(len, sets)) == len(set.union(*sets)) and len(rooms["train"]) == 10


def test_the_labels_are_balanced_over_the_whole_split(motions):
    rows = load_jsonl(motions / "questions_train.jsonl")
    said = Counter(
        (row["category"], row["answer"]) for row in rows if row["category"] in ("A4", "D2", "D4")
    )
    assert (
        said["A4", "true"] == said["A4", "false"] > 5 and said["D2", "yes"] == said["D2", "no"] > 0
    )
    ways = Counter(" ".join(row["answer"].split()[:2]) for row in rows if row["category"] == "A1")
    assert len(ways) == 4 and len(set(ways.values())) == 1


def test_the_files_are_the_same_again(motions, tmp_path):
    make_room_questions(tmp_path, rooms=10, held_out=(3, 3), threads=1)
    for split in SPLITS:
        assert (tmp_path / f"questions_{split}.jsonl").read_bytes() == (
            motions / f"questions_{split}.jsonl"
        ).read_bytes()


def test_a_world_model_teaches_what_it_imagines(motions, tmp_path, monkeypatch):
    """Pictures are its own, motions those that it has seen; what is held out stays true."""

    class Blurred:
        asked = []

        def imagine(self, queries):
            self.asked.append(len(queries))
            views = TrueRenderer().imagine(queries)
            return [
                np.random.default_rng(query.seed).normal(view, 10).clip(0, 255).astype(np.uint8)
                for query, view in zip(queries, views, strict=True)
            ]

    make_room_questions(tmp_path, Blurred(), rooms=9, held_out=(3, 3))
    assert Blurred.asked[0] == 8 * 8  # eight rooms, eight programs each
    rows = load_jsonl(tmp_path / "questions_train.jsonl")
    assert not any("backward 0" in row["answer"] or "backward 1" in row["answer"] for row in rows)
    for file in ("questions_val.jsonl", "questions_test.jsonl"):
        assert (tmp_path / file).read_bytes() == (motions / file).read_bytes()
    with pytest.raises(SystemExit, match="python train_wm.py"):
        questions.main(["--teacher", str(tmp_path / "none"), "--out", str(tmp_path)])


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
                    "id": f"scannet/{split}{n}",
                    "context": [f"{n}.png", f"{n + 1}.png"],
                    "reference": 2,
                    "motion": {"kind": "dx", "amount": 1.0},
                    "target": "3.png",
                    "warp": "3.png",
                    "scene": f"scannet/{split}{n}",
                    "metric": n != 1,
                }
                for n in (0, 0, 1, 2)
            ],
        )
    command = [
        "--anchors",
        str(tmp_path),
        "--teacher",
        str(tmp_path / "wm"),
        "--out",
        str(tmp_path / "out"),
    ]
    questions.main([*command, "--limit", "1"])
    first = len(Teacher.motions)
    log = tmp_path / "out" / "records_train.jsonl"
    log.write_text(log.read_text() + '{"torn')
    questions.main(command)
    both = len(Teacher.motions)
    questions.main(command)
    assert (
        1.5 * first < both < 2.5 * first and len(Teacher.motions) == both
    )  # what was done is not done again
    assert max(abs(motion.amount) for motion in Teacher.motions if motion.unit == "meters") == 1.0
    assert max(abs(motion.amount) for motion in Teacher.motions if motion.unit == "degrees") == 45.0
    for split in SPLITS:
        rows = load_jsonl(tmp_path / "out" / f"questions_{split}.jsonl")
        assert {row["cluster"] for row in rows} <= {
            f"scannet/{split}0",
            f"scannet/{split}2",
        } and rows
        assert {row["category"] for row in rows} <= {"A1", "A2", "A3", "A4"}
        for row in rows:
            assert load_image(row["images"][-1]).shape == (50, 66, 3)
            assert load_image(row["images"][0])[0, 0, 0] in (40, 120)
    with pytest.raises(SystemExit):
        questions.main(["--anchors", str(tmp_path)])  # nobody renders scans truly


def test_a_teacher_without_scans_to_start_from_is_told(tmp_path, monkeypatch):
    """Rooms' triples name no metric scale: six empty files are no success."""
    monkeypatch.setattr("world_model.WorldModel.load", lambda *where: None)
    (tmp_path / "wm").mkdir()
    data.make_triples(tmp_path / "rooms", rooms=1, held_out=1, threads=1)
    with pytest.raises(
        SystemExit, match="No question was made: --anchors .* must hold triples of scans"
    ):
        questions.main(
            [
                "--anchors",
                str(tmp_path / "rooms"),
                "--teacher",
                str(tmp_path / "wm"),
                "--out",
                str(tmp_path),
            ]
        )
