"""
Reinforcement learning of the policy with the simulator in the loop: GRPO in two phases (the paper's Astra-VL).

  sample, imagine   G rollouts per question: think -> imagine -> look -> ... -> answer; phase 2: also K without the tool
  score             the reward r of the phase, rewards.py
  advantage         A_i = r_i - mean of the group, in astra divided by the group's deviation + 1e-6
  logprob           of the tokens under the start policy, where --kl-weight holds the policy near it
  update            L = sum over tokens of (kl_weight KL - min(ratio A, clip(ratio, 1 - 0.2, 1 + 0.28) A)) / number of
                    tokens; a question's prompt is computed once for its group, as in the rollout (policy.collate)

  CPU, 30 s    python train_rl.py --phase 1          # out/sft, out/wm, out/data -> out/phase1
  5 min        python train_rl.py --phase 2          # out/phase1, out/wm, out/data -> out/phase2
  8 GPUs       torchrun --standalone --nproc_per_node 8 train_rl.py --phase 1 --preset astra
                                                     # out/wm-astra, out/mined -> out/phase1-astra
  resume       the same command

Recipes of the paper's Table 3 (experiments/policy.py), as long as the 6 + 100 steps of both phases, each with its own
--out. Its "phase 1 only" is, as we read it, what phase 1 leaves.
  tool gain only      --phase 2 --steps 106 --policy out/sft --lambda-use 0       exact match and format stay
  usage bonus only    --phase 1 --steps 106
  direct answers      --phase 1 --steps 106 --mode direct                         ours: no tool

Out: the policy, log.jsonl (its keys: LOG, below), dialogues/ (words and pictures of each evaluation), curves.png (extras/).

Ours, where the paper is silent: astra divides advantages by the group's deviation, as GRPO is usually written; tiny does
not, since that makes the bonus of a needless call as loud as a wrong answer, and holds the policy near its start a
little, so that it goes on trying both (docs/results.md); the loss is a mean over all tokens of an optimiser step
(a minibatch, all ranks), those of the policy only; groups whose rewards are all equal have no signal
and are left out, of the mean too.
"""

import contextlib
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

import rewards
from lib import simulators
from lib.checkpoints import TrainingState, training_tensors
from lib.dialogue import Trajectory
from lib.distributed import (
    Means,
    World,
    clip_gradients,
    fail,
    global_max,
    global_sum,
    is_main,
    progress,
    say,
    setup,
    shard,
    sum_gradients,
    unsharded,
)
from lib.images import with_pictures
from lib.packing import padded
from lib.records import Question, load_jsonl, whole_folder
from lib.rollout import Layout
from lib.stage import (
    Flag,
    Interrupt,
    begin,
    finish,
    has_extras,
    parse_flags,
    run_stage,
)
from lib.streams import rows_of_step, set_learning_rate, stream_seed
from policy import Policy, collate, rollout, token_logprobs

CLIP_LOW = 0.2  # paper: Clip-Higher
CLIP_HIGH = 0.28
TEMPERATURE = 1.0  # of sampling, and so of the log-probs that are trained; evaluation is greedy
BETAS = (0.9, 0.99)  # of AdamW; no weight decay
MAX_GRAD_NORM = 1.0  # longer gradients are scaled down to it
QUESTION_KEYS = ("question", "images", "options", "answer")  # of a question
SAVED_DIALOGUES = 4  # per evaluation

# ---- flags -----------------------------------------------------------------------------------------------------------

# The paper gives no astra default but those marked so. Ours: group and lr as common in GRPO of 7B models; 200 steps of
# 128 questions are four passes over some 6,000, the number that readers report.
FLAGS = [
    Flag("--phase", 1, 1, "1: acquire the tool; 2: learn when to use it (paper)", choices=(1, 2)),
    Flag(
        "--mode",
        "agentic",
        "agentic",
        "direct: prompts without the tool",
        choices=("agentic", "direct"),
    ),
    # in and out
    Flag(
        "--policy",
        None,
        None,
        "the start; default: phase 1 out/sft (astra: Qwen/Qwen3-VL-8B-Instruct, as in the paper), phase 2 out/phase1 "
        "(astra: out/phase1-astra)",
    ),
    Flag("--wm", "out/wm", "out/wm-astra", "the tuned simulator"),
    Flag(
        "--simulator",
        "tuned",
        "tuned",
        f"{', '.join(simulators.SIMULATORS)}, the folder or hub id of a world model, or a URL (lib/simulators.py); "
        "none: a call is answered by a sentence",
    ),
    Flag(
        "--data",
        ["out/data"],
        ["out/mined"],
        "folders of questions_{train,val}.jsonl, one for each corpus",
    ),
    Flag("--out", None, None, "default: out/phase1 or out/phase2, with -astra behind it"),
    # these change the numbers
    Flag("--seed", 0, 0, "of sampling and of the order of questions"),
    Flag("--steps", None, 200, "batches of rollouts; default: phase 1 6, phase 2 100", 1),
    Flag("--questions", 16, 128, "per step, all ranks together", 1),
    Flag("--group", 8, 8, "G, rollouts per question", 2),
    Flag("--direct-rollouts", 4, 4, "K, phase 2: no-tool rollouts per question", 1),
    Flag("--max-new-tokens", 64, 4096, "per turn", 1),
    Flag("--lambda-use", rewards.LAMBDA_USE, rewards.LAMBDA_USE, "bonus for a call (paper: 0.02)"),
    Flag("--divide-by-std", False, True, "advantages by the deviation of their group"),
    Flag("--minibatches", 2, 2, "optimiser steps per batch; the clip acts from the second on", 1),
    Flag("--lr", 6e-5, 1e-6, "AdamW, peak", 0),
    Flag("--warmup", 2, 10, "steps to the peak", 0),
    Flag("--lr-floor", 0.3, 1.0, "share of the peak where the cosine ends; 1: constant", 0, 1),
    Flag("--kl-weight", 0.1, 0.0, "weight of the KL to the start policy (a second model)", 0),
    Flag("--lora", 0, 0, "train adapters of this rank (alpha twice that) beside --policy", 0),
    # views inside RL: cheaper than the simulator's config.json has them (docs/speed.md: their price)
    Flag("--view-steps", None, None, "network evaluations of an imagined view", 1, kind=int),
    Flag("--view-taylor", False, False, "compute one of its steps in three (step caching)"),
    # looks, memory, speed and safety only: these never change the numbers
    Flag(
        "--eval-every",
        None,
        10,
        "steps; 0: never; default: phase 1 3, phase 2 20",
        0,
        neutral=True,
    ),
    Flag(
        "--eval-questions",
        200,
        256,
        "held-out questions, the same for every --seed",
        1,
        neutral=True,
    ),
    Flag(
        "--rows",
        64,
        16,
        "dialogues written together, per rank; 16 of astra: 9.7 GB at 4,096 tokens",
        1,
        neutral=True,
    ),
    Flag(
        "--micro-batch-cells",
        4096,
        8192,
        "cells (tokens and padding) per pass and rank; a longer rollout has a pass to itself",
        1,
        neutral=True,
    ),
    Flag(
        "--gradient-checkpointing",
        False,
        True,
        "recompute activations in backward (paper)",
        neutral=True,
    ),
    # astra: a step takes half an hour or more (README), and what came after the last checkpoint is lost with a node
    Flag("--save-every", 6, 2, "steps between checkpoints", 1, neutral=True),
    Flag("--threads", None, None, "CPU threads per process", 1, kind=int, neutral=True),
]
TINY_STEPS = {1: 6, 2: 100}  # calling is learned in a few steps
TINY_EVAL_EVERY = {1: 3, 2: 20}


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line; what depends on the phase is filled in here."""
    args = parse_flags(__doc__, FLAGS, argv)
    if args.questions % args.minibatches:
        args.parser.error(
            f"--questions {args.questions} does not split into --minibatches {args.minibatches} of equal size"
        )
    if args.mode == "direct" and args.phase == 2:
        args.parser.error("--mode direct has no phase 2: without the tool there is no gain")
    astra = args.preset == "astra"
    suffix = "-astra" if astra else ""
    base = "Qwen/Qwen3-VL-8B-Instruct" if astra else "out/sft"
    args.policy = args.policy or (base if args.phase == 1 else f"out/phase1{suffix}")
    args.out = args.out or f"out/phase{args.phase}{suffix}"
    args.steps = args.steps or TINY_STEPS[args.phase]
    if args.eval_every is None:
        args.eval_every = TINY_EVAL_EVERY[args.phase]
    return args


def inputs_of(args: Namespace) -> list[tuple[str | Path, str]]:
    """(path, the command that makes it) of every input."""
    astra = args.preset == "astra"
    preset = " --preset astra" if astra else ""
    cold_start = args.phase == 1 or Path(args.policy).name == "sft"
    stage = "train_sft.py" if cold_start else f"train_rl.py --phase 1{preset}"
    inputs = [(args.policy, f"python {stage}")]
    maker = "-m extras.scans.mining --questions FILE --policy FOLDER" if astra else "data.py"
    for folder in args.data:
        for split in ("train", "val"):
            file = Path(folder, f"questions_{split}.jsonl")
            inputs.append((file, f"python {maker} --out {folder}"))
    if args.mode == "agentic" and args.simulator == "tuned":
        inputs.append((args.wm, f"python train_wm.py{preset}"))
    return inputs


# ---- the stage -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Sample and imagine, score, advantage, logprob, update: for every step."""
    args = parse_args(argv)
    world = setup(args.threads)
    begin(f"train_rl --phase {args.phase}", args, FLAGS, inputs_of(args))
    out = Path(args.out)
    train, held_out = open_questions(args, world)
    simulator = None
    if args.mode == "agentic":
        options = view_options(args)
        simulator = simulators.load_simulator(args.simulator, world.device, args.wm, **options)
    policy = load_policy(args, world)
    start_policy = load_policy(args, world) if args.kl_weight else None

    weights = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=BETAS, weight_decay=0.0, fused=True)
    training = TrainingState(out, training_tensors(policy.model, optimizer))
    if training.start:
        say(f"going on after step {training.start} of {args.steps}")

    bar = progress(args.steps, training.start, f"phase {args.phase}")
    with Interrupt() as stop:
        for step in bar:
            metrics = {"lr": set_learning_rate(optimizer, step, args)}
            if args.eval_every and step % args.eval_every == 0:
                folder = out / "dialogues" / f"step_{step:06d}"
                metrics["eval"] = evaluate(policy, held_out, simulator, args, world, folder)

            # sample, imagine: G rollouts per question of this rank; in phase 2 also K without the tool
            seconds = Stopwatch()
            order = rows_of_step(len(train), args.questions, step, args.seed)
            questions = [train[row] for row in order[world.rank :: world.size]]
            with seconds("sample"):
                timed = TimedSimulator(simulator, seconds) if simulator else None
                rollouts = sample_groups(
                    policy, questions, timed, args.mode, args, step, args.group, TEMPERATURE
                )
                direct_rollouts = []
                if args.phase == 2:
                    size = args.direct_rollouts
                    direct_rollouts = sample_groups(
                        policy, questions, timed, "direct", args, step, size, TEMPERATURE
                    )

            # score: e, f, the number of calls, and in phase 2 the gain over answering directly
            with seconds("score"):
                groups = reward_rollouts(rollouts, direct_rollouts, args)

            # advantage: each rollout against its group; groups without signal go
            with seconds("advantage"):
                set_advantages(groups, args.divide_by_std)
                minibatches = split_minibatches(groups, args.questions, args.minibatches, world)

            # logprob: under the start policy where its KL counts; on a GPU also under the policy itself: in bf16 the
            # rollout's cached passes round differently from training's, so the ratio would not start at 1
            with seconds("logprob"):
                if start_policy:
                    set_logprobs(
                        "start_logprobs", start_policy, minibatches, args.micro_batch_cells
                    )
                if world.device.type == "cuda":
                    set_logprobs("old_logprobs", policy, minibatches, args.micro_batch_cells)

            # update: an optimiser step per minibatch
            with seconds("update"):
                metrics |= update(
                    policy,
                    optimizer,
                    minibatches,
                    args.micro_batch_cells,
                    kl_weight=args.kl_weight,
                )

            metrics |= rollout_means(groups) | group_means(groups)
            training.log.write(step, **metrics, seconds=seconds)
            bar.set_postfix(reward=f"{metrics['reward']:.2f}", match=f"{metrics['match']:.2f}")
            # frees the image features on the GPU before save and the next step
            del rollouts, direct_rollouts, groups, minibatches
            stop.save_or_leave(step + 1, args, training.save)

    if args.eval_every:
        table = evaluate(policy, held_out, simulator, args, world, out / "dialogues" / "end")
        training.log.write(args.steps, eval=table)
    save_policy(policy, out, args)
    if is_main() and has_extras():
        from extras.report.curves import draw_curves

        draw_curves(out)
    finish(out, args.steps, training.clock)


# ---- sample, imagine -------------------------------------------------------------------------------------------------


class Stopwatch(dict):
    """Seconds per part of a step: `with seconds("update"): ...` adds to seconds["update"]."""

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self[part] = self.get(part, 0.0) + time.perf_counter() - start


class TimedSimulator(NamedTuple):
    """A simulator with a stopwatch, so that the log can tell `imagine` from the rest of `sample`."""

    simulator: Any
    seconds: Stopwatch

    def imagine(self, queries: list) -> list:
        """The simulator's views, timed."""
        with self.seconds("imagine"):
            return self.simulator.imagine(queries)


def sample_groups(
    policy: Policy,
    questions: list[dict],
    simulator,
    mode: str,
    args: Namespace,
    step: int,
    size: int,
    temperature: float,
) -> list[list[Trajectory]]:
    """A group of `size` rollouts for each question, drawn from the stream of (--seed, mode, step).

    args   seed, max_new_tokens and rows count
    """
    seed = stream_seed("run", args.seed, mode, step)
    with unsharded(policy.model):
        trajectories = rollout(
            policy,
            questions,
            simulator,
            mode,
            size,
            temperature,
            seed,
            max_new_tokens=args.max_new_tokens,
            rows=args.rows,
        )
    starts = range(0, len(trajectories), size)
    return [trajectories[start : start + size] for start in starts]


# ---- score, advantage ------------------------------------------------------------------------------------------------


@dataclass
class Episode:
    """A rollout with its reward, and what an update needs. L: tokens of the trajectory.

    Entry j of a log-prob vector is about token j + 1.
    """

    trajectory: Trajectory
    reward: float  # r
    match: float  # e
    format: float  # f
    old_logprobs: Tensor  # (L - 1,) under the policy that sampled: denominator of the ratio
    match_direct: float | None = None  # phase 2: e_direct of its question
    # set later
    advantage: float = 0.0  # A
    start_logprobs: Tensor | None = None  # (L - 1,) under the start policy, where --kl-weight asks
    idle: bool = False  # only takes part in the collectives of a sharded model

    @property
    def n_tokens(self) -> int:
        """How many tokens the loss counts."""
        return 0 if self.idle else sum(self.trajectory.loss_mask)


def reward_rollouts(
    rollouts: list[list[Trajectory]], direct_rollouts: list[list[Trajectory]], args: Namespace
) -> list[list[Episode]]:
    """Reward the rollouts of each question, in phase 2 by its no-tool rollouts too."""
    groups = []
    for number, trajectories in enumerate(rollouts):
        match_direct = mean_match(direct_rollouts[number]) if direct_rollouts else None
        groups.append([episode_of(trajectory, args, match_direct) for trajectory in trajectories])
    return groups


def mean_match(trajectories: list[Trajectory]) -> float:
    """e_direct: the mean exact match of some rollouts."""
    matches = [rewards.exact_match(t.answer, t.question) for t in trajectories]
    return sum(matches) / len(matches)


def episode_of(
    trajectory: Trajectory, args: Namespace, match_direct: float | None = None
) -> Episode:
    """The reward of phase 1, and with `match_direct` that of phase 2, with the weights of the flags."""
    match = rewards.exact_match(trajectory.answer, trajectory.question)
    well_formed = rewards.format_reward(trajectory)
    n_tool = trajectory.valid_calls
    if match_direct is None:
        reward = rewards.phase1_reward(match, well_formed, n_tool, args.lambda_use)
    else:
        reward = rewards.phase2_reward(match, well_formed, n_tool, match_direct, args.lambda_use)
    return Episode(
        trajectory,
        reward=reward,
        match=match,
        format=well_formed,
        old_logprobs=torch.tensor(trajectory.logprobs[1:]),
        match_direct=match_direct,
    )


def set_advantages(groups: list[list[Episode]], divide_by_std: bool) -> None:
    """Compare each episode with the others of its question."""
    for group in groups:
        group_rewards = [episode.reward for episode in group]
        advantages = rewards.group_advantages(group_rewards, len(group), divide_by_std).tolist()
        for episode, advantage in zip(group, advantages, strict=True):
            episode.advantage = advantage


def has_signal(group: list[Episode]) -> bool:
    """False where all rewards of a group are equal: `rewards.group_advantages` makes all advantages exactly zero."""
    return any(episode.advantage for episode in group)


def split_minibatches(
    groups: list[list[Episode]], questions: int, minibatches: int, world: World
) -> list[list[Episode]]:
    """This rank's episodes by optimiser step (a collective): groups with signal, and steps that have any.

    A question's optimiser step follows from its place among the `questions` of all ranks, not from the rank that
    holds it: any number of ranks makes the same steps. A rank without episodes for a step gets an idle one.
    """
    questions_per_minibatch = questions // minibatches
    batches = [[] for _ in range(minibatches)]
    for index, group in enumerate(groups):
        if has_signal(group):
            # its place in `order`, which main deals out as order[rank :: size]
            place = world.rank + index * world.size
            batches[place // questions_per_minibatch].extend(group)
    taken = []
    for batch in batches:
        if global_sum(len(batch)):
            taken.append(batch or [replace(groups[0][0], idle=True)])
    return taken


# ---- micro-batches ---------------------------------------------------------------------------------------------------


def micro_batches(episodes: list[Episode], max_cells: int) -> list[list[Episode]]:
    """Episodes by forward pass, of at most `max_cells` cells each; as many passes on every rank.

    Neighbours with one prompt make a row, as collate(share_prompts=True) lays them out; rows of like length share a pass.
    Each pass through a sharded model is a set of collectives: a rank with fewer of them adds idle ones.
    """
    rows = []
    last_prompt = None
    for episode in episodes:
        prompt = episode.trajectory.prompt_key
        if prompt == last_prompt and cells([*rows[-1], episode]) <= max_cells:
            rows[-1].append(episode)
        else:
            rows.append([episode])
        last_prompt = prompt
    passes = []
    for row in sorted(rows, key=cells, reverse=True):
        if passes and cells(passes[-1] + row) <= max_cells:
            passes[-1].extend(row)
        else:
            passes.append(row)
    missing = int(global_max(len(passes))) - len(passes)
    return passes + [[replace(episodes[0], idle=True)]] * missing


def cells(episodes: list[Episode]) -> int:
    """How many cells, tokens and padding, a forward pass over these episodes takes."""
    layout = Layout.of([episode.trajectory for episode in episodes], share_prompts=True)
    return len(layout.rows) * layout.width


# ---- logprob ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def set_logprobs(
    field: str, policy: Policy, minibatches: list[list[Episode]], micro_batch_cells: int
) -> None:
    """Set a field of each episode to the log-probs (L - 1,) of its tokens under `policy`.

    Set, not returned: passes hold the episodes in another order, and idle copies besides, whose values go with them.
    """
    for minibatch in minibatches:
        for micro_batch in micro_batches(minibatch, micro_batch_cells):
            batch = collate(
                policy, [episode.trajectory for episode in micro_batch], share_prompts=True
            )
            logprobs, _ = token_logprobs(policy, batch, TEMPERATURE)  # (B, L - 1)
            for episode, row in zip(micro_batch, logprobs.cpu(), strict=True):
                setattr(episode, field, row[: len(episode.trajectory.ids) - 1].clone())


# ---- update ----------------------------------------------------------------------------------------------------------


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    clip_high: float = CLIP_HIGH,
) -> Tensor:
    """The clipped policy-gradient loss, *summed* over tokens: divide by their number in the optimiser step, all ranks.

    logprobs, old_logprobs   (B, L - 1) of the tokens under the policy now and under the one that sampled them
    advantages               (B,) one per rollout
    loss_mask                (B, L - 1) 1 on the policy's own tokens
    returns                  scalar sum of -min(ratio A, clip(ratio, 1 - CLIP_LOW, 1 + clip_high) A)
    """
    assert logprobs.shape == old_logprobs.shape == loss_mask.shape
    assert advantages.shape == logprobs.shape[:1]
    ratio = (logprobs - old_logprobs).exp()  # (B, L - 1)
    advantages = advantages[:, None]  # (B, 1)
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    return -(surrogate * loss_mask).sum()


def kl_to_start(logprobs: Tensor, start_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
    """Sum over tokens of the k3 estimate of KL(policy || start): exp(d) - d - 1 >= 0, d = log start - log policy."""
    d = start_logprobs - logprobs
    return ((d.exp() - d - 1) * loss_mask).sum()


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    minibatches: list[list[Episode]],
    micro_batch_cells: int,
    clip_high: float = CLIP_HIGH,
    kl_weight: float = 0.0,
) -> dict[str, float]:
    """One optimiser step per minibatch -> {key of LOG: value}; where all groups are flat, of no tokens.

    The loss of a minibatch is a mean over its tokens on all ranks: each rank's sum, divided by the global count.
    """
    if not minibatches:
        return {"tokens": 0.0}
    means = Means(("loss", "entropy", "clipped_low", "clipped_high", "kl"))
    largest_ratios, mismatches = [], []  # of the passes
    tokens_learned = 0.0
    grad_norms = []
    for minibatch in minibatches:
        first_step = not grad_norms
        tokens = global_sum(sum(episode.n_tokens for episode in minibatch))
        tokens_learned += tokens
        for micro_batch in micro_batches(minibatch, micro_batch_cells):
            batch = collate(
                policy, [episode.trajectory for episode in micro_batch], share_prompts=True
            )
            logprobs, entropy = token_logprobs(policy, batch, TEMPERATURE)  # (B, L - 1) each
            old = padded([episode.old_logprobs for episode in micro_batch]).to(policy.device)
            advantages = logprobs.new_tensor([episode.advantage for episode in micro_batch])  # (B,)
            active = logprobs.new_tensor([not episode.idle for episode in micro_batch])
            loss_mask = batch.loss_mask * active[:, None]
            count = loss_mask.sum()
            loss = grpo_loss(logprobs, old, advantages, loss_mask, clip_high)
            means.add("loss", loss.detach().double(), count)
            if kl_weight:
                start = padded([episode.start_logprobs for episode in micro_batch])
                start = start.to(policy.device)
                kl = kl_to_start(logprobs, start, loss_mask)
                means.add("kl", kl.detach().double(), count)
                loss = loss + kl_weight * kl
            (loss / tokens).backward()

            # for the log
            ratio = (logprobs.detach() - old).exp()
            stats = clip_stats(ratio, advantages, clip_high) | {"entropy": entropy}
            for key, values in stats.items():
                means.add(key, (values * loss_mask).sum().double(), count)
            largest_ratios.append((ratio * loss_mask).max())
            if first_step:
                difference = (logprobs.detach() - batch.logprobs).abs() * loss_mask
                mismatches.append(difference.max())
        sum_gradients(policy.model.parameters())  # of adapters, if any
        grad_norms.append(clip_gradients(policy.model.parameters(), MAX_GRAD_NORM))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return means.read() | {
        "tokens": tokens_learned,
        "ratio_max": global_max(torch.stack(largest_ratios).max()),
        "mismatch": global_max(torch.stack(mismatches).max()),
        "grad_norm": sum(grad_norms) / len(grad_norms),
    }


# ---- inputs and outputs ----------------------------------------------------------------------------------------------


def open_questions(args: Namespace, world: World) -> tuple[list[dict], list[dict]]:
    """The questions to learn from, and the held-out ones of an evaluation; a sentence where there are too few."""
    train = with_pictures(load_questions(args.data, "train", args.simulator))
    held_out = with_pictures(load_questions(args.data, "val", args.simulator))
    if not held_out:
        fail(f"No held-out question of {', '.join(args.data)} has pictures that can be read.")
    count = min(args.eval_questions, len(held_out))
    chosen = rows_of_step(len(held_out), count, 0, 0)  # of one step and seed: always the same ones
    held_out = [held_out[row] for row in chosen]
    if args.questions < world.size:
        fail(f"--questions {args.questions} leaves some of {world.size} ranks without a question.")
    if args.questions > len(train):
        fail(
            f"A step asks no question twice: {', '.join(args.data)} has {len(train)}, --questions asks for "
            f"{args.questions}."
        )
    return train, held_out


def load_questions(folders: list[str], split: str, simulator: str) -> list[dict]:
    """The questions of a split, "train" or "val", in all folders; each must fit the simulator."""
    files = [Path(folder, f"questions_{split}.jsonl") for folder in folders]
    names = " and ".join(map(str, files))
    questions = []
    for file in files:
        questions += load_jsonl(file, Question, rewards.name_gold, QUESTION_KEYS)
    if not questions:
        fail(f"{names} has no question.")
    for question in questions:
        if question["answer"] is None:
            fail(f"{names}: question {question.get('id')} has no gold answer to learn from.")
        if simulators.needs_room(simulator) and not question.get("scene"):
            fail(
                f"--simulator {simulator} works in rooms only; {names} has questions without a scene."
            )
    return questions


def view_options(args: Namespace) -> dict:
    """The flags that make imagined views cheaper than config.json has them, as fields of lib.bagel.Settings."""
    options = {"steps": args.view_steps, "taylor": args.view_taylor}
    return {key: value for key, value in options.items() if value}


def load_policy(args: Namespace, world: World) -> Policy:
    """--policy, ready to train on this rank: fp32 weights, those that only adapters change in bf16 on a GPU."""
    frozen_in_bf16 = args.lora and world.device.type == "cuda"
    dtype = torch.bfloat16 if frozen_in_bf16 else torch.float32
    return Policy.load(args.policy, world.device, dtype, partial(prepare, args=args, world=world))


def prepare(model: Qwen3VLForConditionalGeneration, args: Namespace, world: World) -> None:
    """Freeze the vision tower (paper), in bf16 on a GPU, and shard the rest; the model may still be on the meta device."""
    tower = model.model.visual
    tower.requires_grad_(False)
    adapters = []
    if args.lora:
        from extras.lora import QWEN_LAYERS, add_lora

        adapters = add_lora(model, QWEN_LAYERS, args.lora, args.seed, world.device)
    if world.device.type == "cuda":
        tower.to(torch.bfloat16)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    layers = model.model.language_model.layers
    shard(model, layers, world, ignored=[*tower.parameters(), *adapters])
    model.train()  # rollouts switch to eval and back


def save_policy(policy: Policy, out: Path, args: Namespace) -> None:
    """Write the finished policy, adapters added to the weights they stand beside."""
    tensors = None
    if args.lora:
        from extras.lora import merged

        tensors = merged(policy.model)
    with whole_folder(out) as part:
        policy.save(part, tensors)


# ---- what a step logs ------------------------------------------------------------------------------------------------

ROLLOUT_LOG = {  # means over rollouts, on all ranks: of a step, and of the greedy ones of an evaluation
    "reward": "r of the phase; of an evaluation always that of phase 1, without the gain",
    "match": "exact match e",
    "match_needs_view": "exact match, questions that need a view that is not given",
    "match_answerable": "exact match, questions that the given views answer",
    "format": "format reward f",
    "call_rate": "share of rollouts with a valid call",
    "call_rate_needs_view": "that share, questions that need a view that is not given",
    "call_rate_answerable": "that share, questions that the given views answer",
    "valid_calls": "valid calls",
    "invalid_calls": "malformed or impossible calls",
    "e_direct": "phase 2: exact match of the rollouts without the tool",
    "gain": "phase 2: tool-induced gain, over the rollouts that called",
    "length": "tokens of the policy",
    "truncated": "share of rollouts that ran out of tokens or turns",
}
LOG = ROLLOUT_LOG | {  # log.jsonl: one line per step, on all ranks
    "groups_flat": "share of groups with equal rewards, which have no signal and are left out",
    # over the tokens that the update learned from; their number alone where all groups are flat
    "tokens": "their number",
    "loss": "GRPO loss per token, without the KL term",
    "entropy": "of the next-token distribution, nats",
    "ratio_max": "largest new probability over old",
    "clipped_low": "share of tokens silenced by the clip: A < 0, and a ratio below 1 - 0.2 already",
    "clipped_high": "share of tokens silenced by the clip: A > 0, and a ratio above 1 + 0.28 already",
    "kl": "with --kl-weight: to the start policy, nats per token (k3 estimate)",
    "mismatch": "largest |rollout - training log-prob| before the first optimiser step",
    "grad_norm": "before clipping, mean over the optimiser steps",
    # of the step
    "lr": "learning rate",
    "seconds": "of sample (imagine included), imagine, score, advantage, logprob, update",
    "eval": "{mode: means over greedy rollouts of held-out questions, before this step}",
}


def rollout_means(groups: list[list[Episode]]) -> dict[str, float]:
    """What the rollouts of these groups did: {key of ROLLOUT_LOG: mean} (a collective)."""
    means = Means(ROLLOUT_LOG)
    for group in groups:
        for episode in group:
            for key, value in rollout_values(episode).items():
                means.add(key, value)
    return means.read()


def group_means(groups: list[list[Episode]]) -> dict[str, float]:
    """The share of groups that teach nothing (a collective)."""
    means = Means(("groups_flat",))
    for group in groups:
        means.add("groups_flat", not has_signal(group))
    return means.read()


def rollout_values(episode: Episode) -> dict[str, float]:
    """What one rollout adds to the means."""
    trajectory = episode.trajectory
    called = trajectory.valid_calls > 0
    values = {
        "reward": episode.reward,
        "match": episode.match,
        "format": episode.format,
        "call_rate": called,
        "valid_calls": trajectory.valid_calls,
        "invalid_calls": trajectory.invalid_calls,
        "length": sum(trajectory.loss_mask),
        "truncated": trajectory.truncated,
    }
    needs_view = trajectory.question.get("needs_view")
    if needs_view is not None:
        need = "needs_view" if needs_view else "answerable"
        values[f"match_{need}"] = episode.match
        values[f"call_rate_{need}"] = called
    if episode.match_direct is not None:
        values["e_direct"] = episode.match_direct
        if called:
            values["gain"] = rewards.tool_gain(
                episode.match, trajectory.valid_calls, episode.match_direct
            )
    return values


def clip_stats(ratio: Tensor, advantages: Tensor, clip_high: float) -> dict[str, Tensor]:
    """Per token (B, L - 1): does the clip silence it, which it does where A wants the ratio further out?"""
    advantages = advantages[:, None]
    return {
        "clipped_low": (advantages < 0) & (ratio < 1 - CLIP_LOW),
        "clipped_high": (advantages > 0) & (ratio > 1 + clip_high),
    }


def evaluate(
    policy: Policy,
    questions: list[dict],
    simulator,
    args: Namespace,
    world: World,
    folder: Path,
) -> dict[str, dict[str, float]]:
    """Greedy rollouts of held-out questions, with and without the tool -> {mode: means}; the first few are saved.

    Views are imagined with the same noise in every evaluation: all are drawn as if of step 0.
    """
    table = {}
    for mode in dict.fromkeys((args.mode, "direct")):
        mine = questions[world.rank :: world.size]
        rollouts = sample_groups(policy, mine, simulator, mode, args, 0, 1, temperature=0.0)
        means = rollout_means(reward_rollouts(rollouts, [], args))
        say(f"held out, {mode}: match {means['match']:.3f}, call rate {means['call_rate']:.2f}")
        table[mode] = means
        if mode == args.mode and is_main():
            for number, (trajectory,) in enumerate(rollouts[:SAVED_DIALOGUES]):
                trajectory.save(folder / str(number))
                trajectory.draw(folder / f"{number}.png")
    return table


if __name__ == "__main__":
    run_stage(main)
