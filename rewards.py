"""
Every reward, as pure functions of what a rollout did: Astra's, and below them World2VLM's (`world2vlm`).

Astra rewards rollout i of question g in two phases (the weights are the paper's):

  phase 1, exploration and tool acquisition   r = e + lambda_fmt f + lambda_use min(n_tool, c)
  phase 2, selective imagination              r = (phase 1) + alpha max(0, D_i) - beta max(0, -D_i)
                                              D_i = e_i - e_g^direct

  e          exact match of the answer, 0 or 1
  f          format: every turn can be read, every call be obeyed, and the episode ends in an answer, 0 or 1
  n_tool     valid simulator calls, whether or not a server then fails; c = 1: the first earns the bonus, others nothing
  D_i        tool-induced gain: what imagining changed against answering the same question directly

Ours, where the paper is silent: e_g^direct is the mean exact match of a few no-tool rollouts of the same question by
the current policy, and D_i = 0 for a rollout that used no tool, since no tool induced anything.
"""

import math

import torch

from extras.benches.rules import option_letter
from extras.world2vlm.words import read_actions, read_box, read_truth

LAMBDA_FMT = 0.5  # worth of a dialogue in good form, half a right answer
LAMBDA_USE = 0.02  # worth of looking at all
CALL_CAP = 1  # c: calls that are paid
ALPHA = 0.1  # gain of imagining where answering directly fails
BETA = 0.03  # price of imagining where answering directly succeeds


def exact_match(answer, question):
    """e: 1.0 if the answer names the right option, else 0.0.

    answer     what stood between <answer> and </answer>, or None: "B", "b", "B." and "B. red box" all name option B,
               and so do its words alone ("red box")
    question   {"answer": gold letter, "options": ["A. …", …]}; without options the whole answers are compared, case
               and outer spaces aside
    """
    if answer is None:
        return 0.0
    if question.get("options"):
        return float(option_letter(answer, question["options"]) == question["answer"])
    return float(answer.strip().lower() == question["answer"].strip().lower())


def format_reward(trajectory):
    """f: 1.0 if every turn could be read, every call be obeyed (an Image-9 of four cannot), and an answer ends it."""
    return float(trajectory.well_formed)


def phase1_reward(match, form, n_tool, lambda_use=LAMBDA_USE):
    """r = e + lambda_fmt f + lambda_use min(n_tool, c): learn the protocol and try the simulator."""
    return match + LAMBDA_FMT * form + lambda_use * min(n_tool, CALL_CAP)


def tool_gain(match, n_tool, match_direct):
    """D_i = e_i - e_g^direct in [-1, 1]; 0 for a rollout without a valid call (ours)."""
    return match - match_direct if n_tool > 0 else 0.0


def phase2_reward(match, form, n_tool, match_direct, lambda_use=LAMBDA_USE, alpha=ALPHA, beta=BETA):
    """Phase 1 plus alpha max(0, D) - beta max(0, -D): imagine where it helps.

    The paper's overview figure prints the last term without its inner minus; the formula in its text is this one.
    """
    gain = tool_gain(match, n_tool, match_direct)
    return (
        phase1_reward(match, form, n_tool, lambda_use)
        + alpha * max(0.0, gain)
        - beta * max(0.0, -gain)
    )


def group_advantages(rewards, group_size, divide_by_std=True, eps=1e-6):
    """Compare each rollout with the other rollouts of the same question (GRPO).

    rewards         (Q * G,), question-major: the G rollouts of one question are neighbours
    divide_by_std   divide by the group's standard deviation (over G - 1) plus eps. This makes a bonus of 0.02 as loud
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
        advantages = advantages / (groups.std(dim=1, keepdim=True) + eps)  # ddof 1
    advantages = advantages * varied(rewards, group_size)[:, None]
    return advantages.flatten().float()


def varied(rewards, group_size, tolerance=1e-9):
    """(Q,) bool: groups with something to learn from, i.e. whose rewards are not all equal (up to rounding of sums)."""
    groups = torch.as_tensor(rewards, dtype=torch.float64).view(-1, group_size)
    return groups.amax(dim=1) - groups.amin(dim=1) > tolerance


# ---- World2VLM: what an answer about a camera motion is worth -------------------------------------------------------

MAX_LENGTH, TOO_LONG = 200, -1.0  # characters; -1 is the released code's, "the minimum" the paper's
TOLERANCE = {
    "move": (0.5, 5.0),
    "turn": (5.0, 90.0),
}  # full marks up to the first, none from the second on
EXTRA_ACTION = 0.03  # the fee per action too many
FULL = 1 - 1e-6  # a total above it is 1 up to rounding


def world2vlm(task, answer, response):
    """Score a response to one of the tasks A1-A4, D1-D4 (arXiv 2604.26934, Stage II) by the paper's equations.

    answer     the reference, as extras/world2vlm/words.py writes it: "move left 0.5 meters; turn left 20 degrees", "true",
               "[48, 558, 226, 681]"
    response   what stands between <answer> and </answer>, thoughts are free (ours); None for nothing. Whatever
               it is, it raises nothing
    returns    {"total", "format", and
                 A1, A2: "action", "numeric";  A3, D3: "action", "order", "numeric";  A4, D2, D4: "accuracy";
                 D1: "validity", "geometry", "iou", "center", "size", "l1"}
               all in [0, 1], but total is -1 (and the parts 0) where the response is longer than 200 characters
    raises     ValueError for an unknown task, or a reference without action or box

    Where the released code differs from the paper we follow the paper:
      length        of the response as it comes; released: without outer white space (which our dialogues cut off, too)
      box corners   put in order and into the picture first, then judged; released: the corners as written, so that an
                    exact box with swapped corners earns 0.58 instead of 1
      exact box     "[a, b, c, d]" alone; released: also with the word bbox before it
      size, centre  as defined; released: sides count as at least 1, so that a box without width has a size
      yes or no     format looks at the response alone; released: a reference that is neither earns 0 for everything
    As in the released code: minus signs, decimals in boxes and "meter" are read, the first box counts, and an action
    counts wherever it stands ("remove forward 2 meters").
    """
    if task not in SCORES:
        raise ValueError(f"there is no task {task!r}; the tasks are: {', '.join(SCORES)}")
    response = response or ""
    if len(response) > MAX_LENGTH:
        return dict.fromkeys(SCORES[task](answer, ""), 0.0) | {"total": TOO_LONG}
    return SCORES[task](answer, response)


def numeric(kind, value, true):
    """s(v, v*): 1 within the first tolerance, 0 beyond the second, a straight line between. Angles do not wrap."""
    low, high = TOLERANCE[kind.split()[0]]
    return min(1.0, max(0.0, (high - abs(value - true)) / (high - low)))


def score_action(answer, response):
    """A1, A2: 0.10 fmt + 0.35 sem + 0.55 num, each the best of all actions that the response names (a weakness)."""
    kind, true = true_actions(answer)[0]
    said = read_actions(response)
    form = float(bool(said))
    action = max((float(k == kind) for k, _ in said), default=0.0)
    number = max((numeric(k, v, true) for k, v in said if k == kind), default=0.0)
    return {
        "total": 0.10 * form + 0.35 * action + 0.55 * number,
        "format": form,
        "action": action,
        "numeric": number,
    }


def score_sequence(answer, response):
    """A3, D3: max(0, 0.10 fmt + 0.25 sem + 0.35 ord + 0.30 num - 0.03 max(0, n - m)), m true actions and n said.

    sem   shared actions, order aside, over max(n, m);  ord, num: right kinds and amounts at their places, over m
    """
    true, said = true_actions(answer), read_actions(response)
    n, m = len(said), len(true)
    form, kinds = float(n > 0), [kind for kind, _ in true]
    action = sum(min(kinds.count(k), sum(k == kind for kind, _ in said)) for k in set(kinds)) / max(
        n, m
    )
    places = [(k, v, w) for (k, v), (kind, w) in zip(said, true) if k == kind]
    order, number = len(places) / m, sum(numeric(*place) for place in places) / m
    total = (
        0.10 * form + 0.25 * action + 0.35 * order + 0.30 * number - EXTRA_ACTION * max(0, n - m)
    )
    return {
        "total": max(0.0, total),
        "format": form,
        "action": action,
        "order": order,
        "numeric": number,
    }


def true_actions(answer):
    """The actions of a reference; ValueError if there is none."""
    if not (actions := read_actions(answer)):
        raise ValueError(f"the reference {answer!r} names no action such as 'turn left 20 degrees'")
    return actions


def score_truth(answer, response):
    """A4, D2, D4: 0.20 fmt + 0.80 sem; the response must be yes, true, no or false and nothing else."""
    said = read_truth(response)
    form, right = float(said is not None), float(said is not None and said == read_truth(answer))
    return {"total": 0.20 * form + 0.80 * right, "format": form, "accuracy": right}


def score_box(answer, response):
    """D1: 0.20 fmt + 0.15 valid + 0.65 geo; fmt is 1 for a box alone, 0.4 for one within other words.

    valid = 0.7 [x1 < x2 and y1 < y2] + 0.3 max(0, 1 - overflow / 200)
    geo   = (0.45 IoU + 0.20 centre + 0.20 L1 + 0.15 size) (0.3 + 0.7 valid)
    """
    true, _ = read_box(answer)
    if true is None:
        raise ValueError(f"the reference {answer!r} is not a box such as '[48, 558, 226, 681]'")
    box, alone = read_box(response)
    if box is None:
        return dict.fromkeys(
            ("total", "format", "validity", "geometry", "iou", "center", "size", "l1"), 0.0
        )
    form = 1.0 if alone else 0.4
    overflow = sum(max(-v, v - 1000, 0) for v in box) / 4
    b, t = canonical(box), canonical(true)
    (w, h), (w_true, h_true) = ((x2 - x1, y2 - y1) for x1, y1, x2, y2 in (b, t))
    valid = 0.7 * (w > 0 and h > 0) + 0.3 * max(0.0, 1 - overflow / 200)

    shared = max(0, min(b[2], t[2]) - max(b[0], t[0])) * max(0, min(b[3], t[3]) - max(b[1], t[1]))
    union = w * h + w_true * h_true - shared
    iou = shared / union if union > 0 else 0.0
    apart = math.hypot(b[0] + b[2] - t[0] - t[2], b[1] + b[3] - t[1] - t[3]) / 2
    center = max(0.0, 1 - apart / max(80, 0.6 * math.hypot(w_true, h_true)))
    l1 = max(0.0, 1 - sum(abs(v - v_true) for v, v_true in zip(b, t)) / 4 / 180)
    size = 0.0
    if min(w, h, w_true, h_true) > 0:
        size = max(0.0, 1 - (abs(math.log(w / w_true)) + abs(math.log(h / h_true))) / 1.6)
    geometry = (0.45 * iou + 0.20 * center + 0.20 * l1 + 0.15 * size) * (0.3 + 0.7 * valid)
    return {
        "total": 0.20 * form + 0.15 * valid + 0.65 * geometry,
        "format": form,
        "validity": valid,
        "geometry": geometry,
        "iou": iou,
        "center": center,
        "size": size,
        "l1": l1,
    }


def canonical(box):
    """Corners in order, within 0..1000."""
    x1, y1, x2, y2 = (min(max(v, 0.0), 1000.0) for v in box)
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


SCORES = {
    "A1": score_action,
    "A2": score_action,
    "A3": score_sequence,
    "D3": score_sequence,
    "A4": score_truth,
    "D2": score_truth,
    "D4": score_truth,
    "D1": score_box,
}
