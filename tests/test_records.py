"""Files that are whole or not there, logs, and rows of data. `pytest tests/test_records.py`"""

import errno
import json
import os

import numpy as np
import pytest
import torch

import rewards
from lib import records
from lib.geometry import Motion
from lib.protocol import call_of


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


def test_half_a_letter_is_written_as_its_number(tmp_path):
    records.write_text(tmp_path / "page.md", "é \ud83d")
    assert (tmp_path / "page.md").read_bytes() == b"\xc3\xa9 \\ud83d"


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


ROW = {
    "id": "q",
    "bench": "rooms",
    "images": ["1.png"],
    "question": "Which one?",
    "options": ["A. red ball", "B. blue ball"],
    "answer": "B",
    "needs_view": False,
}


def load(tmp_path, kind, check, **changes):
    base = ROW
    if kind is records.Triple:
        base = {
            "context": ["1.png", "2.png"],
            "reference": 1,
            "motion": {"kind": "dx", "amount": 1},
        }
        base |= {"target": "3.png", "coverage": 0.9, "target_c2w": np.eye(4).tolist()}
    records.save_jsonl(tmp_path / "rows.jsonl", [base, base | changes])
    return records.load_jsonl(tmp_path / "rows.jsonl", kind, check)[1]


@pytest.mark.parametrize("key", ["id", "images", "question", "options", "needs_view"])
@pytest.mark.parametrize("value", [5, 1.5, "x\ud800", {}, [1], [None], [["x"]], [[]], float("nan")])
def test_a_value_of_another_kind_is_named_with_its_file_and_line(tmp_path, key, value):
    with pytest.raises(SystemExit, match=f"rows.jsonl, line 2 has {key} .*, which should be "):
        load(tmp_path, records.Question, rewards.name_gold, **{key: value})


@pytest.mark.parametrize(
    "key, value, sentence",
    [
        ("context", [], "has the reference 1 of 0 context views"),
        ("context", "1.png", "has context .*, which should be"),
        ("reference", 3, "has the reference 3 of 2 context views"),
        ("reference", True, "has reference true, which should be int"),
        ("reference", 10**30, "has reference 1000.*, which should be int"),
        ("motion", {"kind": "dx"}, "has the motion"),
        ("motion", {"kind": "jump", "amount": 1}, "has the motion .*unknown motion"),
        ("motion", {"kind": "dx", "amount": "far"}, "has the motion"),
        ("coverage", float("inf"), "has coverage Infinity, which should be float"),
        ("target_c2w", [[1.0]], "has target_c2w of another shape"),
        ("target_c2w", [["1"] * 4] * 4, "has target_c2w .*, which should be"),
        ("provenance", [None], "has 1 calls for 2 context views"),
        ("provenance", [call_of(1, Motion("dx", 1.0)), None], "has the call .*no earlier image"),
        ("provenance", [None, "dx"], "has the call dx"),
        (
            "provenance",
            [None, {"reference_image": 1, "motion_type": "dx"}],
            "has the call .*takes reference_image",
        ),
        ("provenance", [None, call_of(2, Motion("dx", 1.0))], "has the call .*no earlier image"),
    ],
)
def test_parts_of_a_triple_go_together(tmp_path, key, value, sentence):
    assert load(tmp_path, records.Triple, records.check_triple)["reference"] == 1
    with pytest.raises(SystemExit, match=f"rows.jsonl, line 2 {sentence}"):
        load(tmp_path, records.Triple, records.check_triple, **{key: value})


def test_imagined_context_views_come_last_and_name_earlier_ones():
    call = call_of(1, Motion("dx", 1.0))
    row = {"context": ["1.png"] * 3, "reference": 1, "motion": {"kind": "dx", "amount": 1}}
    records.check_triple(row | {"provenance": [None, call, call_of(2, Motion("dy", 1.0))]})
    with pytest.raises(ValueError, match="a given context view after an imagined one"):
        records.check_triple(row | {"provenance": [None, call, None]})


@pytest.mark.parametrize("line", ['{"id": 1, "id": 2}', "[" * 10**5, '{"n": ' + "1" * 5000 + "}"])
def test_json_that_python_takes_and_others_do_not_is_refused(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text("\n" + line)
    with pytest.raises(SystemExit, match="rows.jsonl, line 2 is not JSON"):
        records.load_jsonl(tmp_path / "rows.jsonl")
    assert records.read_log(tmp_path / "rows.jsonl") == []


def test_gold_answers_of_every_form_are_the_letter_or_refused(tmp_path):
    def gold(answer, options):
        row = load(tmp_path, records.Question, rewards.name_gold, answer=answer, options=options)
        return row["answer"]

    balls = ROW["options"]
    for form in (
        "B",
        "b",
        "(B)",
        "B.",
        "b)",
        " B ",
        "B. blue ball",
        "(b) Blue ball",
        "Blue Ball",
        2,
    ):
        assert gold(form, balls) == "B", form
    assert gold(0, balls) == "A"
    assert gold("B", ["A. B", "B. A"]) == "B"  # words that are letters: a letter is a letter
    assert gold("blue", ["red", "blue"]) == "blue" and gold("7", []) == gold(7, []) == "7"
    assert gold(None, balls) is None  # nobody knows
    for odd in ("C", "ball", "", 1, -1, 3, 0.5, "B. red ball", "A or B"):
        with pytest.raises(SystemExit, match="line 2 has the answer .* names 0 of the options"):
            gold(odd, balls)
    for odd, options in (("b", ["A. b", "B. a"]), (2, ["A. 2", "B. 3"])):
        with pytest.raises(SystemExit, match="line 2 has the answer .* names 2 of the options"):
            gold(odd, options)
