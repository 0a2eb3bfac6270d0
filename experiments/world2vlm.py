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
simulator strays on a chain of its own views. Simulators are those of experiments/simulator.py, in the folder above --out; `untuned`
learned under shuffled sentences, `unweighted` has the data of `tuned`. Boxes of a simulator's questions are those of
the room, so D1 to D4 do not suffer from what it draws wrongly.

Out, in out/evidence/world2vlm/: data/<data>/, <row>-s<seed>/{1, 2, 3, rl: the policy after each stage; asked/: its
answers; result.json}, table.md.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import FIRST_ROOM
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
from extras.world2vlm.evaluate import answer_record
from extras.world2vlm.questions import motion_questions, write_motion_questions
from extras.world2vlm.rewards import world2vlm
from extras.world2vlm.transitions import ROOMS, SEEN, drift, room_anchor
from extras.world2vlm.words import TASKS, read_actions
from lib import common, simulators
from lib.geometry import Motion
from lib.records import load_jsonl, save_jsonl
from lib.rooms import FURNISHED
from lib.scores import STRATA, gain_over, interval


class Data(NamedTuple):
    """Questions to learn from: the number of rooms, who shows the motions, which motions, which kinds of rooms."""

    rooms: int = 1000
    teacher: str = "truth"  # or a row of experiments/simulator.py
    seen: bool = False  # only motions that a trained teacher has seen
    tries: int = 1  # its views of every motion, whose agreement is
    weighted: bool = True  # an answer's weight in the loss
    firsts: tuple = (FIRST_ROOM["questions_train"],)  # seeds of the first room of each kind


class Run(NamedTuple):
    """A row: the data, stages of learning (flags of train_sft.py, then of train_rl.py or None), what it is asked."""

    name: str
    data: str = "usual"
    sft: tuple = ()
    rl: str | None = None
    of: str = ""  # the row or the demo's stage that it starts from; "": the cold start
    rooms: str = ""  # flags of evaluate.py: it is asked about rooms, not World2VLM's questions
    drift: str = ""  # the simulator whose chains are measured; no policy is asked


FINE, UNTUNED = "fine-plain-s0", "fine-untuned-s0"
DATA = {
    "usual": Data(),  # also the held-out questions of all rows
    "60": Data(60),
    "250": Data(250),
    **{kind: Data(firsts=(first,)) for kind, (first, _) in FURNISHED.items()},  # bare, cluttered
    "mixed": Data(firsts=tuple(first for first, _ in FURNISHED.values())),
    "truth": Data(400, seen=True),
    "tuned": Data(400, FINE, True, 2),
    "untuned": Data(400, UNTUNED, True, 2),
    "unweighted": Data(400, FINE, True, 2, weighted=False),
}
EASY = ("--tasks A2 --steps 400", "--tasks A1 A2 --steps 500")  # turns, then moves too, then all
SFT = (*EASY, "--steps 600")
LESSONS = "--lessons direct --steps 350"
RUNS = [
    Run("constant"),
    Run("blind"),
    Run("start"),
    Run("sft", sft=SFT),  # both directions
    Run("grpo", rl="", of="sft"),
    Run("at-once", sft=("--steps 1500",)),  # all tasks from the first step on
    Run("forward", sft=("--lambda-inv 0 --steps 1500",)),
    Run("inverse", sft=(*EASY, "--lambda-fwd 0 --steps 600")),
    Run("inverse-at-once", sft=("--lambda-fwd 0 --steps 1500",)),
    *(Run(f"of-{name}-rooms", name, SFT) for name in ("60", "250")),  # the amount of data
    *(
        Run(f"by-{name}", name, SFT) for name in ("truth", "tuned", "untuned", "unweighted")
    ),  # teachers; same motions
    *(
        Run(f"in-{name}-rooms", name, SFT) for name in ("bare", "cluttered", "mixed")
    ),  # mixed: half of each
    Run("start-rooms", rooms="--mode direct"),
    *(Run(f"{name}-rooms", of=name, rooms="--mode direct") for name in ("sft", "grpo")),
    Run("direct-only", of="direct", rooms="--mode direct"),
    Run("lessons", sft=(LESSONS,), rooms="--mode direct"),
    *(
        Run(f"{name}-lessons", sft=(LESSONS,), of=name, rooms="--mode direct")
        for name in ("sft", "grpo")
    ),
    Run("agentic", of="phase2", rooms="--mode agentic"),
    *(Run(name, of="phase2", rooms=f"--mode {name} --limit 256") for name in ("gate", "search")),
    *(
        Run(f"drift-{name}", drift=place)
        for name, place in (("truth", "truth"), ("tuned", FINE), ("untuned", UNTUNED))
    ),
]
DEMO = "out/demo"
CHAIN = (Motion("turn left", 30.0), 4, 40)  # motion, steps, rooms of a drift
ASKED = 2400  # held-out questions, in random order
MOST = {
    "D1": 0.05,
    "D3": 0.05,
}  # of the questions to learn from: about the paper's shares, in rooms a third


def simulator(name, out):
    """truth, or the simulator of a row of experiments/simulator.py."""
    return simulators.load_simulator(
        name
        if name == "truth"
        else str(
            common.need(
                out.parent / name,
                f"python -m experiments simulator --only {name.rsplit('-s', 1)[0]}",
            )
        )
    )


def make_questions(name, out):
    """Fill out/data/<name>, if it is empty. Only "usual" holds questions out."""
    folder, data, rows = out / "data" / name, DATA[name], []
    if name == "usual" and not (folder / "questions_test.jsonl").exists():
        call(
            "-m",
            "extras.world2vlm.questions",
            "--rooms",
            str(data.rooms),
            "--out",
            str(folder),
            "--threads",
            "1",
        )
    elif not (folder / "questions_train.jsonl").exists():
        teacher = simulator(data.teacher, out)
        seeds = [first + i for i in range(data.rooms // len(data.firsts)) for first in data.firsts]
        for i in tqdm(
            range(0, len(seeds), 8), desc=f"questions, {name}"
        ):  # eight rooms imagined at a time
            ((part, _),) = motion_questions(
                seeds[i : i + 8], folder, teacher, SEEN if data.seen else ROOMS, data.tries
            )
            rows += part
        save_jsonl(folder / "questions_val.jsonl", [])
        write_motion_questions(folder, "train", rows, f"{len(seeds)} rooms ({name})", 0)
    rows, kept = (
        common.read_log(folder / "questions_train.jsonl"),
        [],
    )  # in random order: the first of a task stay
    many = sum(row["category"] not in MOST for row in rows) / (1 - sum(MOST.values()))
    left = {task: MOST.get(task, 1) * many // 1 for task in TASKS}
    for row in rows:
        left[row["category"]] -= 1
        kept += (
            [row if data.weighted else row | {"weight": 1.0}] if left[row["category"]] >= 0 else []
        )
    save_jsonl(folder / "questions_train.jsonl", kept)


def worth_most(rows):
    """Of the answers to some questions of a task the one that earns most on all of them."""
    return max(
        sorted({row["answer"] for row in rows}),
        key=lambda said: sum(
            world2vlm(row["category"], row["answer"], said)["total"] for row in rows
        ),
    )


def constant_answers(rows):
    """The best constant answer of each task, for every row."""
    best = {
        task: worth_most([row for row in rows if row["category"] == task])
        for task in {row["category"] for row in rows}
    }
    return [best[row["category"]] for row in rows]


def blind_answers(rows, known, neighbours=5):
    """What the words tell without a picture: for every row the answer that earns most on its nearest known questions.

    Near are those of its task with the same actions and like numbers (boxes, metres, degrees), each over its spread; a
    question without numbers that vary, or with actions that none has, gets the best constant answer of its task.
    """

    def words(row):
        actions = [kind for kind, _ in read_actions(row["question"])]
        return row["category"], *actions, len(numbers(row))

    def numbers(row):
        return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", row["question"])]

    groups, answers = {}, []
    for row in known:
        groups.setdefault(words(row), []).append(row)
    tables = {key: np.array([numbers(row) for row in group]) for key, group in groups.items()}
    best = {
        task: worth_most([row for row in known if row["category"] == task][:1000])
        for task in {row["category"] for row in rows}
    }
    for row in rows:
        key = words(row)
        spread = tables[key].std(0) if key in tables else np.zeros(0)
        if not spread.any():
            answers.append(best[row["category"]])
            continue
        apart = np.square((tables[key] - numbers(row))[:, spread > 0] / spread[spread > 0]).sum(1)
        answers.append(
            worth_most([groups[key][i] for i in apart.argsort(kind="stable")[:neighbours]])
        )
    return answers


def given(rows, answers):
    """Answers that no policy gave, as the records of extras/world2vlm/evaluate.py."""
    return [answer_record(row, answer) for row, answer in zip(rows, answers, strict=True)]


def learned(run, seed, out):
    """The policy that a row begins with: where the row `of` ended, or that stage of the demo."""
    before = next((row for row in RUNS if row.name == run.of), None)
    if before is None:
        return f"{DEMO}/{run.of or 'sft'}"
    return out / f"{run.of}-s{seed}" / ("rl" if before.rl is not None else str(len(before.sft)))


def commands(run, seed, out):
    """What makes a row, one stage after the other: [(script, flags)]; the last asks the held-out questions."""
    place, made, policy = out / f"{run.name}-s{seed}", [], learned(run, seed, out)
    data = f"--data {out}/data/{run.data} --seed {seed}"
    for number, flags in enumerate(run.sft, 1):
        script, about = "-m extras.world2vlm.train", f"{data} --eval-questions 0"
        if flags == LESSONS:
            script, about = "train_sft.py", f"--data {DEMO}/data --seed {seed}"
        made.append((script, f"{about} --start {policy} {flags} --out {place}/{number}"))
        policy = place / str(number)
    if run.rl is not None:
        flags = f"{data} --policy {policy} --eval-every 0 {run.rl} --out {place}/rl"
        made.append(("-m extras.world2vlm.train_rl", flags))
        policy = place / "rl"
    if run.rooms:
        flags = f"--data {DEMO}/data --wm {DEMO}/wm {run.rooms} --no-report"
        script = "evaluate.py"
    else:
        flags = f"--data {out}/data/usual --limit {ASKED}"
        script = "-m extras.world2vlm.evaluate"
    made.append((script, f"{flags} --policy {policy} --out {place}/asked"))
    if run.name in ("constant", "blind") or run.drift:
        return []
    return [(script, f"{flags} --threads 1".split()) for script, flags in made]


def finish(run, seed, out):
    """Do what is missing of one row, result.json last; a finished row is left as it is."""
    place, made = out / f"{run.name}-s{seed}", commands(run, seed, out)
    about = [CHAIN, run.drift] if run.drift else [] if run.rooms else [ASKED, DATA[run.data]]
    setting = {
        "commands": [" ".join([script, *flags]) for script, flags in made],
        "about": repr(about),
    }
    if is_made(place, setting):
        return
    if run.drift:
        motion, length, rooms = CHAIN
        anchors = [room_anchor(FIRST_ROOM["test"] + i) for i in range(rooms)]
        setting["drift"] = drift(
            simulator(run.drift, out), anchors, motion, length, np.random.default_rng(seed)
        )
    elif not run.rooms:
        for name in dict.fromkeys(("usual", run.data)):
            make_questions(name, out)
    if run.name in ("constant", "blind"):
        known, asked = (
            load_jsonl(out / f"data/usual/questions_{split}.jsonl") for split in ("train", "test")
        )
        asked = asked[:ASKED]
        answers = constant_answers(asked) if run.name == "constant" else blind_answers(asked, known)
        save_jsonl(place / "asked/predictions.jsonl", given(asked, answers))
    for script, flags in made:
        call(*script.split(), *flags)
    done = [file for file in place.glob("*/done.json") if file.parent.name != "asked"]
    spent = sum(json.loads(file.read_text())["cpu_seconds"] for file in done)
    common.write_json(place / "result.json", {**setting, "cpu_seconds": spent})


def results(name, out):
    """The finished seeds of a row: {seed: (result, [records of its answers])}."""
    places = sorted(file.parent for file in out.glob(f"{name}-s[0-9]*/result.json"))
    return {
        place.name.rsplit("-s", 1)[1]: (
            json.loads((place / "result.json").read_text()),
            common.read_log(place / "asked/predictions.jsonl"),
        )
        for place in places
    }


def motion_table(out):
    """World2VLM's questions: reward and full rewards per task, right ways of A1 and A2, all questions against `sft`."""
    head, base = (
        ["row", "seeds", *TASKS, "A1 way", "A2 way", "all", "over sft", "train CPU-s"],
        averaged("sft", out),
    )
    base = {record["key"]: record["correct"] for record in base}
    lines = []
    for run in RUNS:
        done, cells = {} if run.rooms else results(run.name, out), {}
        for task in TASKS:
            part = [
                record
                for _, records in done.values()
                for record in records
                if record["category"] == task
            ]
            for key in (task, f"{task} way") if part else ():
                earned = [
                    record["correct"] if key == task else record["parts"].get("action", 0)
                    for record in part
                ]
                cells[key] = "{:.2f} [{:.2f} {:.2f}]".format(
                    np.mean(earned), *interval(earned, [record["scene"] for record in part])
                )
            cells |= (
                {task: f"{cells[task]} {np.mean([record['exact'] for record in part]):.2f}"}
                if part
                else {}
            )
        if cells:
            merged = averaged(run.name, out)
            cells["all"] = f"{np.mean([record['correct'] for record in merged]):.3f}"
            if base and run.name != "sft":
                cells["over sft"] = gap(gain_over(base, merged))
            spent = np.mean([result["cpu_seconds"] for result, _ in done.values()])
            lines.append(
                [
                    run.name,
                    " ".join(done),
                    *(cells.get(key, "") for key in head[2:-1]),
                    f"{spent:.0f}",
                ]
            )
    return markdown(head, lines)


def averaged(name, out):
    """The answers of a row, each number the mean over its finished seeds."""
    asked = {}
    for _, records in results(name, out).values():
        for record in records:
            record["views"] = record.get("cost", {}).get("rendered", 0)
            asked.setdefault(record["key"], []).append(record)
    return [
        same[0]
        | {
            key: np.mean([record[key] for record in same])
            for key in ("correct", "seconds", "views")
            if key in same[0]
        }
        for same in asked.values()
    ]


def rooms_table(out):
    """Questions about rooms: right answers by what they need and by category, and over `direct-only` on the same
    questions; views imagined and CPU seconds per question."""
    kinds = ("camera-camera", "camera-object", "object-object", "region", "rotation")
    base = {record["key"]: record["correct"] for record in averaged("direct-only", out)}
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
    lines = []
    for run in RUNS:
        merged = averaged(run.name, out) if run.rooms else []
        if not merged:
            continue
        parts = [
            merged,
            *(
                [record for record in merged if record["needs_view"] is need]
                for need in STRATA.values()
            ),
            *([record for record in merged if record["category"] == kind] for kind in kinds),
        ]
        gain = gain_over(base, merged) if base and run.name != "direct-only" else None
        lines.append(
            [
                run.name,
                " ".join(results(run.name, out)),
                str(len(merged)),
                *(
                    f"{np.mean([record['correct'] for record in part]):.3f}" if part else ""
                    for part in parts
                ),
                gap(gain),
                f"{np.mean([record['views'] for record in merged]):.1f}",
                f"{np.mean([record['seconds'] for record in merged]):.3f}",
            ]
        )
    return markdown(head, lines)


def table(out):
    """The lines of table.md: World2VLM's questions, questions about rooms, and drifts."""
    chains = [
        f"{run.name}-s{seed} step {k}: "
        + ", ".join(f"{key} {number:.3f}" for key, number in step.items())
        for run in RUNS
        for seed, (result, _) in results(run.name, out).items()
        for k, step in enumerate(result.get("drift", []), 1)
    ]
    tables = [lines for lines in (motion_table(out), rooms_table(out)) if len(lines) > 2]
    return [line for lines in tables for line in (*lines, "")] + chains


def parse_args(argv=None):
    """The command line's flags."""
    return list_parser(
        __doc__, "by-*", "out/evidence/world2vlm", "; experiments/simulator.py's stand beside it"
    ).parse_args(argv)


def main(argv=None):
    """Finish the rows one by one, then print the table of all that are finished."""
    args = parse_args(argv)
    out, named = Path(args.out), chosen(RUNS, args.only, "-m experiments world2vlm")
    jobs = [
        (run, seed)
        for seed in args.seeds
        for run in named
        if run.sft or run.rl is not None or run.of in {row.name for row in RUNS} or seed == 0
    ]
    if args.list:
        return show_jobs(jobs, commands, out)
    common.setup(1)
    for run, seed in jobs:
        if run.of not in {row.name for row in named}:
            policy = str(learned(run, seed, out))
            common.need(
                policy,
                "make demo"
                if policy.startswith(DEMO)
                else f"python -m experiments world2vlm --only {run.of} --seeds {seed}",
            )
        common.say(f"{run.name}-s{seed}")
        finish(run, seed, out)
    publish(
        table(out),
        out,
        "Per task: mean reward [95 % interval over rooms], share of full rewards. Way: share of "
        "right directions. Over ...: on the same questions. Intervals leave out what another "
        "seed changes.",
    )


if __name__ == "__main__":
    common.run(main)
