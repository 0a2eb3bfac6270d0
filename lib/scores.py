"""
Predictions into numbers: accuracy, intervals, calls, comparisons; and the tables that evaluate.py prints.

Every question with a gold answer is in the denominator, whatever became of it. Intervals are 95 % bootstrap intervals
over rooms (videos), since questions about one room are not independent. A published bench weighs its questions by its
own rule (extras/benches); in rooms each counts the same.
"""

from collections import Counter

import numpy as np

from lib.answers import Prediction
from lib.consistency import POSE_THRESHOLDS
from lib.streams import numpy_stream

STRATA = {"needs_view": True, "answerable": False}
TOOLLESS = ("direct", "official")  # modes that know no tool
RESAMPLES = 2000
MEANS = ("invalid_calls", "unreadable", "truncated", "seconds")
# of views: the paper prints all but tight and mse; pose and content as one number each stand in results.json alone
COLUMNS = (
    "pose, moves",
    "turns",
    "tight, moves",
    "turns",
    "precision",
    "recall",
    "topology",
    "mse",
)
CELL = "accuracy [95 % interval], share of questions with a call, calls per question"

Rows = list[Prediction]


# ---- accuracy -------------------------------------------------------------------------------------------------------


def interval(values, clusters=None, weights=None) -> list[float]:
    """95 % bootstrap interval of a weighted mean, drawing whole clusters (rooms, videos) -> [low, high].

    values (n,);  clusters: (n,) names, None: each value on its own;  weights (n,), None: all the same
    """
    values = np.asarray(values, float)
    if weights is None:
        weights = np.ones(len(values))
    names = np.arange(len(values)) if clusters is None else [str(cluster) for cluster in clusters]
    _, member = np.unique(names, return_inverse=True)
    sums = np.bincount(member, values * weights)  # per cluster
    totals = np.bincount(member, weights)
    draws = numpy_stream("bootstrap", 0).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[draws].sum(1) / totals[draws].sum(1)
    return np.quantile(means, [0.025, 0.975]).round(4).tolist()


def official_weights(predictions: Rows) -> np.ndarray:
    """What each prediction counts in the bench's own overall (n,): they sum to 1, and some may be 0."""
    bench = predictions[0]["bench"]
    if bench == "rooms":
        return np.full(len(predictions), 1 / len(predictions))
    from extras.benches.common import weights

    return weights(bench, [row["category"] for row in predictions])


def brief(predictions: Rows, weights=None) -> dict:
    """{"accuracy", "ci95", "call_rate", "valid_calls", "n"}.

    call_rate     the share of questions with at least one valid call;  valid_calls: of them per question
    weights   (n,) what each counts in the accuracy; None: all the same
    """
    correct = [row["correct"] for row in predictions]
    return {
        "accuracy": float(np.average(correct, weights=weights)),
        "ci95": interval(correct, [row["scene"] for row in predictions], weights),
        "call_rate": float(np.mean([row["valid_calls"] > 0 for row in predictions])),
        "valid_calls": float(np.mean([row["valid_calls"] for row in predictions])),
        "n": len(predictions),
    }


def gain_over(alone: dict[str, float], predictions: Rows, weights=None) -> dict:
    """Accuracy beyond that on the same questions alone, paired -> {"difference", "ci95" of the differences}.

    alone   {key: "correct" in mode direct};  weights: as in `brief`
    """
    gain = [row["correct"] - alone[row["key"]] for row in predictions]
    return {
        "difference": float(np.average(gain, weights=weights)),
        "ci95": interval(gain, [row["scene"] for row in predictions], weights),
    }


def chance(questions: list[dict]) -> float | None:
    """Expected accuracy of a blind guess: the mean of 1 / number of options; None where no question has options."""
    odds = []
    for question in questions:
        if question["answer"] is not None and question.get("options"):
            odds.append(1 / len(question["options"]))
    return float(np.mean(odds)) if odds else None


# ---- cost -----------------------------------------------------------------------------------------------------------


def cost_of(trajectory) -> dict[str, int | None]:
    """What a dialogue of any mode took: views rendered and shown, turns the policy wrote, tokens read and written.

    A prompt that several dialogues read counts in each; tokens that only a server knows are None.
    """
    views = len(trajectory.provenance) - trajectory.provenance.count(None)
    cost = {"rendered": views, "shown": views, "policy_calls": len(trajectory.turns)}
    cost |= getattr(trajectory, "cost", {})  # of extras/report/search.py: several dialogues
    is_counted = all(isinstance(token, int) for token in trajectory.ids)
    return cost | {"tokens": len(trajectory.ids) if is_counted else None}


def mean_cost(predictions: Rows) -> dict[str, float]:
    """The mean of what every question took that could be asked; what is unknown for one is left out."""
    costs = [row["cost"] for row in predictions if "cost" in row and not row["error"]]
    means = {}
    for key in costs[0] if costs else ():
        values = [cost[key] for cost in costs]
        if None not in values:
            means[key] = float(np.mean(values))
    return means


# ---- a summary ------------------------------------------------------------------------------------------------------


def summarise(predictions: Rows, direct: Rows | None = None, truth: Rows | None = None) -> dict:
    """Everything the table shows of one mode with one simulator.

    direct   of the same questions in mode direct: "gain", overall and beside every part's accuracy (a level or type of
             the bench, what needs a view), is `gain_over` them; over_use, the share of questions on which the policy
             called though it is right without
    truth    and also under forced use of the true view: under_use, the share on which it did not call though it is
             wrong without and right with the true view
    """
    predictions = sorted(predictions, key=lambda row: row["key"])
    gold = [row for row in predictions if row["gold"] is not None]
    counted = [row for row, weight in zip(gold, official_weights(gold), strict=True) if weight > 0]
    alone = {row["key"]: row["correct"] for row in direct or ()}
    summary = group_summary(counted, alone)
    for key in MEANS:
        summary[key] = sum(row[key] for row in counted) / len(counted)
    summary["lenient"] = float(official_weights(counted) @ [row["lenient"] for row in counted])
    summary["by_category"] = {}
    for group in sorted({group for row in gold for group in row["groups"]}):
        members = [row for row in gold if group in row["groups"]]
        summary["by_category"][group] = group_summary(members, alone)
    summary["by_need"] = {}
    for title, need in STRATA.items():
        members = [row for row in counted if row["needs_view"] is need]
        if members:
            summary["by_need"][title] = group_summary(members, alone)
    letters = Counter(row["answer"] or "none" for row in counted if row["kind"] == "mca")
    summary["letters"] = dict(sorted(letters.items()))
    summary["cost"] = mean_cost(predictions)
    summary["counts"] = counts_of(predictions, counted)
    summary["counts"]["no gold answer (left out)"] = len(predictions) - len(gold)
    if counted[0]["bench"] != "rooms":
        from extras.benches.common import more_numbers

        summary |= more_numbers(counted)
    called = {row["key"]: row["valid_calls"] > 0 for row in counted}
    if alone and counted[0]["mode"] not in TOOLLESS:
        needless = [called[key] and alone[key] == 1 for key in called]
        summary["over_use"] = float(np.mean(needless))
    if alone and truth:
        with_truth = {row["key"]: row["correct"] for row in truth}
        missed = [not called[key] and alone[key] < 1 and with_truth[key] == 1 for key in called]
        summary["under_use"] = float(np.mean(missed))
    return summary


def group_summary(members: Rows, alone: dict[str, float]) -> dict:
    """`brief` of some predictions by the bench's weights, and their gain over mode direct if that is known."""
    weights = official_weights(members)
    gain = {"gain": gain_over(alone, members, weights)} if alone else {}
    return brief(members, weights) | gain


def counts_of(predictions: Rows, counted: Rows) -> dict[str, int]:
    """How often something went wrong."""
    errors = [row["error"] for row in counted if row["error"]]
    unreadable = sum(error.startswith("image: ") for error in errors)
    return {
        "no answer read": sum(row["answer"] is None for row in counted),
        "empty reply": sum(row["turns"] != [] and not row["turns"][-1].strip() for row in counted),
        "image unreadable (counted as wrong)": unreadable,
        "refused by the endpoint (counted as wrong)": len(errors) - unreadable,
        "asked without a missing image": sum(row["missing_images"] > 0 for row in counted),
        "duplicate id": sum("#" in row["key"] for row in predictions),
    }


# ---- tables ---------------------------------------------------------------------------------------------------------


def text_table(head: list[str], rows: list[list]) -> str:
    """A table for the terminal, the first column to the left; a float shows three digits, None is "-"."""
    lines = [head]
    for row in rows:
        cells = ["-" if cell is None else cell for cell in row]
        lines.append([f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ""
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        text += "  ".join([line[0].ljust(widths[0]), *cells[1:]]) + "\n"
    return text


def title_of(mode: str, simulator: str) -> str:
    """What a column is called: "direct", or "agentic, tuned"."""
    return mode if mode in TOOLLESS else f"{mode}, {simulator}"


def print_answers(runs: dict[tuple, dict], guessing: float | None) -> None:
    """The table: a row per part of the questions, a column per mode and simulator; then the gain over mode direct.

    runs   {(mode, simulator): of `summarise`, with "cost"};  guessing: of `chance`
    """
    summaries = list(runs.values())
    head = ["", "n", *(title_of(*run) for run in runs)]
    groups = {"all": summaries}
    for kind in ("by_need", "by_category"):
        for name in summaries[0][kind]:
            groups[name] = [summary[kind].get(name) for summary in summaries]
    rows, gains = [], []
    for name, cells in groups.items():
        rows.append([name, cells[0]["n"], *map(accuracy_text, cells)])
        gains.append([name, cells[0]["n"], *map(gain_text, cells)])
    for key in ("lenient", "invalid_calls", "seconds", "over_use", "under_use"):
        values = [summary.get(key) for summary in summaries]
        if any(value is not None for value in values):
            rows.append([key, "", *values])
    print("\n" + text_table(head, rows), end="")
    print(CELL if guessing is None else f"{CELL}; chance, guessing {guessing:.3f}")
    if any("gain" in summary for summary in summaries):
        print("\naccuracy beyond direct on the same questions [95 % interval]")
        print(text_table(head, gains), end="")
    for (mode, simulator), summary in runs.items():
        counts = [f"{title}: {count}" for title, count in summary["counts"].items() if count]
        cost = [f"{key.replace('_', ' ')} {mean:,.1f}" for key, mean in summary["cost"].items()]
        print("; ".join([f"{mode}, {simulator}, per question: {', '.join(cost)}", *counts]))


def accuracy_text(summary: dict | None) -> str | None:
    """ "0.812 [0.75 0.87]  40% 0.52" of a group's `brief`: see CELL."""
    text = "{accuracy:.3f} [{ci95[0]:.2f} {ci95[1]:.2f}] {call_rate:4.0%} {valid_calls:.2f}"
    return summary and text.format(**summary)


def gain_text(summary: dict | None) -> str | None:
    """ "+0.120 [+0.05 +0.19]" of a group's `gain_over`."""
    gain = (summary or {}).get("gain")
    return gain and "{difference:+.3f} [{ci95[0]:+.2f} {ci95[1]:+.2f}]".format(**gain)


def consistency_row(scores: dict) -> list[float | None]:
    """What stands under COLUMNS, of `consistency.score_views`; None is unknown."""
    poses = []
    for key in ("pose", "tight"):
        poses += [scores.get(family, {}).get(key) for family in ("moves", "turns")]
    return poses + [scores.get(key) for key in COLUMNS[4:]]


def print_consistency(results: dict) -> None:
    """A table of pose and content: simulators, trivial baselines, oracles."""
    rows = []
    for title in ("simulators", "baselines", "oracles"):
        for name, scores in results[title].items():
            *shares, mse = consistency_row(scores)
            rows.append([name, *shares, f"{mse:.4f}"])
    print("\n" + text_table(["", *COLUMNS], rows), end="")
    print(f"pose: share of views {POSE_THRESHOLDS}")
