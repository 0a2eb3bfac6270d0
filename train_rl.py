"""
Reinforcement learning of the policy with the simulator in the loop: GRPO in two phases (Astra Sec. 4).

  sample, imagine   G rollouts per question: think -> imagine -> look -> ... -> answer; phase 2: also K without the tool
  score             the reward of the phase, rewards.py
  advantage         A_i = (r_i - mean of the group) / (deviation of the group + 1e-6)
  logprob           of the start policy, to watch the distance from it
  update            L = - sum over tokens of min(ratio A, clip(ratio, 1 - 0.2, 1 + 0.28) A) / number of tokens

  CPU, 5 min   python train_rl.py --phase 1          # out/sft, out/wm, out/data -> out/phase1
               python train_rl.py --phase 2          # out/phase1, out/wm, out/data -> out/phase2
  8 GPUs       torchrun --standalone --nproc_per_node 8 train_rl.py --phase 1 --preset astra
  resume       the same command
Out: the policy, log.jsonl (its keys: LOG below), dialogues/ (what it said and saw at each evaluation), curves.png.

Ours, where the paper is silent: advantages are divided by the group's deviation (--no-divide-by-std for the ablation);
the loss is a mean over all tokens of an update, those of the policy only; groups whose rewards are all equal teach
nothing and are left out, of the mean too; no KL term unless asked for (--kl).
"""

import argparse
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F

import rewards
from data import load_jsonl
from lib import checkpoints, common
from lib.common import total
from policy import Policy, Trajectory, collate, rollout, token_logprobs

CLIP_LOW, CLIP_HIGH = 0.2, 0.28         # paper: Clip-Higher
MAX_ROUNDS, MAX_TURNS = 3, 10           # paper: tool rounds and assistant turns
BETAS = (0.9, 0.99)                     # of AdamW; no weight decay
SAVED_DIALOGUES = 4                     # per evaluation

LOG = {  # log.jsonl: one line per step; means over all rollouts of the step, on all ranks, unless said otherwise
    "reward": "mean reward",
    "match": "exact match e; also match_needs_view and match_answerable, where the data knows",
    "format": "format reward f",
    "call_rate": "share of rollouts with a valid call; also _needs_view and _answerable",
    "valid_calls": "valid calls per rollout",
    "invalid_calls": "malformed or impossible calls per rollout",
    "match_direct": "phase 2: exact match of the rollouts without the tool",
    "gain": "phase 2: tool-induced gain D, over the rollouts that called",
    "length": "tokens of the policy per rollout",
    "turns": "turns of the policy per rollout",
    "truncated": "share of rollouts that ran out of tokens or turns",
    "groups_flat": "share of groups with equal rewards: skipped",
    "groups_bonus": "share of groups whose answers are all right or all wrong, and whose rewards differ",
    "tokens": "tokens that the update learned from",
    "loss": "GRPO loss per token, without the KL term; this and the next three: over the tokens learned from",
    "entropy": "of the next-token distribution, nats",
    "clipped": "share of tokens silenced by the clip",
    "kl": "to the start policy, nats per token (k3 estimate); with --kl 0 only at evaluations",
    "mismatch": "largest |old - new log-prob| before the first optimiser step: rollout against training",
    "grad_norm": "before clipping, mean over the optimiser steps",
    "lr": "learning rate",
    "seconds": "of sample (imagine included), imagine, score, advantage, logprob, update",
    "eval": "held-out questions, greedy, after `step` steps: {mode: {accuracy, call_rate, each also by need}}",
}

PRESETS = {
    "tiny": dict(questions=16, group=8, minibatches=2, lr=6e-5, warmup=2, lr_floor=0.1, kl=0.0,
                 max_new_tokens=64, eval_questions=200, micro_batch=32, save_every=6),
    "astra": dict(questions=128, group=8, steps=200, minibatches=2, lr=1e-6, warmup=10, lr_floor=1.0,
                  max_new_tokens=4096, eval_every=10, eval_questions=256, micro_batch=1, save_every=10,
                  gradient_checkpointing=True),
}
TINY_LENGTH = {1: dict(steps=12, eval_every=4), 2: dict(steps=60, eval_every=12)}   # calling is learned in a few steps
NEUTRAL = ("threads", "micro_batch", "save_every", "gradient_checkpointing")


def parse_args(argv=None):
    """Flags, with the preset's defaults; "paper" in a help text means that the number is the paper's."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--phase", type=int, choices=(1, 2), default=1, help="1: acquire the tool; 2: learn when to use it")
    # in and out
    p.add_argument("--policy", help="the start; default: phase 1 out/sft (astra: Qwen/Qwen3-VL-8B-Instruct, as in the "
                   "paper), phase 2 out/phase1")
    p.add_argument("--wm", help="the tuned simulator (default: the newest of out/wm and out/demo/wm)")
    p.add_argument("--simulator", choices=("tuned", "truth", "none"), default="tuned",
                   help="Astra-WM; the true renderer (rooms only); or none: calls are told so")
    p.add_argument("--data", help="folder of questions_{train,val}.jsonl (default: out/data or out/demo/data)")
    p.add_argument("--out", help="default: out/phase1 or out/phase2")
    # these change the numbers
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, help="batches of rollouts")
    p.add_argument("--questions", type=int, help="per step, all ranks together")
    p.add_argument("--group", type=int, help="rollouts per question")
    p.add_argument("--direct", type=int, default=4, help="phase 2: no-tool rollouts per question")
    p.add_argument("--temperature", type=float, default=1.0, help="of sampling, and of the log-probs that are trained")
    p.add_argument("--max-new-tokens", type=int, help="per turn")
    p.add_argument("--divide-by-std", action=argparse.BooleanOptionalAction, default=True, help="of each group")
    p.add_argument("--minibatches", type=int, help="optimiser steps per batch; the clip acts from the second on")
    p.add_argument("--lr", type=float, help="AdamW, peak")
    p.add_argument("--warmup", type=int, help="steps to the peak")
    p.add_argument("--lr-floor", type=float, help="share of the peak where the cosine ends; 1: constant")
    p.add_argument("--max-grad-norm", type=float, default=1.0)
    p.add_argument("--kl", type=float, help="weight of the KL to the start policy; 0 (tiny) only watches it; astra's "
                   "default has none and keeps no start policy in memory")
    p.add_argument("--eval-every", type=int, help="steps; 0: never")
    p.add_argument("--eval-questions", type=int, help="held-out questions per evaluation")
    # memory, speed and safety only: these never change the numbers
    p.add_argument("--micro-batch", type=int, help="rollouts per forward pass and rank")
    p.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations in backward (paper)")
    p.add_argument("--save-every", type=int, help="steps between checkpoints")
    p.add_argument("--threads", type=int, help="CPU threads per process")
    args = common.parse_with_preset(p, PRESETS, argv)
    for key, value in TINY_LENGTH[args.phase].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    start = "Qwen/Qwen3-VL-8B-Instruct" if args.preset == "astra" else str(common.newest(("sft",)) or "out/sft")
    args.policy = args.policy or (start if args.phase == 1 else str(common.newest(("phase1",)) or "out/phase1"))
    args.data = args.data or str(common.newest(("data",), "questions_train.jsonl") or "out/data")
    args.wm = args.wm or str(common.newest(("wm",)) or "out/wm")
    args.out = args.out or f"out/phase{args.phase}"
    if args.questions % args.minibatches:
        p.error(f"--questions {args.questions} does not split into --minibatches {args.minibatches} of equal size")
    return args


# ---------------------------------------------------------------- the loss

def grpo_loss(logprobs, old_logprobs, advantages, loss_mask, clip_low=CLIP_LOW, clip_high=CLIP_HIGH):
    """The clipped policy-gradient loss, *summed* over tokens: divide by the token count of the whole update, all ranks.

    logprobs, old_logprobs   (B, L) of the tokens under the policy now and under the one that sampled them
    advantages               (B,) one per rollout
    loss_mask                (B, L) 1 on the policy's own tokens
    returns                  scalar sum of -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)
    """
    assert logprobs.shape == old_logprobs.shape == loss_mask.shape and advantages.shape == logprobs.shape[:1]
    ratio = (logprobs - old_logprobs).exp()                                             # (B, L)
    advantages = advantages[:, None]                                                    # (B, 1)
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    return -(objective * loss_mask).sum()


def clipped_tokens(logprobs, old_logprobs, advantages, loss_mask, clip_low=CLIP_LOW, clip_high=CLIP_HIGH):
    """How many tokens the clip silences: their ratio has gone beyond its bound in the direction the advantage asks."""
    ratio, advantages = (logprobs - old_logprobs).exp(), advantages[:, None]
    silent = ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))
    return (silent * loss_mask).sum()


def kl_to_start(logprobs, start_logprobs, loss_mask):
    """Sum over tokens of the k3 estimate of KL(policy || start): exp(d) - d - 1 >= 0, d = log start - log policy."""
    d = start_logprobs - logprobs
    return ((d.exp() - d - 1) * loss_mask).sum()


# ---------------------------------------------------------------- rollouts as rows

@dataclass
class Row:
    """A rollout with what an update needs. Entry j of a log-prob vector is about token j + 1 of the trajectory."""
    trajectory: Trajectory
    match: float                            # e
    form: float                             # f
    match_direct: float | None              # e_direct of its question, phase 2
    reward: float
    old: torch.Tensor                       # (L - 1,) log-probs under the policy that sampled
    start: torch.Tensor | None = None       # (L - 1,) log-probs under the start policy
    advantage: float = 0.0
    weight: float = 1.0                     # 0: only fills up a rank's micro-batches


def dialogues(policy, questions, simulator, mode, args, group=1, temperature=0.0, step=0):
    """`group` dialogues per question, question-major, drawn from the streams of (run seed, mode, step)."""
    seed = common.stable_seed(args.seed, mode, step)
    with common.gathered(policy.model):
        return rollout(policy, questions, simulator, mode, group, temperature, seed, MAX_ROUNDS, MAX_TURNS,
                       args.max_new_tokens)


def score(trajectory, phase, match_direct=None):
    """Reward a rollout by the formula of the phase."""
    match = rewards.exact_match(trajectory.answer, trajectory.question)
    form, n_tool = rewards.format_reward(trajectory), trajectory.valid_calls
    reward = (rewards.phase1_reward(match, form, n_tool) if phase == 1 else
              rewards.phase2_reward(match, form, n_tool, match_direct))
    return Row(trajectory, match, form, match_direct, reward, torch.tensor(trajectory.logprobs[1:]))


def mean_match(trajectories, group):
    """Mean exact match of each group of `group` neighbours: e_direct per question."""
    matches = [rewards.exact_match(t.answer, t.question) for t in trajectories]
    return [sum(matches[i:i + group]) / group for i in range(0, len(matches), group)]


def split(rows, varied, args, world):
    """This rank's rows by optimiser step, without groups that teach nothing; the division ignores the ranks."""
    minibatches = [[] for _ in range(args.minibatches)]
    for i, row in enumerate(rows):
        place = world.rank + i // args.group * world.size                               # of its question in the step
        if varied[i // args.group]:
            minibatches[place * args.minibatches // args.questions].append(row)
    return minibatches


def micro_batches(rows, filler, size):
    """Chunks of at most `size` rows, rows of like length together; the same number of chunks on every rank.

    Each pass through a sharded model is a set of collectives: a rank with fewer rows goes through the motions with
    `filler`, any of its rows, at weight 0.
    """
    rows = sorted(rows, key=lambda row: len(row.trajectory.ids))
    chunks = [rows[i:i + size] for i in range(0, len(rows), size)]
    return chunks + [[replace(filler, weight=0.0)]] * (int(common.global_max(len(chunks))) - len(chunks))


def stack(vectors, like):
    """1-D tensors of at most like.shape[1] entries -> a tensor like `like` (B, L - 1), zeros behind."""
    return torch.stack([F.pad(vector, (0, like.shape[1] - len(vector))) for vector in vectors]).to(like.device)


@torch.no_grad()
def remember_logprobs(policy, rows, filler, name, args):
    """Set row.<name> to the log-probs of each row's tokens under `policy`."""
    for chunk in micro_batches(rows, filler, args.micro_batch):
        logprobs, _ = token_logprobs(policy, collate(policy, [row.trajectory for row in chunk]), args.temperature)
        for row, values in zip(chunk, logprobs.cpu()):
            setattr(row, name, values[:len(row.trajectory.ids) - 1].clone())


def accumulate_gradient(policy, rows, filler, args):
    """Add the gradient of one update's loss: a mean over the policy's tokens in `rows`, those of all ranks together.

    rows, filler   this rank's share, maybe empty, and any row to fill up with
    returns        this rank's sums over tokens {tokens, loss, entropy, clipped; kl, kl_tokens where row.start is known}
                   and the largest `mismatch`; {} on every rank if there is no token to learn from
    """
    tokens = common.global_sum(float(sum(sum(row.trajectory.loss_mask) for row in rows)))
    sums = defaultdict(float)
    for chunk in micro_batches(rows, filler, args.micro_batch) if tokens else ():
        batch = collate(policy, [row.trajectory for row in chunk])
        logprobs, entropy = token_logprobs(policy, batch, args.temperature)             # (B, L - 1) each
        weight, advantages = torch.tensor([[row.weight, row.advantage] for row in chunk], device=logprobs.device).T
        mask = batch["loss_mask"][:, 1:] * weight[:, None]                              # (B, L - 1)
        old = stack([row.old for row in chunk], logprobs)
        loss = objective = grpo_loss(logprobs, old, advantages, mask)
        if chunk[0].start is not None:
            kl = kl_to_start(logprobs, stack([row.start for row in chunk], logprobs), mask)
            objective = loss + args.kl * kl
            sums["kl"] += kl.item()
            sums["kl_tokens"] += mask.sum().item()
        (objective / tokens).backward()                                             # a local sum over a global count
        sums["tokens"] += mask.sum().item()
        sums["loss"] += loss.item()
        sums["entropy"] += (entropy.detach() * mask).sum().item()
        sums["clipped"] += clipped_tokens(logprobs.detach(), old, advantages, mask).item()
        sums["mismatch"] = max(sums["mismatch"], ((logprobs.detach() - old).abs() * mask).max().item())
    return sums


def update(policy, optimizer, minibatches, filler, step, args):
    """One optimiser step per minibatch that has something to teach -> {key of LOG: value}."""
    rate = args.lr * common.cosine(step, args.steps, args.warmup, args.lr_floor)
    for group in optimizer.param_groups:
        group["lr"] = rate
    sums, norms = [], []
    for minibatch in minibatches:
        sums.append(accumulate_gradient(policy, minibatch, filler, args))
        if sums[-1]:
            norms.append(common.clip_gradients(policy.model.parameters(), args.max_grad_norm))
            if not math.isfinite(norms[-1]):
                common.fail(f"The gradient of step {step} is not finite. The last checkpoint is kept in {args.out}; "
                            f"give a smaller --lr and another --out.")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    over = {"loss": "tokens", "entropy": "tokens", "clipped": "tokens", "kl": "kl_tokens"}
    means = common.global_means({key: tuple(sum(part.get(k, 0.0) for part in sums) for k in (key, count))
                                 for key, count in over.items()})
    first = next(filter(None, sums), {})
    return {"tokens": common.global_sum(sum(part.get("tokens", 0.0) for part in sums)), **means,
            "mismatch": common.global_max(first.get("mismatch", 0.0)),
            "grad_norm": sum(norms) / len(norms) if norms else 0.0, "lr": rate}


# ---------------------------------------------------------------- what happened

def by_need(name, rows, value):
    """Totals of value(row) under name, name_needs_view and name_answerable, the latter two where the data knows."""
    need = [row.trajectory.question.get("needs_view") for row in rows]
    return {name: total([value(row) for row in rows]),
            f"{name}_needs_view": total([value(row) for row, needs in zip(rows, need) if needs is True]),
            f"{name}_answerable": total([value(row) for row, needs in zip(rows, need) if needs is False])}


def rollout_totals(rows, group):
    """What this rank's rollouts did: {key of LOG: (sum, count)}."""
    groups = [rows[i:i + group] for i in range(0, len(rows), group)]
    flat = (~rewards.varied([row.reward for row in rows], group)).tolist()
    trajectories = [row.trajectory for row in rows]
    against_direct = [row for row in rows if row.match_direct is not None]
    return {
        "reward": total([row.reward for row in rows]),
        **by_need("match", rows, lambda row: row.match),
        "format": total([row.form for row in rows]),
        **by_need("call_rate", rows, lambda row: row.trajectory.valid_calls > 0),
        "valid_calls": total([t.valid_calls for t in trajectories]),
        "invalid_calls": total([t.invalid_calls for t in trajectories]),
        "match_direct": total([row.match_direct for row in against_direct]),
        "gain": total([row.match - row.match_direct for row in against_direct if row.trajectory.valid_calls]),
        "length": total([sum(t.loss_mask) for t in trajectories]),
        "turns": total([len(t.turns) for t in trajectories]),
        "truncated": total([t.truncated for t in trajectories]),
        "groups_flat": total(flat),
        "groups_bonus": total([not equal and len({row.match for row in g}) == 1 for equal, g in zip(flat, groups)]),
    }


def evaluate(policy, questions, simulator, args, world, folder):
    """Greedy dialogues on held-out questions, with and without the tool -> {mode: means}; the first few are saved."""
    table = {}
    for mode in ("agentic", "direct"):
        trajectories = dialogues(policy, questions[world.rank::world.size], simulator, mode, args)
        rows = [score(trajectory, phase=1) for trajectory in trajectories]
        table[mode] = common.global_means({**by_need("accuracy", rows, lambda row: row.match),
                                    "format": total([row.form for row in rows]),
                                    **by_need("call_rate", rows, lambda row: row.trajectory.valid_calls > 0)})
        if mode == "agentic" and common.is_main():
            with common.disk(folder):
                for i, trajectory in enumerate(trajectories[:SAVED_DIALOGUES]):
                    trajectory.save(folder / str(i))
                    trajectory.draw(folder / f"{i}.png")
    agentic, direct = table["agentic"], table["direct"]
    common.say(f"held out: agentic {agentic['accuracy']:.3f}, direct {direct['accuracy']:.3f}, "
               f"call rate {agentic['call_rate']:.2f}")
    return table


def draw_curves(out):
    """curves.png from log.jsonl: rewards, calls and distances in training, accuracy and calls in evaluation."""
    try:
        import matplotlib
    except ImportError:
        return common.say("No curves.png without matplotlib (pip install matplotlib); log.jsonl has the numbers.")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    panels = {"rewards": ("reward", "match", "match_direct", "format"), "policy": ("entropy", "kl", "clipped", "gain"),
              "calls": ("call_rate", "call_rate_needs_view", "call_rate_answerable", "invalid_calls"),
              "held out, greedy": ("agentic accuracy", "agentic accuracy_needs_view", "direct accuracy",
                                   "agentic call_rate")}
    curves = defaultdict(list)
    for row in common.read_log(out / "log.jsonl"):
        held_out = {f"{mode} {key}": v for mode, means in row.get("eval", {}).items() for key, v in means.items()}
        for key, value in {**row, **held_out}.items():
            if isinstance(value, float):
                curves[key].append((row["step"], value))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axis, (title, keys) in zip(axes, panels.items()):
        for key in filter(curves.get, keys):
            axis.plot(*zip(*curves[key]), label=key, marker="." if len(curves[key]) < 20 else None)
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend(fontsize=7)
    figure.savefig(out / "curves.png", dpi=110)
    pyplot.close(figure)


# ---------------------------------------------------------------- the stage

class Watched:
    """A simulator with a stopwatch, so that the log can tell `imagine` from the rest of `sample`."""

    def __init__(self, simulator, seconds):
        self.simulator, self.seconds = simulator, seconds

    def imagine(self, queries):
        """The simulator's views, timed."""
        with self.seconds("imagine"):
            return self.simulator.imagine(queries)


def open_simulator(args, world):
    """--simulator as an object with `imagine`, or None."""
    if args.simulator == "none":
        return None
    if args.simulator == "truth":
        from lib.rooms import TrueRenderer
        return TrueRenderer()
    from world_model import WorldModel
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    return WorldModel.load(args.wm, world.device, dtype)


def open_policy(args, world):
    """The policy to train: fp32 weights, vision tower frozen (paper), sharded over the ranks if there are several."""
    policy = Policy.load(args.policy, world.device, torch.float32)
    policy.vision.requires_grad_(False)
    if args.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable()
    common.shard(policy.model, policy.model.model.language_model.layers, world, ignored=policy.vision.parameters())
    policy.model.train()                                # rollouts switch to eval and back
    return policy


def questions_of_step(questions, count, step, seed):
    """The questions of a step: pass after pass over all of them, each pass in an order of its own."""
    chosen = []
    for place in range(step * count, (step + 1) * count):
        epoch, index = divmod(place, len(questions))
        order = torch.randperm(len(questions), generator=common.generator(seed, "questions", epoch))
        chosen.append(questions[order[index]])
    return chosen


def save_policy(policy, out):
    """The policy in its public layout, gathered from all ranks."""
    weights = checkpoints.whole(policy.model.named_parameters())
    if common.is_main():
        with common.written_whole(out) as part:
            policy.save(part, weights)


def main(argv=None):
    """The stage: sample, imagine, score, advantage, logprob, update, and again."""
    args = parse_args(argv)
    files = [Path(args.data) / f"questions_{part}.jsonl" for part in ("train", "val")]
    needs = [(args.policy, "python train_sft.py" if args.phase == 1 else "python train_rl.py --phase 1"),
             *((file, f"python data.py --out {args.data}") for file in files),
             *([(args.wm, "python train_wm.py")] if args.simulator == "tuned" else [])]
    common.begin(f"train_rl --phase {args.phase}", args, NEUTRAL, needs)
    world, out = common.setup(args.threads), Path(args.out)
    policy, simulator = open_policy(args, world), open_simulator(args, world)
    start_policy = None if args.kl is None else open_policy(args, world)
    train, held_out = map(load_jsonl, files)
    held_out = questions_of_step(held_out, min(args.eval_questions, len(held_out)), step=0, seed=0)
    if args.questions < world.size:
        common.fail(f"--questions {args.questions} leaves some of {world.size} ranks without a question.")
    learning = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=args.lr, betas=BETAS, weight_decay=0.0)
    tensors = checkpoints.training_tensors(policy.model, optimizer)
    first, state = checkpoints.load_state(out / "training", tensors) or (0, {})
    if first:
        common.say(f"going on after step {first} of {args.steps}")
    log, clock = common.MetricLog(out / "log.jsonl", first), common.Clock(state.get("clock"))

    with common.Interrupt() as stop:
        for step in (bar := common.progress(args.steps, first, f"phase {args.phase}")):
            seconds, held = common.Stopwatch(), {}
            if args.eval_every and step % args.eval_every == 0:
                held["eval"] = evaluate(policy, held_out, simulator, args, world, out / f"dialogues/step_{step:06d}")

            # sample, imagine: G rollouts per question of this rank; in phase 2 also K without the tool
            questions = questions_of_step(train, args.questions, step, args.seed)[world.rank::world.size]
            with seconds("sample"):
                watched = simulator and Watched(simulator, seconds)
                sampled = dialogues(policy, questions, watched, "agentic", args, args.group, args.temperature, step)
                direct = ([] if args.phase == 1 else
                          dialogues(policy, questions, None, "direct", args, args.direct, args.temperature, step))

            # score: e, f, the number of calls, and in phase 2 the gain over answering directly
            with seconds("score"):
                e_direct = mean_match(direct, args.direct) if direct else [None] * len(questions)
                rows = [score(dialogue, args.phase, e_direct[i // args.group]) for i, dialogue in enumerate(sampled)]

            # advantage: each rollout against its group
            with seconds("advantage"):
                earned = [row.reward for row in rows]
                advantages = rewards.group_advantages(earned, args.group, args.divide_by_std)
                for row, advantage in zip(rows, advantages.tolist()):
                    row.advantage = advantage
                minibatches = split(rows, rewards.varied(earned, args.group), args, world)

            # logprob: of the start policy; in bf16, where cached and full passes round differently, also of this one
            with seconds("logprob"):
                for minibatch in minibatches:
                    if start_policy and (args.kl or held):
                        remember_logprobs(start_policy, minibatch, rows[0], "start", args)
                    if world.device.type == "cuda":
                        remember_logprobs(policy, minibatch, rows[0], "old", args)

            with seconds("update"):
                learned = update(policy, optimizer, minibatches, rows[0], step, args)

            means = common.global_means(rollout_totals(rows, args.group))
            log.write(step, **means, **learned, seconds=dict(seconds), **held)
            bar.set_postfix({key: f"{means[key]:.2f}" for key in ("reward", "match", "call_rate")})
            stopping = stop.requested()
            if stopping or (step + 1) % args.save_every == 0:
                checkpoints.save_state(out / "training", step + 1, tensors, {"clock": clock.read()})
            if stopping:
                stop.leave(step + 1)

    if args.eval_every:
        log.write(args.steps, eval=evaluate(policy, held_out, simulator, args, world, out / "dialogues" / "end"))
    save_policy(policy, out)
    if common.is_main():
        draw_curves(out)
    common.finish(out, args.steps, clock)


if __name__ == "__main__":
    common.run(main)
