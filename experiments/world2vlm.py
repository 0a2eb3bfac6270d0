"""
What World2VLM rests on: its stages, directions and teachers, as runs and a table (Tables 2 to 4 of arXiv 2604.26934).

  python -m experiments world2vlm --list                           every row, its commands, whether it is finished
  python -m experiments world2vlm                                  run what is missing; stopped, it goes on
  python -m experiments world2vlm --only "by-*" --seeds 0 1 2      some rows, three seeds of the training each

Rows start from the demo's cold start (`make demo` comes first: out/demo), learn for 1,500 steps (`grpo`: 60 more), and
answer the same held-out questions, whose pictures are of the true renderer. Compare `forward` with `inverse-at-once`,
as neither begins with turns. What is carried over shows in questions about rooms: World2VLM alone forgets how to answer
them, so `…lessons` learn 350 steps of direct lessons first. Beside them the demo's policies: `direct-only` (1,800 such
steps) and `agentic`. The teachers of `by-…` are simulators of experiments/simulator.py, in the folder
above --out; `untuned` learned under shuffled sentences. Boxes of a simulator's questions are those of the room, so D1
to D4 do not suffer from what it draws wrongly.

Out, in out/evidence/world2vlm/: data/<data>/, <row>-s<seed>/{1, 2, 3, rl: the policy after each stage; asked/: its
answers; result.json}, table.md.
"""

from argparse import Namespace
from collections import defaultdict
from functools import partial
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
from extras.world2vlm.questions import make_room_questions
from extras.world2vlm.words import TASKS
from lib.questions import FAMILIES
from lib.records import read_log, save_jsonl, write_json
from lib.scores import STRATA, interval
from lib.simulators import load_simulator
from lib.stage import need, run_stage


class Data(NamedTuple):
    """Questions to learn from: the number of rooms, and who shows the motions.

    teacher   a row of experiments/simulator.py, or "truth" for the true renderer: both show only motions that a trained
              teacher has seen. "": the true renderer, all motions
    """

    rooms: int
    teacher: str = ""


class World2vlmRow(NamedTuple):
    """The data, the stages of learning, and what the policy is asked."""

    name: str
    data: str = "usual"
    sft: tuple = ()  # flags of extras.world2vlm.train, or of train_sft.py for LESSONS
    rl: bool = False  # GRPO last
    start: str = ""  # the row of STARTS or the demo's stage that it starts from; "": the cold start
    rooms: str = ""  # flags of evaluate.py: it is asked about rooms, not World2VLM's questions

    @property
    def trains(self) -> bool:
        return bool(self.sft or self.rl)


DATA = {
    "usual": Data(1000),  # also the held-out questions of all rows
    "truth": Data(400, "truth"),
    "tuned": Data(400, "ring-plain-s0"),
    "untuned": Data(400, "ring-untuned-s0"),
}
EASY = ("--tasks A2 --steps 400", "--tasks A1 A2 --steps 500")  # turns, then moves too, then all
SFT = (*EASY, "--steps 600")
LESSONS = "--lessons direct --steps 350"
DIRECT = "--mode direct"
STARTS = {"sft": "3", "grpo": "rl"}  # rows that others start from: the folder of their last stage
ROWS = [
    World2vlmRow("start"),
    World2vlmRow("sft", sft=SFT),  # both directions
    World2vlmRow("grpo", rl=True, start="sft"),
    World2vlmRow("at-once", sft=("--steps 1500",)),  # all tasks from the first step on
    World2vlmRow("forward", sft=("--lambda-inv 0 --steps 1500",)),
    World2vlmRow("inverse", sft=(*EASY, "--lambda-fwd 0 --steps 600")),
    World2vlmRow("inverse-at-once", sft=("--lambda-fwd 0 --steps 1500",)),
    World2vlmRow("by-truth", "truth", SFT),  # teachers; same motions
    World2vlmRow("by-tuned", "tuned", SFT),
    World2vlmRow("by-untuned", "untuned", SFT),
    World2vlmRow("direct-only", start="direct", rooms=DIRECT),
    World2vlmRow("lessons", sft=(LESSONS,), rooms=DIRECT),
    World2vlmRow("sft-lessons", sft=(LESSONS,), start="sft", rooms=DIRECT),
    World2vlmRow("grpo-lessons", sft=(LESSONS,), start="grpo", rooms=DIRECT),
    World2vlmRow("agentic", start="phase2", rooms="--mode agentic"),
]
HELD_OUT = 2400  # questions, in random order
MOST = {
    "D1": 0.05,
    "D3": 0.05,
}  # of the questions to learn from: about the paper's shares, in rooms a third


# ---- a row -----------------------------------------------------------------------------------------------------------


def job_of(row: World2vlmRow, seed: int, out: Path) -> Job:
    """What makes a row, one stage after the other; the last command asks the held-out questions."""
    folder = out / f"{row.name}-s{seed}"
    policy = Path(DEMO, row.start or "sft")
    maker = "make demo"
    if row.start in STARTS:
        policy = out / f"{row.start}-s{seed}" / STARTS[row.start]
        maker = f"python -m experiments world2vlm --only {row.start} --seeds {seed}"
    commands = commands_of(row, seed, policy, folder, out)
    if row.rooms:
        return Job(folder.name, commands, needs={policy: maker})
    inputs = {}
    for name in ("usual", row.data):
        inputs[out / "data" / name / "shares.json"] = partial(make_questions, name, out)
    setting = {"data": repr(DATA[row.data]), "held out": HELD_OUT}
    return Job(folder.name, commands, inputs, {policy: maker}, setting)


def commands_of(
    row: World2vlmRow, seed: int, policy: Path, folder: Path, out: Path
) -> list[list[str]]:
    """The stages of learning from `policy` on, then the questions."""
    commands = []
    data = out / "data" / row.data
    for number, flags in enumerate(row.sft, 1):
        stage = folder / str(number)
        where = dict(start=policy, out=stage, seed=seed, threads=1)
        if flags == LESSONS:
            commands.append(words(f"train_sft.py {flags}", data=f"{DEMO}/data", **where))
        else:
            train = f"-m extras.world2vlm.train {flags}"
            commands.append(words(train, data=data, eval_questions=0, **where))
        policy = stage
    if row.rl:
        where = dict(policy=policy, out=folder / "rl", seed=seed, threads=1)
        commands.append(words("-m extras.world2vlm.train_rl", data=data, eval_every=0, **where))
        policy = folder / "rl"
    where = dict(policy=policy, out=folder / "asked", threads=1)
    if row.rooms:
        ask = f"evaluate.py {row.rooms} --no-report"
        commands.append(words(ask, data=f"{DEMO}/data", wm=f"{DEMO}/wm", **where))
    else:
        ask = "-m extras.world2vlm.evaluate"
        commands.append(words(ask, data=out / "data/usual", limit=HELD_OUT, **where))
    return commands


# ---- the questions to learn from -------------------------------------------------------------------------------------


def make_questions(name: str, out: Path) -> None:
    """Fill out/data/<name>; shares.json, {task: questions to learn from}, comes last. Only "usual" holds questions out."""
    folder = out / "data" / name
    data = DATA[name]
    if data.teacher:
        teacher = teacher_of(data.teacher, out)
        make_room_questions(folder, teacher, data.rooms, held_out=(0, 0), threads=1)
    else:
        make_room_questions(folder, None, data.rooms, threads=1)
    rows = with_shares(read_log(folder / "questions_train.jsonl"))  # paths as they are written
    save_jsonl(folder / "questions_train.jsonl", rows)
    write_json(folder / "shares.json", {task: len(by_task(rows)[task]) for task in TASKS})


def teacher_of(name: str, out: Path):
    """The true renderer, or the simulator of a row of experiments/simulator.py."""
    if name == "truth":
        return load_simulator(name)
    row = name.rsplit("-s", 1)[0]
    maker = f"python -m experiments simulator --only {row}"
    return load_simulator(need(str(out.parent / name), maker))


def with_shares(rows: list[dict]) -> list[dict]:
    """Rows without what is too much of the tasks of MOST; the rows come in random order, and the first of a task stay."""
    others = sum(row["category"] not in MOST for row in rows)
    total = others / (1 - sum(MOST.values()))
    left = {task: share * total // 1 for task, share in MOST.items()}
    chosen = []
    for row in rows:
        task = row["category"]
        if task in left:
            left[task] -= 1
        if left.get(task, 0) >= 0:
            chosen.append(row)
    return chosen


# ---- tables ----------------------------------------------------------------------------------------------------------


def by_task(rows: list[dict]) -> dict[str, list[dict]]:
    """{task or kind of question: its rows}."""
    tasks = defaultdict(list)
    for row in rows:
        tasks[row["category"]].append(row)
    return tasks


def numbers(record: dict) -> dict[str, float]:
    """What is averaged of an answer over seeds."""
    means = {"correct": record["correct"], "views": record.get("cost", {}).get("rendered", 0)}
    if "seconds" in record:
        means["seconds"] = record["seconds"]
    return means


def motion_table(out: Path) -> list[str]:
    """World2VLM's questions: reward and full rewards per task, right ways of A1 and A2, all questions against `sft`."""
    head = ["row", "seeds", *TASKS, "A1 way", "A2 way", "all", "over sft", "train CPU-s"]
    base = mean_answers("sft", out, numbers)
    lines = []
    for row in ROWS:
        seeds = finished_seeds(row.name, out)
        records = []
        for _, folder in seeds.values():
            records += read_log(folder / "asked" / "predictions.jsonl")
        if row.rooms or not records:
            continue
        tasks = by_task(records)
        line = [row.name, " ".join(seeds), *(task_cell(tasks[task]) for task in TASKS)]
        for task in ("A1", "A2"):
            ways = [record["parts"].get("action", 0) for record in tasks[task]]
            line.append(interval_text(ways, tasks[task]) if ways else "")
        merged = mean_answers(row.name, out, numbers)
        over = gain_cell(merged, base) if row.name != "sft" else ""
        spent = np.mean([result["cpu_seconds"] for result, _ in seeds.values()])
        lines.append([*line, f"{mean_of(merged, 'correct'):.3f}", over, f"{spent:.0f}"])
    return markdown(head, lines)


def task_cell(part: list[dict]) -> str:
    """Mean reward of a task, its interval, and the share of full rewards."""
    if not part:
        return ""
    rewards = [record["correct"] for record in part]
    return f"{interval_text(rewards, part)} {mean_of(part, 'exact'):.2f}"


def interval_text(values: list[float], part: list[dict]) -> str:
    """ "0.50 [0.41 0.58]": a mean and its interval over rooms."""
    low, high = interval(values, [record["scene"] for record in part])
    return f"{np.mean(values):.2f} [{low:.2f} {high:.2f}]"


def rooms_table(out: Path) -> list[str]:
    """Questions about rooms: right answers by what they need and by family, and over `direct-only` on the same
    questions; views imagined and CPU seconds per question."""
    head = ["row", "seeds", "questions", "right", *STRATA, *FAMILIES]
    head += ["over direct-only", "views", "seconds"]
    base = mean_answers("direct-only", out, numbers)
    lines = []
    for row in ROWS:
        records = mean_answers(row.name, out, numbers) if row.rooms else []
        if not records:
            continue
        parts = [records]
        for needs_view in STRATA.values():
            parts.append([record for record in records if record["needs_view"] is needs_view])
        parts += [by_task(records)[family] for family in FAMILIES]
        right = [f"{mean_of(part, 'correct'):.3f}" if part else "" for part in parts]
        over = gain_cell(records, base) if row.name != "direct-only" else ""
        cost = [f"{mean_of(records, 'views'):.1f}", f"{mean_of(records, 'seconds'):.3f}"]
        seeds = " ".join(finished_seeds(row.name, out))
        lines.append([row.name, seeds, str(len(records)), *right, over, *cost])
    return markdown(head, lines)


def table(out: Path) -> list[str]:
    """The lines of table.md: World2VLM's questions, then questions about rooms."""
    return [*motion_table(out), "", *rooms_table(out)]


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line's flags."""
    return rows_parser(__doc__, "by-*", "out/evidence/world2vlm").parse_args(argv)


LEGEND = (
    "Per task: mean reward [95 % interval over rooms], share of full rewards. Way: share of right directions. "
    "Over ...: on the same questions. Intervals leave out what another seed changes."
)


def main(argv: list[str] | None = None) -> None:
    """Finish the rows one by one, then print the table of all that are finished."""
    args = parse_args(argv)
    run_rows(args, "experiments world2vlm", ROWS, job_of, table, LEGEND)


if __name__ == "__main__":
    run_stage(main)
