"""
What the policy's evidence rests on: training recipes and simulators swapped, as runs and a table (`make evidence`).

  python -m experiments policy --list                       every row, its commands, whether it is finished
  python -m experiments policy                              run what is missing, one after the other; stopped, it goes on
  python -m experiments policy --only "two-phase*" --seeds 0 1 2     some rows, three seeds of the training each

Rows start from the demo's cold start and imagine with its simulator (`make demo` comes first: out/demo; `…-untuned`
rows with a generic one), learn for the same number of steps, and answer the held-out questions: rooms that nothing was
trained on. Recipes are those of the paper's Table 3; `phase1-only` is our reading of its "phase 1 only": the checkpoint
between the phases, so fewer steps. Rows that forbid the tool or force it say so. Differences are on the same questions,
seeds averaged.

Out, in out/evidence/policy/: <row>-s<seed>/{1, 2: the policy after each stage; asked/: its answers; result.json},
table.md.
"""

from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.runner import (
    DEMO,
    Job,
    finished_seeds,
    gain_cell,
    markdown,
    mean_answers,
    mean_of,
    rows_parser,
    run_rows,
    words,
)
from lib.scores import STRATA
from lib.stage import run_stage


class PolicyRow(NamedTuple):
    """Stages of learning (flags of train_rl.py), each from where the one before ended, and how the policy is asked."""

    name: str
    stages: tuple = ()  # none: the cold start, or the policy of the row `start`
    mode: str = "agentic"
    simulator: str = "tuned"  # it learns and is asked with; "untuned" is ring-untuned of experiments/simulator.py
    start: str = ""

    @property
    def trains(self) -> bool:
        return bool(self.stages or self.start)


TWO = ("--phase 1 --steps 12", "--phase 2 --steps 60")
RECIPES = {  # each is two rows: with the tuned simulator, and NAME-untuned
    # no bonus for use; exact match and format stay
    "gain-only": ("--phase 2 --steps 72 --lambda-use 0",),
    "usage-only": ("--phase 1 --steps 72",),  # no term of gain
    "phase1-only": TWO[:1],
    "two-phase": TWO,
    "two-phase-undivided": tuple(f"{stage} --no-divide-by-std" for stage in TWO),  # A = r - mean
}
# accuracy on all of MMSI-Bench, share of questions with a call, calls per question
PAPER = {
    "gain-only": ".343, 4.9%, 0.05",
    "usage-only": ".361, 98.1%, 1.40",
    "phase1-only": ".368, 98.0%, 1.12",
    "two-phase": ".388, 61.5%, 0.78",
}


def all_rows() -> list[PolicyRow]:
    """The rows in the order in which they run."""
    rows = [PolicyRow("start"), PolicyRow("start-direct", mode="direct")]
    for name, stages in RECIPES.items():
        rows.append(PolicyRow(name, stages))
    for name, stages in RECIPES.items():  # calls do not help
        rows.append(PolicyRow(f"{name}-untuned", stages, simulator="untuned"))
    rows.append(PolicyRow("direct-only", ("--phase 1 --mode direct --steps 72",), "direct"))
    rows.append(PolicyRow("two-phase-direct", mode="direct", start="two-phase"))
    for name, start in (("start", ""), ("two-phase", "two-phase")):
        for simulator in ("none", "untuned", "tuned", "reprojection", "truth"):
            rows.append(PolicyRow(f"{name}-forced-{simulator}", (), "forced", simulator, start))
    return rows


ROWS = all_rows()


def job_of(row: PolicyRow, seed: int, out: Path) -> Job:
    """What makes a row, one stage after the other; the last command asks the held-out questions."""
    folder = out / f"{row.name}-s{seed}"
    needs = {Path(DEMO, "sft"): "make demo", Path(DEMO, "wm"): "make demo"}
    simulator = row.simulator
    if simulator == "untuned":
        simulator = out.parent / "ring-untuned-s0"
        needs[simulator] = "python -m experiments simulator --only ring-untuned"
    policy = Path(DEMO, "sft")
    if row.start:
        stages = next(other.stages for other in ROWS if other.name == row.start)
        policy = out / f"{row.start}-s{seed}" / str(len(stages))
        needs[policy] = f"python -m experiments policy --only {row.start} --seeds {seed}"
    shared = dict(simulator=simulator, wm=f"{DEMO}/wm", data=f"{DEMO}/data", threads=1)
    commands = []
    for number, flags in enumerate(row.stages, 1):
        stage = folder / str(number)
        where = dict(policy=policy, out=stage, seed=seed, eval_every=0)
        commands.append(words(f"train_rl.py {flags}", **where, **shared))
        policy = stage
    asked = dict(mode=row.mode, policy=policy, out=folder / "asked")
    commands.append(words("evaluate.py --no-report", **asked, **shared))
    return Job(folder.name, commands, needs=needs)


def numbers(record: dict) -> dict[str, float]:
    """What is averaged of an answer over seeds."""
    calls = record["valid_calls"]
    return {"correct": record["correct"], "called": calls > 0, "calls": calls}


def table(out: Path) -> list[str]:
    """The lines of table.md: accuracy and calls of every finished row, and its difference from two-phase."""
    head = ["row", "seeds"]
    for part in ("all", "view needed", "view given"):
        head += [part, "with a call", "calls"]
    head += ["over two-phase", "train CPU-s", "the paper"]
    base = mean_answers("two-phase", out, numbers)
    lines = []
    for row in ROWS:
        seeds = finished_seeds(row.name, out)
        if not seeds:
            continue
        records = mean_answers(row.name, out, numbers)
        line = [row.name, " ".join(seeds)]
        parts = [records]
        for need in STRATA.values():
            parts.append([record for record in records if record["needs_view"] is need])
        for part in parts:
            line += [f"{mean_of(part, 'correct'):.3f}", f"{mean_of(part, 'called'):.0%}"]
            line.append(f"{mean_of(part, 'calls'):.2f}")
        gap = gain_cell(records, base) if row.name != "two-phase" else ""
        spent = np.mean([result["cpu_seconds"] for result, _ in seeds.values()])
        line += [gap, f"{spent:.0f}" if row.stages else "", PAPER.get(row.name, "")]
        lines.append(line)
    return markdown(head, lines)


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line's flags."""
    return rows_parser(__doc__, "*-forced-*", "out/evidence/policy").parse_args(argv)


LEGEND = (
    "All, view needed, view given: accuracy, then the share of questions with a valid call, and valid calls per "
    "question. Over two-phase: on the same questions, [95 % interval over rooms]. The paper (Table 3, MMSI-Bench, "
    "Qwen3-VL-8B): accuracy, share with a call, calls."
)


def main(argv: list[str] | None = None) -> None:
    """Finish the rows one by one, then print the table of all that are finished."""
    args = parse_args(argv)
    run_rows(args, "experiments policy", ROWS, job_of, table, LEGEND)


if __name__ == "__main__":
    run_stage(main)
