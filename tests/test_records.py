"""Files that are whole or not there, logs, and rows of data. `pytest tests/test_records.py`"""

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
