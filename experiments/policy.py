"""
What the policy's evidence rests on: training recipes and simulators swapped, as runs and tables (`make evidence`).

  python -m experiments policy --list                       every row, its commands, whether it is finished
  python -m experiments policy                              run what is missing, one after the other; stopped, it goes on
  python -m experiments policy --only "two-phase*" --seeds 0 1 2     some rows, three seeds of the training each

Rows begin with a cold start, of seed 0 the demo's (`make demo` comes first: out/demo), of others their own; they imagine
with the demo's simulator and answer the held-out questions: rooms that nothing was trained on.

  phase1-only …       the paper's Table 3: recipes of reinforcement learning, as many steps each but for phase1-only, our
                      reading of its "phase 1 only": the checkpoint between the phases. -divided: advantages by the
                      deviation of their group
  direct-only         never imagines; goes on learning to answer for as long as reinforcement learning takes, -long for as
                      long as that and the simulator take together
  two-phase-…         the demo's recipe asked otherwise: in another mode; with another simulator; "swapped": with the
                      pictures of another question of the family, whose gap between the calls that a view is needed for
                      and the others must vanish, if the gap comes from looking
  degraded-20-45      the true renderer, turned 20 degrees too far and without 45 % of the objects (extras/degraded.py);
                      retrained-…: and learned with it

Out, in out/evidence/policy/: <row>-s<seed>/{1, 2: the policy after each stage; asked/: its answers; result.json},
table.md, imagining-pays.png.
"""

import os
from argparse import Namespace
from functools import cache, partial
from itertools import product
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
from lib.geometry import decompose
from lib.images import save_image
from lib.protocol import call_poses
from lib.records import Question, load_jsonl, read_log, save_jsonl
from lib.scores import STRATA
from lib.stage import run_stage

TEST = Path(DEMO, "data", "questions_test.jsonl")

# ---- rows ------------------------------------------------------------------------------------------------------------


class PolicyRow(NamedTuple):
    """Stages of learning (commands), each from where the one before ended, and how the policy is asked."""

    name: str
    stages: tuple = ()  # none: the policy of the row `start`
    mode: str = "agentic"
    simulator: str = "tuned"  # it learns and is asked with; "untuned" is ring-untuned of experiments/simulator.py
    start: str = "start"  # the row whose policy is asked, or goes on learning
    flags: str = ""  # of evaluate.py

    @property
    def trains(self) -> bool:
        """Whether seeds differ: all begin with a cold start of their own."""
        return not self.name.startswith(("degraded", "retrained"))


ONE = "train_rl.py --phase 1 --steps 6"
TWO = (ONE, "train_rl.py --phase 2 --steps 100")
RECIPES = {
    # no bonus for use; exact match and format stay
    "gain-only": ("train_rl.py --phase 2 --steps 106 --lambda-use 0",),
    "usage-only": ("train_rl.py --phase 1 --steps 106",),  # no term of gain
    "phase1-only": (ONE,),
    "two-phase": TWO,
}
# accuracy on all of MMSI-Bench, share of questions with a call, calls per question
PAPER = {
    "gain-only": ".343, 4.9%, 0.05",
    "usage-only": ".361, 98.1%, 1.40",
    "phase1-only": ".368, 98.0%, 1.12",
    "two-phase": ".388, 61.5%, 0.78",
}
YAW_ERRORS = (0, 10, 20, 30, 40)  # degrees
MISSING = (0, 15, 30, 45, 60)  # per cent of the objects
# where the policy learns with the degraded renderer, too
RETRAINED = ((0, 60), (20, 30), (40, 0), (40, 60))
CELL = "--limit 320"
SWAPPED = "two-phase-swapped"


def all_rows() -> list[PolicyRow]:
    """The rows in the order in which they run."""
    rows = [PolicyRow("start")]
    for mode in ("direct", "forced"):
        rows.append(PolicyRow(f"start-{mode}", mode=mode))
    for name in ("two-phase", "phase1-only", "gain-only", "usage-only"):
        rows.append(PolicyRow(name, RECIPES[name]))
    direct = "train_sft.py --lessons direct --steps"
    rows.append(PolicyRow("direct-only", (f"{direct} 1300",), "direct"))
    rows.append(PolicyRow("direct-only-long", (f"{direct} 3800",), "direct"))
    for mode in ("direct", "forced"):
        rows.append(PolicyRow(f"two-phase-{mode}", mode=mode, start="two-phase"))
    rows.append(PolicyRow(SWAPPED, start="two-phase"))
    for simulator in ("none", "reprojection", "truth", "untuned"):
        rows.append(PolicyRow(f"two-phase-{simulator}", (), "agentic", simulator, "two-phase"))
    for name, stages in RECIPES.items():
        divided = tuple(f"{stage} --divide-by-std" for stage in stages)
        rows.append(PolicyRow(f"{name}-divided", divided))
    for yaw, missing in product(YAW_ERRORS, MISSING):
        name, simulator = f"degraded-{yaw}-{missing}", f"truth:{yaw}:{missing}"
        rows.append(PolicyRow(name, (), "agentic", simulator, "two-phase", CELL))
    for yaw, missing in RETRAINED:
        name, simulator = f"retrained-{yaw}-{missing}", f"truth:{yaw}:{missing}"
        rows.append(PolicyRow(name, TWO, simulator=simulator, flags=CELL))
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
    stages = row.stages
    policy = Path(DEMO, "sft")
    if row.name == "start" and seed:
        stages = ("train_sft.py",)
    elif row.name != "start" and (row.start != "start" or seed):
        start = next(other for other in ROWS if other.name == row.start)
        policy = out / f"{row.start}-s{seed}" / str(len(start.stages) or 1)
        needs[policy] = f"python -m experiments policy --only {row.start} --seeds {seed}"

    inputs = {}
    asked_data = f"{DEMO}/data"
    if row.name == SWAPPED:
        asked_data = out.parent / "swapped"
        inputs[asked_data / TEST.name] = partial(swap_pictures, asked_data)
    with_simulator = dict(simulator=simulator, wm=f"{DEMO}/wm")
    commands = []
    for number, command in enumerate(stages, 1):
        stage = folder / str(number)
        where = dict(out=stage, seed=seed, data=f"{DEMO}/data", threads=1)
        if command.startswith("train_rl.py"):
            where |= dict(policy=policy, eval_every=0, **with_simulator)
        elif row.name != "start":
            where |= dict(start=policy)
        commands.append(words(command, **where))
        policy = stage
    asked = dict(mode=row.mode, policy=policy, out=folder / "asked", data=asked_data, threads=1)
    commands.append(words(f"evaluate.py --no-report {row.flags}", **asked, **with_simulator))
    return Job(folder.name, commands, inputs, needs)


def swap_pictures(folder: Path) -> None:
    """Every question gets the pictures of another of its family, half of all further on."""
    families = {}
    for row in read_log(TEST):
        families.setdefault(row["category"], []).append(row)
    swapped = []
    for rows in families.values():
        for number, row in enumerate(rows):
            other = rows[(number + len(rows) // 2) % len(rows)]
            images = [os.path.relpath(TEST.parent / image, folder) for image in other["images"]]
            swapped.append({**row, "images": images})
    save_jsonl(folder / TEST.name, swapped)


# ---- what is counted -------------------------------------------------------------------------------------------------

LANDS = (15, 0.3)  # degrees, metres


@cache
def test_questions() -> dict[str, dict]:
    """{id: question}."""
    return {question["id"]: question for question in load_jsonl(TEST, Question)}


def numbers(record: dict) -> dict[str, float]:
    """What is averaged of an answer over seeds."""
    calls = record["valid_calls"]
    landed = lands(record["calls"], test_questions()[record["key"]])
    return {"correct": record["correct"], "called": calls > 0, "calls": calls, "lands": landed}


def correctness(record: dict) -> dict[str, float]:
    """All that a comparison needs of an answer: where its calls end takes longer to find."""
    return {"correct": record["correct"]}


def lands(calls: list[dict], question: dict) -> bool:
    """Whether there are as many calls as ideal ones, and each ends within LANDS of where the ideal one does."""
    ideal = question["ideal"]
    if len(calls) != len(ideal):
        return False
    given = len(question["scene"]["poses"])
    ends = call_poses(question["scene"], calls)[given:]
    goals = call_poses(question["scene"], ideal)[given:]
    degrees, meters = LANDS
    for end, goal in zip(ends, goals, strict=True):
        delta = decompose(goal, end)
        if np.linalg.norm(delta[:3]) > meters or np.abs(delta[3:]).max() > degrees:
            return False
    return True


def table(out: Path) -> list[str]:
    """The lines of table.md, and the picture of the degraded renderers."""
    draw_degraded(out)
    answers = {}
    for row in ROWS:
        records = mean_answers(row.name, out, numbers) if row.trains else []
        if records:
            answers[row.name] = records
    return recipe_table(answers, out) + ["", "By family:", ""] + family_table(answers)


def recipe_table(answers: dict[str, list[dict]], out: Path) -> list[str]:
    """Accuracy and calls of every finished row, and what it answers beyond two-phase and direct-only.

    answers   {row: its answers, seeds averaged}
    """
    head = ["row", "seeds", "all", "over two-phase"]
    for part in ("view needed", "view given"):
        head += [part, "with a call", "calls", "over direct-only"]
    head += ["train CPU-s", "the paper"]
    lines = []
    stages = {row.name: row.stages for row in ROWS}
    for name, records in answers.items():
        seeds = finished_seeds(name, out)
        line = [name, " ".join(seeds), f"{mean_of(records, 'correct'):.3f}"]
        line.append(gain_cell_of(name, "two-phase", out))
        for need in STRATA.values():
            part = [record for record in records if record["needs_view"] is need]
            line += [f"{mean_of(part, 'correct'):.3f}", f"{mean_of(part, 'called'):.0%}"]
            line.append(f"{mean_of(part, 'calls'):.2f}")
            line.append(gain_cell_of(name, "direct-only", out, need))
        spent = np.mean([result["cpu_seconds"] for result, _ in seeds.values()])
        line += [f"{spent:.0f}" if stages[name] else "", PAPER.get(name, "")]
        lines.append(line)
    return markdown(head, lines)


def gain_cell_of(name: str, base: str, out: Path, need: bool | None = None) -> str:
    """`gain_cell` of a row over another, by the seeds that both have; `need`: of questions that need a view, or do not."""
    seeds = finished_seeds(name, out).keys() & finished_seeds(base, out).keys()
    if name == base or not seeds:
        return ""
    records = mean_answers(name, out, correctness, seeds)
    if need is not None:
        records = [record for record in records if record["needs_view"] is need]
    return gain_cell(records, mean_answers(base, out, correctness, seeds))


def family_table(answers: dict[str, list[dict]]) -> list[str]:
    """Accuracy, share of questions with a call, and of calls that land, for every family and need."""
    groups = sorted({record["groups"][0] for records in answers.values() for record in records})
    lines = []
    for name, records in answers.items():
        cells = [name]
        for group in groups:
            part = [record for record in records if record["groups"][0] == group]
            shares = [f"{mean_of(part, key):.0%}" for key in ("called", "lands")]
            cells.append(f"{mean_of(part, 'correct'):.3f}, {', '.join(shares)}")
        lines.append(cells)
    return markdown(["row", *groups], lines)


# ---- how good a simulator must be ------------------------------------------------------------------------------------


def cell_means(prefix: str, yaw: int, missing: int, out: Path, direct: dict) -> tuple | None:
    """(gain over `direct`, share with a call) of the questions of a cell; None where it is not finished."""
    records = mean_answers(f"{prefix}-{yaw}-{missing}", out, numbers)
    if not records:
        return None
    gains = [record["correct"] - direct[record["key"]] for record in records]
    return float(np.mean(gains)), mean_of(records, "called")


def draw_degraded(out: Path) -> None:
    """imagining-pays.png: accuracy beyond direct-only and share of calls over the errors of a simulator.

    In brackets the same of a policy that learned with that simulator.
    """
    answers = mean_answers("direct-only", out, correctness, {"0"})  # no cell has another seed
    direct = {row["key"]: row["correct"] for row in answers}
    if not direct:
        return
    cells = [cell_means("degraded", *at, out, direct) for at in product(YAW_ERRORS, MISSING)]
    if None in cells:
        return
    grid = np.array(cells).reshape(len(YAW_ERRORS), len(MISSING), 2)
    gains, calls = grid.T  # (missing, yaw) each
    retrained = {at: cell_means("retrained", *at, out, direct) for at in RETRAINED}

    def draw(pyplot):
        """A cell for every pair of errors, and the line where nothing is gained."""
        figure, axis = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
        size = float(np.abs(gains).max())
        around = (-5, 45, -7.5, 67.5)  # half a cell beyond the grid
        style = {"cmap": "RdBu", "vmin": -size, "vmax": size, "aspect": "auto"}
        picture = axis.imshow(gains, origin="lower", extent=around, **style)
        figure.colorbar(picture, label="accuracy beyond direct-only")
        axis.contour(YAW_ERRORS, MISSING, gains, [0], colors="black", linewidths=1.5)
        for row, missing in enumerate(MISSING):
            for column, yaw in enumerate(YAW_ERRORS):
                text = f"{gains[row, column]:+.2f}\n{calls[row, column]:.0%}"
                learned = retrained.get((yaw, missing))
                if learned:
                    text += f"\n({learned[0]:+.2f}, {learned[1]:.0%})"
                colour = "white" if abs(gains[row, column]) > 0.6 * size else "black"
                axis.text(yaw, missing, text, color=colour, ha="center", va="center", fontsize=8)
        axis.set_xticks(YAW_ERRORS)
        axis.set_yticks(MISSING)
        axis.set_xlabel("yaw error of the simulator, degrees")
        axis.set_ylabel("objects that its views lack, %")
        return figure

    from extras.report.curves import figure_image

    image = figure_image(draw)
    if image:
        save_image(out / "imagining-pays.png", image)


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line's flags."""
    return rows_parser(__doc__, "degraded-*", "out/evidence/policy").parse_args(argv)


LEGEND = (
    "Over: accuracy beyond that row on the same questions and seeds [95 % interval over rooms]. View needed, view "
    "given: accuracy, the share of questions with a valid call, valid calls per question. By family: accuracy, share "
    "with a call, share whose calls are as many as the ideal ones and end within 15 degrees and 0.3 m of them. The "
    "paper (Table 3, MMSI-Bench, Qwen3-VL-8B): accuracy, share with a call, calls."
)


def main(argv: list[str] | None = None) -> None:
    """Finish the rows one by one, then print the table of all that are finished."""
    args = parse_args(argv)
    run_rows(args, "experiments policy", ROWS, job_of, table, LEGEND)


if __name__ == "__main__":
    run_stage(main)
