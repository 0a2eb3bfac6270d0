"""The list of runs: what is finished stays, what is missing is done, and the table says what the files say."""

import json

import numpy as np
import pytest

import data
import train_wm
from experiments import simulator as evidence
from experiments.simulator import DATA, RUNS, Run
from world_model import WorldModel

ROOMS = np.repeat(np.arange(20), 5)


def row(out, name, right, seed=0):
    """A finished row on disk: the first `right` of the five views of every room have the right pose."""
    folder = out / f"{name}-s{seed}"
    folder.mkdir(parents=True)
    pose, mse, n = np.arange(len(ROOMS)) % 5 < right, 0.1 / (1 + right), len(ROOMS)
    values = np.column_stack([np.ones(n), pose, np.full(n, mse), np.ones((n, 8))])
    np.savez(folder / "views.npz", id=[str(i) for i in range(n)], room=ROOMS, values=values)
    result = {
        "pose": pose.mean(),
        "content": 1.0,
        "mse": mse,
        "cpu_seconds": 100 + seed,
        "steps": 9,
    }
    (folder / "result.json").write_text(json.dumps(result))


def cells(lines):
    """{row: its cells} of table.md."""
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {name: rest for name, *rest in split}


def test_every_row_is_one_the_stages_understand():
    assert len({run.name for run in RUNS}) == len(RUNS)
    for run in RUNS:
        data.parse_args(["triples", *DATA[run.data].make.split()])
        train_wm.parse_args([*DATA[run.data].train.split(), *run.flags.split()])
    assert {f"{name}-plain" for name in DATA} <= {
        run.name for run in RUNS
    }  # what each is compared with


def test_the_table_says_what_the_files_say(tmp_path):
    (
        row(tmp_path, "ring-plain", 2),
        row(tmp_path, "ring-content", 3),
        row(tmp_path, "ring-untuned", 0),
    )
    row(tmp_path, "rooms250-plain", 1), row(tmp_path, "apart-content", 4)
    told = cells(evidence.table(tmp_path))
    assert list(told) == [
        "ring-plain",
        "ring-content",
        "ring-untuned",
        "rooms250-plain",
        "apart-content",
    ]
    assert told["ring-plain"] == ["0", "9", "0.400", "1.000", "0.0333", "100", "", "", ""]
    assert told["ring-content"][6:] == [
        "+0.200 [+0.200 +0.200]",
        "+0.000 [+0.000 +0.000]",
        "-0.0083 [-0.0083 -0.0083]",
    ]
    assert told["ring-untuned"][6].startswith("-0.400") and told["rooms250-plain"][6].startswith(
        "-0.200"
    )
    assert told["apart-content"][6:] == ["", "", ""]  # its plain row is not there yet


def test_seeds_are_averaged(tmp_path):
    (
        row(tmp_path, "ring-plain", 2),
        row(tmp_path, "ring-content", 2),
        row(tmp_path, "ring-content", 4, seed=1),
    )
    told = cells(evidence.table(tmp_path))["ring-content"]
    assert told[:3] == ["0 1", "9", "0.600"] and told[5:7] == ["100", "+0.200 [+0.200 +0.200]"]


def test_rows_of_other_views_are_not_compared(tmp_path):
    row(tmp_path, "ring-plain", 2), row(tmp_path, "ring-content", 3)
    views = dict(np.load(tmp_path / "ring-plain-s0" / "views.npz"))
    np.savez(tmp_path / "ring-plain-s0" / "views.npz", **{**views, "id": views["id"][::-1]})
    with pytest.raises(SystemExit, match="different test views"):
        evidence.table(tmp_path)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two rooms of data, two rows, and a train_wm.py that leaves an untrained model; -> (folder, the calls made)."""
    calls = []
    rows = [
        row
        for seed in (5_000_000, 5_000_001)
        for row in data.room_triples(seed, tmp_path / "data/ring")
    ]

    def call(stage, *flags):
        args = dict(zip(flags[::2], flags[1::2]))
        calls.append((stage, args))
        if stage == "data.py":
            return data.save_jsonl(tmp_path / "data/ring/triples_test.jsonl", rows)
        WorldModel.tiny().save(evidence.Path(args["--out"]))
        (evidence.Path(args["--out"]) / "done.json").write_text('{"cpu_seconds": 7}')

    monkeypatch.setattr(evidence, "call", call)
    monkeypatch.setattr(
        evidence,
        "RUNS",
        [
            Run("ring-plain", "ring", "--warp-weight 0"),
            Run("ring-warp", "ring", "", "warp with true depth and pose"),
        ],
    )
    return tmp_path, calls


def test_a_finished_row_is_not_run_again(place, capsys):
    out, calls = place
    evidence.main(["--out", str(out), "--steps", "3"])
    assert [stage for stage, _ in calls] == ["data.py", "train_wm.py"]
    assert (
        calls[1][1]["--steps"] == "3"
        and calls[1][1]["--seed"] == "0"
        and calls[1][1]["--warp-weight"] == "0"
    )
    told, again = (
        cells((out / "table.md").read_text().splitlines()),
        (out / "ring-plain-s0/result.json").read_text(),
    )
    assert (
        float(told["ring-warp"][2]) > 0.9 > float(told["ring-plain"][2])
        and told["ring-plain"][5] == "7"
    )
    assert json.loads(again)["views"] == 16

    evidence.main(["--out", str(out), "--steps", "3"])
    assert len(calls) == 2 and (out / "ring-plain-s0/result.json").read_text() == again
    (out / "ring-plain-s0/result.json").unlink()  # killed between training and looking
    evidence.main(["--out", str(out), "--steps", "3", "--only", "ring-p*"])
    assert len(calls) == 3 and (out / "ring-plain-s0/result.json").read_text() == again
    evidence.main(["--out", str(out), "--steps", "3", "--seeds", "0", "1"])
    assert [args["--seed"] for _, args in calls[3:]] == ["1"]  # the oracle has no seed
    capsys.readouterr()
    evidence.main(["--out", str(out), "--seeds", "0", "2", "--list"])
    assert [line.split()[3] == "done" for line in capsys.readouterr().out.splitlines()[:3]] == [
        True,
        True,
        False,
    ]


def test_rows_of_other_flags_are_not_mixed(place):
    out, _ = place
    evidence.main(["--out", str(out), "--steps", "3"])
    with pytest.raises(SystemExit, match="not with .*'steps': 4"):
        evidence.main(["--out", str(out), "--steps", "4"])
    with pytest.raises(SystemExit, match="--list"):
        evidence.main(["--out", str(out), "--only", "nothing"])


def test_a_stage_that_fails_stops_the_list():
    with pytest.raises(SystemExit, match="raise SystemExit.2.` ended with code 2"):
        evidence.call("-c", "raise SystemExit(2)")
    evidence.call("-c", "raise SystemExit(0)")
