"""
One GRPO step by hand: the numbers of docs/one-step.md, out of dialogues recorded in tests/data/one_step.

  python -m docs.one_step            print the tables
  python -m docs.one_step --write    put them into docs/one-step.md, each below its mark
  python -m docs.one_step --record   hold the dialogues anew with the policy of phase 1 and the simulator in out/demo
                                     (`make demo`), then write the tables: a minute

The arithmetic stands first and is numpy alone. rewards.py and train_rl.py do the same with torch, for many questions on
many GPUs; nothing here asks them, and tests/test_one_step.py holds the two against each other. Changed the reward? Change
`score_by_hand` too, write the tables, then `pytest tests/test_one_step.py`.

Recorded: rollout_1 ... rollout_8 and direct_1 ... direct_4, as `Trajectory.save` writes them, and recording.json.
G rollouts of a group; L tokens of a dialogue, of which the policy wrote n.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.dialogue import Trajectory
from lib.distributed import fail, say
from lib.images import load_image
from lib.records import write_text
from lib.scores import text_table
from lib.stage import run_stage

PAGE = Path(__file__).with_name("one-step.md")
RECORDING = Path(__file__).parents[1] / "tests" / "data" / "one_step"

# ---- by hand ---------------------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """What the rollouts of one question earned, (G,) each but e_direct."""

    e: np.ndarray  # 1 where the answer is right
    f: np.ndarray  # 1 where all is well formed
    n_tool: np.ndarray  # valid calls
    e_direct: float  # mean e of the rollouts without the tool
    gain: np.ndarray  # Δ
    reward: np.ndarray  # r


def is_right(rollout: Trajectory) -> bool:
    """Does the answer name the right option, by its letter or its words?"""
    letter = rollout.question["answer"]
    words = [text[3:] for text in rollout.question["options"] if text.startswith(f"{letter}. ")]
    return (rollout.answer or "").lower() in (letter.lower(), words[0].lower())


def score_by_hand(rollouts: list[Trajectory], direct: list[Trajectory]) -> Scores:
    """From what happened to the reward of phase 2."""
    e = np.array([is_right(t) for t in rollouts], float)
    answered = np.array([t.answer is not None for t in rollouts])
    refused = np.array([t.invalid_calls + t.unreadable for t in rollouts])
    f = (answered & (refused == 0)).astype(float)
    n_tool = np.array([t.valid_calls for t in rollouts])
    e_direct = float(np.mean([is_right(t) for t in direct]))
    gain = np.where(n_tool > 0, e - e_direct, 0.0)
    phase1 = e + 0.5 * f + 0.02 * np.minimum(n_tool, 1)
    reward = phase1 + 0.1 * np.maximum(0, gain) - 0.03 * np.maximum(0, -gain)
    return Scores(e, f, n_tool, e_direct, gain, reward)


def advantages_by_hand(reward: np.ndarray) -> np.ndarray:
    """A (G,): how far each reward lies above the group's mean, in standard deviations of the group."""
    if np.ptp(reward) < 1e-9:
        return np.zeros(len(reward))
    return (reward - reward.mean()) / (reward.std(ddof=1) + 1e-6)


def ratios_by_hand(rollout: Trajectory, new_logprobs: list[float]) -> np.ndarray:
    """New probability over old of what the policy wrote (n,)."""
    own = np.array(rollout.loss_mask) == 1
    return np.exp(np.array(new_logprobs)[own] - np.array(rollout.logprobs)[own])


def surrogate_by_hand(ratio: np.ndarray, advantage: float, high: float = 0.28) -> np.ndarray:
    """What each token brings to the objective (n,): the smaller of ratio A and clipped ratio A."""
    return np.minimum(ratio * advantage, np.clip(ratio, 1 - 0.2, 1 + high) * advantage)


def loss_by_hand(ratios: list[np.ndarray], advantages: np.ndarray) -> float:
    """Minus the mean of the surrogate over all tokens of the group."""
    pairs = zip(ratios, advantages, strict=True)
    surrogates = [surrogate_by_hand(ratio, advantage) for ratio, advantage in pairs]
    return -float(np.concatenate(surrogates).mean())


# ---- the recording ---------------------------------------------------------------------------------------------------


class Recording(NamedTuple):
    """One question of one step."""

    rollouts: list[Trajectory]  # G, with the tool
    direct: list[Trajectory]  # K, without it
    new_logprobs: list[list[float]]  # per rollout (L,), 0 on what the policy did not write
    tokens: list[list[str]]  # per rollout (L,): every token as text
    updates: int  # optimiser steps from the old log-probs to the new ones

    @property
    def example(self) -> int:
        """The rollout that the page follows: the first one that is right after a call, and well formed."""
        for index, t in enumerate(self.rollouts):
            if t.valid_calls and t.well_formed and is_right(t):
                return index
        raise ValueError("no rollout of the recording is right after a call")

    def scores(self) -> Scores:
        """Of its group."""
        return score_by_hand(self.rollouts, self.direct)

    def advantages(self) -> np.ndarray:
        """Of its group (G,)."""
        return advantages_by_hand(self.scores().reward)

    def ratios(self) -> list[np.ndarray]:
        """Per rollout (n,)."""
        pairs = zip(self.rollouts, self.new_logprobs, strict=True)
        return [ratios_by_hand(t, new_logprobs) for t, new_logprobs in pairs]


def load_dialogue(folder: Path) -> Trajectory:
    """The dialogue that `Trajectory.save` wrote, ready for `policy.collate`."""
    record = json.loads((folder / "dialogue.json").read_text())
    record["stream"] = tuple(record["stream"])
    record["positions"] = [tuple(position) for position in record["positions"]]
    numbers = range(1, len(record["provenance"]) + 1)
    return Trajectory(**record, images=[load_image(folder / f"image_{n}.png") for n in numbers])


def load_recording(folder: Path = RECORDING) -> Recording:
    """What `record` wrote."""
    dialogues = {}
    for kind in ("rollout", "direct"):
        count = len(list(folder.glob(f"{kind}_*")))
        dialogues[kind] = [load_dialogue(folder / f"{kind}_{i + 1}") for i in range(count)]
    more = json.loads((folder / "recording.json").read_text())
    return Recording(dialogues["rollout"], dialogues["direct"], **more)


# ---- tables ----------------------------------------------------------------------------------------------------------


def question_table(r: Recording) -> str:
    """The question, and below it what the policy is not told."""
    question = r.rollouts[0].question
    need = "is" if question["needs_view"] else "is not"
    hidden = f"right answer {question['answer']}; a view that is not given {need} needed"
    return "\n".join([question["question"], *question["options"], f"({hidden})"]) + "\n"


def on_one_line(text: str, width: int = 46) -> str:
    """A token's text in quotes, a long one without its middle."""
    text = json.dumps(text, ensure_ascii=False)
    half = width // 2 - 2
    return text if len(text) <= width else f"{text[:half]} … {text[-half:]}"


def tokens_table(r: Recording) -> str:
    """The example, token by token."""
    t = r.rollouts[r.example]
    rows = []
    for j, token in enumerate(t.ids):
        logprob = f"{t.logprobs[j]:.4f}" if t.loss_mask[j] else None
        text = on_one_line(r.tokens[r.example][j])
        rows.append([text, j, token, t.loss_mask[j], *t.positions[j], logprob])
    head = ["text", "token", "id", "mask", "time", "row", "column", "log-prob"]
    return text_table(head, rows)


def deeds(t: Trajectory) -> str:
    """What a rollout did, in the words of the protocol's replies."""
    steps = [reply.strip() for reply, _ in t.replies]
    steps.append("no answer" if t.answer is None else f"answer: {t.answer}")
    return " ".join(steps)


def rollouts_table(r: Recording) -> str:
    """The group in short."""
    lines = [f"rollout {i}   {deeds(t)}" for i, t in enumerate(r.rollouts, 1)]
    lines += [f"direct {i}    {deeds(t)}" for i, t in enumerate(r.direct, 1)]
    return "\n".join(lines) + "\n"


def rewards_table(r: Recording) -> str:
    """From what happened to the reward."""
    s = r.scores()
    rows = []
    for i, reward in enumerate(s.reward):
        flags = [int(s.e[i]), int(s.f[i]), int(s.n_tool[i])]
        rows.append([f"rollout {i + 1}", *flags, f"{s.gain[i]:+.2f}", f"{reward:.4f}"])
    matches = ", ".join(str(int(is_right(t))) for t in r.direct)
    below = f"e_direct = mean of {matches} = {s.e_direct:.2f}\n"
    return text_table(["", "e", "f", "n_tool", "Δ", "r"], rows) + below


def advantages_table(r: Recording) -> str:
    """From the rewards to the advantages."""
    reward = r.scores().reward
    rows = []
    for i, advantage in enumerate(r.advantages()):
        difference = f"{reward[i] - reward.mean():+.4f}"
        rows.append([f"rollout {i + 1}", f"{reward[i]:.4f}", difference, f"{advantage:+.4f}"])
    below = f"mean {reward.mean():.4f}, deviation {reward.std(ddof=1):.4f}\n"
    return text_table(["", "r", "r - mean", "A"], rows) + below


GROUPS = {  # the two rewards of groups that we made up; four rollouts have the one, four the other
    "all wrong, no call": (0.5, 0.5),
    "all right, no call": (1.5, 1.5),
    "half right, no call": (1.5, 0.5),
    "all right, half call": (1.52, 1.5),
    "all wrong, half call": (0.52, 0.5),
}


def groups_table(r: Recording) -> str:
    """What the division by the deviation does to groups of phase 1."""
    rows = []
    for name, (first, last) in GROUPS.items():
        reward = np.array([first] * 4 + [last] * 4)
        difference = f"{first - reward.mean():+.2f}"
        advantage = f"{advantages_by_hand(reward)[0]:+.2f}"
        rows.append([name, f"4 x {first:.2f}, 4 x {last:.2f}", difference, advantage])
    return text_table(["", "rewards", "r - mean of the first", "its A"], rows)


def ratios_table(r: Recording) -> str:
    """What the policy wrote in the example, before the update and after it."""
    t = r.rollouts[r.example]
    advantage = r.advantages()[r.example]
    ratio = r.ratios()[r.example]
    surrogate = surrogate_by_hand(ratio, advantage)
    rows = []
    for k, j in enumerate(np.flatnonzero(t.loss_mask)):
        old = np.exp(t.logprobs[j])
        new = np.exp(r.new_logprobs[r.example][j])
        clipped = np.clip(ratio[k], 1 - 0.2, 1 + 0.28)
        numbers = [f"{number:.4f}" for number in (old, new, ratio[k], clipped, surrogate[k])]
        rows.append([on_one_line(r.tokens[r.example][j]), int(j), *numbers])
    head = ["text", "token", "old p", "new p", "ratio", "clipped", "surrogate"]
    return text_table(head, rows) + f"A = {advantage:+.4f}\n"


def risen_token(r: Recording) -> tuple[int, int]:
    """(rollout, token) of the token that rose most among those of a positive advantage."""
    largest, where = 0.0, None
    for i, (advantage, ratio) in enumerate(zip(r.advantages(), r.ratios(), strict=True)):
        if advantage > 0 and ratio.max() > largest:
            largest = ratio.max()
            own = np.flatnonzero(r.rollouts[i].loss_mask)
            where = (i, int(own[ratio.argmax()]))
    return where


def clip_table(r: Recording) -> str:
    """That token under a clip at 1.2 and under one at 1.28: does the loss still want it to rise?"""
    i, j = risen_token(r)
    advantage = r.advantages()[i]
    old = np.exp(r.rollouts[i].logprobs[j])
    ratio_after = np.exp(r.new_logprobs[i][j]) / old
    rows = []
    for name, ratio in (
        ("before the update", 1.0),
        ("below both clips", 1.1),
        ("between them", 1.24),
        (f"after {r.updates} updates", ratio_after),
    ):
        cells = [name, f"{ratio * old:.4f}", f"{ratio:.3f}"]
        for high in (0.2, 0.28):
            surrogate = surrogate_by_hand(ratio, advantage, high)
            cells += [f"{surrogate:.4f}", "up" if ratio < 1 + high else None]
        rows.append(cells)
    head = ["", "p", "ratio", "clipped at 1.2", "push", "clipped at 1.28", "push"]
    text = on_one_line(r.tokens[i][j])
    title = f"token {j} of rollout {i + 1}, {text}, A = {advantage:+.4f}\n"
    return title + text_table(head, rows)


def is_silent(ratio: np.ndarray, advantage: float) -> np.ndarray:
    """Where the clip leaves no gradient (n,): A wants the ratio further out than it is allowed."""
    return (ratio > 1.28) & (advantage > 0) | (ratio < 0.8) & (advantage < 0)


def loss_table(r: Recording) -> str:
    """From the tokens to the loss: before the update, where every ratio is 1, and after it."""
    advantages = r.advantages()
    ratios = r.ratios()
    rows = []
    for i, (ratio, advantage) in enumerate(zip(ratios, advantages, strict=True), 1):
        before = f"{len(ratio) * advantage:+.4f}"
        after = f"{surrogate_by_hand(ratio, advantage).sum():+.4f}"
        silent = int(is_silent(ratio, advantage).sum())
        rows.append([f"rollout {i}", f"{advantage:+.4f}", len(ratio), before, after, silent])
    tokens = sum(map(len, ratios))
    losses = []
    for ratio in ([np.ones_like(ratio) for ratio in ratios], ratios):
        losses.append(loss_by_hand(ratio, advantages))
    sums = [f"{-loss * tokens:+.4f}" for loss in losses]
    rows.append(["sum", None, tokens, *sums, sum(row[-1] for row in rows)])
    losses = [f"{loss:+.6f}" for loss in losses]
    rows.append([f"loss = -sum / {tokens}", None, None, *losses, None])
    return text_table(["", "A", "tokens", "before", "after", "silent"], rows)


TABLES = {
    "question": question_table,
    "tokens": tokens_table,
    "rollouts": rollouts_table,
    "rewards": rewards_table,
    "advantages": advantages_table,
    "groups": groups_table,
    "ratios": ratios_table,
    "clip": clip_table,
    "loss": loss_table,
}


def with_tables(page: str, r: Recording) -> str:
    """A page with each table in the block below its mark, such as <!-- rewards -->."""
    for name, table in TABLES.items():
        before, mark, after = page.partition(f"<!-- {name} -->\n```\n")
        if not mark:
            raise ValueError(f"the page has no block below a mark <!-- {name} -->")
        _, end, rest = after.partition("```\n")
        page = before + mark + table(r) + end + rest
    return page


# ---- record ----------------------------------------------------------------------------------------------------------

DEMO = "out/demo"
SEARCHED_STEPS = 30  # of 16 questions each
MOST_UPDATES = 20


def group_disagrees(rollouts: list[Trajectory], direct: list[Trajectory]) -> bool:
    """The rule that chooses the question: every term of the reward must count.

    Some rollouts call and some do not, and of each kind some are right and some wrong; one is not well formed; direct
    answers are right and wrong too.
    """
    s = score_by_hand(rollouts, direct)
    kinds = set(zip(s.n_tool > 0, s.e, strict=True))
    return len(kinds) == 4 and s.f.min() == 0 and 0 < s.e_direct < 1


def clip_acts(r: Recording) -> bool:
    """Whether the clip silences a token that rose and one that fell."""
    sides = set()
    for advantage, ratio in zip(r.advantages(), r.ratios(), strict=True):
        if is_silent(ratio, advantage).any():
            sides.add(advantage > 0)
    return len(sides) == 2


def choose_group(policy, simulator, questions: list[dict], args) -> tuple[list, list]:
    """The first group that disagrees, in the order in which phase 2 asks -> rollouts and direct rollouts."""
    import train_rl
    from lib.streams import rows_of_step

    def groups(asked, mode, step, size):
        temperature = train_rl.TEMPERATURE
        return train_rl.sample_groups(policy, asked, simulator, mode, args, step, size, temperature)

    for step in range(SEARCHED_STEPS):
        order = rows_of_step(len(questions), args.questions, step, args.seed)
        asked = [questions[row] for row in order]
        rollouts = groups(asked, "agentic", step, args.group)
        direct = groups(asked, "direct", step, args.direct_rollouts)
        for pair in zip(rollouts, direct, strict=True):
            if group_disagrees(*pair):
                return pair
    fail(
        f"Of {SEARCHED_STEPS * args.questions} questions none has a group that disagrees as the page needs it. The "
        f"policy in {args.policy} may have learned too little: `make demo` trains one."
    )


def updated_logprobs(policy, rollouts: list, direct: list, args) -> Recording:
    """Let the trainer take optimiser steps on this group alone until the clip acts on both sides."""
    import torch

    import train_rl
    from policy import collate, token_logprobs

    groups = train_rl.reward_rollouts([rollouts], [direct], args)
    train_rl.set_advantages(groups, args.divide_by_std)
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, args.lr, train_rl.BETAS, weight_decay=0.0)
    tokens = [[policy.tokenizer.decode([token]) for token in t.ids] for t in rollouts]
    for updates in range(1, MOST_UPDATES + 1):
        train_rl.update(policy, optimizer, groups, args.micro_batch_cells)
        new_logprobs = []
        for t in rollouts:
            with torch.no_grad():
                batch = collate(policy, [t])
                logprobs, _ = token_logprobs(policy, batch, train_rl.TEMPERATURE)
            new_logprobs.append([0.0, *logprobs[0].tolist()])
        recording = Recording(rollouts, direct, new_logprobs, tokens, updates)
        if clip_acts(recording):
            return recording
    fail(f"After {MOST_UPDATES} updates the clip silences no token yet.")


def record(folder: Path = RECORDING) -> None:
    """Let the trainer's own functions hold the dialogues and update the policy; save what the arithmetic needs."""

    import train_rl
    from lib.distributed import setup
    from lib.simulators import load_simulator
    from lib.stage import need

    flags = f"--phase 2 --policy {DEMO}/phase1 --wm {DEMO}/wm --data {DEMO}/data"
    args = train_rl.parse_args(flags.split())
    for path in (args.policy, args.wm, *args.data):
        need(path, "make demo")
    world = setup(1)
    questions = train_rl.load_questions(args.data, "train", args.simulator)
    simulator = load_simulator(args.simulator, world.device, args.wm)
    policy = train_rl.load_policy(args, world)
    rollouts, direct = choose_group(policy, simulator, questions, args)
    r = updated_logprobs(policy, rollouts, direct, args)

    shutil.rmtree(folder, ignore_errors=True)
    for i, t in enumerate(r.rollouts, 1):
        t.save(folder / f"rollout_{i}")
    for i, t in enumerate(r.direct, 1):
        t.save(folder / f"direct_{i}")
    more = {"new_logprobs": r.new_logprobs, "tokens": r.tokens, "updates": r.updates}
    write_text(folder / "recording.json", json.dumps(more) + "\n")
    r.rollouts[r.example].draw(PAGE.with_suffix(".png"))
    say(f"{folder}: {r.rollouts[0].question['id']}, after {r.updates} updates")


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's flags."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--write", action="store_true", help="the tables into docs/one-step.md")
    parser.add_argument("--record", action="store_true", help="the dialogues anew, then --write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Print the tables, or renew them."""
    args = parse_args(argv)
    if args.record:
        record()
    r = load_recording()
    if args.record or args.write:
        write_text(PAGE, with_tables(PAGE.read_text(), r))
    else:
        for name, table in TABLES.items():
            print(f"---- {name}\n{table(r)}")


if __name__ == "__main__":
    run_stage(main)
