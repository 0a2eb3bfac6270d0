"""The tables of what the stages logged. `pytest tests/test_curves.py`"""

import json

import pytest

from experiments.curves import main, rows_of, table


def write_log(folder, rows):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_column_is_the_log_at_that_step(tmp_path):
    rows = [{"step": step, "loss": 100.0 - step, "lr": 0.1} for step in range(60)]
    rows[8]["nearest"] = 0.25
    write_log(tmp_path / "wm", rows)
    lines = table(rows_of(tmp_path / "wm"), ("loss", "nearest", "absent"))
    assert lines == [
        "| after step | 1 | 10 | 50 | 60 |",
        "| --- | --- | --- | --- | --- |",
        "| `loss` | 100 | 91 | 51 | 41 |",
        "| `nearest` |  | 0.25 | 0.25 | 0.25 |",
    ]


def test_an_evaluation_at_the_end_is_no_step(tmp_path):
    rows = [{"step": step, "reward": step / 10, "lr": 0.1} for step in range(12)]
    rows[0]["eval"] = {"agentic": {"match": 0.25}}
    rows.append({"step": 12, "eval": {"agentic": {"match": 0.75}}})
    write_log(tmp_path / "phase1", rows)
    lines = table(rows_of(tmp_path / "phase1"), ("reward", "agentic match"))
    assert lines[0] == "| after step | 1 | 10 | 12 |"
    assert lines[2:] == ["| `reward` | 0 | 0.9 | 1.1 |", "| `agentic match` | 0.25 | 0.25 | 0.75 |"]


def test_a_folder_without_logs_is_told(tmp_path):
    with pytest.raises(SystemExit, match="holds no log of a stage"):
        main(["--out", str(tmp_path)])
