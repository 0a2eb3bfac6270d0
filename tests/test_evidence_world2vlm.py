"""World2VLM's rows: every command is one that its stage understands, the table adds up, the data are what they say."""

import json

import pytest

import evaluate
import train_sft
from experiments import world2vlm as evidence_world2vlm
from experiments.world2vlm import (
    DATA,
    RUNS,
    Data,
    Run,
    blind_answers,
    commands,
    constant_answers,
    given,
    make_questions,
)
from extras.world2vlm import evaluate as evaluate_motions
from extras.world2vlm import train, train_rl
from lib.records import load_jsonl, save_jsonl
from lib.rooms import FURNISHED, random_room
from lib.stage import parse_flags

PARSERS = {
    "train_sft.py": train_sft.parse_args,
    "-m extras.world2vlm.train": train.parse_args,
    "-m extras.world2vlm.train_rl": train_rl.parse_args,
    "-m extras.world2vlm.evaluate": lambda flags: parse_flags("", evaluate_motions.FLAGS, flags),
    "evaluate.py": evaluate.parse_args,
}


def answered(out, name, reward, exact, seed=0, seconds=100):
    """A finished row on disk: 20 rooms, each asked A2 (the way is right in half of them) and D2."""
    folder = out / f"{name}-s{seed}"
    save_jsonl(
        folder / "asked/predictions.jsonl",
        [
            {
                "key": f"{room}/{task}",
                "scene": room,
                "category": task,
                "correct": reward,
                "exact": exact,
                "parts": {"action": float(room < 10)},
            }
            for room in range(20)
            for task in ("A2", "D2")
        ],
    )
    (folder / "result.json").write_text(json.dumps({"commands": [], "cpu_seconds": seconds}))


def test_every_row_is_one_the_stages_understand(tmp_path):
    assert len({run.name for run in RUNS}) == len(RUNS)
    for run in RUNS:
        told = commands(run, 3, tmp_path)
        for script, flags in told:
            args = PARSERS[script](flags)
            assert "evaluate" in script or args.seed == 3
        stages = len(run.sft) + (run.rl is not None)
        assert len(told) == (0 if run.drift or run.name in ("constant", "blind") else stages + 1)
        assert run.data in DATA and run.of in {
            "",
            "direct",
            "phase2",
            *{row.name for row in RUNS} - {run.name},
        }
    learned = {
        run.name: sum(
            PARSERS[script](flags).steps
            for script, flags in commands(run, 0, tmp_path)[: len(run.sft)]
        )
        for run in RUNS
        if run.sft
    }
    assert {name for name, steps in learned.items() if steps != 1500} == {
        "lessons",
        "sft-lessons",
        "grpo-lessons",
    }


def test_stages_start_where_the_one_before_ended(tmp_path):
    run = Run("x", sft=("--lambda-inv 0",), rl="--steps 2")
    (_, first), (_, second), (_, asked) = commands(run, 1, tmp_path)
    assert (
        second[second.index("--policy") + 1]
        == first[first.index("--out") + 1]
        == f"{tmp_path}/x-s1/1"
    )
    assert (
        asked[asked.index("--policy") + 1]
        == second[second.index("--out") + 1]
        == f"{tmp_path}/x-s1/rl"
    )
    (_, learned), _ = commands(next(run for run in RUNS if run.name == "grpo"), 1, tmp_path)
    assert learned[learned.index("--policy") + 1] == f"{tmp_path}/sft-s1/3"
    starts = {
        run.name: flags[flags.index("--start") + 1]
        for run in RUNS
        if run.rooms and run.sft
        for flags in [commands(run, 1, tmp_path)[0][1]]
    }
    assert starts == {
        "lessons": "out/demo/sft",
        "sft-lessons": f"{tmp_path}/sft-s1/3",
        "grpo-lessons": f"{tmp_path}/grpo-s1/rl",
    }
    for name, mode, policy in (
        ("search", "search", "out/demo/phase2"),
        ("direct-only", "direct", "out/demo/direct"),
    ):
        ((_, asked),) = commands(next(run for run in RUNS if run.name == name), 1, tmp_path)
        assert (asked[asked.index("--policy") + 1], asked[asked.index("--mode") + 1]) == (
            policy,
            mode,
        )


def test_the_table_says_what_the_answers_say(tmp_path):
    answered(tmp_path, "sft", 0.5, 0.0), answered(tmp_path, "sft", 1.0, 1.0, seed=1, seconds=200)
    answered(tmp_path, "grpo", 0.25, 0.0)
    (tmp_path / "drift-tuned-s0").mkdir()
    (tmp_path / "drift-tuned-s0/result.json").write_text(
        json.dumps(
            {"commands": [], "cpu_seconds": 0, "drift": [{"mse": 0.5, "meters": 0.1, "degrees": 2}]}
        )
    )
    lines = evidence_world2vlm.table(tmp_path)
    split = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    head, _, *rows = split
    told = {row[0]: dict(zip(head, row)) for row in rows}
    assert list(told) == ["sft", "grpo"] and all(len(row) == len(head) for row in rows)
    assert (
        told["sft"]["A2"] == "0.75 [0.75 0.75] 0.50"
        and told["grpo"]["D2"] == "0.25 [0.25 0.25] 0.00"
    )
    assert (
        told["sft"]["A2 way"].startswith("0.50 [0.")
        and told["sft"]["A1 way"] == told["sft"]["A1"] == ""
    )
    assert (told["sft"]["seeds"], told["sft"]["train CPU-s"]) == ("0 1", "150")
    assert (told["sft"]["all"], told["sft"]["over sft"]) == ("0.750", "")
    assert (told["grpo"]["all"], told["grpo"]["over sft"]) == ("0.250", "-0.500 [-0.500 -0.500]")
    assert lines[-1] == "drift-tuned-s0 step 1: mse 0.500, meters 0.100, degrees 2.000"


def test_answers_about_rooms_are_compared_on_the_same_questions(tmp_path):
    def asked(row, right, seconds):
        """A row's answers to questions 0, 1, ...: the even ones need a view, of rooms 0 and 1 in turn."""
        save_jsonl(
            tmp_path / row / "asked/predictions.jsonl",
            [
                {
                    "key": str(i),
                    "scene": i // 2 % 2,
                    "correct": float(hit),
                    "needs_view": i % 2 == 0,
                    "seconds": seconds,
                    "category": (
                        "camera-camera",
                        "camera-object",
                        "object-object",
                        "region",
                        "rotation",
                    )[i % 5],
                    "cost": {"rendered": i},
                }
                for i, hit in enumerate(right)
            ],
        )
        (tmp_path / row / "result.json").write_text(json.dumps({"commands": [], "cpu_seconds": 0}))

    (
        asked("direct-only-s0", (1, 0, 0, 0, 1, 0, 0, 0), 0.5),
        asked("direct-only-s1", (1, 1, 0, 0, 1, 1, 0, 0), 0.5),
    )
    asked("search-s0", (1, 1, 1, 0), 2)  # none about rotations
    lines = evidence_world2vlm.table(tmp_path)
    head, _, first, second = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[:-1]
    ]
    first, second = dict(zip(head, first)), dict(zip(head, second))
    assert [
        first[key]
        for key in (
            "row",
            "seeds",
            "questions",
            "right",
            "needs_view",
            "answerable",
            "camera-object",
            "over direct-only",
        )
    ] == ["direct-only", "0 1", "8", "0.375", "0.500", "0.250", "0.250", ""]
    assert (second["right"], second["seconds"], second["views"]) == ("0.750", "2.000", "1.5")
    assert second["rotation"] == ""
    assert second["over direct-only"].startswith(
        "+0.375 [+0.250 +0.500"
    )  # 0 to 3 alone: .75 over .375


def test_the_best_constant_answer_by_hand():
    rows = [
        {
            "id": f"{task}{i}",
            "bench": "world2vlm",
            "category": task,
            "answer": answer,
            "scene": {"room": i},
        }
        for task, answers in (
            ("A4", ("true", "false", "false")),
            ("A2", ("turn left 20 degrees",) * 2),
        )
        for i, answer in enumerate(answers)
    ]
    records = {record["key"]: record for record in given(rows, constant_answers(rows))}
    assert [records[f"A4{i}"]["answer"] for i in range(3)] == ["false"] * 3
    assert [records[f"A4{i}"]["correct"] for i in range(3)] == pytest.approx([0.2, 1, 1])
    assert [records[f"A4{i}"]["exact"] for i in range(3)] == [0, 1, 1] and records["A21"][
        "exact"
    ] == 1


def test_blind_answers_go_by_actions_and_the_nearest_numbers():
    def row(box, action, answer):
        return {
            "category": "D2",
            "answer": answer,
            "question": f'The ball is at bbox [{box}, 5]. After the camera does "{action}", does it disappear?',
        }

    known = [
        row(10, "turn left 20 degrees", "no"),
        row(900, "turn left 20 degrees", "yes"),
        row(10, "turn right 20 degrees", "yes"),
        row(20, "turn right 20 degrees", "yes"),
    ]
    asked = [
        row(100, "turn left 20 degrees", "?"),
        row(800, "turn left 20 degrees", "?"),
        row(100, "turn right 30 degrees", "?"),
        row(100, "move left 1 meters", "?"),
    ]
    assert blind_answers(asked, known, neighbours=1) == [
        "no",
        "yes",
        "yes",
        "yes",
    ]  # the last: what is commonest


def test_rooms_of_other_kinds_are_furnished_otherwise_and_the_usual_ones_as_ever():
    assert [len(random_room(seed).things) for seed in (0, 5_999_999, 8_000_000)] == [6, 6, 6]
    for first, things in FURNISHED.values():
        assert {len(random_room(first + i).things) for i in (0, 999_999)} == {things}
    assert random_room(7, things=6) == random_room(7)


def test_questions_of_mixed_rooms_come_half_from_each_kind(tmp_path, monkeypatch):
    monkeypatch.setitem(
        evidence_world2vlm.DATA, "some", Data(4, seen=True, firsts=(10_000_000, 11_000_000))
    )
    make_questions("some", tmp_path)
    folder = tmp_path / "data/some"
    rows = load_jsonl(folder / "questions_train.jsonl")
    assert {row["scene"]["room"] for row in rows} <= {
        10_000_000,
        10_000_001,
        11_000_000,
        11_000_001,
    }
    assert not any("move backward" in row["answer"] for row in rows)
    assert load_jsonl(folder / "questions_val.jsonl") == []
    assert sum(row["category"] in ("D1", "D3") for row in rows) <= 0.1 * len(rows)
    make_questions("some", tmp_path)  # again: nothing is made or left out
    assert load_jsonl(folder / "questions_train.jsonl") == rows


def test_a_finished_row_is_kept_and_one_of_other_commands_refused(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(evidence_world2vlm, "call", lambda *command: calls.append(command))
    for _ in range(2):
        evidence_world2vlm.finish(Run("start"), 0, tmp_path)
    assert [script for script, *_ in calls] == ["-m", "-m"]
    with pytest.raises(SystemExit, match="was made with"):
        evidence_world2vlm.finish(Run("start", of="sft"), 0, tmp_path)
    with pytest.raises(SystemExit, match="--list"):
        evidence_world2vlm.main(["--out", str(tmp_path), "--only", "nothing"])
    with pytest.raises(SystemExit, match="python -m experiments simulator --only fine-plain"):
        evidence_world2vlm.finish(Run("drift-tuned", drift="fine-plain-s0"), 0, tmp_path / "below")
