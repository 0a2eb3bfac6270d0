"""pytest tests/test_train_rl.py: GRPO's loss, its gradient however it is batched, the stage.  CPU, about 40 s."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import rewards
import train_rl
from lib import common
from policy import Policy, Trajectory

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------- the loss

def test_grpo_loss_against_numpy():
    """Ratios from 0.5 to 2 reach both clips in both signs; a masked token counts for nothing."""
    rng = np.random.default_rng(0)
    old, new = np.log(rng.uniform(0.1, 0.4, (4, 6))), np.log(rng.uniform(0.1, 0.4, (4, 6)))
    mask, a = rng.integers(0, 2, (4, 6)), np.array([1.5, -0.5, 0.7, -2.0])[:, None]
    ratio = np.exp(new - old)
    want = -(np.minimum(ratio * a, np.clip(ratio, 0.8, 1.28) * a) * mask).sum()
    tensors = [torch.tensor(x) for x in (new, old, a[:, 0], mask)]
    assert train_rl.grpo_loss(*tensors).item() == pytest.approx(want)
    silent = (((a > 0) & (ratio > 1.28)) | ((a < 0) & (ratio < 0.8))) & (mask > 0)
    assert silent.any() and train_rl.clipped_tokens(*tensors).item() == silent.sum()


@pytest.mark.parametrize("advantage, ratio, flows", [
    (1, 1.27, True), (1, 1.29, False), (1, 0.5, True), (-1, 0.81, True), (-1, 0.79, False), (-1, 1.5, True)])
def test_clip_higher_stops_the_gradient(advantage, ratio, flows):
    """0.28 bounds good tokens from above, 0.2 bad ones from below; a token that strays the other way is called back."""
    logprobs = torch.tensor([[np.log(0.2 * ratio)]], requires_grad=True)
    train_rl.grpo_loss(logprobs, torch.tensor([[np.log(0.2)]]), torch.tensor([advantage]), torch.ones(1, 1)).backward()
    assert logprobs.grad.item() == pytest.approx(-advantage * ratio if flows else 0.0)


def test_kl_estimate_is_right_on_average():
    """k3 under samples of the policy: its mean is the true KL, and no sample is negative."""
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    k3 = torch.stack([train_rl.kl_to_start(p[i].log(), q[i].log(), torch.tensor(1.0)) for i in range(3)])
    assert (k3 >= 0).all() and (p * k3).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-6)


@pytest.mark.parametrize("phase, calls, answer, reward", [
    (1, 0, "A", 1.5), (1, 2, "A", 1.52), (2, 0, "A", 1.5),
    (2, 1, "A", 1.52 + 0.1 * 0.75), (2, 1, "B", 0.52 - 0.03 * 0.25)])
def test_score_follows_the_phase(phase, calls, answer, reward):
    dialogue = SimpleNamespace(answer=answer, question={"answer": "A"}, well_formed=True, valid_calls=calls,
                               logprobs=[0.0, -1.0])
    assert train_rl.score(dialogue, phase, 0.25).reward == pytest.approx(reward)


# ---------------------------------------------------------------- the gradient

def small_policy():
    return Policy.tiny(0, width=32, depth=1, heads=2, kv_heads=1, mlp=64, vision_width=32, vision_depth=1)


def rows_of(policy, turns=(3, 9, 1, 5, 7)):
    """Dialogues of unequal length with one to nine words per turn, advantages of both signs and stale old log-probs."""
    image, rows = np.zeros((32, 32, 3), np.uint8), []
    for i, words in enumerate(turns):
        dialogue = Trajectory.start(policy, {"question": "Which?", "answer": "A"}, [image] * (1 + i % 2), "direct")
        dialogue.say(policy, " red ball" * words)
        row = train_rl.score(dialogue, phase=1)
        row.advantage, row.start = (-1) ** i * (1.0 + i), row.old - 5.0
        row.old = row.old - 6.0 - 0.1 * torch.arange(len(row.old))
        rows.append(row)
    return rows


def gradient(policy, rows, micro_batch):
    policy.model.zero_grad()
    policy.vision.requires_grad_(False)
    args = SimpleNamespace(micro_batch=micro_batch, temperature=1.0, kl=0.1)
    sums = train_rl.accumulate_gradient(policy, rows, rows[0], args)
    return sums, torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


def test_micro_batch_does_not_change_the_gradient():
    """Dividing once per micro-batch is the classic mistake; answers of unequal length expose it."""
    policy = small_policy()
    rows = rows_of(policy)
    sums, want = gradient(policy, rows, micro_batch=5)
    assert sums["tokens"] == sum(sum(row.trajectory.loss_mask) for row in rows) and want.abs().max() > 0.01
    for micro_batch in (2, 1):
        again, got = gradient(policy, rows, micro_batch)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * want.abs().max().item())
        assert again["entropy"] == pytest.approx(sums["entropy"], rel=1e-5)


def test_rows_of_weight_zero_teach_nothing():
    """A rank with fewer rows fills up with idle ones: only the collectives may notice."""
    policy = small_policy()
    rows = rows_of(policy)
    _, want = gradient(policy, rows[:3], micro_batch=3)
    idle = [train_rl.replace(row, weight=0.0) for row in rows[3:]]
    tokens = sum(sum(row.trajectory.loss_mask) for row in rows)
    kept = sum(sum(row.trajectory.loss_mask) for row in rows[:3])
    _, got = gradient(policy, rows[:3] + idle, micro_batch=2)
    torch.testing.assert_close(got * tokens / kept, want, rtol=1e-4, atol=1e-6 * want.abs().max().item())


def test_groups_without_variance_are_left_out():
    args, world = SimpleNamespace(group=2, questions=4, minibatches=2), common.World(0, 1, 0, None)
    rows = list("aabbccdd")
    assert train_rl.split(rows, [True, False, True, True], args, world) == [["a", "a"], ["c", "c", "d", "d"]]
    ranks = [common.World(rank, 2, 0, None) for rank in (0, 1)]                 # they hold questions 0, 2 and 1, 3
    halves = [train_rl.split(part, [True, True], args, rank) for part, rank in zip((rows[:4], rows[4:]), ranks)]
    assert halves == [[["a", "a"], ["b", "b"]], [["c", "c"], ["d", "d"]]]


def test_questions_come_once_per_pass():
    questions = list(range(10))
    steps = [train_rl.questions_of_step(questions, 4, step, seed=0) for step in range(5)]
    passes = np.reshape(steps, (2, 10)).tolist()
    assert sorted(passes[0]) == sorted(passes[1]) == questions and passes[0] != passes[1]


# ---------------------------------------------------------------- the stage

# A random policy earns nothing, so the runs below reward something it can do: tokens with an even number.
EVEN = """
def even_tokens(t):
    wrote = [i for i, m in zip(t.ids, t.loss_mask) if m]
    return sum(i % 2 == 0 for i in wrote) / len(wrote)
"""
exec(EVEN)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A small random policy and a few questions over random images."""
    folder = tmp_path_factory.mktemp("inputs")
    small_policy().save(folder / "sft")
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
    for part, count in (("train", 6), ("val", 4)):
        rows = [{"id": f"{part}{i}", "images": ["0.png", f"{1 + i % 2}.png"], "question": f"Which object is {i}?",
                 "options": ["A. red ball", "B. blue box"], "answer": "AB"[i % 2], "needs_view": i % 2 == 0}
                for i in range(count)]
        (folder / f"questions_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(inputs, out, *more):
    return ["--policy", str(inputs / "sft"), "--data", str(inputs), "--out", str(out), "--simulator", "none",
            "--questions", "4", "--group", "4", "--steps", "3", "--max-new-tokens", "6", "--lr", "1e-3",
            "--eval-every", "2", "--eval-questions", "4", "--threads", "1", *more]


def log_of(out):
    rows = common.read_log(out / "log.jsonl")
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def unbroken(inputs, tmp_path_factory):
    """Three steps of phase 1 in one go."""
    out = tmp_path_factory.mktemp("run") / "phase1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "format_reward", even_tokens)
        train_rl.main(command(inputs, out))
    return out


def test_stage_leaves_what_it_promises(inputs, unbroken):
    rows = log_of(unbroken)
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and set(rows[0]["eval"]) == {"agentic", "direct"}
    assert all(row["tokens"] > 0 and row["mismatch"] < 1e-4 and row["grad_norm"] > 0 for row in rows[:3])
    assert 0 < rows[0]["kl"] < rows[2]["kl"] and "kl" not in rows[1]    # 0 <: the first minibatch has moved it already
    assert {"curves.png", "args.json", "config.json", "model.safetensors"} <= {p.name for p in unbroken.iterdir()}
    assert json.loads((unbroken / "done.json").read_text())["steps"] == 3
    assert (unbroken / "dialogues/step_000002/0.png").exists() and (unbroken / "dialogues/end/0/dialogue.json").exists()
    known = {word for key in train_rl.LOG for word in key.split()} | {"step"}
    assert {key.removesuffix("_needs_view").removesuffix("_answerable") for row in rows for key in row} <= known
    before, after = (load_file(folder / "model.safetensors") for folder in (inputs / "sft", unbroken))
    assert before.keys() == after.keys()
    learned = {key for key in before if not torch.equal(before[key], after[key])}
    assert learned == {key for key in before if "visual" not in key}                    # the vision tower is frozen


def test_resumed_run_equals_an_unbroken_one(inputs, unbroken, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rewards, "format_reward", even_tokens)
    out = tmp_path / "phase1"
    with monkeypatch.context() as patch:
        patch.setattr(common.Interrupt, "requested", lambda stop: True)                 # Ctrl-C during the first step
        with pytest.raises(SystemExit) as left:
            train_rl.main(command(inputs, out))
    assert left.value.code == 130 and not (out / "done.json").exists()
    train_rl.main(command(inputs, out, "--save-every", "1"))                            # a neutral flag may differ
    assert "going on after step 1 of 3" in capsys.readouterr().out
    assert log_of(out) == log_of(unbroken)
    a, b = (load_file(folder / "model.safetensors") for folder in (out, unbroken))
    assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(SystemExit) as left:                                             # and once more: nothing to do
        train_rl.main(command(inputs, out))
    assert left.value.code == 0


def test_two_ranks_give_the_curve_of_one(inputs, unbroken, tmp_path):
    """The whole stage under torchrun with FSDP: same questions, same samples, same gradients."""
    script = tmp_path / "run.py"
    script.write_text(f"import sys\nimport rewards, train_rl\n{EVEN}\nrewards.format_reward = even_tokens\n"
                      "train_rl.main(sys.argv[1:])\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run([*torchrun, *command(inputs, tmp_path / "phase1")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for two, one in zip(log_of(tmp_path / "phase1"), log_of(unbroken), strict=True):
        assert two.keys() == one.keys()
        for key in {"reward", "tokens", "groups_flat", "loss", "entropy", "kl", "grad_norm", "lr"} & one.keys():
            assert two[key] == pytest.approx(one[key], rel=2e-3, abs=1e-5), (one["step"], key)
    assert two["eval"] == one["eval"]


def test_phase_2_measures_the_gain_over_answering_directly(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "format_reward", even_tokens)
    seen = []
    monkeypatch.setattr(rewards, "phase2_reward", lambda match, form, n_tool, direct: seen.append(direct) or form)
    train_rl.main(command(inputs, tmp_path / "phase2", "--phase", "2", "--steps", "1", "--eval-every", "0"))
    assert len(seen) == 16 and log_of(tmp_path / "phase2")[0]["match_direct"] == sum(seen) / 16


def test_what_is_rewarded_becomes_more_frequent(inputs, tmp_path, monkeypatch):
    """A wrong sign anywhere between reward and weights would drive the other way."""
    monkeypatch.setattr(rewards, "format_reward", even_tokens)
    out = tmp_path / "run"
    train_rl.main(command(inputs, out, "--steps", "12", "--lr", "3e-2", "--group", "8", "--eval-every", "0"))
    curve = [row["format"] for row in log_of(out)]
    assert curve[0] < 0.6 and curve[-1] > 0.8


def test_missing_inputs_name_the_command(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="out/sft is missing. `python train_sft.py` makes it"):
        train_rl.main([])
    with pytest.raises(SystemExit, match="out/phase1 is missing. `python train_rl.py --phase 1` makes it"):
        train_rl.main(["--phase", "2"])
    with pytest.raises(SystemExit, match="out/wm is missing. `python train_wm.py` makes it"):
        train_rl.main(["--policy", str(inputs / "sft"), "--data", str(inputs)])


def test_presets():
    tiny, astra = train_rl.parse_args([]), train_rl.parse_args(["--preset", "astra", "--phase", "2"])
    assert (tiny.policy, tiny.out, tiny.kl) == ("out/sft", "out/phase1", 0.0)
    assert (astra.policy, astra.out, astra.kl, astra.gradient_checkpointing) == ("out/phase1", "out/phase2", None, True)
    with pytest.raises(SystemExit):
        train_rl.parse_args(["--questions", "5", "--minibatches", "2"])
