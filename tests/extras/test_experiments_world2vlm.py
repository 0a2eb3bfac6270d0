"""World2VLM's rows: every command is one that its stage understands, the table adds up, the data are what they say."""

import json
from functools import partial
from pathlib import Path

import pytest

import evaluate
import train_sft
from experiments import runner, world2vlm
from experiments.world2vlm import ROWS, Data, World2vlmRow, job_of, make_questions
from extras.world2vlm import evaluate as evaluate_w2v
from extras.world2vlm import train, train_rl
from lib.records import load_jsonl, save_jsonl
from lib.stage import parse_flags

PARSERS = {
    "train_sft.py": train_sft.parse_args,
    "evaluate.py": evaluate.parse_args,
    "extras.world2vlm.train": train.parse_args,
    "extras.world2vlm.train_rl": train_rl.parse_args,
    "extras.world2vlm.evaluate": partial(parse_flags, "", evaluate_w2v.FLAGS),
}


def parsed(command):
    """(script, flags) of a command, as its stage reads them."""
    script, *flags = command[1:] if command[0] == "-m" else command
    return script, PARSERS[script](flags)


def flags_of(row, seed, out):
    """The flags of all commands of a row."""
    if isinstance(row, str):
        row = next(other for other in ROWS if other.name == row)
    return [parsed(command)[1] for command in job_of(row, seed, out).commands]


def finished(out, name, records, **result):
    """A finished row on disk."""
    save_jsonl(out / name / "asked/predictions.jsonl", records)
    (out / name / "result.json").write_text(json.dumps({"cpu_seconds": 0, **result}))


def tables(lines):
    """The tables of table.md: {row: {head: cell}}, all together."""
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            continue
        line = [cell.strip() for cell in line.strip("|").split("|")]
        if line[0] == "row":
            head = line
        rows[line[0]] = dict(zip(head, line, strict=True))
    return {name: row for name, row in rows.items() if name not in ("row", "---")}


def test_every_row_is_one_the_stages_understand(tmp_path):
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        steps = 0
        for command in job_of(row, 3, tmp_path).commands:
            script, args = parsed(command)
            assert "evaluate" in script or args.seed == 3
            steps += args.steps if script.endswith((".train", "sft.py")) else 0
        if row.sft:
            assert steps == (350 if row.name.endswith("lessons") else 1500), row.name


def test_stages_start_where_the_one_before_ended(tmp_path):
    row = World2vlmRow("x", sft=("--lambda-inv 0",), rl=True)
    first, second, asked = flags_of(row, 1, tmp_path)
    assert second.policy == first.out == f"{tmp_path}/x-s1/1"
    assert asked.policy == second.out == f"{tmp_path}/x-s1/rl"
    assert flags_of("grpo", 1, tmp_path)[0].policy == f"{tmp_path}/sft-s1/3"
    assert flags_of("lessons", 1, tmp_path)[0].start == "out/demo/sft"
    assert flags_of("sft-lessons", 1, tmp_path)[0].start == f"{tmp_path}/sft-s1/3"
    assert flags_of("grpo-lessons", 1, tmp_path)[0].start == f"{tmp_path}/grpo-s1/rl"
    for name, mode, policy in (
        ("agentic", "agentic", "phase2"),
        ("direct-only", "direct", "direct"),
    ):
        (asked,) = flags_of(name, 1, tmp_path)
        assert (asked.policy, asked.mode) == (f"out/demo/{policy}", mode)


def test_the_table_of_motions_says_what_the_answers_say(tmp_path):
    def motions(reward, exact):
        """20 rooms, each asked A2 (the way is right in half of them) and D2."""
        records = []
        for room in range(20):
            for task in ("A2", "D2"):
                record = {"key": f"{room}/{task}", "scene": room, "category": task}
                record |= {"correct": reward, "exact": exact, "parts": {"action": float(room < 10)}}
                records.append(record)
        return records

    finished(tmp_path, "sft-s0", motions(0.5, 0.0), cpu_seconds=100)
    finished(tmp_path, "sft-s1", motions(1.0, 1.0), cpu_seconds=200)
    finished(tmp_path, "grpo-s0", motions(0.25, 0.0))
    rows = tables(world2vlm.table(tmp_path))
    assert list(rows) == ["sft", "grpo"]
    sft, grpo = rows.values()
    assert sft["A2"] == "0.75 [0.75 0.75] 0.50" and grpo["D2"] == "0.25 [0.25 0.25] 0.00"
    assert sft["A2 way"].startswith("0.50 [0.") and sft["A1 way"] == sft["A1"] == ""
    assert (sft["seeds"], sft["train CPU-s"]) == ("0 1", "150")
    assert (sft["all"], sft["over sft"]) == ("0.750", "")
    assert (grpo["all"], grpo["over sft"]) == ("0.250", "-0.500 [-0.500 -0.500]")


def test_answers_about_rooms_are_compared_on_the_same_questions(tmp_path):
    kinds = ("commanded", "turning", "walking")

    def answers(right, seconds):
        """Questions 0, 1, ...: the even ones need a view, of rooms 0 and 1 in turn."""
        records = []
        for i, hit in enumerate(right):
            record = {"key": str(i), "scene": i // 2 % 2, "correct": float(hit)}
            record |= {"needs_view": i % 2 == 0, "category": kinds[i % 3]}
            records.append(record | {"seconds": seconds, "cost": {"rendered": i}})
        return records

    finished(tmp_path, "direct-only-s0", answers((1, 0, 0, 0, 1, 0, 0, 0), 0.5))
    finished(tmp_path, "direct-only-s1", answers((1, 1, 0, 0, 1, 1, 0, 0), 0.5))
    finished(tmp_path, "agentic-s0", answers((1, 1, 1, 0), 2))
    rows = tables(world2vlm.table(tmp_path))
    first, second = rows["direct-only"], rows["agentic"]
    keys = ("seeds", "questions", "right", "needs_view", "answerable", "commanded")
    assert [first[key] for key in keys] == ["0 1", "8", "0.375", "0.500", "0.250", "0.333"]
    assert (second["right"], second["seconds"], second["views"]) == ("0.750", "2.000", "1.5")
    assert first["over direct-only"] == ""
    assert second["over direct-only"].startswith("+0.375 [+0.250 +0.500")  # 0 to 3: .75 over .375


@pytest.mark.slow
def test_a_teachers_questions_are_of_motions_that_it_knows_and_none_are_held_out(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(world2vlm.DATA, "some", Data(4, "truth"))
    monkeypatch.chdir(tmp_path)
    make_questions("some", Path())
    folder = Path("data/some")
    rows = load_jsonl(folder / "questions_train.jsonl")
    assert all(Path(path).is_file() for row in rows for path in row["images"])
    assert not any("move backward" in row["answer"] for row in rows)
    assert load_jsonl(folder / "questions_val.jsonl") == []
    assert sum(row["category"] in ("D1", "D3") for row in rows) <= 0.1 * len(rows)
    assert sum(json.loads((folder / "shares.json").read_text()).values()) == len(rows)


def test_a_simulator_that_is_not_there_names_its_command(tmp_path):
    with pytest.raises(SystemExit, match="python -m experiments simulator --only ring-plain"):
        make_questions("tuned", tmp_path / "below")


def test_what_is_missing_is_named_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "call", lambda command: None)
    with pytest.raises(SystemExit, match="--only sft --seeds 0"):
        world2vlm.main(["--out", str(tmp_path), "--only", "sft-lessons"])
    with pytest.raises(SystemExit, match="--list"):
        world2vlm.main(["--out", str(tmp_path), "--only", "nothing"])
