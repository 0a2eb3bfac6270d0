"""pytest tests/test_common.py: processes, a stage's folder and the log.  CPU, about 10 s."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks

from lib import checkpoints, common, streams

ROOT = Path(__file__).parent.parent


def two_steps(out):
    """Two steps of a small module on this rank's share of 5 rows; saves what rank 0 saw in `out`."""
    world = common.setup(threads=1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    model.scale = torch.nn.Parameter(torch.ones(3))  # whole on every rank
    common.shard(model, [model[0]], world, ignored=[model.scale])
    sharded = [p for p in model.parameters() if p is not model.scale]
    optimizer = torch.optim.AdamW(sharded, lr=0.1)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))[world.rank :: world.size]
    n = common.global_sum(float(len(x)))
    for step in range(2):
        model.zero_grad()
        ((model(x) * model.scale).square().sum() / n).backward()
        common.sum_gradients(model.parameters())
        gradients = checkpoints.whole([(name, p.grad) for name, p in model.named_parameters()])
        norm = common.clip_gradients(sharded, 0.5)
        optimizer.step()
    with common.gathered(model), torch.no_grad():
        for _ in range(1 + world.rank):  # ranks may differ in their number of passes
            model(x)
    if common.is_main():
        torch.save({"n": n, "norm": norm, "gradients": gradients}, out)


def test_two_ranks_give_the_gradient_of_one(tmp_path):
    """FSDP's default is a mean over ranks, which would give half; 3 rows on one rank and 2 on the other expose more."""
    two_steps(tmp_path / "one.pt")
    on_ranks(2, two_steps, tmp_path / "two.pt")
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    assert one["n"] == two["n"] == 5 and len(one["gradients"]) == 5
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-4)
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-4, atol=1e-5)


def one_gives_up(folder):
    """Rank 1 ends with a sentence, and rank 0 knows nothing of it."""
    (Path(folder) / os.environ["RANK"]).write_text(str(os.getpid()))
    if common.setup(threads=1).rank == 1:
        common.fail("This is enough.")
    time.sleep(60)


def test_a_rank_that_fails_is_heard_and_the_others_end(tmp_path):
    start = time.monotonic()
    with pytest.raises(
        AssertionError, match="rank 1 ended with 1:\n(.*\n)+SystemExit: This is enough."
    ):
        on_ranks(2, one_gives_up, tmp_path)
    assert time.monotonic() - start < 30
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(rank)).read_text()), 0)


def test_written_whole_shows_all_files_or_none(tmp_path):
    with pytest.raises(KeyError), common.written_whole(tmp_path) as part:
        (part / "model.bin").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with common.written_whole(tmp_path) as part:
        (part / "model.bin").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["model.bin"]


def test_streams_are_stable_and_apart():
    """The number is written down: a seed that changes between versions would change every stored result."""
    assert streams.stable_hash(0, "a", 1) == 3567593624700274890
    keys = ((0, "a", 1), (0, "a", 1), (0, "b", 1), (0, "a", 2))
    draws = [torch.rand(4, generator=streams.torch_stream("order", *key)) for key in keys]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])


def test_cosine_rises_then_falls():
    factors = [common.cosine(step, 12, warmup=2, floor=0.1) for step in range(13)]
    assert (
        factors[:3] == [0.5, 1.0, 1.0]
        and factors[7] == pytest.approx(0.55)
        and factors[12] == pytest.approx(0.1)
    )


def test_log_of_a_resumed_run_has_each_step_once(tmp_path):
    log = common.MetricLog(tmp_path / "log.jsonl")
    for step in range(4):
        log.write(step, reward=step / 3, broken=float("nan"))
    with open(log.path, "a") as file:
        file.write('{"step": 4, "rew')  # the process was killed here
    log = common.MetricLog(log.path, resume_step=2)
    log.write(2, reward=torch.tensor(7.0))
    assert common.read_log(log.path) == [
        {"step": 0, "reward": 0.0, "broken": None},
        {"step": 1, "reward": 0.333333, "broken": None},
        {"step": 2, "reward": 7.0},
    ]


def test_interrupt_only_raises_a_flag(capsys):
    with common.Interrupt() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
        with pytest.raises(SystemExit) as left:
            stop.save_or_leave(5, argparse.Namespace(save_every=100, steps=9), lambda: None)
    assert left.value.code == 130 and "The same command goes on" in capsys.readouterr().out


def arguments(out, **more):
    return argparse.Namespace(
        **{"preset": "tiny", "out": str(out), "lr": 1e-4, "threads": 1, **more}
    )


def test_same_command_continues_and_other_flags_are_refused(tmp_path, capsys):
    out = tmp_path / "stage"
    common.begin("stage", arguments(out), neutral=("threads",))
    (out / "training").mkdir()
    common.begin(
        "stage", arguments(out, threads=2), neutral=("threads",)
    )  # a neutral flag may change
    with pytest.raises(SystemExit, match="--lr 0.0001 .now 0.5."):
        common.begin("stage", arguments(out, lr=0.5), neutral=("threads",))
    with pytest.raises(SystemExit, match="not finished. Run `python stage.py` again"):
        common.need(out, "python stage.py")
    common.finish(out, 1, common.Clock({"seconds": 10.0, "cpu_seconds": 20.0}))
    done = json.loads((out / "done.json").read_text())
    assert done["steps"] == 1 and 10 <= done["seconds"] < 11 and done["cpu_seconds"] >= 20
    assert common.need(out, "python stage.py") == out and not (out / "training").exists()
    with pytest.raises(SystemExit) as left:
        common.begin("stage", arguments(out), neutral=("threads",))
    assert left.value.code == 0 and "is finished (1 steps" in capsys.readouterr().out


def test_missing_input_names_the_command_and_a_hub_id_passes():
    with pytest.raises(SystemExit, match="out/nothing is missing. `python train_sft.py` makes it"):
        common.need("out/nothing", "python train_sft.py")
    assert common.need("Qwen/Qwen3-VL-8B-Instruct", "…") == "Qwen/Qwen3-VL-8B-Instruct"


def test_preset_gives_defaults_and_the_user_wins():
    def parse(*argv):
        parser = argparse.ArgumentParser()
        parser.add_argument("--lr", type=float)
        parser.add_argument("--steps", type=int, default=3)
        return common.parse_with_preset(
            parser, {"tiny": {"lr": 1.0}, "astra": {"lr": 2.0, "steps": 9}}, argv
        )

    assert vars(parse()) == {"lr": 1.0, "steps": 3, "preset": "tiny"}
    assert vars(parse("--preset", "astra", "--lr", "5")) == {
        "lr": 5.0,
        "steps": 9,
        "preset": "astra",
    }


def test_every_pass_draws_each_thing_once_and_no_step_draws_one_twice():
    passes = np.reshape([streams.rows_of_step(8, 4, step, 0) for step in range(6)], (3, 8)).tolist()
    assert all(sorted(each) == list(range(8)) for each in passes) and passes[0] != passes[1]
    steps = [
        streams.rows_of_step(10, 4, step, 0) for step in range(40)
    ]  # two are left over in every pass
    assert all(len(set(a + b)) == 8 for a, b in zip(steps[::2], steps[1::2]))
    assert np.bincount(np.ravel(steps), minlength=10).min() > 8
    assert streams.rows_of_step(10, 0, 0, 0) == []  # --eval-questions 0


def test_flags_below_their_smallest_value_are_refused(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--save-every", type=int)
    assert (
        common.parse_with_preset(parser, {"tiny": {}}, [], [("save_every", 1)]).save_every is None
    )
    with pytest.raises(SystemExit):
        common.parse_with_preset(
            argparse.ArgumentParser(parents=[parser], add_help=False, conflict_handler="resolve"),
            {"tiny": {}},
            ["--save-every", "0"],
            [("save_every", 1)],
        )
    assert "--save-every 0: must be 1 or more" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_ends_the_run():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert common.clip_gradients([weight], 1.0) == pytest.approx(
        5
    ) and weight.grad.norm() == pytest.approx(1)
    weight.grad = torch.tensor([1.0, float("nan")])
    with pytest.raises(SystemExit, match="not finite"):
        common.clip_gradients([weight], 1.0)


def test_what_a_script_started_in_the_background_stops_on_sigterm(tmp_path):
    """There Ctrl-C is ignored; a list of evidence and the demo end their stages by SIGTERM."""
    (tmp_path / "stage.py").write_text(
        "import time\nfrom lib.common import run\n"
        "run(lambda: [print('begun', flush=True), time.sleep(60)])\n"
    )
    child = subprocess.Popen(
        [sys.executable, str(tmp_path / "stage.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert child.stdout.readline() == "begun\n"
    child.send_signal(signal.SIGINT)
    child.terminate()
    said, _ = child.communicate(timeout=30)
    assert (
        child.returncode == 130
        and said == "Stopped. The same command goes on from what was saved.\n"
    )
