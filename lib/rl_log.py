"""
What train_rl.py writes down: every key of its log.jsonl, and the curves drawn from it.
"""

from collections import defaultdict

import numpy as np

import rewards
from extras.world2vlm.rewards import SCORES
from lib import common
from lib.common import total
from lib.images import figure_image, save_image

PARTS = (
    "total",
    "format",
    "action",
    "order",
    "numeric",
    "accuracy",
    "validity",
    "geometry",
    "iou",
    "center",
    "size",
    "l1",
)  # of extras.world2vlm.rewards, each task has some

LOG = {  # log.jsonl: one line per step; means over all rollouts of the step, on all ranks, unless said otherwise
    "reward": "mean reward",
    "match": "exact match e (World2VLM: the total); also match_needs_view and match_answerable, where the data knows",
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
    "loss": "GRPO loss per token, without the KL term; from here to kl: over the tokens learned from",
    "entropy": "of the next-token distribution, nats",
    "ratio": "new probability over old, mean over tokens; above and below 1 cancel",
    "ratio_max": "its largest value",
    "clipped_low": "share of tokens silenced by the clip: bad ones whose ratio is below 1 - 0.2 already",
    "clipped_high": "and good ones whose ratio is above 1 + --clip-high already",
    "kl": "to the start policy, nats per token (k3 estimate); with --kl 0 only at evaluations",
    "mismatch": "largest |rollout - training log-prob| before the first optimiser step",
    "grad_norm": "before clipping, mean over the optimiser steps",
    "lr": "learning rate",
    "seconds": "of sample (imagine included), imagine, score, advantage, logprob, update",
    "A1_total": "World2VLM: mean total of this task's questions; so for A1 to D4, and each part (A1_numeric, ...)",
    "eval": "held-out questions, greedy, after `step` steps: {mode: {accuracy, call_rate, each also by need}}",
}


def by_need(name, rows, value):
    """Totals of value(row) under name, name_needs_view and name_answerable, the latter two where the data knows."""
    need = [row.trajectory.question.get("needs_view") for row in rows]
    return {
        name: total([value(row) for row in rows]),
        f"{name}_needs_view": total(
            [value(row) for row, needs in zip(rows, need) if needs is True]
        ),
        f"{name}_answerable": total(
            [value(row) for row, needs in zip(rows, need) if needs is False]
        ),
    }


def by_task(rows):
    """Totals of the parts of World2VLM's reward, per task; nothing where the rows have no parts."""
    return {
        f"{task}_{part}": total(
            [
                row.parts[part]
                for row in rows
                if row.trajectory.question["category"] == task and part in row.parts
            ]
        )
        for task in SCORES
        for part in PARTS
        if rows[0].parts
    }


def rollout_totals(rows, group):
    """What this rank's rollouts did: {key of LOG: (sum, count)}."""
    groups = [rows[i : i + group] for i in range(0, len(rows), group)]
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
        "gain": total(
            [row.match - row.match_direct for row in against_direct if row.trajectory.valid_calls]
        ),
        "length": total([sum(t.loss_mask) for t in trajectories]),
        "turns": total([len(t.turns) for t in trajectories]),
        "truncated": total([t.truncated for t in trajectories]),
        **by_task(rows),
        "groups_flat": total(flat),
        "groups_bonus": total(
            [not equal and len({row.match for row in g}) == 1 for equal, g in zip(flat, groups)]
        ),
    }


def draw_curves(out):
    """curves.png from log.jsonl: rewards, calls and distances in training, accuracy and calls in evaluation."""
    panels = {
        "rewards": ("reward", "match", "match_direct", "format"),
        "policy": ("entropy", "kl", "clipped_low", "clipped_high", "gain"),
        "calls": ("call_rate", "call_rate_needs_view", "call_rate_answerable", "invalid_calls"),
        "held out, greedy": (
            "agentic accuracy",
            "agentic accuracy_needs_view",
            "direct accuracy",
            "agentic call_rate",
        ),
    }
    curves = defaultdict(list)
    for row in common.read_log(out / "log.jsonl"):
        held_out = {
            f"{mode} {key}": v
            for mode, means in row.get("eval", {}).items()
            for key, v in means.items()
        }
        for key, value in {**row, **held_out}.items():
            if isinstance(value, float):
                curves[key].append((row["step"], value))

    def draw(pyplot):
        """A panel per title, a line per key that the log has."""
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(4.2 * len(panels), 3.4), layout="constrained"
        )
        for axis, (title, keys) in zip(axes, panels.items()):
            for key in filter(curves.get, keys):
                axis.plot(
                    *zip(*curves[key]), label=key, marker="." if len(curves[key]) < 20 else None
                )
            axis.set(title=title, xlabel="step")
            if axis.lines:
                axis.legend(fontsize=7)
        return figure

    image = figure_image(draw)
    if not image:
        return common.say(
            "No curves.png without matplotlib (pip install matplotlib); log.jsonl has the numbers."
        )
    save_image(out / "curves.png", np.array(image))
