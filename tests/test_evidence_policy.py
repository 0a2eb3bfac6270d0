"""The policy's rows: every command is one that its stage understands, stages follow each other, the table adds up."""

import json

import pytest

import evaluate
import train_rl
from experiments import policy as evidence_policy
from experiments.policy import RUNS, Run, commands


def answered(out, name, right, called, seed=0):
    """A finished row on disk: 20 rooms of two questions, the first in need of a view; `right` of 20 rooms are right."""
    folder = out / f"{name}-s{seed}" / "asked"
    folder.mkdir(parents=True)
    records = [
        {
            "key": f"{room}/{need}",
            "scene": room,
            "needs_view": need,
            "correct": float(room < right),
            "valid_calls": int(need and called),
        }
        for room in range(20)
        for need in (True, False)
    ]
    (folder / "predictions.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )
    (folder.parent / "result.json").write_text(
        json.dumps({"commands": [], "cpu_seconds": 100 + seed})
    )


def test_every_row_is_one_the_stages_understand(tmp_path):
    assert len({run.name for run in RUNS}) == len(RUNS)
    parsers = {"train_rl.py": train_rl.parse_args, "evaluate.py": evaluate.parse_args}
    for run in RUNS:
        told = commands(run, 3, tmp_path)
        for script, flags in told:
            parsers[script](flags)
        assert len(told) == len(run.stages) + 1 and (
            not run.of or run.of in {row.name for row in RUNS}
        )
    learned = {
        run.name: sum(
            train_rl.parse_args(flags).steps for _, flags in commands(run, 0, tmp_path)[:-1]
        )
        for run in RUNS
        if run.stages
    }
    assert set(learned.values()) == {72}  # equal total steps


def test_stages_start_where_the_one_before_ended(tmp_path):
    (_, first), (_, second), (_, asked) = commands(
        next(run for run in RUNS if run.name == "two-phase"), 1, tmp_path
    )
    assert (
        second[second.index("--policy") + 1]
        == first[first.index("--out") + 1]
        == str(tmp_path / "two-phase-s1/1")
    )
    assert (
        asked[asked.index("--policy") + 1]
        == second[second.index("--out") + 1]
        == str(tmp_path / "two-phase-s1/2")
    )
    _, asked = commands(
        Run("x", mode="forced", simulator="untuned", of="two-phase"), 1, tmp_path / "policy"
    )[-1]
    assert asked[asked.index("--policy") + 1] == str(tmp_path / "policy/two-phase-s1/2")
    assert asked[asked.index("--simulator") + 1] == str(tmp_path / "ring-untuned-s0")


def test_the_table_says_what_the_answers_say(tmp_path):
    answered(tmp_path, "two-phase", 10, True), answered(tmp_path, "single-stage", 15, False)
    (
        answered(tmp_path, "two-phase-direct", 10, False),
        answered(tmp_path, "two-phase", 20, True, seed=1),
    )
    split = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in evidence_policy.table(tmp_path)[2:]
    ]
    told = {name: rest for name, *rest in split}
    assert told["two-phase"] == ["0 1", "0.750", "50%", "0.750", "100%", "0.750", "0%", "", "100"]
    assert told["single-stage"][:2] == ["0", "0.750"] and told["single-stage"][7].startswith(
        "+0.000 [-0."
    )
    assert told["two-phase-direct"][7].startswith("-0.250") and told["two-phase-direct"][8] == ""


def test_a_finished_row_is_kept_and_one_of_other_commands_refused(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(evidence_policy, "call", lambda *command: calls.append(command))
    run = Run("start")
    evidence_policy.finish(run, 0, tmp_path)
    evidence_policy.finish(run, 0, tmp_path)
    assert [script for script, *_ in calls] == ["evaluate.py"]
    with pytest.raises(SystemExit, match="was made with"):
        evidence_policy.finish(Run("start", mode="forced"), 0, tmp_path)
    with pytest.raises(SystemExit, match="--list"):
        evidence_policy.main(["--out", str(tmp_path), "--only", "nothing"])
