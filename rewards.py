"""
Every reward, as pure functions of what a rollout did; and how an answer is read.

Astra rewards rollout i of question g in two phases (the weights are the paper's):

  phase 1, exploration and tool acquisition   r = e + lambda_fmt f + lambda_use min(n_tool, c)
  phase 2, selective imagination              r = (phase 1) + alpha max(0, Δ_i) - beta max(0, -Δ_i)
                                              Δ_i = e_i - e_g^direct

  e          exact match of the answer, 0 or 1
  f          format: every turn can be read, every call be obeyed, and the episode ends in an answer, 0 or 1
  n_tool     valid simulator calls, whether or not a server then fails; c = 1: the first earns the bonus, others nothing
  Δ_i        tool-induced gain: what imagining changed against answering the same question directly

Ours, where the paper is silent: e_g^direct is the mean exact match of a few no-tool rollouts of the same question by
the current policy, and Δ_i = 0 for a rollout that used no tool, since no tool induced anything.
"""

import contextlib
import re
from collections.abc import Sequence

import torch

LAMBDA_FMT = 0.5  # worth of a dialogue in good form, half a right answer
LAMBDA_USE = 0.02  # worth of looking at all
CALL_CAP = 1  # c: calls that are paid
ALPHA = 0.1  # gain of imagining where answering directly fails
BETA = 0.03  # price of imagining where answering directly succeeds


def exact_match(answer: str | None, question: dict) -> float:
    """e: 1.0 if the answer names the right option, else 0.0. It is the reward's term and the accuracy of an evaluation.

    answer     what stood between <answer> and </answer>, or None: "B", "b", "B." and "B. red box" all name option B,
               and so do its words alone ("red box"); a letter in front wins, whatever words follow
    question   {"answer": gold letter, "options": ["A. …", …]}; without options the whole answers are compared, case
               and outer spaces aside, or as numbers where "kind" is "na"
    """
    if answer is None or question["answer"] is None:
        return 0.0
    if question.get("options"):
        return float(option_letter(answer, question["options"]) == question["answer"])
    text, gold = answer.strip().lower(), question["answer"].strip().lower()
    if question.get("kind") == "na":
        with contextlib.suppress(ValueError):  # what is no number is compared as text
            return float(float(text) == float(gold))
    return float(text == gold)


def option_letter(text: str, options: list[str]) -> str | None:
    """The letter of the option that an answer names, or None: "B", "b", "(B)", "B: red box" or its words, "red box".

    options   each "B. red box"; one without ". " has no letter: it is named by all its text, which is what comes back
    """
    text = text.strip()
    for cased in (str, str.lower):  # as it is written, then in any case
        names = {}
        for option in options:  # the letter "A", or all of "A. red box"
            letter = option.partition(". ")[0]
            names |= {cased(letter): letter, cased(option): letter}
        for option in options:
            letter, _, words = option.partition(". ")
            names.setdefault(cased(words or option), letter)
        if cased(text) in names:
            return names[cased(text)]
    match = re.fullmatch(r"\**\(?([A-Za-z])\**(?:[.):].*)?", text, re.DOTALL)  # "**B**" too
    return match[1].upper() if match else None


def name_gold(question: dict) -> None:
    """The gold answer of a row as its option's letter: "b", "(B)", "B. blue ball" and "blue ball" become "B".

    Raises ValueError, the rest of a sentence, where it names no option or more than one, as a number may that counts
    from 0 or from 1: it would be worth 0 to every policy. Without options a number becomes text.
    """
    answer, options = question.get("answer"), question.get("options") or []
    letters = [option.partition(". ")[0] for option in options]
    text = str(answer).strip().lower()
    if answer is None or answer in letters:
        return
    if not options:
        question["answer"] = text.removesuffix(".0") if not isinstance(answer, str) else answer
        return
    # "b)" and "(b) blue ball" as options are written
    spelt = re.sub(r"^\(?(\w)[).:]\s*", r"\1. ", text).removesuffix(". ")
    named = set()
    for index, (letter, option) in enumerate(zip(letters, options, strict=True)):
        words = option.partition(". ")[2].lower()
        if {text, spelt} & {letter.lower(), words, option.lower()}:
            named.add(letter)
        # 0 can only count from 0, the number of options only from 1
        if answer == index == 0 or answer == index + 1 == len(options):
            named.add(letter)
    if len(named) != 1:
        raise ValueError(
            f"has the answer {answer!r}, which names {len(named)} of the options {options}"
        )
    question["answer"] = named.pop()


def format_reward(trajectory) -> float:
    """f: 1.0 if every turn could be read, every call be obeyed (an Image-9 of four cannot), and an answer ends it."""
    return float(trajectory.well_formed)


def phase1_reward(
    match: float, well_formed: float, n_tool: int, lambda_use: float = LAMBDA_USE
) -> float:
    """r = e + lambda_fmt f + lambda_use min(n_tool, c): learn the protocol and try the simulator."""
    return match + LAMBDA_FMT * well_formed + lambda_use * min(n_tool, CALL_CAP)


def tool_gain(match: float, n_tool: int, match_direct: float) -> float:
    """Δ_i = e_i - e_g^direct in [-1, 1]; 0 for a rollout without a valid call (ours)."""
    return match - match_direct if n_tool > 0 else 0.0


def phase2_reward(
    match: float,
    well_formed: float,
    n_tool: int,
    match_direct: float,
    lambda_use: float = LAMBDA_USE,
) -> float:
    """Phase 1 plus alpha max(0, Δ) - beta max(0, -Δ): imagine where it helps.

    The paper's overview figure prints the last term without its inner minus; the formula in its text is this one.
    """
    gain = tool_gain(match, n_tool, match_direct)
    return (
        phase1_reward(match, well_formed, n_tool, lambda_use)
        + ALPHA * max(0.0, gain)
        - BETA * max(0.0, -gain)
    )


def group_advantages(
    rewards: Sequence[float], group_size: int, divide_by_std: bool = True
) -> torch.Tensor:
    """Compare each rollout with the other rollouts of the same question (GRPO).

    rewards         (Q * G,), question-major: the G rollouts of one question are neighbours
    divide_by_std   divide by the group's standard deviation (over G - 1) plus 1e-6. This makes a bonus of 0.02 as loud
                    as a right answer wherever all answers of a group agree; without it A is just the difference
    returns         (Q * G,) float32; mean zero in each group, exactly zero where all rewards of a group are equal
    raises          ValueError if the rewards do not fill whole groups of at least two
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    if group_size < 2 or rewards.numel() % group_size:
        raise ValueError(
            f"{rewards.numel()} rewards do not fill groups of {group_size}: every question needs the same "
            f"number of rollouts, two or more."
        )
    groups = rewards.view(-1, group_size)  # (Q, G)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if divide_by_std:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-6)  # ddof 1
    has_signal = groups.amax(dim=1) - groups.amin(dim=1) > 1e-9  # beyond the rounding of sums
    advantages = advantages * has_signal[:, None]
    return advantages.flatten().float()
