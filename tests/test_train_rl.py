"""pytest tests/test_train_rl.py: GRPO's loss, its gradient however it is batched, the stage.  CPU, about 25 s."""

import itertools
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import on_ranks
from safetensors.torch import load_file

import rewards
import train_rl
from extras.remote.client import RemoteSimulator
from extras.world2vlm import rewards as world2vlm_rewards
from lib import common, rl_log, streams
from lib.simulators import SimulatorError
from policy import Policy, Trajectory

# ---------------------------------------------------------------- the loss


def test_grpo_loss_against_numpy():
    """Ratios from 0.5 to 2 reach both clips in both signs; a masked token counts for nothing."""
    rng = np.random.default_rng(0)
    old, new = np.log(rng.uniform(0.1, 0.4, (4, 6))), np.log(rng.uniform(0.1, 0.4, (4, 6)))
    mask, a = rng.integers(0, 2, (4, 6)), np.array([1.5, -0.5, 0.7, -2.0])[:, None]
    ratio = np.exp(new - old)
    want = -(np.minimum(ratio * a, np.clip(ratio, 0.8, 1.28) * a) * mask).sum()
    new, old, ratio_, a_, mask_ = (torch.tensor(x) for x in (new, old, ratio, a[:, 0], mask))
    assert train_rl.grpo_loss(new, old, a_, mask_).item() == pytest.approx(want)
    silent = [
        ((a < 0) & (ratio < 0.8) & (mask > 0)).sum(),
        ((a > 0) & (ratio > 1.28) & (mask > 0)).sum(),
    ]
    assert all(silent) and [n.item() for n in train_rl.clipped_tokens(ratio_, a_, mask_)] == silent


@pytest.mark.parametrize(
    "advantage, ratio, flows",
    [
        (1, 1.27, True),
        (1, 1.29, False),
        (1, 0.5, True),
        (-1, 0.81, True),
        (-1, 0.79, False),
        (-1, 1.5, True),
    ],
)
def test_clip_higher_stops_the_gradient(advantage, ratio, flows):
    """0.28 bounds good tokens from above, 0.2 bad ones from below; a token that strays the other way is called back."""
    logprobs = torch.tensor([[np.log(0.2 * ratio)]], requires_grad=True)
    train_rl.grpo_loss(
        logprobs, torch.tensor([[np.log(0.2)]]), torch.tensor([advantage]), torch.ones(1, 1)
    ).backward()
    assert logprobs.grad.item() == pytest.approx(-advantage * ratio if flows else 0.0)


def test_kl_estimate_is_right_on_average():
    """k3 under samples of the policy: its mean is the true KL, and no sample is negative."""
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    k3 = torch.stack(
        [train_rl.kl_to_start(p[i].log(), q[i].log(), torch.tensor(1.0)) for i in range(3)]
    )
    assert (k3 >= 0).all() and (p * k3).sum().item() == pytest.approx(
        (p * (p / q).log()).sum().item(), abs=1e-6
    )


def dialogue_of(said, calls=0, **question):
    return SimpleNamespace(
        answer=said,
        question={"answer": "A", **question},
        well_formed=True,
        valid_calls=calls,
        logprobs=[0.0, -1.0],
    )


@pytest.mark.parametrize(
    "calls, answer, direct, reward",
    [
        (0, "A", None, 1.5),
        (2, "A", None, 1.52),
        (0, "A", 0.25, 1.5),
        (1, "A", 0.25, 1.52 + 0.1 * 0.75),
        (1, "B", 0.25, 0.52 - 0.03 * 0.25),
    ],
)
def test_score_follows_the_phase(calls, answer, direct, reward):
    phase1, phase2 = rewards.phase1_reward, rewards.phase2_reward
    match = float(answer == "A")
    assert reward == pytest.approx(
        phase1(match, 1, calls) if direct is None else phase2(match, 1, calls, direct)
    )
    row = train_rl.score(dialogue_of(answer, calls), train_rl.parse_args([]), direct)
    assert row.reward == pytest.approx(reward) and row.match == match


@pytest.mark.parametrize(
    "flags, won, lost",
    [
        ("--lambda-use 0", 1.5 + 0.1 * 0.75, 0.5 - 0.03 * 0.25),
        ("--alpha 0 --beta 0", 1.52, 0.52),
        ("--alpha 0.4", 1.52 + 0.4 * 0.75, 0.52 - 0.03 * 0.25),
        ("--beta 1", 1.52 + 0.1 * 0.75, 0.52 - 0.25),
    ],
)
def test_flags_take_the_reward_apart(flags, won, lost):
    """Gain only, usage only: a rollout that called, right or wrong, where 1 of 4 direct answers is right."""
    args = train_rl.parse_args(["--phase", "2", *flags.split()])
    got = [train_rl.score(dialogue_of(answer, calls=1), args, 0.25).reward for answer in "AB"]
    assert got == pytest.approx([won, lost])


def test_world2vlm_has_rewards_of_its_own():
    args = train_rl.parse_args(["--task", "world2vlm"])
    row = train_rl.score(
        dialogue_of("turn left 30 degrees", answer="turn left 20 degrees", category="A2"), args
    )
    want = world2vlm_rewards.world2vlm("A2", "turn left 20 degrees", "turn left 30 degrees")
    assert row.reward == row.match == want["total"] and row.parts == want and 0.9 < row.reward < 1
    silent = train_rl.score(dialogue_of(None, answer="yes", category="D4"), args)
    totals = rl_log.by_task([row, silent])
    assert totals["A2_numeric"] == (want["numeric"], 1) and totals["A1_total"] == (0, 0)
    assert totals["D4_total"] == (0, 1)
    assert (
        {key.split("_", 1)[1] for key in totals}
        == set(rl_log.PARTS)
        >= set(row.parts) | set(silent.parts)
    )
    assert (args.group, args.kl, args.clip_high, args.mode) == (4, 0.01, 0.3, "direct")
    with pytest.raises(SystemExit):
        train_rl.parse_args(["--task", "world2vlm", "--phase", "2"])


# ---------------------------------------------------------------- the gradient


def small_policy():
    return Policy.tiny(
        0, width=32, depth=2, heads=2, kv_heads=1, mlp=64, vision_width=32, vision_depth=1
    )


def rows_of(policy, turns=(3, 9, 1, 5, 7)):
    """Dialogues of unequal length with one to nine words per turn, advantages of both signs and stale old log-probs."""
    image, rows = np.zeros((32, 32, 3), np.uint8), []
    for i, words in enumerate(turns):
        dialogue = Trajectory.start(
            policy, {"question": "Which?", "answer": "A"}, [image] * (1 + i % 2), "direct"
        )
        dialogue.say(policy, " red ball" * words)
        row = train_rl.score(dialogue, train_rl.parse_args([]))
        row.advantage, row.start = (-1) ** i * (1.0 + i), row.old - 5.0
        row.old = row.old - 6.0 - 0.1 * torch.arange(len(row.old))
        rows.append(row)
    return rows


def gradient(policy, rows, tokens):
    policy.model.zero_grad()
    policy.vision.requires_grad_(False)
    args = SimpleNamespace(micro_batch_tokens=tokens, temperature=1.0, kl=0.1, clip_high=0.28)
    sums = train_rl.accumulate_gradient(policy, rows, rows[0], args)
    return sums, torch.cat(
        [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
    )


def test_micro_batch_does_not_change_the_gradient():
    """Dividing once per micro-batch is the classic mistake; answers of unequal length expose it.

    Rows 0, 2, 4 and 1, 3 share a prompt, and so a line if there is room: all of them, three, two, none.
    """
    policy = small_policy()
    rows = rows_of(policy)
    rows = [rows[i] for i in (0, 2, 4, 1, 3)]
    sums, want = gradient(policy, rows, tokens=1000)
    assert (
        sums["tokens"] == sum(sum(row.trajectory.loss_mask) for row in rows)
        and want.abs().max() > 0.01
    )
    for tokens in (70, 40, 1):
        again, got = gradient(policy, rows, tokens)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * want.abs().max().item())
        assert again["entropy"] == pytest.approx(sums["entropy"], rel=1e-5)


def test_rows_of_weight_zero_teach_nothing():
    """A rank with fewer rows fills up with idle ones: only the collectives may notice."""
    policy = small_policy()
    rows = rows_of(policy)
    _, want = gradient(policy, rows[:3], tokens=1000)
    idle = [train_rl.replace(row, weight=0.0) for row in rows[3:]]
    tokens = sum(sum(row.trajectory.loss_mask) for row in rows)
    kept = sum(sum(row.trajectory.loss_mask) for row in rows[:3])
    _, got = gradient(policy, rows[:3] + idle, tokens=40)
    torch.testing.assert_close(
        got * tokens / kept, want, rtol=1e-4, atol=1e-6 * want.abs().max().item()
    )


@pytest.mark.parametrize("advantage, ratio", [(1.0, 1.29), (2.0, 0.7), (-1.5, 1.29), (-1.0, 0.7)])
def test_gradient_of_the_written_formula(advantage, ratio):
    """One row at temperature 0.7: - min(ratio A, clip(ratio, 0.8, 1.3) A) + 0.1 k3, a mean over tokens, by autograd.

    The ratio of 1.29 is within --clip-high 0.3 and beyond the default.
    """
    policy = small_policy()
    policy.vision.requires_grad_(False)
    (row,) = rows_of(policy, turns=(5,))
    args = train_rl.parse_args(["--temperature", "0.7", "--kl", "0.1", "--clip-high", "0.3"])
    batch = train_rl.collate(policy, [row.trajectory])
    logits = policy.forward(batch.ids, batch.positions, batch.mask, batch.features)[0]
    logprobs = torch.log_softmax(logits / 0.7, -1).gather(-1, batch.targets[0, :, None])[:, 0]
    wrote = batch.loss_mask[0] > 0
    row.advantage, row.old = advantage, logprobs.detach() - np.log(ratio)
    row.start = logprobs.detach() + torch.linspace(-1, 1, len(logprobs))
    now, old, start = logprobs[wrote], row.old[wrote], row.start[wrote]
    r, d = (now - old).exp(), start - now
    k3 = d.exp() - d - 1
    objective = -torch.minimum(r * advantage, r.clamp(0.8, 1.3) * advantage) + 0.1 * k3
    learning = [p for p in policy.model.parameters() if p.requires_grad]
    want = torch.autograd.grad(objective.mean(), learning)
    sums = train_rl.accumulate_gradient(policy, [row], row, args)
    assert sums["kl"] == pytest.approx(k3.sum().item(), rel=1e-4) and sums["kl"] > 0.1
    largest = max(g.abs().max().item() for g in want)
    assert largest > 1e-3
    for p, g in zip(learning, want):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-5 * largest)


def test_an_update_goes_at_the_rate_of_its_step_and_as_far_as_the_norm_allows():
    """Under plain gradient descent from a wrong rate: the way is the rate times the largest norm allowed."""
    policy = small_policy()
    policy.vision.requires_grad_(False)
    rows = rows_of(policy)
    for row in rows:
        row.old = row.old + 6.0  # or the clip would silence the good ones
    learning = [p for p in policy.model.parameters() if p.requires_grad]
    before = torch.cat([p.detach().flatten().clone() for p in learning])
    args = train_rl.parse_args(
        ["--lr", "1e-2", "--warmup", "4", "--steps", "9", "--max-grad-norm", "1e-3"]
    )
    told = train_rl.update(policy, torch.optim.SGD(learning, lr=99), [rows], rows[0], 1, args)
    assert told["lr"] == pytest.approx(0.5e-2) and told["grad_norm"] > 1e-2
    way = torch.cat([p.detach().flatten() for p in learning]) - before
    assert way.norm().item() == pytest.approx(0.5e-2 * 1e-3, rel=0.05)
    assert all(p.grad is None for p in learning)


def test_micro_batches_keep_within_their_tokens():
    """Neighbours with one prompt share a line, lines share a pass; every row is in one pass, a long one alone."""
    policy = small_policy()
    rows = rows_of(policy)
    rows = [rows[i] for i in (0, 2, 4, 1, 3)]
    for tokens, passes in (
        (1000, 1),
        (70, 2),
        (40, 4),
        (1, 5),
    ):  # lines of 20 + 3 * 14 and 27 + 2 * 18
        chunks = train_rl.micro_batches(rows, rows[0], tokens)
        assert len(chunks) == passes and sorted(map(id, sum(chunks, []))) == sorted(map(id, rows))
        for chunk in chunks:
            cells = train_rl.collate(
                policy, [row.trajectory for row in chunk], share=True
            ).ids.numel()
            assert cells <= tokens or len(chunk) == 1
    assert train_rl.collate(policy, [row.trajectory for row in rows], share=True).ids.shape[0] == 2


def test_groups_without_variance_are_left_out():
    args, world = SimpleNamespace(group=2, questions=4, minibatches=2), common.World(0, 1, 0, None)
    rows = list("aabbccdd")
    assert train_rl.split(rows, [True, False, True, True], args, world) == [
        ["a", "a"],
        ["c", "c", "d", "d"],
    ]
    ranks = [common.World(rank, 2, 0, None) for rank in (0, 1)]  # they hold questions 0, 2 and 1, 3
    halves = [
        train_rl.split(part, [True, True], args, rank)
        for part, rank in zip((rows[:4], rows[4:]), ranks)
    ]
    assert halves == [[["a", "a"], ["b", "b"]], [["c", "c"], ["d", "d"]]]


def test_curriculum_asks_what_varies():
    """New questions first, each once; then those whose rewards differ, the others now and then."""
    spread, asked = [1.0] * 8, []
    for step in range(300):
        places = train_rl.places_of_step(8, 2, step, 0, spread)
        earned = [
            reward
            for place in places
            for reward in ((1.5, 0.5, 1.5, 0.5) if place < 2 else (1.5,) * 4)
        ]
        spread = train_rl.new_spread(spread, places, earned, 4)
        asked.append(places)
    assert all(len(set(places)) == 2 for places in asked)
    assert spread == pytest.approx([1 / 3 + train_rl.LEAST] * 2 + [train_rl.LEAST] * 6)
    counts = np.bincount(np.ravel(asked[50:]), minlength=8)
    assert counts[:2].min() > 4 * counts[2:].max() > 0


# ---------------------------------------------------------------- the stage


def even_tokens(t):
    """A random policy earns nothing, so the runs below reward something it can do: tokens with an even number."""
    wrote = [i for i, m in zip(t.ids, t.loss_mask) if m]
    return sum(i % 2 == 0 for i in wrote) / len(wrote)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A small random policy and a few questions over random images."""
    folder = tmp_path_factory.mktemp("inputs")
    small_policy().save(folder / "sft")
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
    for part, count in (("train", 6), ("val", 4)):
        rows = [
            {
                "id": f"{part}{i}",
                "images": ["0.png", f"{1 + i % 2}.png"],
                "question": f"Which object is {i}?",
                "options": ["A. red ball", "B. blue box"],
                "answer": "AB"[i % 2],
                "needs_view": i % 2 == 0,
            }
            for i in range(count)
        ]
        (folder / f"questions_{part}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    return folder


def command(inputs, out, *more):
    return [
        "--policy",
        str(inputs / "sft"),
        "--data",
        str(inputs),
        "--out",
        str(out),
        "--simulator",
        "none",
        "--questions",
        "4",
        "--group",
        "4",
        "--steps",
        "3",
        "--max-new-tokens",
        "6",
        "--lr",
        "1e-3",
        "--eval-every",
        "2",
        "--eval-questions",
        "4",
        "--threads",
        "1",
        *more,
    ]


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
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and set(rows[0]["eval"]) == {
        "agentic",
        "direct",
    }
    assert all(
        row["tokens"] > 0 and row["mismatch"] < 1e-4 and row["grad_norm"] > 0 for row in rows[:3]
    )
    assert all(abs(row["ratio"] - 1) < 0.1 and row["ratio_max"] > 1 for row in rows[:3])
    assert (
        0 < rows[0]["kl"] < rows[2]["kl"] and "kl" not in rows[1]
    )  # 0 <: the first minibatch has moved it already
    assert {"curves.png", "args.json", "config.json", "model.safetensors"} <= {
        p.name for p in unbroken.iterdir()
    }
    assert json.loads((unbroken / "done.json").read_text())["steps"] == 3
    assert (unbroken / "dialogues/step_000002/0.png").exists() and (
        unbroken / "dialogues/end/0/dialogue.json"
    ).exists()
    known = set(rl_log.LOG) | {"step"}
    assert {
        key.removesuffix("_needs_view").removesuffix("_answerable") for row in rows for key in row
    } <= known
    before, after = (
        load_file(folder / "model.safetensors") for folder in (inputs / "sft", unbroken)
    )
    assert before.keys() == after.keys()
    learned = {key for key in before if not torch.equal(before[key], after[key])}
    assert learned == {key for key in before if "visual" not in key}  # the vision tower is frozen


def test_resumed_run_equals_an_unbroken_one(inputs, unbroken, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rewards, "format_reward", even_tokens)
    out = tmp_path / "phase1"
    with monkeypatch.context() as patch:
        patch.setattr(
            common.Interrupt, "requested", lambda stop: True
        )  # Ctrl-C during the first step
        with pytest.raises(SystemExit) as left:
            train_rl.main(command(inputs, out))
    assert left.value.code == 130 and not (out / "done.json").exists()
    train_rl.main(command(inputs, out, "--save-every", "1"))  # a neutral flag may differ
    assert "going on after step 1 of 3" in capsys.readouterr().out
    assert log_of(out) == log_of(unbroken)
    a, b = (load_file(folder / "model.safetensors") for folder in (out, unbroken))
    assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(SystemExit) as left:  # and once more: nothing to do
        train_rl.main(command(inputs, out))
    assert left.value.code == 0


def test_resumed_curriculum_asks_the_same(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "format_reward", even_tokens)
    flags = ("--curriculum", "variance", "--save-every", "1", "--eval-every", "0", "--steps", "2")
    train_rl.main(command(inputs, tmp_path / "unbroken", *flags))
    with monkeypatch.context() as patch:
        patch.setattr(common.Interrupt, "requested", lambda stop: True)
        with pytest.raises(SystemExit):
            train_rl.main(command(inputs, tmp_path / "resumed", *flags))
    train_rl.main(command(inputs, tmp_path / "resumed", *flags))
    assert log_of(tmp_path / "resumed") == log_of(tmp_path / "unbroken")


def stage(*flags):
    train_rl.main(flags)


def test_two_ranks_give_the_curve_of_one(inputs, unbroken, tmp_path, monkeypatch):
    """The whole stage with FSDP: same questions, same samples, same gradients."""
    monkeypatch.setattr(rewards, "format_reward", even_tokens)
    on_ranks(2, stage, *command(inputs, tmp_path / "phase1"))
    for two, one in zip(log_of(tmp_path / "phase1"), log_of(unbroken), strict=True):
        assert two.keys() == one.keys()
        for key in {
            "reward",
            "tokens",
            "groups_flat",
            "loss",
            "entropy",
            "kl",
            "grad_norm",
            "lr",
        } & one.keys():
            assert two[key] == pytest.approx(one[key], rel=2e-3, abs=1e-5), (one["step"], key)
    assert two["eval"] == one["eval"]


class Script:
    """Stands in for `rollout`: every other tool rollout is right, and direct ones as often as DIRECT says."""

    DIRECT = {
        0: (1, 1, 0, 1),
        1: (0, 0, 0, 0),
        2: (0, 1, 0, 0),
    }  # by the number of the question, over again

    def __init__(self):
        self.asked = []  # (ids of questions, simulator or not, mode, group, temperature, seed)

    def __call__(self, policy, questions, simulator, mode, group, temperature, seed, *_):
        self.asked.append(
            ([q["id"] for q in questions], bool(simulator), mode, group, temperature, seed)
        )
        return [self.held(policy, q, mode, k) for q in questions for k in range(group)]

    def held(self, policy, question, mode, k):
        dialogue = Trajectory.start(policy, question, [np.zeros((32, 32, 3), np.uint8)] * 2, mode)
        right = self.DIRECT[int(question["id"][-1]) % 3][k] if mode == "direct" else k % 2 == 0
        if mode == "agentic":
            call = '{"name": "imagine", "arguments": {"image": 1, "motion": "turn left", "amount": 45}}'
            dialogue.say(policy, f"<think></think><tool_call>{call}</tool_call>")
            dialogue.observe(policy, image=np.zeros((32, 32, 3), np.uint8))
        said = question["answer"] if right else "AB"[question["answer"] == "A"]
        dialogue.say(policy, f"<think></think><answer>{said}</answer>")
        return dialogue


@pytest.fixture
def scripted(inputs, tmp_path, monkeypatch):
    """scripted(flags) -> (what was asked, the rows of every step): phase 2, two questions a step, seed 3."""

    def run(*flags):
        script, steps, split = Script(), [], train_rl.split
        monkeypatch.setattr(train_rl, "rollout", script)
        monkeypatch.setattr(train_rl, "open_simulator", lambda *_: object())
        monkeypatch.setattr(
            train_rl, "split", lambda rows, *rest: steps.append(rows) or split(rows, *rest)
        )
        train_rl.main(
            command(
                inputs,
                tmp_path / "run",
                "--phase",
                "2",
                "--questions",
                "2",
                "--group",
                "2",
                "--minibatches",
                "1",
                "--seed",
                "3",
                "--temperature",
                "0.7",
                "--eval-questions",
                "2",
                *flags,
            )
        )
        return script.asked, steps

    return run


def test_what_a_stage_asks_and_of_whom(scripted):
    """Held-out questions greedily, then a step's own with the tool, and the same ones without it four times each."""
    asked, _ = scripted("--steps", "2", "--eval-every", "1")
    held_out = [f"val{place}" for place in streams.rows_of_step(4, 2, 0, 0)]
    seed = partial(streams.stream_seed, "run")
    evaluation = [
        (held_out, True, "agentic", 1, 0.0, seed(3, "agentic", 0)),
        (held_out, True, "direct", 1, 0.0, seed(3, "direct", 0)),
    ]
    want = []
    for step in range(2):
        own = [f"train{place}" for place in streams.rows_of_step(6, 2, step, 3)]
        want += [
            *evaluation,
            (own, True, "agentic", 2, 0.7, seed(3, "agentic", step)),
            (own, False, "direct", 4, 0.7, seed(3, "direct", step)),
        ]
    assert asked == want + evaluation
    assert asked[2][0] != [
        f"train{place}" for place in streams.rows_of_step(6, 2, 0, 0)
    ]  # of another seed


def test_every_rollout_is_measured_against_direct_answers_to_its_own_question(scripted):
    _, steps = scripted("--steps", "3", "--eval-every", "0")  # all six questions
    found = {row.trajectory.question["id"]: row.match_direct for rows in steps for row in rows}
    assert found == {f"train{i}": sum(Script.DIRECT[i % 3]) / 4 for i in range(6)}
    for rows in steps:
        for right, wrong in zip(rows[::2], rows[1::2]):
            assert right.trajectory.question is wrong.trajectory.question
            e = right.match_direct
            assert (right.reward, wrong.reward) == pytest.approx(
                (1.52 + 0.1 * (1 - e), 0.52 - 0.03 * e)
            )
            assert (right.advantage, wrong.advantage) == pytest.approx(
                (0.5**0.5, -(0.5**0.5)), abs=1e-4
            )


def test_advantages_are_not_divided_where_the_flag_says_so(scripted):
    _, (rows,) = scripted("--steps", "1", "--eval-every", "0", "--no-divide-by-std")
    for right, wrong in zip(rows[::2], rows[1::2]):
        half = (right.reward - wrong.reward) / 2
        assert (right.advantage, wrong.advantage) == pytest.approx(
            (half, -half), abs=1e-5
        ) and half > 0.49


def test_phase_2_measures_the_gain_over_answering_directly(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "format_reward", even_tokens)
    seen = []
    monkeypatch.setattr(
        rewards, "tool_gain", lambda match, n_tool, direct: seen.append(direct) or 0.0
    )
    train_rl.main(
        command(inputs, tmp_path / "phase2", "--phase", "2", "--steps", "1", "--eval-every", "0")
    )
    assert len(seen) == 16 and log_of(tmp_path / "phase2")[0]["match_direct"] == sum(seen) / 16


def test_what_is_rewarded_becomes_more_frequent(inputs, tmp_path, monkeypatch):
    """A wrong sign anywhere between reward and weights would drive the other way."""
    monkeypatch.setattr(rewards, "format_reward", even_tokens)
    out = tmp_path / "run"
    train_rl.main(
        command(inputs, out, "--steps", "8", "--lr", "6e-2", "--group", "8", "--eval-every", "0")
    )
    curve = [row["format"] for row in log_of(out)]
    assert curve[0] < 0.6 and curve[-1] > 0.8


def test_missing_inputs_name_the_command(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="out/sft is missing. `python train_sft.py` makes it"):
        train_rl.main([])
    with pytest.raises(
        SystemExit, match="out/phase1 is missing. `python train_rl.py --phase 1` makes it"
    ):
        train_rl.main(["--phase", "2"])
    with pytest.raises(SystemExit, match="out/wm is missing. `python train_wm.py` makes it"):
        train_rl.main(["--policy", str(inputs / "sft"), "--data", str(inputs)])


WORLD2VLM = [
    ("A2", "By how much was the camera turned?", "turn left 20 degrees"),
    ("D4", "Is it gone?", "yes"),
    ("D1", "Where is the box now?", "[48, 558, 226, 681]"),
]


def test_world2vlm_stage(inputs, tmp_path, monkeypatch):
    """Its questions stand beside others in the file; no simulator, no tool, the parts of the reward in the log."""
    earned = itertools.cycle([0.25, 0.75])  # rollouts of a group differ: it learns
    monkeypatch.setattr(
        world2vlm_rewards, "world2vlm", lambda *_: {"total": next(earned), "format": 0.0}
    )
    for part in ("train", "val"):
        rows = [
            {
                "id": f"{part}{i}",
                "bench": "world2vlm",
                "images": ["0.png", "1.png"][: 1 + i % 2],
                "question": prompt,
                "options": [],
                "answer": answer,
                "category": task,
                "kind": "na",
                "needs_view": None,
                "weight": 1.0,
            }
            for i, (task, prompt, answer) in enumerate(2 * WORLD2VLM)
        ]
        other = json.loads((inputs / f"questions_{part}.jsonl").read_text().splitlines()[0])
        (tmp_path / f"questions_{part}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in [other, *rows])
        )
        for i in range(2):
            (tmp_path / f"{i}.png").write_bytes((inputs / f"{i}.png").read_bytes())
    flags = command(
        inputs, tmp_path / "rl", "--task", "world2vlm", "--data", str(tmp_path), "--steps", "1"
    )
    train_rl.main([flag for flag in flags if flag not in ("--simulator", "none")])
    first, last = log_of(tmp_path / "rl")
    assert (
        {"A2_total", "D4_total", "D1_total"} <= set(first)
        and first["call_rate"] == 0
        and "A1_total" not in first
    )
    assert first["tokens"] > 0 and first["grad_norm"] > 0 and first["kl"] >= 0
    assert set(last["eval"]) == {"direct"} and 0.25 <= last["eval"]["direct"]["A2_total"] <= 0.75
    with pytest.raises(
        SystemExit, match="questions_train.jsonl has no question for --task world2vlm"
    ):
        train_rl.main(command(inputs, tmp_path / "none", "--task", "world2vlm"))


def test_simulators_by_name(inputs, tmp_path, monkeypatch):
    """The flag's words are lib/simulators'; a server that is down ends the run in a sentence, and it can be resumed."""
    with pytest.raises(SystemExit, match="--simulator truth works in rooms only"):
        train_rl.main(command(inputs, tmp_path / "truth", "--simulator", "truth"))
    args = train_rl.parse_args(["--simulator", "http://127.0.0.1:9"])
    world = common.World(0, 1, 0, torch.device("cpu"))
    assert isinstance(train_rl.open_simulator(args, world), RemoteSimulator)
    assert train_rl.open_simulator(train_rl.parse_args(["--mode", "direct"]), world) is None

    def down(*_, **__):
        raise SimulatorError("http://127.0.0.1:9 could not be reached", down=True)

    monkeypatch.setattr(train_rl, "rollout", down)
    with pytest.raises(
        SystemExit, match="could not be reached. The same command goes on from the last checkpoint."
    ):
        train_rl.main(command(inputs, tmp_path / "down", "--eval-every", "0"))


def test_presets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no out/demo, from which the defaults would come
    tiny, astra = (
        train_rl.parse_args([]),
        train_rl.parse_args(["--preset", "astra", "--phase", "2"]),
    )
    assert (tiny.policy, tiny.out, tiny.kl) == ("out/sft", "out/phase1", 0.0)
    assert (astra.policy, astra.out) == ("out/phase1-astra", "out/phase2-astra")
    assert (astra.kl, astra.gradient_checkpointing) == (None, True)
    assert (astra.wm, astra.data) == ("out/wm-astra", ["out/mined"])
    with pytest.raises(SystemExit):
        train_rl.parse_args(["--questions", "5", "--minibatches", "2"])
