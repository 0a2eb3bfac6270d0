"""pytest tests/test_common.py: processes, checkpoints and the log.  CPU, about 15 s."""

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib import common

ROOT = Path(__file__).parent.parent

# Two steps of a small module on this rank's share of 5 rows, then a checkpoint written and read back.
STEPS = """
import sys, torch
from lib import common

out = sys.argv[1]
world = common.setup(threads=1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
common.shard(model, [model[0]], world)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
x = torch.randn(5, 6, generator=common.generator("x"))[world.rank::world.size]
n = common.global_sum(float(len(x)))
for step in range(2):
    optimizer.zero_grad()
    (model(x).square().sum() / n).backward()
    gradients = common.whole([(name, p.grad) for name, p in model.named_parameters()])
    norm = common.clip_gradients(model.parameters(), 0.5)
    optimizer.step()
with common.gathered(model), torch.no_grad():
    for _ in range(1 + world.rank):                                     # ranks may differ in their number of passes
        model(x)
before = common.training_tensors(model, optimizer)
common.save_state(out + ".state", 2, before, {})
common.restore_training(model, optimizer, common.load_state(out + ".state")[1])
after = common.training_tensors(model, optimizer)
if common.is_main():
    assert len(before) == 16 and all(torch.equal(before[name], after[name]) for name in before)
    torch.save({"n": n, "norm": norm, "gradients": gradients}, out)
"""


def on_ranks(ranks, script, out):
    """Run the script on gloo ranks (0: a plain process) and return what its rank 0 saved."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *torchrun, str(script), str(out)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out)


def test_two_ranks_give_the_gradient_of_one(tmp_path):
    """FSDP's default is a mean over ranks, which would give half; 3 rows on one rank and 2 on the other expose more."""
    script = tmp_path / "steps.py"
    script.write_text(STEPS)
    one, two = on_ranks(0, script, tmp_path / "one.pt"), on_ranks(2, script, tmp_path / "two.pt")
    assert one["n"] == two["n"] == 5
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-4)
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-4, atol=1e-5)


def small_state(value):
    return {"w": torch.full((3,), float(value))}


def test_newest_checkpoint_replaces_the_older(tmp_path):
    assert common.load_state(tmp_path / "training") is None
    for step in (1, 2):
        common.save_state(tmp_path / "training", step, small_state(step), {"note": step})
    step, tensors, state = common.load_state(tmp_path / "training")
    assert (step, state, tensors["w"].tolist()) == (2, {"note": 2}, [2.0] * 3)
    assert [p.name for p in (tmp_path / "training").iterdir()] == ["step_000002"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   RuntimeError("Error while serializing: I/O error: No space left on device")])
def test_full_disk_is_a_sentence_and_keeps_the_older_checkpoint(tmp_path, monkeypatch, error):
    common.save_state(tmp_path, 1, small_state(1), {})

    def full(tensors, path):
        path.write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(common, "save_file", full)
    with pytest.raises(SystemExit, match="disk is full"):
        common.save_state(tmp_path, 2, small_state(2), {})
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
    assert common.load_state(tmp_path)[0] == 1


def test_unreadable_checkpoint_names_the_folder(tmp_path):
    common.save_state(tmp_path, 3, small_state(3), {})
    (tmp_path / "step_000003" / "tensors.safetensors").write_bytes(b"not tensors")
    with pytest.raises(SystemExit, match="step_000003 cannot be read.*Remove it"):
        common.load_state(tmp_path)


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
    assert common.stable_seed(0, "a", 1) == 3567593624700274890
    keys = ((0, "a", 1), (0, "a", 1), (0, "b", 1), (0, "a", 2))
    draws = [torch.rand(4, generator=common.generator(*key)) for key in keys]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])


def test_cosine_rises_then_falls():
    factors = [common.cosine(step, 12, warmup=2, floor=0.1) for step in range(13)]
    assert factors[:3] == [0.5, 1.0, 1.0] and factors[7] == pytest.approx(0.55) and factors[12] == pytest.approx(0.1)


def test_log_of_a_resumed_run_has_each_step_once(tmp_path):
    log = common.MetricLog(tmp_path / "log.jsonl")
    for step in range(4):
        log.write(step, reward=step / 3, broken=float("nan"))
    with open(log.path, "a") as file:
        file.write('{"step": 4, "rew')                                   # the process was killed here
    log = common.MetricLog(log.path, resume_step=2)
    log.write(2, reward=torch.tensor(7.0))
    assert common.read_log(log.path) == [{"step": 0, "reward": 0.0, "broken": None},
                                         {"step": 1, "reward": 0.333333, "broken": None}, {"step": 2, "reward": 7.0}]


def test_interrupt_only_raises_a_flag(capsys):
    with common.Interrupt() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
    with pytest.raises(SystemExit) as left:
        stop.leave(5)
    assert left.value.code == 130 and "The same command goes on" in capsys.readouterr().out


def arguments(out, **more):
    return argparse.Namespace(**{"preset": "tiny", "out": str(out), "lr": 1e-4, "threads": 1, **more})


def test_same_command_continues_and_other_flags_are_refused(tmp_path, capsys):
    out = tmp_path / "stage"
    common.begin("stage", arguments(out), neutral=("threads",))
    common.save_state(out / "training", 1, small_state(1), {})
    common.begin("stage", arguments(out, threads=2), neutral=("threads",))          # a neutral flag may change
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
        return common.parse_with_preset(parser, {"tiny": {"lr": 1.0}, "astra": {"lr": 2.0, "steps": 9}}, argv)

    assert vars(parse()) == {"lr": 1.0, "steps": 3, "preset": "tiny"}
    assert vars(parse("--preset", "astra", "--lr", "5")) == {"lr": 5.0, "steps": 9, "preset": "astra"}
