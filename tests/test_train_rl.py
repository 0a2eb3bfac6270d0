"""pytest tests/test_train_rl.py: GRPO's loss, its gradient however it is batched, the stage.  CPU, about 25 s."""

import json
import re
import shutil
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
from lib import streams
from lib.distributed import World
from lib.records import read_log
from lib.simulators import SimulatorError, load_simulator
from lib.stage import Interrupt
from policy import Policy, Trajectory, rollout

ALONE = World(0, 1, torch.device("cpu"))

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
    clipped = train_rl.clip_stats(ratio_, a_, clip_high=0.28)
    low, high = (clipped[key].numpy() & (mask > 0) for key in ("clipped_low", "clipped_high"))
    assert (low == (a < 0) & (ratio < 0.8) & (mask > 0)).all() and low.any()
    assert (high == (a > 0) & (ratio > 1.28) & (mask > 0)).all() and high.any()


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
    episode = train_rl.episode_of(dialogue_of(answer, calls), train_rl.parse_args([]), direct)
    assert episode.reward == pytest.approx(reward) and episode.match == match


def test_the_bonus_for_use_can_be_taken_away():
    """A rollout that called, right or wrong, where 1 of 4 direct answers is right: the gain alone is left."""
    args = train_rl.parse_args(["--phase", "2", "--lambda-use", "0"])
    got = [train_rl.episode_of(dialogue_of(answer, calls=1), args, 0.25).reward for answer in "AB"]
    assert got == pytest.approx([1.5 + 0.1 * 0.75, 0.5 - 0.03 * 0.25])
    args = train_rl.parse_args(["--lambda-use", "0"])
    got = [train_rl.episode_of(dialogue_of(answer, calls=1), args).reward for answer in "AB"]
    assert got == [1.5, 0.5]


def test_what_a_rollout_adds_to_the_log():
    """Only valid calls are calls; needs_view has its own pair of keys, and a gain needs a call."""
    args = train_rl.parse_args(["--phase", "2"])

    def logged(answer, calls, invalid_calls, needs_view, match_direct):
        dialogue = dialogue_of(answer, calls, needs_view=needs_view)
        dialogue.invalid_calls, dialogue.truncated = invalid_calls, False
        dialogue.loss_mask = [0, 1, 1, 1]
        return train_rl.rollout_values(train_rl.episode_of(dialogue, args, match_direct))

    one = logged("A", 2, 1, True, 0.25)
    both = {"match": 1, "call_rate": 1, "valid_calls": 2, "invalid_calls": 1, "length": 3}
    of_need = {"match_needs_view": 1, "call_rate_needs_view": 1}
    of_gain = {"e_direct": 0.25, "gain": 0.75}
    rest = {"reward": pytest.approx(1.52 + 0.075), "format": 1, "truncated": 0}
    assert one == both | of_need | of_gain | rest
    two = logged("B", 0, 3, False, 0.25)
    assert (two["call_rate"], two["call_rate_answerable"], two["match_answerable"]) == (0, 0, 0)
    assert two["e_direct"] == 0.25 and not {"gain", "match_needs_view"} & two.keys()
    three = logged("A", 1, 0, None, None)
    assert three.keys() == both.keys() | rest.keys()


# ---------------------------------------------------------------- the gradient


def episodes_of(policy, turns=(3, 9, 1, 5, 7)):
    """Dialogues of unequal length with one to nine words per turn, advantages of both signs and stale old log-probs."""
    image = np.zeros((32, 32, 3), np.uint8)
    question = {"question": "Which?", "answer": "A"}
    episodes = []
    for i, words in enumerate(turns):
        dialogue = Trajectory.start(policy, question, [image] * (1 + i % 2), "direct")
        dialogue.add_turn(policy, " red ball" * words)
        episode = train_rl.episode_of(dialogue, train_rl.parse_args([]))
        episode.advantage = (-1) ** i * (1.0 + i)
        episode.start_logprobs = episode.old_logprobs - 5.0
        episode.old_logprobs = episode.old_logprobs - 6.0
        episode.old_logprobs -= 0.1 * torch.arange(len(episode.old_logprobs))
        episodes.append(episode)
    return episodes


def neighbours_of(policy):
    """Five episodes, the first three with one prompt, the last two with another."""
    episodes = episodes_of(policy)
    return [episodes[i] for i in (0, 2, 4, 1, 3)]


class Idle:
    """An optimiser that leaves the gradient where it is."""

    def step(self):
        pass

    def zero_grad(self, **_):
        pass


def gradient(policy, episodes, tokens, monkeypatch):
    """What an update does, and its gradient, not clipped."""
    monkeypatch.setattr(train_rl, "MAX_GRAD_NORM", float("inf"))
    policy.model.zero_grad()
    policy.vision.requires_grad_(False)
    stats = train_rl.update(policy, Idle(), [episodes], tokens, kl_weight=0.1)
    gradients = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
    return stats, torch.cat(gradients)


def test_micro_batch_does_not_change_the_gradient(monkeypatch):
    """Dividing once per micro-batch is the classic mistake; answers of unequal length expose it.

    There is room in a row for all that share a prompt, for three, for two, for one.
    """
    policy = Policy.tiny()
    episodes = neighbours_of(policy)
    stats, want = gradient(policy, episodes, 1000, monkeypatch)
    assert stats["tokens"] == sum(sum(episode.trajectory.loss_mask) for episode in episodes)
    assert want.abs().max() > 0.01
    for tokens in (70, 40, 1):
        again, got = gradient(policy, episodes, tokens, monkeypatch)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * want.abs().max().item())
        assert again["entropy"] == pytest.approx(stats["entropy"], rel=1e-5)


def test_idle_episodes_teach_nothing(monkeypatch):
    """A rank with fewer episodes fills up with idle ones: only the collectives may notice."""
    policy = Policy.tiny()
    episodes = episodes_of(policy)
    stats, want = gradient(policy, episodes[:3], 1000, monkeypatch)
    idle = [train_rl.replace(episode, idle=True) for episode in episodes[3:]]
    again, got = gradient(policy, episodes[:3] + idle, 40, monkeypatch)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * want.abs().max().item())
    assert again == pytest.approx(stats, rel=1e-4)


@pytest.mark.parametrize("advantage, ratio", [(1.0, 1.29), (2.0, 0.7), (-1.5, 1.29), (-1.0, 0.7)])
def test_gradient_of_the_written_formula(advantage, ratio, monkeypatch):
    """One rollout: - min(ratio A, clip(ratio, 0.8, 1.3) A) + 0.1 k3, a mean over tokens, by autograd.

    The ratio of 1.29 is within a clip of 0.3 and beyond the default.
    """
    monkeypatch.setattr(train_rl, "MAX_GRAD_NORM", float("inf"))
    policy = Policy.tiny()
    policy.vision.requires_grad_(False)
    (episode,) = episodes_of(policy, turns=(5,))
    batch = train_rl.collate(policy, [episode.trajectory])
    logits = policy.logits(policy.hidden(batch.ids, batch.positions, batch.mask, batch.features))[0]
    logprobs = torch.log_softmax(logits, -1).gather(-1, batch.targets[0, :, None])[:, 0]
    wrote = batch.loss_mask[0] > 0
    episode.advantage = advantage
    episode.old_logprobs = logprobs.detach() - np.log(ratio)
    episode.start_logprobs = logprobs.detach() + torch.linspace(-1, 1, len(logprobs))
    now, old, start = logprobs[wrote], episode.old_logprobs[wrote], episode.start_logprobs[wrote]
    r, d = (now - old).exp(), start - now
    k3 = d.exp() - d - 1
    loss = -torch.minimum(r * advantage, r.clamp(0.8, 1.3) * advantage) + 0.1 * k3
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    want = torch.autograd.grad(loss.mean(), weights)
    stats = train_rl.update(policy, Idle(), [[episode]], 1000, clip_high=0.3, kl_weight=0.1)
    assert stats["kl"] == pytest.approx(k3.mean().item(), rel=1e-4) and stats["kl"] > 0.02
    largest = max(g.abs().max().item() for g in want)
    assert largest > 1e-3
    for p, g in zip(weights, want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-5 * largest)


def test_an_update_goes_as_far_as_the_norm_allows(monkeypatch):
    """Under plain gradient descent the way is the rate times the largest norm allowed."""
    monkeypatch.setattr(train_rl, "MAX_GRAD_NORM", 1e-3)
    policy = Policy.tiny()
    policy.vision.requires_grad_(False)
    episodes = episodes_of(policy)
    for episode in episodes:
        episode.old_logprobs += 6.0  # or the clip would silence the good ones
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    before = torch.cat([p.detach().flatten().clone() for p in weights])
    stats = train_rl.update(policy, torch.optim.SGD(weights, lr=0.5e-2), [episodes], 1000)
    assert stats["grad_norm"] > 1e-2
    way = torch.cat([p.detach().flatten() for p in weights]) - before
    assert way.norm().item() == pytest.approx(0.5e-2 * 1e-3, rel=0.05)
    assert all(p.grad is None for p in weights)


def test_micro_batches_keep_within_their_tokens():
    """Neighbours with one prompt share a row, rows share a pass; all are in one pass, a long one alone."""
    policy = Policy.tiny()
    episodes = neighbours_of(policy)
    # rows of 20 + 3 * 14 and 27 + 2 * 18
    for tokens, passes in ((1000, 1), (70, 2), (40, 4), (1, 5)):
        micro_batches = train_rl.micro_batches(episodes, tokens)
        assert len(micro_batches) == passes
        assert sorted(map(id, sum(micro_batches, []))) == sorted(map(id, episodes))
        for own in micro_batches:
            batch = train_rl.collate(
                policy, [episode.trajectory for episode in own], share_prompts=True
            )
            assert batch.ids.numel() <= tokens or len(own) == 1
    batch = train_rl.collate(
        policy, [episode.trajectory for episode in episodes], share_prompts=True
    )
    assert batch.ids.shape[0] == 2


def test_every_episode_gets_its_own_logprobs():
    """However the passes are cut, whatever the order in them."""
    policy = Policy.tiny()
    episodes = neighbours_of(policy)
    for tokens in (1000, 40):
        train_rl.set_logprobs("start_logprobs", policy, [episodes[:2], episodes[2:]], tokens)
        for episode in episodes:
            batch = train_rl.collate(policy, [episode.trajectory])
            want, _ = train_rl.token_logprobs(policy, batch)
            torch.testing.assert_close(
                episode.start_logprobs, want[0].detach(), atol=1e-4, rtol=1e-4
            )


def test_log_probs_are_those_of_the_temperature_of_sampling(monkeypatch):
    """At twice the temperature a random policy is more even, in a pass without gradient and in an update."""
    monkeypatch.setattr(train_rl, "TEMPERATURE", 2.0)
    policy = Policy.tiny()
    (episode,) = episodes_of(policy, turns=(5,))
    train_rl.set_logprobs("old_logprobs", policy, [[episode]], 1000)
    batch = train_rl.collate(policy, [episode.trajectory])
    want, _ = train_rl.token_logprobs(policy, batch, 2.0)
    other, _ = train_rl.token_logprobs(policy, batch, 1.0)
    assert (want - other).abs().max() > 0.01
    torch.testing.assert_close(episode.old_logprobs, want[0].detach(), atol=1e-4, rtol=1e-4)
    stats = train_rl.update(policy, Idle(), [[episode]], 1000)
    assert stats["ratio_max"] == pytest.approx(1, abs=1e-3)


def group_of(*earned):
    """A question's episodes with these rewards."""
    group = [train_rl.Episode(None, reward, 0.0, 0.0, None) for reward in earned]
    train_rl.set_advantages([group], True)
    return group


def test_groups_and_steps_without_signal_are_left_out(monkeypatch):
    a, b, c, d = group_of(1.0, 0.0), group_of(1.0, 1.0), group_of(0.0, 1.0), group_of(0.0, 1.0)
    split = partial(train_rl.split_minibatches, questions=4, minibatches=2)
    assert split([a, b, c, d], world=ALONE) == [a, c + d]
    assert split([b, b, c, d], world=ALONE) == [c + d]
    monkeypatch.setattr(train_rl, "global_sum", lambda own: own + 1)  # the other rank has some
    ranks = [World(rank, 2, None) for rank in (0, 1)]  # they hold questions 0, 2 and 1, 3
    assert split([a, c], world=ranks[0]) == [a, c]
    idle, own = split([b, d], world=ranks[1])
    assert own == d and [episode.idle for episode in idle] == [True]


def test_a_step_without_signal_logs_that_it_learned_from_no_token():
    assert train_rl.update(Policy.tiny(), Idle(), [], 1000) == {"tokens": 0.0}


# ---------------------------------------------------------------- the stage


class TwoTurns:
    """Stands in for `Writer`: a call that names its seed, then an answer."""

    CALL = (
        '{"name": "world_simulator_tool", "arguments": {"reference_image": 1, "motion_type": "dangle", '
        '"value": -45, "seed": 7}}'
    )

    def __init__(self, policy, dialogues, group_size):
        self.policy = policy
        self.turns = iter((f"<tool_call>{self.CALL}</tool_call>", "<answer>A</answer>"))

    def write(self, members, *_):
        ids = self.policy.encode_text(f"<think></think>{next(self.turns)}<|im_end|>")
        return [(ids, [0.0] * len(ids)) for _ in members]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_policy_that_learns_does_not_choose_the_noise_of_its_views(temperature, monkeypatch):
    """Or it could learn the one seed that shows what it wants."""
    seeds = []

    def imagine(queries):
        seeds.extend(query.seed for query in queries)
        return [query.images[0] for query in queries]

    monkeypatch.setattr("policy.Writer", TwoTurns)
    question = {"question": "Which?", "answer": "A", "images": [np.zeros((32, 32, 3), np.uint8)]}
    simulator = SimpleNamespace(imagine=imagine)
    done = rollout(Policy.tiny(), [question], simulator, "agentic", 2, temperature, seed=0)
    assert [dialogue.answer for dialogue in done] == ["A", "A"]
    assert seeds == [7, 7] if temperature == 0 else len({7, *seeds}) == 3


def even_tokens(t):
    """A random policy earns nothing, so the runs below reward something it can do: tokens with an even number."""
    wrote = [i for i, m in zip(t.ids, t.loss_mask, strict=True) if m]
    return sum(i % 2 == 0 for i in wrote) / len(wrote)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A small random policy and a few questions over random images."""
    folder = tmp_path_factory.mktemp("inputs")
    Policy.tiny().save(folder / "sft")
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
    flags = (
        f"--policy {inputs / 'sft'} --data {inputs} --out {out} --simulator none --questions 4 --group 4 --steps 3 "
        "--max-new-tokens 6 --lr 1e-3 --kl-weight 0.1 --eval-every 2 --eval-questions 4 --threads 1"
    )
    return [*flags.split(), *more]


def log_of(out):
    rows = read_log(out / "log.jsonl")
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def unbroken(inputs, tmp_path_factory):
    """Three steps of phase 1 in one go."""
    out = tmp_path_factory.mktemp("run") / "phase1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "format_reward", even_tokens)
        train_rl.main(command(inputs, out))
    return out


@pytest.mark.slow
def test_stage_leaves_what_it_promises(inputs, unbroken):
    rows = log_of(unbroken)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert set(rows[0]["eval"]) == {"agentic", "direct"}
    assert set(rows[0]["eval"]["direct"]) <= set(train_rl.ROLLOUT_LOG)
    for row in rows[:3]:
        assert row["tokens"] > 0 and row["mismatch"] < 1e-4 and row["grad_norm"] > 0
        assert 1 < row["ratio_max"] < 5
    assert [row["lr"] for row in rows[:3]] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert 0 < rows[0]["kl"] < rows[2]["kl"]  # 0 <: the first minibatch has moved it already
    assert {key for row in rows for key in row} <= set(train_rl.LOG) | {"step"}
    assert json.loads((unbroken / "done.json").read_text())["steps"] == 3
    files = ("args.json", "config.json", "dialogues/step_000002/0.png")
    for file in (*files, "dialogues/end/0/dialogue.json"):
        assert (unbroken / file).exists(), file
    before, after = (
        load_file(folder / "model.safetensors") for folder in (inputs / "sft", unbroken)
    )
    assert before.keys() == after.keys()
    learned = {key for key in before if not torch.equal(before[key], after[key])}
    assert learned == {key for key in before if "visual" not in key}  # the vision tower is frozen


@pytest.mark.slow
def test_resumed_run_equals_an_unbroken_one(inputs, unbroken, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rewards, "format_reward", even_tokens)
    out = tmp_path / "phase1"
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "requested", lambda stop: True)  # Ctrl-C during the first step
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


def stage(*flags):
    train_rl.main(flags)


@pytest.mark.slow
def test_adapters_of_a_policy_learn_on_two_ranks_and_are_merged_when_saved(
    inputs, tmp_path, monkeypatch
):
    lora = pytest.importorskip("extras.lora")
    monkeypatch.setattr(rewards, "format_reward", even_tokens)
    more = ("--lora", "2", "--lr", "1e-2", "--kl-weight", "0", "--eval-every", "0")
    train_rl.main(command(inputs, tmp_path / "one", *more))
    on_ranks(2, stage, *command(inputs, tmp_path / "two", *more))
    before, one, two = (
        load_file(folder / "model.safetensors")
        for folder in (inputs / "sft", tmp_path / "one", tmp_path / "two")
    )
    assert before.keys() == one.keys() == two.keys()
    learned = {key for key in before if not torch.equal(before[key], one[key])}
    assert learned and all(re.fullmatch(lora.QWEN_LAYERS + r"\.weight", key) for key in learned)
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-4)


def test_views_inside_rl_are_as_cheap_as_asked_for():
    plain = train_rl.parse_args([])
    assert train_rl.view_options(plain) == {}
    cheap = train_rl.parse_args("--view-steps 25 --view-taylor".split())
    assert train_rl.view_options(cheap) == {"steps": 25, "taylor": True}


@pytest.mark.slow
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

    # by the number of the question, over again
    DIRECT = ((1, 1, 0, 1), (0, 0, 0, 0), (0, 1, 0, 0))
    CALL = '{"name": "world_simulator_tool", "arguments": {"reference_image": 1, "motion_type": "dangle", "value": -45}}'
    IMAGE = np.zeros((32, 32, 3), np.uint8)

    def __init__(self):
        self.calls = []  # (ids of questions, simulator or not, mode, group, temperature, seed)

    def __call__(self, policy, questions, simulator, mode, group, temperature, seed, **_):
        ids = [question["id"] for question in questions]
        self.calls.append((ids, bool(simulator), mode, group, temperature, seed))
        return [self.write(policy, q, mode, k) for q in questions for k in range(group)]

    def write(self, policy, question, mode, k):
        dialogue = Trajectory.start(policy, question, [self.IMAGE] * 2, mode)
        right = self.DIRECT[int(question["id"][-1]) % 3][k] if mode == "direct" else k % 2 == 0
        if mode == "agentic":
            dialogue.add_turn(policy, f"<think></think><tool_call>{self.CALL}</tool_call>")
            dialogue.observe(policy, image=self.IMAGE)
        answer = question["answer"] if right else "AB"[question["answer"] == "A"]
        dialogue.add_turn(policy, f"<think></think><answer>{answer}</answer>")
        return dialogue


@pytest.fixture
def scripted(inputs, tmp_path, monkeypatch):
    """scripted(flags) -> (calls of `rollout`, the groups of every step): phase 2, two questions a step, seed 3."""

    def run(*flags):
        script, steps, split = Script(), [], train_rl.split_minibatches

        def record(groups, *rest):
            steps.append(groups)
            return split(groups, *rest)

        monkeypatch.setattr(train_rl, "rollout", script)
        monkeypatch.setattr(train_rl.simulators, "load_simulator", lambda *_: object())
        monkeypatch.setattr(train_rl, "split_minibatches", record)
        monkeypatch.setattr(train_rl, "has_extras", lambda: False)
        more = "--phase 2 --questions 2 --group 2 --minibatches 1 --seed 3 --eval-questions 2"
        train_rl.main(command(inputs, tmp_path / "run", *more.split(), *flags))
        return script.calls, steps

    return run


def test_what_a_stage_asks_and_of_whom(scripted):
    """Held-out questions greedily, then a step's own with the tool, and the same ones without it four times each."""
    calls, _ = scripted("--steps", "2", "--eval-every", "1")
    held_out = [f"val{row}" for row in streams.rows_of_step(4, 2, 0, 0)]
    seed = partial(streams.stream_seed, "run")
    evaluation = [
        (held_out, True, "agentic", 1, 0.0, seed(3, "agentic", 0)),
        (held_out, True, "direct", 1, 0.0, seed(3, "direct", 0)),
    ]
    want = []
    for step in range(2):
        own = [f"train{row}" for row in streams.rows_of_step(6, 2, step, 3)]
        want += evaluation
        want.append((own, True, "agentic", 2, 1.0, seed(3, "agentic", step)))
        want.append((own, True, "direct", 4, 1.0, seed(3, "direct", step)))
    assert calls == want + evaluation
    other_seed = [f"train{row}" for row in streams.rows_of_step(6, 2, 0, 0)]
    assert calls[2][0] != other_seed


def test_every_rollout_is_measured_against_direct_answers_to_its_own_question(scripted):
    _, steps = scripted("--steps", "3", "--eval-every", "0")  # all six questions
    groups = sum(steps, [])
    direct = {right.trajectory.question["id"]: right.match_direct for right, _ in groups}
    assert direct == {f"train{i}": sum(Script.DIRECT[i % 3]) / 4 for i in range(6)}
    for right, wrong in groups:
        assert right.trajectory.question is wrong.trajectory.question
        e = right.match_direct
        assert right.reward == pytest.approx(1.52 + 0.1 * (1 - e))
        assert wrong.reward == pytest.approx(0.52 - 0.03 * e)
        half = (right.reward - wrong.reward) / 2
        assert (right.advantage, wrong.advantage) == pytest.approx((half, -half), abs=1e-5)
        assert half > 0.49


def test_advantages_are_divided_where_the_flag_says_so(scripted):
    _, (groups,) = scripted("--steps", "1", "--eval-every", "0", "--divide-by-std")
    for right, wrong in groups:
        assert right.advantage == pytest.approx(0.5**0.5, abs=1e-4)
        assert wrong.advantage == pytest.approx(-(0.5**0.5), abs=1e-4)


@pytest.mark.slow
def test_phase_2_measures_the_gain_over_answering_directly(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "format_reward", even_tokens)
    seen = []
    monkeypatch.setattr(
        rewards, "tool_gain", lambda match, n_tool, direct: seen.append(direct) or 0.0
    )
    train_rl.main(
        command(inputs, tmp_path / "phase2", "--phase", "2", "--steps", "1", "--eval-every", "0")
    )
    assert len(seen) == 16 and log_of(tmp_path / "phase2")[0]["e_direct"] == sum(seen) / 16


@pytest.mark.slow
def test_what_is_rewarded_becomes_more_frequent(inputs, tmp_path, monkeypatch):
    """A wrong sign anywhere between reward and weights would drive the other way."""
    monkeypatch.setattr(rewards, "format_reward", even_tokens)
    out = tmp_path / "run"
    more = ("--steps", "10", "--lr", "6e-2", "--group", "8", "--eval-every", "0")
    train_rl.main(command(inputs, out, *more, "--kl-weight", "0", "--divide-by-std"))
    curve = [row["format"] for row in log_of(out)]
    assert curve[-1] > curve[0] + 0.25  # .43 to .81, and to .05 by a wrong sign


def test_missing_inputs_name_the_command(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="out/sft is missing. `python train_sft.py` makes it"):
        train_rl.main([])
    with pytest.raises(
        SystemExit, match="out/phase1 is missing. `python train_rl.py --phase 1` makes it"
    ):
        train_rl.main(["--phase", "2"])
    with pytest.raises(SystemExit, match="out/sft is missing. `python train_sft.py` makes it"):
        train_rl.main(["--phase", "2", "--policy", "out/sft"])
    with pytest.raises(SystemExit, match="out/wm is missing. `python train_wm.py` makes it"):
        train_rl.main(["--policy", str(inputs / "sft"), "--data", str(inputs)])


def test_simulators_by_name(inputs, tmp_path, monkeypatch):
    """The flag's words are lib/simulators'; a server that is down ends the run in a sentence, and it can be resumed."""
    with pytest.raises(SystemExit, match="--simulator truth works in rooms only"):
        train_rl.main(command(inputs, tmp_path / "truth", "--simulator", "truth"))
    args = train_rl.parse_args(["--simulator", "http://127.0.0.1:9"])
    client = pytest.importorskip("extras.remote.client")
    assert isinstance(load_simulator(args.simulator), client.RemoteSimulator)

    def down(*_, **__):
        raise SimulatorError("http://127.0.0.1:9 could not be reached.", down=True)

    monkeypatch.setattr(train_rl, "rollout", down)
    with pytest.raises(SimulatorError, match="could not be reached."):
        train_rl.main(command(inputs, tmp_path / "down", "--eval-every", "0"))


def test_presets():
    tiny = train_rl.parse_args([])
    astra = train_rl.parse_args(["--preset", "astra", "--phase", "2"])
    assert (tiny.policy, tiny.out, tiny.steps) == ("out/sft", "out/phase1", 6)
    assert train_rl.parse_args(["--preset", "astra"]).policy == "Qwen/Qwen3-VL-8B-Instruct"
    assert (astra.policy, astra.out) == ("out/phase1-astra", "out/phase2-astra")
    assert (astra.kl_weight, astra.gradient_checkpointing) == (0.0, True)
    assert (astra.wm, astra.data) == ("out/wm-astra", ["out/mined"])
    for wrong in (
        "--questions 5 --minibatches 2",
        "--eval-questions 0",
        "--mode direct --phase 2",
    ):
        with pytest.raises(SystemExit):
            train_rl.parse_args(wrong.split())


def test_questions_must_be_enough(inputs, tmp_path):
    with pytest.raises(SystemExit, match="has 6, --questions asks for 8"):
        train_rl.main(command(inputs, tmp_path / "run", "--questions", "8"))


def test_questions_whose_pictures_cannot_be_shown_are_left_out(inputs, tmp_path):
    shutil.copytree(inputs, tmp_path / "data")
    (tmp_path / "data" / "2.png").write_bytes(b"no picture")  # of questions 1, 3 and 5
    args = train_rl.parse_args(command(tmp_path / "data", tmp_path / "run", "--questions", "2"))
    train, held_out = train_rl.open_questions(args, World(0, 1, torch.device("cpu")))
    assert [question["id"] for question in train] == ["train0", "train2", "train4"]
    assert {question["id"] for question in held_out} == {"val0", "val2"}
