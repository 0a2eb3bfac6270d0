"""
What the policy's evidence rests on: reward ablations and simulators swapped, as runs and a table (`make evidence`).

  python -m experiments policy --list                       every row, its commands, whether it is finished
  python -m experiments policy                              run what is missing, one after the other; stopped, it goes on
  python -m experiments policy --only "two-phase*" --seeds 0 1 2     some rows, three seeds of the training each

Rows start from the demo's cold start and imagine with its simulator (`make demo` comes first: out/demo; `…-untuned`
rows with a generic one), learn for the same number of steps, and answer the held-out questions: rooms that nothing was
trained on. Rows that forbid the tool or force it say so. Differences are on the same questions, seeds averaged.

Out, in out/evidence/policy/: <row>-s<seed>/{1, 2: the policy after each stage; asked/: its answers; result.json},
table.md.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.simulator import (
    call,
    chosen,
    gap,
    is_made,
    list_parser,
    markdown,
    publish,
    show_jobs,
)
from lib import common
from lib.scores import STRATA, paired_bootstrap


class Run(NamedTuple):
    """A row: stages of learning (flags of train_rl.py), each from where the one before ended, and how it is asked."""

    name: str
    stages: tuple = ()  # none: the cold start, or the policy of the row `of`
    mode: str = "agentic"
    simulator: str = "tuned"  # it learns and is asked with; "untuned" is ring-untuned of experiments/simulator.py
    of: str = ""


DEMO = "out/demo"
TWO = ("--phase 1 --steps 12", "--phase 2 --steps 60")
SWAP = ("none", "untuned", "tuned", "reprojection", "truth")
REWARDS = {
    "two-phase": TWO,  # the paper's
    "single-stage": ("--phase 2 --steps 72",),  # all terms at once
    "gain-only": ("--phase 2 --steps 72 --lambda-use 0",),  # no bonus for use
    "usage-only": ("--phase 1 --steps 72",),  # no term of gain
    "match-only": ("--phase 1 --steps 72 --lambda-use 0",),  # neither
    "two-phase-undivided": tuple(f"{stage} --no-divide-by-std" for stage in TWO),  # A = r - mean
}
RUNS = [
    Run("start"),
    Run("start-direct", mode="direct"),
    *(Run(name, stages) for name, stages in REWARDS.items()),
    *(
        Run(f"{name}-untuned", stages, simulator="untuned") for name, stages in REWARDS.items()
    ),  # calls do not help
    Run("direct-only", ("--phase 1 --mode direct --steps 72",), mode="direct"),  # never imagines
    Run("two-phase-direct", mode="direct", of="two-phase"),
    *(
        Run(f"{who}-forced-{name}", mode="forced", simulator=name, of=of)
        for who, of in (("start", ""), ("two-phase", "two-phase"))
        for name in SWAP
    ),
]


def commands(run, seed, out):
    """What makes a row, one stage after the other: [(script, flags)]; the last asks the held-out questions."""
    place, policy, made = out / f"{run.name}-s{seed}", learned(run, seed, out), []
    simulator = str(out.parent / "ring-untuned-s0") if run.simulator == "untuned" else run.simulator
    given = [
        "--simulator",
        simulator,
        "--wm",
        f"{DEMO}/wm",
        "--data",
        f"{DEMO}/data",
        "--threads",
        "1",
    ]
    for number, flags in enumerate(run.stages, 1):
        made.append(
            (
                "train_rl.py",
                [
                    *flags.split(),
                    "--policy",
                    str(policy),
                    "--seed",
                    str(seed),
                    "--eval-every",
                    "0",
                    *given,
                    "--out",
                    str(place / str(number)),
                ],
            )
        )
        policy = place / str(number)
    return [
        *made,
        (
            "evaluate.py",
            [
                "--mode",
                run.mode,
                "--policy",
                str(policy),
                "--no-report",
                *given,
                "--out",
                str(place / "asked"),
            ],
        ),
    ]


def learned(run, seed, out):
    """The policy that a row begins with: the demo's cold start, or where the row `of` ended."""
    if not run.of:
        return f"{DEMO}/sft"
    return (
        out / f"{run.of}-s{seed}" / str(len(next(row for row in RUNS if row.name == run.of).stages))
    )


def finish(run, seed, out):
    """Do what is missing of one row, result.json last; a finished row is left as it is."""
    place, told = out / f"{run.name}-s{seed}", commands(run, seed, out)
    setting = {"commands": [" ".join([script, *flags]) for script, flags in told]}
    if is_made(place, setting):
        return
    for script, flags in told:
        call(script, *flags)
    spent = sum(
        json.loads((place / str(number) / "done.json").read_text())["cpu_seconds"]
        for number in range(1, len(run.stages) + 1)
    )
    common.write_json(place / "result.json", {**setting, "cpu_seconds": spent})


def answers(name, out):
    """The finished seeds of a row -> (seeds, {question: the record, correct and calls averaged over seeds}, cpu s)."""
    places = sorted(file.parent for file in out.glob(f"{name}-s[0-9]*/result.json"))
    asked, seconds = (
        {},
        [json.loads((place / "result.json").read_text())["cpu_seconds"] for place in places],
    )
    for place in places:
        for record in common.read_log(place / "asked" / "predictions.jsonl"):
            asked.setdefault(record["key"], []).append(record)
    merged = {
        key: {
            **records[0],
            "correct": np.mean([record["correct"] for record in records]),
            "called": np.mean([record["valid_calls"] > 0 for record in records]),
        }
        for key, records in asked.items()
    }
    return (
        [place.name.rsplit("-s", 1)[1] for place in places],
        merged,
        np.mean(seconds) if seconds else 0.0,
    )


def table(out):
    """The lines of table.md: accuracy and calls of every finished row, and its difference from two-phase."""
    head = [
        "row",
        "seeds",
        "accuracy",
        "calls",
        "view needed",
        "calls",
        "view given",
        "calls",
        "over two-phase",
        "train CPU-s",
    ]
    lines, base = [], answers("two-phase", out)[1]
    for run in RUNS:
        seeds, records, seconds = answers(run.name, out)
        if not seeds:
            continue
        line = [run.name, " ".join(seeds)]
        for need in (None, *STRATA.values()):
            part = [
                record
                for record in records.values()
                if need is None or record["needs_view"] is need
            ]
            line += [
                f"{np.mean([record['correct'] for record in part]):.3f}",
                f"{np.mean([record['called'] for record in part]):.0%}",
            ]
        gain = (
            paired_bootstrap(records.values(), base.values())
            if base and run.name != "two-phase"
            else None
        )
        lines.append([*line, gap(gain), f"{seconds:.0f}" if run.stages else ""])
    return markdown(head, lines)


def parse_args(argv=None):
    """The command line's flags."""
    return list_parser(__doc__, "*-forced-*", "out/evidence/policy").parse_args(argv)


def main(argv=None):
    """Finish the rows one by one, then print the table of all that are finished."""
    args = parse_args(argv)
    out, named = Path(args.out), chosen(RUNS, args.only, "-m experiments policy")
    jobs = [
        (run, seed) for seed in args.seeds for run in named if run.stages or run.of or seed == 0
    ]
    if args.list:
        return show_jobs(jobs, commands, out)
    for stage in ("sft", "wm"):
        common.need(f"{DEMO}/{stage}", "make demo")
    for run, seed in jobs:
        if run.of and run.of not in {row.name for row in named}:
            common.need(
                str(learned(run, seed, out)),
                f"python -m experiments policy --only {run.of} --seeds {seed}",
            )
    if any(run.simulator == "untuned" for run in named):
        common.need(
            out.parent / "ring-untuned-s0", "python -m experiments simulator --only ring-untuned"
        )
    for run, seed in jobs:
        common.say(f"{run.name}-s{seed}")
        finish(run, seed, out)
    publish(
        table(out),
        out,
        "Calls: share of questions with a valid call. Over two-phase: on the same questions, "
        "[95 % interval over rooms].",
    )


if __name__ == "__main__":
    common.run(main)
