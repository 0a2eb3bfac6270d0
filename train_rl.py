"""
Reinforcement learning of the policy with the simulator in the loop: GRPO in two phases (the paper's Astra-VL).

  sample, imagine   G rollouts per question: think -> imagine -> look -> ... -> answer; phase 2: also K without the tool
  score             the reward of the phase, rewards.py
  advantage         A_i = (r_i - mean of the group) / (deviation of the group + 1e-6)
  logprob           of the start policy, to watch the distance from it
  update            L = - sum over tokens of min(ratio A, clip(ratio, 1 - 0.2, 1 + 0.28) A) / number of tokens;
                    a question's prompt is computed once for its group, as in the rollout (policy.collate)

  CPU, 1 min   python train_rl.py --phase 1          # out/sft, out/wm, out/data -> out/phase1
  4 min        python train_rl.py --phase 2          # out/phase1, out/wm, out/data -> out/phase2
  8 GPUs       torchrun --standalone --nproc_per_node 8 train_rl.py --phase 1 --preset astra
                                                     # out/wm-astra, out/mined -> out/phase1-astra
  World2VLM    python train_rl.py --task world2vlm   # out/w2v, out/world2vlm -> out/w2v-rl: its second stage
  resume       the same command

Ablations of the reward (experiments/policy.py), as long as the 12 + 60 steps of both phases, each with its own --out:
  usage-only          --phase 1 --steps 72                           no gain term
  match-only          --phase 1 --steps 72 --lambda-use 0            neither
  single-stage        --phase 2 --steps 72 --policy out/sft          all terms from the start
  gain-only           the same with --lambda-use 0                   no bonus for use
  direct-only         --phase 1 --steps 72 --mode direct             no tool

Out: the policy, log.jsonl (its keys: lib/rl_log.py), dialogues/ (what it said and saw at each evaluation), curves.png.

Ours, where the paper is silent: advantages are divided by the group's deviation, which makes small bonuses loud
(--no-divide-by-std; the README says what follows); the loss is a mean over all tokens of an update, those of the
policy only; groups whose rewards are all equal teach nothing and are left out, of the mean too; no KL term unless
asked for (--kl).
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F

import rewards
from extras.world2vlm import rewards as world2vlm_rewards
from lib import checkpoints, common, simulators
from lib.common import total
from lib.dialogue import Trajectory
from lib.records import load_jsonl
from lib.rl_log import by_need, by_task, draw_curves, rollout_totals
from lib.rollout import cell_count, prompt_key
from lib.simulators import SimulatorError
from lib.streams import rows_of_step, stream_seed, torch_stream
from policy import Policy, collate, rollout, token_logprobs

CLIP_LOW, CLIP_HIGH = 0.2, 0.28  # paper: Clip-Higher
MAX_ROUNDS, MAX_TURNS = 3, 10  # paper: tool rounds and assistant turns
BETAS = (0.9, 0.99)  # of AdamW; no weight decay
SAVED_DIALOGUES = 4  # per evaluation
LEAST = 0.02  # --curriculum variance: beside that of a question's rewards, 0 to about 0.6
PRESETS = {
    "tiny": dict(
        questions=16,
        group=8,
        minibatches=2,
        lr=6e-5,
        warmup=2,
        lr_floor=0.1,
        kl=0.0,
        max_new_tokens=64,
        eval_questions=200,
        rows=64,
        micro_batch_tokens=4096,
        save_every=6,
    ),
    # The paper gives none of these. Ours: group and lr as common in GRPO of 7B models; 200 steps of 128 questions are
    # four passes over some 6,000, the number that readers report.
    "astra": dict(
        questions=128,
        group=8,
        steps=200,
        minibatches=2,
        lr=1e-6,
        warmup=10,
        lr_floor=1.0,
        max_new_tokens=4096,
        eval_every=10,
        eval_questions=256,
        rows=8,
        micro_batch_tokens=8192,
        save_every=10,
        gradient_checkpointing=True,
    ),
}
TINY_LENGTH = {
    1: dict(steps=12, eval_every=4),
    2: dict(steps=60, eval_every=12),
}  # calling is learned in a few steps
# What --task world2vlm changes. Group, KL and lr are its paper's, the clip is the default of the framework that ran it,
# the rest its released code's, which took 4 GPUs (more take more --questions). Not as released: groups whose rewards
# are all equal are left out, weight decay is 0 instead of 0.01, there is no second clip of large ratios, and all
# questions are asked instead of 125 of each task.
WORLD2VLM = {
    "tiny": dict(mode="direct", group=4, kl=0.01, clip_high=0.3, steps=60, eval_every=12),
    "astra": dict(
        mode="direct",
        group=4,
        kl=0.01,
        clip_high=0.3,
        questions=4,
        steps=248,
        lr=2e-6,
        warmup=0,
        max_new_tokens=256,
        eval_every=62,
    ),
}
NEUTRAL = ("threads", "rows", "micro_batch_tokens", "save_every", "gradient_checkpointing")


def parse_args(argv=None):
    """Flags, with the preset's defaults; "paper" in a help text means that the number is the paper's."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for parser in (first, p):
        parser.add_argument(
            "--task",
            choices=("astra", "world2vlm"),
            default="astra",
            help="world2vlm: questions about camera motions and their rewards, one phase, no tool",
        )
    p.add_argument(
        "--phase",
        type=int,
        choices=(1, 2),
        default=1,
        help="1: acquire the tool; 2: learn when to use it",
    )
    p.add_argument(
        "--mode",
        choices=("agentic", "direct"),
        default="agentic",
        help="direct: prompts without the tool",
    )
    # in and out
    p.add_argument(
        "--policy",
        help="the start; default: phase 1 out/sft (astra: Qwen/Qwen3-VL-8B-Instruct, as in the "
        "paper), phase 2 out/phase1, world2vlm out/w2v; astra's folders end in -astra",
    )
    p.add_argument(
        "--wm",
        help="the tuned simulator (default: the newest of out/wm and out/demo/wm; astra: "
        "out/wm-astra)",
    )
    p.add_argument(
        "--simulator",
        default="tuned",
        help=f"{', '.join(simulators.NAMES)}, the folder or hub id of a "
        "world model, or a URL (lib/simulators.py); none: calls are told so",
    )
    p.add_argument(
        "--data",
        nargs="+",
        help="folders of questions_{train,val}.jsonl, one for each corpus (default: "
        "out/data or out/demo/data; world2vlm out/world2vlm; astra: out/mined, out/taught)",
    )
    p.add_argument(
        "--out", help="default: out/phase1, out/phase2 or out/w2v-rl, with -astra behind it"
    )
    # these change the numbers
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, help="batches of rollouts")
    p.add_argument("--questions", type=int, help="per step, all ranks together")
    p.add_argument(
        "--curriculum",
        choices=("even", "variance"),
        default="even",
        help="even: every question at most "
        "once per pass; variance (ours): those more often whose last group of rewards varied more, "
        "new ones first",
    )
    p.add_argument("--group", type=int, help="rollouts per question")
    p.add_argument("--direct", type=int, default=4, help="phase 2: no-tool rollouts per question")
    p.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="of sampling, and of the log-probs that are trained",
    )
    p.add_argument("--max-new-tokens", type=int, help="per turn")
    p.add_argument(
        "--lambda-use",
        type=float,
        default=rewards.LAMBDA_USE,
        help="bonus for a rollout with a call",
    )
    p.add_argument(
        "--alpha",
        type=float,
        default=rewards.ALPHA,
        help="phase 2: worth of a gain over direct answers",
    )
    p.add_argument(
        "--beta", type=float, default=rewards.BETA, help="phase 2: price of a loss against them"
    )
    p.add_argument(
        "--divide-by-std", action=argparse.BooleanOptionalAction, default=True, help="of each group"
    )
    p.add_argument(
        "--minibatches",
        type=int,
        help="optimiser steps per batch; the clip acts from the second on",
    )
    p.add_argument("--clip-high", type=float, default=CLIP_HIGH, help="how far a ratio may rise")
    p.add_argument("--lr", type=float, help="AdamW, peak")
    p.add_argument("--warmup", type=int, help="steps to the peak")
    p.add_argument(
        "--lr-floor", type=float, help="share of the peak where the cosine ends; 1: constant"
    )
    p.add_argument("--max-grad-norm", type=float, default=1.0)
    p.add_argument(
        "--kl",
        type=float,
        help="weight of the KL to the start policy; 0 (tiny) only watches it; astra's "
        "default has none and keeps no start policy in memory",
    )
    p.add_argument("--eval-every", type=int, help="steps; 0: never")
    p.add_argument("--eval-questions", type=int, help="held-out questions per evaluation")
    # memory, speed and safety only: these never change the numbers
    p.add_argument(
        "--rows",
        type=int,
        help="dialogues written together, per rank (astra: 8, 4.8 GB of keys and "
        "values beside the simulator)",
    )
    p.add_argument(
        "--micro-batch-tokens",
        type=int,
        help="tokens per forward pass and rank, with padding (a longer "
        "rollout has a pass to itself)",
    )
    p.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations in backward (paper)",
    )
    p.add_argument("--save-every", type=int, help="steps between checkpoints")
    p.add_argument("--threads", type=int, help="CPU threads per process")
    world2vlm = first.parse_known_args(argv)[0].task == "world2vlm"
    presets = {
        size: flags | (WORLD2VLM[size] if world2vlm else {}) for size, flags in PRESETS.items()
    }
    args = common.parse_with_preset(
        p,
        presets,
        argv,
        [
            ("group", 2),
            ("lr_floor", 0, 1),
            *(
                (key, 1)
                for key in (
                    "steps",
                    "questions",
                    "direct",
                    "minibatches",
                    "max_new_tokens",
                    "rows",
                    "micro_batch_tokens",
                    "save_every",
                    "threads",
                )
            ),
            *(
                (key, 0)
                for key in (
                    "temperature",
                    "lr",
                    "warmup",
                    "clip_high",
                    "max_grad_norm",
                    "kl",
                    "eval_every",
                    "eval_questions",
                )
            ),
        ],
    )
    if args.temperature <= 0:
        p.error(
            "--temperature 0: the rollouts of a group would all be equal, and nothing would be learned"
        )
    for key, value in TINY_LENGTH[args.phase].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    start, data, out = (
        ("w2v", "world2vlm", "w2v-rl")
        if world2vlm
        else ("sft" if args.phase == 1 else "phase1", "data", f"phase{args.phase}")
    )
    if args.preset == "astra":  # nothing of the small world is taken by itself
        inputs = {
            "policy": "Qwen/Qwen3-VL-8B-Instruct" if start == "sft" else f"out/{start}-astra",
            "wm": "out/wm-astra",
            "data": "out/taught" if world2vlm else "out/mined",
            "out": f"out/{out}-astra",
        }
    else:
        inputs = {
            "policy": common.newest((start,)) or f"out/{start}",
            "wm": common.newest(("wm",)) or "out/wm",
            "data": common.newest((data,), "questions_train.jsonl") or f"out/{data}",
            "out": f"out/{out}",
        }
    for key, value in inputs.items():
        setattr(args, key, getattr(args, key) or ([str(value)] if key == "data" else str(value)))
    if world2vlm and (args.phase, args.mode) != (1, "direct"):
        p.error("--task world2vlm has one phase, and no tool")
    if args.questions % args.minibatches:
        p.error(
            f"--questions {args.questions} does not split into --minibatches {args.minibatches} of equal size"
        )
    return args


# ---------------------------------------------------------------- the loss


def grpo_loss(
    logprobs, old_logprobs, advantages, loss_mask, clip_low=CLIP_LOW, clip_high=CLIP_HIGH
):
    """The clipped policy-gradient loss, *summed* over tokens: divide by the token count of the whole update, all ranks.

    logprobs, old_logprobs   (B, L) of the tokens under the policy now and under the one that sampled them
    advantages               (B,) one per rollout
    loss_mask                (B, L) 1 on the policy's own tokens
    returns                  scalar sum of -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)
    """
    assert (
        logprobs.shape == old_logprobs.shape == loss_mask.shape
        and advantages.shape == logprobs.shape[:1]
    )
    ratio = (logprobs - old_logprobs).exp()  # (B, L)
    advantages = advantages[:, None]  # (B, 1)
    objective = torch.minimum(
        ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    )
    return -(objective * loss_mask).sum()


def clipped_tokens(ratio, advantages, loss_mask, clip_low=CLIP_LOW, clip_high=CLIP_HIGH):
    """How many tokens the clip silences, below and above: their ratio (B, L) is beyond the bound, where A wants it."""
    advantages = advantages[:, None]
    low, high = (
        (advantages < 0) & (ratio < 1 - clip_low),
        (advantages > 0) & (ratio > 1 + clip_high),
    )
    return (low * loss_mask).sum(), (high * loss_mask).sum()


def kl_to_start(logprobs, start_logprobs, loss_mask):
    """Sum over tokens of the k3 estimate of KL(policy || start): exp(d) - d - 1 >= 0, d = log start - log policy."""
    d = start_logprobs - logprobs
    return ((d.exp() - d - 1) * loss_mask).sum()


# ---------------------------------------------------------------- rollouts as rows


@dataclass
class Row:
    """A rollout with what an update needs. Entry j of a log-prob vector is about token j + 1 of the trajectory."""

    trajectory: Trajectory
    match: float  # e; World2VLM: the total
    form: float  # f
    match_direct: float | None  # e_direct of its question, phase 2
    reward: float
    old: torch.Tensor  # (L - 1,) log-probs under the policy that sampled
    start: torch.Tensor | None = None  # (L - 1,) log-probs under the start policy
    advantage: float = 0.0
    weight: float = 1.0  # 0: only fills up a rank's micro-batches
    parts: dict | None = None  # of the reward, World2VLM


def dialogues(policy, questions, simulator, mode, args, group=1, temperature=0.0, step=0):
    """`group` dialogues per question, question-major, drawn from the streams of (run seed, mode, step)."""
    seed = stream_seed("run", args.seed, mode, step)
    try:
        with common.gathered(policy.model):
            return rollout(
                policy,
                questions,
                simulator,
                mode,
                group,
                temperature,
                seed,
                MAX_ROUNDS,
                MAX_TURNS,
                args.max_new_tokens,
                args.rows,
            )
    except SimulatorError as error:
        common.fail(f"{error}. The same command goes on from the last checkpoint.")


def score(trajectory, args, match_direct=None):
    """Reward a rollout: phase 1, and with `match_direct` phase 2, as in rewards.py with the weights of the flags."""
    question, n_tool, old = (
        trajectory.question,
        trajectory.valid_calls,
        torch.tensor(trajectory.logprobs[1:]),
    )
    if args.task == "world2vlm":
        parts = world2vlm_rewards.world2vlm(
            question["category"], question["answer"], trajectory.answer
        )
        return Row(
            trajectory, parts["total"], parts["format"], None, parts["total"], old, parts=parts
        )
    match, form = (
        rewards.exact_match(trajectory.answer, question),
        rewards.format_reward(trajectory),
    )
    if match_direct is None:
        reward = rewards.phase1_reward(match, form, n_tool, args.lambda_use)
    else:
        reward = rewards.phase2_reward(
            match, form, n_tool, match_direct, args.lambda_use, args.alpha, args.beta
        )
    return Row(trajectory, match, form, match_direct, reward, old)


def mean_match(trajectories, group):
    """Mean exact match of each group of `group` neighbours: e_direct per question."""
    matches = [rewards.exact_match(t.answer, t.question) for t in trajectories]
    return [sum(matches[i : i + group]) / group for i in range(0, len(matches), group)]


def split(rows, varied, args, world):
    """This rank's rows by optimiser step, without groups that teach nothing.

    A question's optimiser step follows from its place in the whole step, not from the rank that holds it: any number of
    ranks makes the same steps.
    """
    minibatches = [[] for _ in range(args.minibatches)]
    for i, row in enumerate(rows):
        place = world.rank + i // args.group * world.size  # of its question in the step
        if varied[i // args.group]:
            minibatches[place * args.minibatches // args.questions].append(row)
    return minibatches


def micro_batches(rows, filler, tokens):
    """Chunks of rows, one pass each, of at most `tokens` cells; the same number of chunks on every rank.

    Rows with one prompt (neighbours) make a line, as collate(share=True) lays them out; lines of like length make a
    chunk. Each pass through a sharded model is a set of collectives: a rank with fewer chunks runs `filler`, any
    of its rows, at weight 0.
    """

    def cells(*lines):
        return cell_count([row.trajectory for line in lines for row in line])

    lines, chunks, before = [], [], None
    for row in rows:
        prompt = prompt_key(row.trajectory)
        if prompt == before and cells(lines[-1] + [row]) <= tokens:
            lines[-1].append(row)
        else:
            lines.append([row])
        before = prompt
    for line in sorted(lines, key=cells, reverse=True):
        if chunks and cells(*chunks[-1], line) <= tokens:
            chunks[-1].append(line)
        else:
            chunks.append([line])
    chunks = [[row for line in chunk for row in line] for chunk in chunks]
    return chunks + [[replace(filler, weight=0.0)]] * (
        int(common.global_max(len(chunks))) - len(chunks)
    )


def stack(vectors, like):
    """1-D tensors of at most like.shape[1] entries -> a tensor like `like` (B, L - 1), zeros behind."""
    return torch.stack([F.pad(vector, (0, like.shape[1] - len(vector))) for vector in vectors]).to(
        like.device
    )


@torch.no_grad()
def remember_logprobs(policy, rows, filler, name, args):
    """Set row.<name> to the log-probs of each row's tokens under `policy`."""
    for chunk in micro_batches(rows, filler, args.micro_batch_tokens):
        batch = collate(policy, [row.trajectory for row in chunk], share=True)
        logprobs, _ = token_logprobs(policy, batch, args.temperature)
        for row, values in zip(chunk, logprobs.cpu()):
            setattr(row, name, values[: len(row.trajectory.ids) - 1].clone())


def accumulate_gradient(policy, rows, filler, args):
    """Add the gradient of one update's loss: a mean over the policy's tokens in `rows`, those of all ranks together.

    rows, filler   this rank's share, maybe empty, and any row to fill up with
    returns        this rank's sums over tokens {tokens, loss, entropy, ratio, clipped_low, clipped_high; kl, kl_tokens
                   where row.start is known} and the largest `mismatch` and `ratio_max`; {} on every rank if there is no
                   token to learn from
    """
    tokens = common.global_sum(float(sum(sum(row.trajectory.loss_mask) for row in rows)))
    sums = defaultdict(float)
    for chunk in micro_batches(rows, filler, args.micro_batch_tokens) if tokens else ():
        batch = collate(policy, [row.trajectory for row in chunk], share=True)
        logprobs, entropy = token_logprobs(policy, batch, args.temperature)  # (B, L - 1) each
        weight, advantages = torch.tensor(
            [[row.weight, row.advantage] for row in chunk], device=logprobs.device
        ).T
        mask = batch.loss_mask * weight[:, None]  # (B, L - 1)
        old = stack([row.old for row in chunk], logprobs)
        loss = objective = grpo_loss(logprobs, old, advantages, mask, CLIP_LOW, args.clip_high)
        if chunk[0].start is not None:
            kl = kl_to_start(logprobs, stack([row.start for row in chunk], logprobs), mask)
            objective = loss + args.kl * kl
            sums["kl"] += kl.item()
            sums["kl_tokens"] += mask.sum().item()
        (objective / tokens).backward()  # a local sum over a global count
        logprobs = logprobs.detach()
        ratio, sampled = (logprobs - old).exp(), batch.logprobs
        low, high = clipped_tokens(ratio, advantages, mask, CLIP_LOW, args.clip_high)
        for key, value in (
            ("tokens", mask),
            ("loss", loss),
            ("entropy", entropy * mask),
            ("ratio", ratio * mask),
            ("clipped_low", low),
            ("clipped_high", high),
        ):
            sums[key] += value.sum().item()
        for key, value in (("ratio_max", ratio), ("mismatch", (logprobs - sampled).abs())):
            sums[key] = max(sums[key], (value * mask).max().item())
    return sums


def update(policy, optimizer, minibatches, filler, step, args):
    """One optimiser step per minibatch that has something to teach -> {key of LOG: value}."""
    rate = args.lr * common.cosine(step, args.steps, args.warmup, args.lr_floor)
    common.set_rate(optimizer, rate)
    sums, norms = [], []
    for minibatch in minibatches:
        sums.append(accumulate_gradient(policy, minibatch, filler, args))
        if sums[-1]:
            norms.append(common.clip_gradients(policy.model.parameters(), args.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    over = dict.fromkeys(("loss", "entropy", "ratio", "clipped_low", "clipped_high"), "tokens") | {
        "kl": "kl_tokens"
    }
    means = common.global_means(
        {
            key: tuple(sum(part.get(k, 0.0) for part in sums) for k in (key, count))
            for key, count in over.items()
        }
    )
    first = next(filter(None, sums), {})
    return {
        "tokens": common.global_sum(sum(part.get("tokens", 0.0) for part in sums)),
        **means,
        "mismatch": common.global_max(first.get("mismatch", 0.0)),
        "ratio_max": common.global_max(max(part.get("ratio_max", 0.0) for part in sums)),
        "grad_norm": sum(norms) / len(norms) if norms else 0.0,
        "lr": rate,
    }


# ---------------------------------------------------------------- held-out questions


def evaluate(policy, questions, simulator, args, world, folder):
    """Greedy dialogues on held-out questions, with and without the tool -> {mode: means}; the first few are saved."""
    table = {}
    for mode in dict.fromkeys((args.mode, "direct")):
        trajectories = dialogues(policy, questions[world.rank :: world.size], simulator, mode, args)
        rows = [score(trajectory, args) for trajectory in trajectories]
        means = common.global_means(
            {
                **by_need("accuracy", rows, lambda row: row.match),
                **by_task(rows),
                "format": total([row.form for row in rows]),
                **by_need("call_rate", rows, lambda row: row.trajectory.valid_calls > 0),
            }
        )
        table[mode] = means
        if mode == args.mode and common.is_main():
            with common.disk(folder):
                for i, trajectory in enumerate(trajectories[:SAVED_DIALOGUES]):
                    trajectory.save(folder / str(i))
                    trajectory.draw(folder / f"{i}.png")
        common.say(
            f"held out, {mode}: accuracy {means['accuracy']:.3f}, call rate {means['call_rate']:.2f}"
        )
    return table


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
    return (
        None
        if args.mode == "direct"
        else simulators.load_simulator(args.simulator, world.device, args.wm)
    )


def needs(args):
    """[(path of an input, the command that makes it)]."""
    world2vlm, like = args.task == "world2vlm", " --preset astra" if args.preset == "astra" else ""
    sft, data = (
        ("train_sft.py --task world2vlm", "data.py world2vlm")
        if world2vlm
        else ("train_sft.py", "data.py")
    )
    if like:
        data += (
            " --anchors DIR --teacher out/wm-astra"
            if world2vlm
            else " mine --questions FILE --policy FOLDER"
        )
    return [
        (
            args.policy,
            f"python {sft}{like}" if args.phase == 1 else f"python train_rl.py --phase 1{like}",
        ),
        *(
            (Path(folder) / f"questions_{part}.jsonl", f"python {data} --out {folder}")
            for folder in args.data
            for part in ("train", "val")
        ),
        *(
            [(args.wm, f"python train_wm.py{like}")]
            if (args.mode, args.simulator) == ("agentic", "tuned")
            else []
        ),
    ]


def load_questions(part, args):
    """The questions of --task in the files of a part, "train" or "val"."""
    files = [Path(folder) / f"questions_{part}.jsonl" for folder in args.data]
    name = " and ".join(map(str, files))
    questions = [
        q
        for file in files
        for q in load_jsonl(file)
        if (q.get("bench") == "world2vlm") == (args.task == "world2vlm")
    ]
    if not questions:
        common.fail(f"{name} has no question for --task {args.task}.")
    if lacks := {"question", "images", "options", "answer"} - set.intersection(
        *map(set, questions)
    ):
        common.fail(
            f"{name}: questions lack {', '.join(sorted(lacks))}; data.py says what a question holds."
        )
    if args.simulator in simulators.NEEDS_ROOM and not all(q.get("scene") for q in questions):
        common.fail(
            f"--simulator {args.simulator} works in rooms only; {name} has questions without a scene."
        )
    return questions


def prepared(policy, args, world):
    """The policy to train, of fp32 weights, sharded; its vision tower is frozen (paper), and in bf16 on a GPU."""
    policy.vision.requires_grad_(False)
    if world.device.type == "cuda":
        policy.vision.to(torch.bfloat16)
    if args.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable()
    common.shard(
        policy.model,
        policy.model.model.language_model.layers,
        world,
        ignored=policy.vision.parameters(),
    )
    policy.model.train()  # rollouts switch to eval and back
    return policy


def places_of_step(total, count, step, seed, spread=None):
    """Which of `total` questions a step asks: pass after pass over all of them, none twice in a step.

    spread   weights of the questions for --curriculum variance: drawn by these
    """
    if spread:
        weights = torch.tensor(spread, dtype=torch.float64)
        return torch.multinomial(
            weights, count, generator=torch_stream("order", seed, step)
        ).tolist()
    return rows_of_step(total, count, step, seed)


def new_spread(spread, places, earned, group):
    """The weights after a step: of what any rank has asked, the variance of the rewards, plus LEAST; else as before."""
    found = torch.zeros(
        len(spread), dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu"
    )
    found[places] = (
        torch.tensor(earned, dtype=torch.float64, device=found.device).view(-1, group).var(1)
        + LEAST
    )
    return [new or old for new, old in zip(common.global_sum(found).tolist(), spread)]


def save_policy(policy, out):
    """The policy in its public layout, gathered from all ranks."""
    weights = checkpoints.whole(policy.model.named_parameters())
    if common.is_main():
        with common.written_whole(out) as part:
            policy.save(part, weights)


def main(argv=None):
    """The stage: sample, imagine, score, advantage, logprob, update, and again."""
    args = parse_args(argv)
    title = "--task world2vlm" if args.task == "world2vlm" else f"--phase {args.phase}"
    common.begin(f"train_rl {title}", args, NEUTRAL, needs(args))
    world, out = common.setup(args.threads), Path(args.out)
    if args.questions < world.size:
        common.fail(
            f"--questions {args.questions} leaves some of {world.size} ranks without a question."
        )
    policy, start_policy = (
        prepared(Policy.load(args.policy, world.device, torch.float32), args, world)
        if wanted
        else None
        for wanted in (True, args.kl is not None)
    )
    simulator = open_simulator(args, world)
    train, held_out = (load_questions(part, args) for part in ("train", "val"))
    chosen = places_of_step(len(held_out), min(args.eval_questions, len(held_out)), step=0, seed=0)
    held_out = [held_out[place] for place in chosen]
    if args.eval_every and len(held_out) < world.size:
        common.fail(
            f"{len(held_out)} held-out questions leave some of {world.size} ranks without one: give "
            f"--eval-questions {world.size} or more, or --eval-every 0."
        )
    if args.questions > len(train):
        common.fail(
            f"A step asks no question twice: {', '.join(args.data)} has {len(train)}, --questions asks for "
            f"{args.questions}."
        )
    learning = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=args.lr, betas=BETAS, weight_decay=0.0, fused=True)
    tensors = checkpoints.training_tensors(policy.model, optimizer)
    first, state = checkpoints.load_state(out / "training", tensors) or (0, {})
    if first:
        common.say(f"going on after step {first} of {args.steps}")
    log, clock = common.MetricLog(out / "log.jsonl", first), common.Clock(state.get("clock"))
    spread = state.get("spread", [1.0] * len(train)) if args.curriculum == "variance" else None

    with common.Interrupt() as stop:
        for step in (bar := common.progress(args.steps, first, title.strip("-"))):
            seconds, held = common.Stopwatch(), {}
            if args.eval_every and step % args.eval_every == 0:
                held["eval"] = evaluate(
                    policy, held_out, simulator, args, world, out / f"dialogues/step_{step:06d}"
                )

            # sample, imagine: G rollouts per question of this rank; in phase 2 also K without the tool
            places = places_of_step(len(train), args.questions, step, args.seed, spread)[
                world.rank :: world.size
            ]
            questions = [train[place] for place in places]
            with seconds("sample"):
                watched = simulator and Watched(simulator, seconds)
                sampled = dialogues(
                    policy, questions, watched, args.mode, args, args.group, args.temperature, step
                )
                direct = (
                    []
                    if args.phase == 1
                    else dialogues(
                        policy, questions, None, "direct", args, args.direct, args.temperature, step
                    )
                )

            # score: e, f, the number of calls, and in phase 2 the gain over answering directly
            with seconds("score"):
                e_direct = mean_match(direct, args.direct) if direct else [None] * len(questions)
                rows = [
                    score(dialogue, args, e_direct[i // args.group])
                    for i, dialogue in enumerate(sampled)
                ]

            # advantage: each rollout against its group
            with seconds("advantage"):
                earned = [row.reward for row in rows]
                advantages = rewards.group_advantages(earned, args.group, args.divide_by_std)
                for row, advantage in zip(rows, advantages.tolist()):
                    row.advantage = advantage
                minibatches = split(rows, rewards.varied(earned, args.group), args, world)
                spread = spread and new_spread(spread, places, earned, args.group)

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
            del sampled, direct, rows, minibatches  # and their images, before the next ones come
            stop.save_or_leave(
                step + 1,
                args,
                lambda: checkpoints.save_state(
                    out / "training", step + 1, tensors, {"clock": clock.read(), "spread": spread}
                ),
            )

    if args.eval_every:
        log.write(
            args.steps,
            eval=evaluate(policy, held_out, simulator, args, world, out / "dialogues" / "end"),
        )
    save_policy(policy, out)
    if common.is_main():
        draw_curves(out)
    common.finish(out, args.steps, clock)


if __name__ == "__main__":
    common.run(main)
