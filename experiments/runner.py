"""
Rows of an experiment: commands that run one after the other, and what is measured at their end.

A row is finished when its folder holds result.json, and is left as it is; one that was stopped goes on, since each of its
commands does. The same list of rows, --only and --seeds, so gives the same table whatever happened on the way.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Container
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.distributed import die_with_parent, fail, say, setup
from lib.records import read_log, write_json, write_text
from lib.scores import gain_over
from lib.stage import lock_folder, need

DEMO = "out/demo"  # where the rows of a policy begin


class Job(NamedTuple):
    """A row with one seed: what makes it. Commands are the words that one would type behind `python`."""

    name: str  # of its folder: <row>-s<seed>
    commands: list[list[str]]
    inputs: dict[Path, Callable[[], None]] = {}  # {file: what makes it, if it is missing}
    needs: dict[Path, str] = {}  # {path: the command that makes it, for a sentence}
    setting: dict = {}  # what else decides the result
    measure: Callable[[], dict] = dict  # what result.json holds besides


# ---- running ---------------------------------------------------------------------------------------------------------


def words(text: str, **flags) -> list[str]:
    """A command as a list of words: words("train_wm.py --steps 5", out=folder)."""
    command = text.split()
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return command


def start(command: list[str], **options) -> subprocess.Popen:
    """Start a command on one CPU thread, out of reach of Ctrl-C: who started it ends it, and it saves before it leaves.

    If who started it is killed, it is too.
    """
    options |= {"start_new_session": True, "preexec_fn": die_with_parent}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, "-u", *command], env=environment, **options)


def call(command: list[str]) -> None:
    """Run a command and wait for it."""
    child = start(command)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise
    if code:
        fail(f"`python {' '.join(command)}` ended with code {code}; what it said stands above.")


def is_finished(folder: Path, setting: dict) -> bool:
    """Whether `folder` holds the result of a row; a sentence if it was made by another setting."""
    if not (folder / "result.json").exists():
        return False
    result = json.loads((folder / "result.json").read_text())
    before = {key: result.get(key) for key in setting}
    if before != setting:
        fail(
            f"{folder} was made with {before}, not with {setting}. Remove it, or give another --out."
        )
    return True


def finish_job(job: Job, out: Path) -> None:
    """Do what is missing of one row, result.json last; a finished row is left as it is."""
    folder = out / job.name
    setting = {"commands": [" ".join(command) for command in job.commands], **job.setting}
    if is_finished(folder, setting):
        return
    say(job.name)
    for file, make in job.inputs.items():
        if not file.exists():
            make()
    for command in job.commands:
        call(command)
    trained = [file for file in folder.glob("**/done.json") if file.parent.name != "asked"]
    spent = sum(json.loads(file.read_text())["cpu_seconds"] for file in trained)
    write_json(folder / "result.json", {**setting, "cpu_seconds": spent, **job.measure()})


def run_jobs(jobs: list[Job], out: Path) -> None:
    """Finish jobs one by one; what none of them makes must be there before the first begins."""
    names = {job.name for job in jobs}
    for job in jobs:
        for path, command in job.needs.items():
            if not names.intersection(path.parts):
                need(str(path), command)
    for job in jobs:
        finish_job(job, out)


# ---- command line ----------------------------------------------------------------------------------------------------


def rows_parser(doc: str, example: str, out: str) -> argparse.ArgumentParser:
    """The parser of a list of rows: which rows, which seeds, where, or only the list."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    add = parser.add_argument
    add("--only", nargs="+", default=["*"], help=f"names of rows, or patterns such as '{example}'")
    add("--seeds", type=int, nargs="+", default=[0], help="of training; what trains nothing has 0")
    add("--out", type=Path, default=Path(out), help="folder of the rows")
    add("--list", action="store_true", help="print the rows and their commands, and run nothing")
    return parser


def run_rows(
    args: argparse.Namespace,
    script: str,
    rows: list,
    job_of: Callable,
    table: Callable,
    legend: str,
) -> None:
    """Finish the rows that --only and --seeds name, one by one, then print the table of all that are finished.

    rows   each has a `name`, and `trains`: if it does not, there is one seed of it
    job_of(row, seed, out) -> Job;  table(out) -> the lines of table.md;  legend: what they mean
    """
    matching = [row for row in rows if any(fnmatch(row.name, pattern) for pattern in args.only)]
    if not matching:
        patterns = " or ".join(args.only)
        fail(f"No row is called {patterns}. `python -m {script} --list` names them all.")
    jobs = []
    for seed in args.seeds:
        jobs += [job_of(row, seed, args.out) for row in matching if row.trains or seed == 0]
    if args.list:
        print_jobs(jobs, args.out)
        return
    setup(1)
    lock_folder(args.out)
    run_jobs(jobs, args.out)
    text = "\n".join(table(args.out)) + "\n"
    write_text(args.out / "table.md", text)
    print(f"{text}\n{legend} {args.out}/table.md")


def print_jobs(jobs: list[Job], out: Path) -> None:
    """--list: every job, whether it is finished, and its commands."""
    for job in jobs:
        done = "done" if (out / job.name / "result.json").exists() else ""
        commands = "; ".join(" ".join(command) for command in job.commands)
        print(f"{job.name:32}{done:6}{commands}")


# ---- results ---------------------------------------------------------------------------------------------------------


def finished_seeds(name: str, out: Path) -> dict[str, tuple[dict, Path]]:
    """The finished seeds of a row: {seed: (result.json, folder)}."""
    seeds = {}
    for file in sorted(out.glob(f"{name}-s[0-9]*/result.json")):
        seed = file.parent.name.rsplit("-s", 1)[1]
        seeds[seed] = (json.loads(file.read_text()), file.parent)
    return seeds


def mean_answers(
    name: str, out: Path, numbers: Callable[[dict], dict], seeds: Container[str] | None = None
) -> list[dict]:
    """The answers of a row, its finished seeds as one: of every question a prediction, with the mean of `numbers` of it.

    seeds   only these; None: all
    """
    same_question = {}
    for seed, (_, folder) in finished_seeds(name, out).items():
        if seeds is not None and seed not in seeds:
            continue
        for record in read_log(folder / "asked" / "predictions.jsonl"):
            same_question.setdefault(record["key"], []).append(record)
    merged = []
    for records in same_question.values():
        values = [numbers(record) for record in records]
        means = {key: np.mean([value[key] for value in values]) for key in values[0]}
        merged.append(records[0] | means)
    return merged


def mean_of(records: list[dict], key: str) -> float:
    """The mean of one number over predictions."""
    return float(np.mean([record[key] for record in records]))


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table; cells are texts."""
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


def gain_cell(records: list[dict], base: list[dict]) -> str:
    """How much more right than `base` on the same questions, as a cell; empty if there is nothing to compare with."""
    if not base:
        return ""
    gain = gain_over({record["key"]: record["correct"] for record in base}, records)
    return gap_text(gain["difference"], *gain["ci95"])


def gap_text(difference: float, low: float, high: float, digits: int = 3) -> str:
    """A difference and its interval as a cell: "+0.120 [+0.050 +0.190]"."""
    low_high = f"{low:+.{digits}f} {high:+.{digits}f}"
    return f"{difference:+.{digits}f} [{low_high}]"
