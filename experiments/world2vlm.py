"""
What World2VLM rests on: its stages, directions and data, as runs and a table (Tables 2 to 4 of arXiv 2604.26934).

  python -m experiments world2vlm --list                           every row, its commands, whether it is finished
  python -m experiments world2vlm                                  run what is missing; stopped, it goes on
  python -m experiments world2vlm --only "by-*" --seeds 0 1 2      some rows, three seeds of the training each

Rows start from the demo's cold start (`make demo` comes first: out/demo), learn for 1,500 steps (`grpo`: 60 more), and
answer the same held-out questions, whose pictures are of the true renderer. `constant` gives, per task, the true
answer that earns most on these very questions; `blind` knows the words of all questions and sees no picture. Compare
`forward` with `inverse-at-once`, as neither begins with turns. `…-rooms` are asked questions about rooms: World2VLM
alone forgets how to answer them, so `…lessons` learn 350 steps of direct lessons first. Beside them the demo's
policies: `direct-only` (1,800 such steps), `agentic`, with a `gate`, in a `search`. `drift-…` is no policy: how far a
simulator strays on a chain of its own views. Simulators are those of experiments/simulator.py, in the folder above --out;
`untuned` learned under shuffled sentences, `unweighted` has the data of `tuned`. Boxes of a simulator's questions are
those of the room, so D1 to D4 do not suffer from what it draws wrongly.

Out, in out/evidence/world2vlm/: data/<data>/, <row>-s<seed>/{1, 2, 3, rl: the policy after each stage; asked/: its
answers; result.json}, table.md.
"""

import re
from argparse import Namespace
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import FIRST_ROOM
from experiments.runner import (
    DEMO,
    Job,
    call,
    finished_seeds,
    gap_text,
    markdown,
    mean_answers,
    mean_of,
    rows_parser,
    run_rows,
    words,
)
from extras.world2vlm.evaluate import answer_record
from extras.world2vlm.questions import motion_questions, write_motion_questions
from extras.world2vlm.rewards import world2vlm
from extras.world2vlm.transitions import ROOMS, SEEN, drift, room_anchor
from extras.world2vlm.words import TASKS, read_actions
from lib.geometry import Motion
from lib.records import load_jsonl, read_log, save_jsonl, write_json
from lib.rooms import FURNISHED
from lib.scores import STRATA, gain_over, interval
from lib.simulators import load_simulator
from lib.stage import need, run_stage
from lib.streams import numpy_stream


class Data(NamedTuple):
    """Questions to learn from: the number of rooms, who shows the motions, which motions, which kinds of rooms."""

    rooms: int = 1000
    teacher: str = "truth"  # or a row of experiments/simulator.py
    seen: bool = False  # only motions that a trained teacher has seen
    tries: int = 1  # its views of every motion, whose agreement is
    weighted: bool = True  # an answer's weight in the loss
    firsts: tuple = (FIRST_ROOM["questions_train"],)  # seeds of the first room of each kind


class World2vlmRow(NamedTuple):
    """The data, the stages of learning, and what the policy is asked."""

    name: str
    data: str = "usual"
    sft: tuple = ()  # flags of extras.world2vlm.train, or of train_sft.py for LESSONS
    rl: bool = False  # GRPO last
    start: str = ""  # the row of STARTS or the demo's stage that it starts from; "": the cold start
    rooms: str = ""  # flags of evaluate.py: it is asked about rooms, not World2VLM's questions
    drift: str = ""  # the simulator whose chains are measured; no policy is asked

    @property
    def trains(self) -> bool:
        return bool(self.sft or self.rl or self.start in STARTS)


FINE = "fine-plain-s0"
UNTUNED = "fine-untuned-s0"
BARE, CLUTTERED = (first for first, _ in FURNISHED.values())
DATA = {
    "usual": Data(),  # also the held-out questions of all rows
    "60": Data(60),
    "250": Data(250),
    "bare": Data(firsts=(BARE,)),
    "cluttered": Data(firsts=(CLUTTERED,)),
    "mixed": Data(firsts=(BARE, CLUTTERED)),
    "truth": Data(400, seen=True),
    "tuned": Data(400, FINE, seen=True, tries=2),
    "untuned": Data(400, UNTUNED, seen=True, tries=2),
    "unweighted": Data(400, FINE, seen=True, tries=2, weighted=False),
}
EASY = ("--tasks A2 --steps 400", "--tasks A1 A2 --steps 500")  # turns, then moves too, then all
SFT = (*EASY, "--steps 600")
LESSONS = "--lessons direct --steps 350"
DIRECT = "--mode direct"
STARTS = {
    "sft": "3",
    "grpo": "rl",
}  # rows that others start from, and the folder of their last stage
ROWS = [
    World2vlmRow("constant"),
    World2vlmRow("blind"),
    World2vlmRow("start"),
    World2vlmRow("sft", sft=SFT),  # both directions
    World2vlmRow("grpo", rl=True, start="sft"),
    World2vlmRow("at-once", sft=("--steps 1500",)),  # all tasks from the first step on
    World2vlmRow("forward", sft=("--lambda-inv 0 --steps 1500",)),
    World2vlmRow("inverse", sft=(*EASY, "--lambda-fwd 0 --steps 600")),
    World2vlmRow("inverse-at-once", sft=("--lambda-fwd 0 --steps 1500",)),
    World2vlmRow("of-60-rooms", "60", SFT),  # the amount of data
    World2vlmRow("of-250-rooms", "250", SFT),
    World2vlmRow("by-truth", "truth", SFT),  # teachers; same motions
    World2vlmRow("by-tuned", "tuned", SFT),
    World2vlmRow("by-untuned", "untuned", SFT),
    World2vlmRow("by-unweighted", "unweighted", SFT),
    World2vlmRow("in-bare-rooms", "bare", SFT),
    World2vlmRow("in-cluttered-rooms", "cluttered", SFT),
    World2vlmRow("in-mixed-rooms", "mixed", SFT),  # half of each
    World2vlmRow("start-rooms", rooms=DIRECT),
    World2vlmRow("sft-rooms", start="sft", rooms=DIRECT),
    World2vlmRow("grpo-rooms", start="grpo", rooms=DIRECT),
    World2vlmRow("direct-only", start="direct", rooms=DIRECT),
    World2vlmRow("lessons", sft=(LESSONS,), rooms=DIRECT),
    World2vlmRow("sft-lessons", sft=(LESSONS,), start="sft", rooms=DIRECT),
    World2vlmRow("grpo-lessons", sft=(LESSONS,), start="grpo", rooms=DIRECT),
    World2vlmRow("agentic", start="phase2", rooms="--mode agentic"),
    World2vlmRow("gate", start="phase2", rooms="--mode gate --limit 256"),
    World2vlmRow("search", start="phase2", rooms="--mode search --limit 256"),
    World2vlmRow("drift-truth", drift="truth"),
    World2vlmRow("drift-tuned", drift=FINE),
    World2vlmRow("drift-untuned", drift=UNTUNED),
]
DRIFT_MOTION = Motion("turn left", 30.0)
DRIFT_STEPS = 4
DRIFT_ROOMS = 40
HELD_OUT = 2400  # questions, in random order
MOST = {
    "D1": 0.05,
    "D3": 0.05,
}  # of the questions to learn from: about the paper's shares, in rooms a third


# ---- a row -----------------------------------------------------------------------------------------------------------


def job_of(row: World2vlmRow, seed: int, out: Path) -> Job:
    """What makes a row, one stage after the other; the last command asks the held-out questions."""
    folder = out / f"{row.name}-s{seed}"
    if row.drift:
        setting = {"drift of": [row.drift, str(DRIFT_MOTION), DRIFT_STEPS, DRIFT_ROOMS]}
        return Job(folder.name, [], setting=setting, measure=partial(measure_drift, row, seed, out))
    inputs, setting = {}, {}
    if not row.rooms:
        setting = {"data": repr(DATA[row.data]), "held out": HELD_OUT}
        for name in ("usual", row.data):
            inputs[out / "data" / name / "shares.json"] = partial(make_questions, name, out)
    if row.name in ("constant", "blind"):
        return Job(
            folder.name, [], inputs, setting=setting, measure=partial(guess, row.name, folder, out)
        )
    start = start_of(row, seed, out)
    maker = "make demo"
    if row.start in STARTS:
        maker = f"python -m experiments world2vlm --only {row.start} --seeds {seed}"
    needs = {start: maker}
    return Job(folder.name, commands_of(row, seed, start, folder, out), inputs, needs, setting)


def start_of(row: World2vlmRow, seed: int, out: Path) -> Path:
    """The policy that a row begins with: where another row ended, or that stage of the demo."""
    if row.start in STARTS:
        return out / f"{row.start}-s{seed}" / STARTS[row.start]
    return Path(DEMO, row.start or "sft")


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


def simulator_of(name: str, out: Path):
    """The true renderer, or the simulator of a row of experiments/simulator.py."""
    if name == "truth":
        return load_simulator(name)
    row = name.rsplit("-s", 1)[0]
    return load_simulator(
        need(str(out.parent / name), f"python -m experiments simulator --only {row}")
    )


def measure_drift(row: World2vlmRow, seed: int, out: Path) -> dict:
    """How far a simulator strays per step of a chain of its own views."""
    anchors = [room_anchor(FIRST_ROOM["test"] + i) for i in range(DRIFT_ROOMS)]
    rng = numpy_stream("motion questions", seed)
    simulator = simulator_of(row.drift, out)
    return {"drift": drift(simulator, anchors, DRIFT_MOTION, DRIFT_STEPS, rng)}


# ---- the questions to learn from -------------------------------------------------------------------------------------


def make_questions(name: str, out: Path) -> None:
    """Fill out/data/<name>; shares.json, {task: questions to learn from}, comes last. Only "usual" holds questions out."""
    folder = out / "data" / name
    data = DATA[name]
    if name == "usual":
        make = "-m extras.world2vlm.questions"
        call(words(make, rooms=data.rooms, out=folder, threads=1))
    else:
        teacher = simulator_of(data.teacher, out)
        space = SEEN if data.seen else ROOMS
        seeds = []
        for i in range(data.rooms // len(data.firsts)):
            seeds += [first + i for first in data.firsts]
        rows = []
        for i in tqdm(range(0, len(seeds), 8), desc=f"questions, {name}"):  # eight rooms at a time
            ((part, _),) = motion_questions(seeds[i : i + 8], folder, teacher, space, data.tries)
            rows += part
        save_jsonl(folder / "questions_val.jsonl", [])
        write_motion_questions(folder, "train", rows, f"{len(seeds)} rooms ({name})", 0)
    rows = with_shares(read_log(folder / "questions_train.jsonl"))
    if not data.weighted:
        rows = [row | {"weight": 1.0} for row in rows]
    save_jsonl(folder / "questions_train.jsonl", rows)
    shares = {task: sum(row["category"] == task for row in rows) for task in TASKS}
    write_json(folder / "shares.json", shares)


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


# ---- answers without a picture ---------------------------------------------------------------------------------------


def guess(name: str, folder: Path, out: Path) -> dict:
    """Answer the held-out questions by a rule; nothing for result.json."""
    known = load_jsonl(out / "data/usual/questions_train.jsonl")
    rows = load_jsonl(out / "data/usual/questions_test.jsonl")[:HELD_OUT]
    answers = constant_answers(rows) if name == "constant" else blind_answers(rows, known)
    records = [answer_record(row, answer) for row, answer in zip(rows, answers, strict=True)]
    save_jsonl(folder / "asked" / "predictions.jsonl", records)
    return {}


def worth_most(rows: list[dict]) -> str:
    """Of the answers to some questions of a task the one that earns most on all of them."""

    def total(answer):
        return sum(world2vlm(row["category"], row["answer"], answer)["total"] for row in rows)

    return max(sorted({row["answer"] for row in rows}), key=total)


def by_task(rows: list[dict]) -> dict[str, list[dict]]:
    """{task: its rows}."""
    tasks = defaultdict(list)
    for row in rows:
        tasks[row["category"]].append(row)
    return tasks


def constant_answers(rows: list[dict]) -> list[str]:
    """The best constant answer of each task, for every row."""
    best = {task: worth_most(part) for task, part in by_task(rows).items()}
    return [best[row["category"]] for row in rows]


def blind_answers(rows: list[dict], known: list[dict], neighbours: int = 5) -> list[str]:
    """What the words tell without a picture: for every row the answer that earns most on its nearest known questions.

    Near are those of its task with the same actions and like numbers (boxes, metres, degrees), each over its spread; a
    question without numbers that vary, or with actions that none has, gets the best constant answer of its task.
    """
    best = {task: worth_most(part[:1000]) for task, part in by_task(known).items()}
    groups = defaultdict(list)  # of known questions that say the same but for their numbers
    for row in known:
        groups[wording(row)].append(row)
    tables = {key: np.array([numbers_in(row) for row in group]) for key, group in groups.items()}
    answers = []
    for row in rows:
        key = wording(row)
        spread = tables[key].std(0) if key in tables else np.zeros(0)
        if not spread.any():
            answers.append(best[row["category"]])
            continue
        varies = spread > 0
        steps = (tables[key] - numbers_in(row))[:, varies] / spread[varies]
        nearest = np.square(steps).sum(1).argsort(kind="stable")[:neighbours]
        answers.append(worth_most([groups[key][i] for i in nearest]))
    return answers


def wording(row: dict) -> tuple:
    """What a question says but for its numbers: task, actions, how many numbers."""
    actions = [kind for kind, _ in read_actions(row["question"])]
    return row["category"], *actions, len(numbers_in(row))


def numbers_in(row: dict) -> list[float]:
    """The numbers of a question."""
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", row["question"])]


# ---- tables ----------------------------------------------------------------------------------------------------------


def numbers(record: dict) -> dict[str, float]:
    """What is averaged of an answer over seeds."""
    means = {"correct": record["correct"], "views": record.get("cost", {}).get("rendered", 0)}
    if "seconds" in record:
        means["seconds"] = record["seconds"]
    return means


def gain_cell(base: list[dict], records: list[dict]) -> str:
    """How much more right than `base` on the same questions; empty if there is nothing to compare with."""
    if not base:
        return ""
    gain = gain_over({record["key"]: record["correct"] for record in base}, records)
    return gap_text(gain["difference"], *gain["ci95"])


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
        over = gain_cell(base, merged) if row.name != "sft" else ""
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
    """Questions about rooms: right answers by what they need and by category, and over `direct-only` on the same
    questions; views imagined and CPU seconds per question."""
    kinds = ("camera-camera", "camera-object", "object-object", "region", "rotation")
    head = [
        "row",
        "seeds",
        "questions",
        "right",
        *STRATA,
        *kinds,
        "over direct-only",
        "views",
        "seconds",
    ]
    base = mean_answers("direct-only", out, numbers)
    lines = []
    for row in ROWS:
        records = mean_answers(row.name, out, numbers) if row.rooms else []
        if not records:
            continue
        parts = [records]
        for need_of_part in STRATA.values():
            parts.append([record for record in records if record["needs_view"] is need_of_part])
        parts += [by_task(records)[kind] for kind in kinds]
        right = [f"{mean_of(part, 'correct'):.3f}" if part else "" for part in parts]
        over = gain_cell(base, records) if row.name != "direct-only" else ""
        cost = [f"{mean_of(records, 'views'):.1f}", f"{mean_of(records, 'seconds'):.3f}"]
        seeds = " ".join(finished_seeds(row.name, out))
        lines.append([row.name, seeds, str(len(records)), *right, over, *cost])
    return markdown(head, lines)


def table(out: Path) -> list[str]:
    """The lines of table.md: World2VLM's questions, questions about rooms, and drifts."""
    lines = []
    for part in (motion_table(out), rooms_table(out)):
        if len(part) > 2:
            lines += [*part, ""]
    for row in ROWS:
        for seed, (result, _) in finished_seeds(row.name, out).items():
            for k, step in enumerate(result.get("drift", []), 1):
                errors = ", ".join(f"{key} {number:.3f}" for key, number in step.items())
                lines.append(f"{row.name}-s{seed} step {k}: {errors}")
    return lines


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
