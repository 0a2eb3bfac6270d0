"""What every stage does besides its work: flags, its folder, its end, Ctrl-C. `pytest tests/test_stage.py`"""

import argparse
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib import stage
from lib.distributed import die_with_parent
from lib.simulators import SimulatorError
from lib.stage import (
    Flag,
    Interrupt,
    begin,
    finish,
    lock_folder,
    need,
    newest,
    parse_flags,
)
from lib.streams import Clock, cosine

ROOT = Path(__file__).parent.parent
FLAGS = [
    Flag("--lr", 1.0, 2.0, "peak", low=0),
    Flag("--steps", 3, 9, "updates", low=1),
    Flag("--data", ["a"], ["b", "c"], "folders"),
    Flag("--augment", True, False, "mirrored rooms"),
    Flag("--init", None, "hub/id", "start"),
    Flag("--save-every", 6, 10, "steps", low=1, neutral=True),
    Flag("--share", 0.5, 1.0, "of the peak", low=0, high=1),
]


def flags_of(*argv):
    values = vars(parse_flags("A stage.", FLAGS, list(argv)))
    del values["parser"]
    return values


def test_a_preset_gives_defaults_and_the_user_wins():
    tiny = {"lr": 1.0, "steps": 3, "data": ["a"], "augment": True, "init": None}
    assert flags_of() == tiny | {"save_every": 6, "share": 0.5, "preset": "tiny"}
    astra = {"lr": 5.0, "steps": 9, "data": ["b", "c"], "augment": True, "init": "hub/id"}
    argv = ["--preset", "astra", "--lr", "5", "--augment"]
    assert flags_of(*argv) == astra | {"save_every": 10, "share": 1.0, "preset": "astra"}


def test_the_help_shows_the_defaults_of_both_presets(capsys):
    with pytest.raises(SystemExit):
        flags_of("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "updates (tiny 3, astra 9)" in said and "folders (tiny a, astra b c)" in said
    assert "mirrored rooms (tiny True, astra False)" in said and "start (astra hub/id)" in said
    assert stage.help_of(Flag("--seed", 0, 0, "of every draw")) == "of every draw (default 0)"
    assert stage.help_of(Flag("--threads", None, None, "CPU threads")) == "CPU threads"


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--save-every", "0"], "0 is out of bounds: 1 or more"),
        (["--lr", "nan"], "nan is out of bounds: 0 or more"),
        (["--share", "1.5"], "1.5 is out of bounds: 0 or more, and 1 at most"),
        (["--steps", "2.5"], "invalid int value: '2.5'"),
        (["--step", "2"], "unrecognized arguments: --step 2"),  # no abbreviations
    ],
)
def test_flags_out_of_bounds_are_refused(argv, sentence, capsys):
    with pytest.raises(SystemExit):
        flags_of(*argv)
    assert sentence in capsys.readouterr().err


def arguments(out, **more):
    values = {"preset": "tiny", "out": str(out), "lr": 1e-4, "save_every": 1, **more}
    return argparse.Namespace(**values)


def test_the_same_command_continues_and_other_flags_are_refused(tmp_path, capsys):
    out = tmp_path / "stage"
    begin("stage", arguments(out), FLAGS)
    (out / "training").mkdir()
    begin("stage", arguments(out, save_every=2), FLAGS)  # a neutral flag may change
    with pytest.raises(SystemExit, match="--lr 0.0001 .now 0.5."):
        begin("stage", arguments(out, lr=0.5), FLAGS)
    with pytest.raises(SystemExit, match="not finished. Run `python stage.py` again"):
        need(out, "python stage.py")
    finish(out, 1, Clock({"seconds": 10.0, "cpu_seconds": 20.0}))
    done = json.loads((out / "done.json").read_text())
    assert done["steps"] == 1 and 10 <= done["seconds"] < 11 and done["cpu_seconds"] >= 20
    assert need(out, "python stage.py") == out and not (out / "training").exists()
    with pytest.raises(SystemExit) as left:
        begin("stage", arguments(out), FLAGS)
    assert left.value.code == 0 and "is finished (1 steps" in capsys.readouterr().out


def test_a_resumed_run_says_which_inputs_have_changed(tmp_path, capsys):
    rows = tmp_path / "data" / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_text("{}\n")
    flags = arguments(tmp_path / "stage", data=[str(rows.parent)])
    begin("stage", flags, FLAGS)
    (tmp_path / "stage" / "training").mkdir()
    rows.write_text("{}\n")  # made again, and equal
    (rows.parent / "more.jsonl").write_text("")
    begin("stage", flags, FLAGS)
    assert "CHANGED" not in capsys.readouterr().out
    rows.write_text("[]\n")
    for _ in range(2):  # it is compared with its beginning, however often it goes on
        begin("stage", flags, FLAGS)
        assert f"CHANGED since {tmp_path}/stage began: {rows}. It goes" in capsys.readouterr().out


# ---- one run at a time -----------------------------------------------------------------------------------------------


class Child:
    """`with Child(function) as child:` a forked process that has called `function` and sleeps."""

    def __init__(self, function):
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                function()
                os.write(writer, b"ready")
                time.sleep(60)
            finally:
                os._exit(1)
        os.close(writer)

    def __enter__(self):
        assert os.read(self.reader, 5) == b"ready"
        return self

    def __exit__(self, *error):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.reader)


def test_a_folder_is_written_by_one_run_at_a_time_and_a_killed_one_lets_go(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "LOCK_PATIENCE", 0.3)
    with Child(lambda: lock_folder(tmp_path / "out")) as other:
        with pytest.raises(SystemExit, match=f"out is written by process {other.pid} on .*pytest"):
            lock_folder(tmp_path / "out")
        lock_folder(tmp_path / "elsewhere")
    lock_folder(tmp_path / "out")
    lock_folder(tmp_path / "out")  # what a run holds already
    assert f"process {os.getpid()} on" in (tmp_path / "out" / ".lock").read_text()


def test_where_nothing_can_be_locked_a_run_is_warned_and_goes_on(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    lock_folder(tmp_path)
    assert "No locks available. Let no other run write to" in capsys.readouterr().out


def test_a_rank_ends_with_its_parent():
    reader, writer = os.pipe()

    def have_a_child():
        child = Child(die_with_parent)
        child.__enter__()

    with Child(have_a_child):
        os.close(writer)
    assert os.read(reader, 1) == b""  # nobody has the other end open any more
    os.close(reader)


# ---- small things ----------------------------------------------------------------------------------------------------


def test_a_missing_input_names_the_command_and_a_hub_id_passes():
    with pytest.raises(SystemExit, match="out/nothing is missing. `python train_sft.py` makes it"):
        need("out/nothing", "python train_sft.py")
    assert need("Qwen/Qwen3-VL-8B-Instruct", "…") == "Qwen/Qwen3-VL-8B-Instruct"


def test_the_newest_model_may_be_of_either_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert newest(("phase2", "phase1")) is None
    for age, folder in enumerate(["out/phase1-astra", "out/demo/phase2", "out/phase1"]):
        Path(folder).mkdir(parents=True)
        Path(folder, "config.json").touch()
        os.utime(Path(folder, "config.json"), (0, 1000 - age))
    assert newest(("phase2", "phase1")) == Path("out/phase1-astra")
    assert newest(("phase2",)) == Path("out/demo/phase2")


def test_cosine_rises_then_falls():
    factors = [cosine(step, 12, warmup=2, floor=0.1) for step in range(13)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[7] == pytest.approx(0.55) and factors[12] == pytest.approx(0.1)


def test_an_interrupt_only_raises_a_flag(capsys):
    with Interrupt() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
        with pytest.raises(SystemExit) as left:
            stop.save_or_leave(5, argparse.Namespace(save_every=100, steps=9), print)
    assert left.value.code == 130 and "The same command goes on" in capsys.readouterr().out


@pytest.mark.slow
def test_what_a_script_started_in_the_background_stops_on_sigterm(tmp_path):
    """There Ctrl-C is ignored; a list of evidence and the demo end their stages by SIGTERM."""
    (tmp_path / "script.py").write_text(
        "import time\nfrom lib.stage import run_stage\n"
        "run_stage(lambda: [print('begun \\ud800', flush=True), time.sleep(60)])\n"
    )
    child = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert child.stdout.readline() == "begun \\ud800\n"  # half a letter stops nothing
    child.send_signal(signal.SIGINT)
    child.terminate()
    output, _ = child.communicate(timeout=30)
    assert child.returncode == 130
    assert output == "Stopped. The same command goes on from what was saved.\n"


def test_a_server_that_is_down_ends_in_a_sentence(monkeypatch):
    def main():
        raise SimulatorError("The server is down.", down=True)

    monkeypatch.setattr(stage.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="The server is down. The same command goes on from what"):
        stage.run_stage(main)
