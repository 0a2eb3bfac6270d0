"""
Records of answers into numbers: accuracy, intervals, calls, comparisons.

A record is a line of predictions.jsonl (evaluate.record_of). Every question with a gold answer is in the denominator,
whatever became of it. Intervals are 95 % bootstrap intervals over rooms (videos), since questions about one room are
not independent.
"""

from collections import Counter

import numpy as np

from extras.benches import rules as benchmarks
from extras.benches.rules import LISTED_ONLY, group_weights, weights
from lib.streams import numpy_stream

STRATA = {"needs_view": True, "answerable": False}
TOOLLESS = ("direct", "official")  # modes that know no tool
RESAMPLES = 2000


def interval(values, clusters=None, counted=None, seed=0):
    """95 % bootstrap interval of a mean, drawing whole clusters (rooms, videos) -> [low, high].

    counted   (n,) what each value counts in the mean; None: all the same
    """
    values = np.asarray(values, float)
    counted = np.ones(len(values)) if counted is None else counted
    names = np.arange(len(values)) if clusters is None else [str(cluster) for cluster in clusters]
    _, member = np.unique(names, return_inverse=True)
    sums, counts = np.bincount(member, values * counted), np.bincount(member, counted)
    drawn = numpy_stream("bootstrap", seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return np.quantile(means, [0.025, 0.975]).round(4).tolist()


def brief(records, counted=None):
    """{"accuracy", "ci95", "call_rate", "n"}; call_rate is the share of questions with at least one valid call.

    counted   (n,) what each record counts in the accuracy (lib/benchmarks.weights); None: all the same
    World2VLM's accuracy is its mean reward; beside it stands "exact", the share of rewards of 1.
    """
    correct, scenes = ([record[key] for record in records] for key in ("correct", "scene"))
    exact = (
        {"exact": float(np.mean([record["exact"] for record in records]))}
        if "exact" in records[0]
        else {}
    )
    return {
        "accuracy": float(np.average(correct, weights=counted)),
        "ci95": interval(correct, scenes, counted),
        "call_rate": float(np.mean([record["valid_calls"] > 0 for record in records])),
        "n": len(records),
    } | exact


def gain_over(alone, records, counted=None):
    """Accuracy beyond that of mode direct on the same questions -> {"difference", "ci95"}, paired: an interval of the
    differences, drawing whole clusters.

    alone     {key: "correct" in mode direct};  counted   as in `brief`
    """
    gain, scenes = (
        [record["correct"] - alone[record["key"]] for record in records],
        [r["scene"] for r in records],
    )
    return {
        "difference": float(np.average(gain, weights=counted)),
        "ci95": interval(gain, scenes, counted),
    }


def summarise(records, direct=None, truth=None):
    """Everything the table shows of one mode with one simulator.

    direct   records of the same questions in mode direct: "gain", overall and beside every part's accuracy (a level or
             type of the bench, what needs a view), is `gain_over` them; over_use, the share of questions on which the
             policy called though it is right without
    truth    and also records under forced use of the true view: under_use, the share on which it did not call though it
             is wrong without and right with the true view
    """
    records = sorted(records, key=lambda record: record["key"])
    gold = [record for record in records if record["gold"] is not None]
    counted = [record for record in gold if record["category"] not in LISTED_ONLY]
    if not counted:
        raise ValueError("no question has a gold answer: there is nothing to summarise")
    total = {
        key: sum(record[key] for record in counted) / len(counted)
        for key in ("valid_calls", "invalid_calls", "unreadable", "truncated", "seconds")
    }
    bench, categories = counted[0]["bench"], [record["category"] for record in counted]
    total["lenient"] = float(weights(bench, categories) @ [record["lenient"] for record in counted])
    alone = direct and {record["key"]: record["correct"] for record in direct}

    def part_of(part):
        weighed = weights(bench, [record["category"] for record in part])
        return brief(part, weighed) | ({"gain": gain_over(alone, part, weighed)} if direct else {})

    summary = (
        part_of(counted)
        | total
        | {
            "by_category": {
                c: part_of([record for record in gold if c in record["groups"]])
                for c in sorted({group for record in gold for group in record["groups"]})
            },
            "by_need": {
                title: part_of(part)
                for title, need in STRATA.items()
                if (part := [record for record in counted if record["needs_view"] is need])
            },
            "letters": dict(
                sorted(
                    Counter(
                        record["answer"] or "none" for record in counted if record["kind"] == "mca"
                    ).items()
                )
            ),
            "counts": {
                "no answer read": sum(record["answer"] is None for record in counted),
                "empty reply": sum(
                    record["turns"] != [] and not record["turns"][-1].strip() for record in counted
                ),
                "image unreadable (counted as wrong)": sum(
                    (record["error"] or "").startswith("image: ") for record in counted
                ),
                "refused by the endpoint (counted as wrong)": sum(
                    not (record["error"] or "image: ").startswith("image: ") for record in counted
                ),
                "asked without a missing image": sum(
                    record["missing_images"] > 0 for record in counted
                ),
                "duplicate id": sum("#" in record["key"] for record in records),
                "no gold answer (left out)": len(records) - len(gold),
            },
        }
    )
    if bench == "sat":  # some tables print this one beside the official one
        summary["mean_of_groups"] = float(
            group_weights(categories) @ [record["correct"] for record in counted]
        )
    failures = Counter(
        record["error_group"]
        for record in counted
        if record["error_group"] and not record["correct"]
    )
    if failures:  # MMSI-Video: the four error groups of its abstract
        summary["failures"] = dict(failures.most_common())
    called = {record["key"]: record["valid_calls"] > 0 for record in counted}
    if direct and records[0].get("mode") not in TOOLLESS:
        summary["over_use"] = float(np.mean([called[key] and alone[key] == 1 for key in called]))
    if direct and truth:
        shown = {record["key"]: record["correct"] for record in truth}
        missed = [not called[key] and alone[key] < 1 and shown[key] == 1 for key in called]
        summary["under_use"] = float(np.mean(missed))
    return summary


def paired_bootstrap(records_a, records_b):
    """Accuracy of a minus accuracy of b on the same questions, each counting the same -> {"difference", "ci95", "n"}.

    Raises ValueError if the two were not asked the same questions.
    """
    a, b = ({record["key"]: record for record in records} for records in (records_a, records_b))
    if a.keys() != b.keys() or not a:
        raise ValueError(
            f"a paired comparison needs the same questions: {len(a.keys() ^ b.keys())} stand in one list"
        )
    return gain_over({key: record["correct"] for key, record in b.items()}, list(a.values())) | {
        "n": len(a)
    }


def chance(questions):
    """Expected accuracy of a blind guess: the mean of 1 / number of options."""
    odds = [benchmarks.chance(question) for question in questions if question["answer"] is not None]
    odds = [share for share in odds if share is not None]
    return float(np.mean(odds)) if odds else None
