"""Files that are whole or not there, logs, and rows of data. `pytest tests/test_records.py`"""

import errno
import json
import os

import pytest
import torch

from lib import records


def test_a_folder_shows_all_files_or_none(tmp_path):
    with pytest.raises(KeyError), records.whole_folder(tmp_path) as part:
        (part / "model.bin").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with records.whole_folder(tmp_path) as part:
        (part / "model.bin").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["model.bin"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_beside(tmp_path):
    records.write_text(tmp_path / "rows.jsonl", "old")
    with pytest.raises(SystemExit, match="The disk is full: .*rows.jsonl could not be written"):
        with records.whole_file(tmp_path / "rows.jsonl") as beside:
            beside.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert (tmp_path / "rows.jsonl").read_text() == "old"


def test_every_error_of_the_system_that_names_a_file_is_a_sentence(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    for name, words in (
        ("x" * 300, "x: File name too long. Name another file or folder."),
        ("loop/file", "Name another"),
        ("file/below", "Name another"),
        (".", "Name another"),
    ):
        with pytest.raises(SystemExit, match=words):
            records.write_text(tmp_path / name, "text")
    with pytest.raises(SystemExit, match="missing: No such file"), records.disk("what is written"):
        (tmp_path / "missing").read_text()
    with pytest.raises(BrokenPipeError), records.disk("what is written"):  # no file's
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_no_file_holds_a_key(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    monkeypatch.setenv("SIMULATOR_API_KEY", "EMPTY")  # too short for a secret: a word
    value = {
        "model": "sk-0123456789",
        "url": "https://me:secret@host/v1",
        "EMPTY": "http://host:80@12",
    }
    records.write_json(tmp_path / "args.json", value)
    hidden = {"model": "[key]", "url": "https://[key]@host/v1", "EMPTY": "http://host:80@12"}
    assert json.loads((tmp_path / "args.json").read_text()) == hidden


def test_the_log_of_a_resumed_run_has_each_step_once(tmp_path):
    log = records.MetricLog(tmp_path / "log.jsonl")
    for step in range(4):
        log.write(step, reward=step / 3, broken=float("nan"))
    with open(log.path, "a") as file:
        file.write('{"step": 4, "rew')  # the process was killed here
    log = records.MetricLog(log.path, resume_step=2)
    log.write(2, reward=torch.tensor(7.0))
    assert records.read_log(log.path) == [
        {"step": 0, "reward": 0.0, "broken": None},
        {"step": 1, "reward": 0.333333, "broken": None},
        {"step": 2, "reward": 7.0},
    ]


@pytest.mark.parametrize(
    "line, sentence", [("{", "line 2 is not JSON"), ("[1]", "line 2 is not a JSON object")]
)
def test_a_bad_line_is_named(tmp_path, line, sentence):
    file = tmp_path / "questions_train.jsonl"
    file.write_text(f'{{"id": 1}}\n{line}\n')
    with pytest.raises(SystemExit, match=sentence):
        records.load_jsonl(file)
    with pytest.raises(SystemExit, match="`python data.py triples --out"):
        records.load_jsonl(tmp_path / "triples_val.jsonl")
