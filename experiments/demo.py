"""
The whole loop on a laptop: `make demo`, or python -m experiments demo.

    data ─┬─ wm ──┬──── phase1 ── phase2 ── eval        at most two stages run at once, one thread each, so
          │       └─ eval_wm                            that two cores are busy and never wait for each other
          └─ sft ─┬─ (phase1)
                  └─ direct ── eval_direct

Every stage is a command that one could type; its output goes to out/demo/logs/. Ctrl-C stops all of them with their
work saved, and the same command goes on from there. At the end: one table, results.json, report.html, pictures.
With --quick every stage takes a step or two: that all of it runs is seen in a minute, and its numbers mean nothing.

`direct` is the baseline that never imagines. It starts from the same cold start and goes on learning to answer
directly for about as long as both phases of reinforcement learning take; the CPU seconds of both stand below the table.
"""

import argparse
import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from experiments.runner import DEMO, start
from experiments.text_guess import text_only_chance
from lib.distributed import fail, say
from lib.records import Question, load_jsonl, read_log, write_json
from lib.scores import (
    gain_over,
    gain_text,
    print_consistency,
    text_table,
)
from lib.stage import lock_folder, run_stage


class Stage(NamedTuple):
    """A command, the stages it waits for, and the folder below out/demo that it fills."""

    name: str
    needs: tuple
    folder: str
    command: str
    quick: str  # flags of --quick


RL = "--data {out}/data --wm {out}/wm"
QUICK_RL = "--steps 1 --questions 2 --group 2 --direct-rollouts 1 --eval-questions 4"
STAGES = (
    Stage("data", (), "data", "data.py --threads 2", "--rooms 24"),
    Stage(
        "wm",
        ("data",),
        "wm",
        "train_wm.py --data {out}/data --threads 1",
        "--steps 20 --eval-contexts 1",
    ),
    Stage(
        "sft",
        ("data",),
        "sft",
        "train_sft.py --data {out}/data --threads 1",
        "--see-steps 5 --steps 20",
    ),
    Stage(
        "phase1",
        ("sft", "wm"),
        "phase1",
        f"train_rl.py --phase 1 --policy {{out}}/sft --threads 1 {RL}",
        QUICK_RL,
    ),
    Stage(
        "phase2",
        ("phase1",),
        "phase2",
        f"train_rl.py --phase 2 --policy {{out}}/phase1 --threads 1 {RL}",
        QUICK_RL,
    ),
    Stage(
        "direct",
        ("sft",),
        "direct",
        "train_sft.py --lessons direct --steps 1300 --data {out}/data --start {out}/sft --threads 1",
        "--steps 10",
    ),
    Stage(
        "eval_wm",
        ("wm",),
        "eval/wm",
        "evaluate.py --bench wm --limit 300 --dose-rooms 8 --threads 1 --data {out}/data --wm {out}/wm",
        "--limit 8 --dose-rooms 1",
    ),
    Stage(
        "eval_direct",
        ("direct",),
        "eval/direct",
        "evaluate.py --mode direct --threads 1 --data {out}/data --policy {out}/direct",
        "--limit 16",
    ),
    Stage(
        "eval",
        ("phase2",),
        "eval/rooms",
        f"evaluate.py --policy {{out}}/phase2 --threads 1 {RL}",
        "--limit 16",
    ),
)
# what each side trains after the same cold start, the simulator aside
IMAGINING = ("phase1", "phase2")
ANSWERING = ("direct",)
WATCHED = ("loss_flow", "nearest", "loss", "facts", "match", "call_rate")  # beside a bar


# ---- running ---------------------------------------------------------------------------------------------------------


class Running:
    """A stage under way: its process, its log, its bar."""

    def __init__(self, stage: Stage, out: Path, line: int, quick: bool):
        self.stage = stage
        self.folder = out / stage.folder
        self.log = out / "logs" / f"{stage.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = f"{stage.command} {stage.quick if quick else ''} --out {{out}}/{stage.folder}"
        words = [word.format(out=out) for word in command.split()]  # `out` may hold spaces
        self.start = time.time()
        with open(self.log, "w") as log:
            self.process = start(words, stdout=log, stderr=subprocess.STDOUT)
        self.bar = tqdm(desc=f"{stage.name:11}", position=line, leave=False, dynamic_ncols=True)

    def show(self) -> None:
        """Move the bar to where the stage's own last bar stands, with the newest numbers of its log."""
        counts = re.findall(r"(\d+)/(\d+) \[", self.log.read_text()[-2000:])
        if counts:
            self.bar.n, self.bar.total = map(int, counts[-1])
        newest = (read_log(self.folder / "log.jsonl") or [{}])[-1]
        numbers = {key: newest[key] for key in WATCHED if isinstance(newest.get(key), float)}
        self.bar.set_postfix(
            {key: f"{number:.2f}" for key, number in numbers.items()}, refresh=False
        )
        self.bar.refresh()

    def complaint(self) -> str:
        """What to say if it failed: the end of its log."""
        lines = [line for line in re.split(r"[\r\n]+", self.log.read_text()) if line.strip()]
        end = "\n".join(lines[-12:])
        return f"The stage {self.stage.name} stopped; the end of {self.log}:\n{end}"


def run_stages(out: Path, quick: bool) -> dict[str, float]:
    """Run every stage once its needs are met, two at a time -> {stage: wall seconds}. Stops all if one fails."""
    waiting = list(STAGES)
    running = []
    seconds = {}
    try:
        while waiting or running:
            ready = [stage for stage in waiting if seconds.keys() >= set(stage.needs)]
            for stage in ready[: 2 - len(running)]:
                waiting.remove(stage)
                first_line_taken = any(job.bar.pos == 0 for job in running)
                running.append(Running(stage, out, int(first_line_taken), quick))
            time.sleep(0.5)
            for job in list(running):
                job.show()
                code = job.process.poll()
                if code is None:
                    continue
                running.remove(job)
                job.bar.close()
                if code:
                    raise RuntimeError(job.complaint())
                seconds[job.stage.name] = time.time() - job.start
                say(f"{job.stage.name:11} done, {seconds[job.stage.name]:6.0f} s")
    except (KeyboardInterrupt, RuntimeError) as error:
        for sig in (signal.SIGINT, signal.SIGTERM):  # a second one must not tear the saving apart
            signal.signal(sig, signal.SIG_IGN)
        stopped = "Stopped, with the work so far saved. The same command goes on from there."
        fail(str(error) or stopped)
    finally:  # whatever ended us: none goes on unseen
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()
            job.bar.close()
    return seconds


# ---- results ---------------------------------------------------------------------------------------------------------


def read_json_of(folder: Path, name: str) -> dict:
    """A JSON file of a stage's folder; {} if there is none."""
    file = folder / name
    return json.loads(file.read_text()) if file.exists() else {}


def durations(out: Path, seconds: dict[str, float]) -> dict[str, float]:
    """{stage: wall seconds} over interruptions: a trained stage knows its own, others keep their longest run."""
    before = read_json_of(out, "seconds.json")
    known = {}
    for stage in STAGES:
        longest = max(seconds[stage.name], before.get(stage.name, 0))
        done = read_json_of(out / stage.folder, "done.json")
        known[stage.name] = done.get("seconds", round(longest, 1))
    write_json(out / "seconds.json", known)
    return known


def paired_bootstrap(ours: list, theirs: list) -> dict:
    """Accuracy of ours minus theirs on the same questions, each counting the same -> {"difference", "ci95", "n"}.

    Raises ValueError if the two were not asked the same questions.
    """
    other = {row["key"]: row["correct"] for row in theirs}
    apart = other.keys() ^ {row["key"] for row in ours}
    if apart or not ours:
        raise ValueError(
            f"a paired comparison needs the same questions: {len(apart)} stand in one list"
        )
    return {**gain_over(other, ours), "n": len(ours)}


def collect(out: Path, seconds: dict[str, float]) -> dict:
    """The stages' results as one dictionary, for results.json."""
    rooms, direct, wm = (
        read_json_of(out / "eval" / name, "results.json") for name in ("rooms", "direct", "wm")
    )
    cpu_seconds = {}
    for stage in STAGES:
        done = read_json_of(out / stage.folder, "done.json")
        if done:
            cpu_seconds[stage.name] = done["cpu_seconds"]

    def unseen(name, mode):
        """The answers to questions that need an unseen view."""
        rows = read_log(out / "eval" / name / "predictions.jsonl")
        return [row for row in rows if row["mode"] == mode and row["needs_view"]]

    agentic = unseen("rooms", "agentic")
    train, test = (
        load_jsonl(out / "data" / f"questions_{split}.jsonl") for split in ("train", "test")
    )
    return {
        "modes": {**rooms["modes"], "direct_only": direct["modes"]["direct"]},
        "chance": rooms["chance"],
        "text_only_chance": text_only_chance(train, test[: rooms["n"]]),
        "agentic_gain_on_needs_view": {
            "over direct": paired_bootstrap(agentic, unseen("rooms", "direct")),
            "over direct_only": paired_bootstrap(agentic, unseen("direct", "direct")),
        },
        "wm": {
            **next(iter(wm["simulators"].values())),
            "baselines": wm["baselines"],
            "oracles": wm["oracles"],
        },
        "seconds": durations(out, seconds),
        "cpu_seconds": cpu_seconds,
    }


def print_results(results: dict) -> None:
    """The table of the demo: a family of questions a row, a mode a column."""
    modes = results["modes"].values()
    groups = {"all": list(modes)}
    for part in ("by_need", "by_category"):
        for name in next(iter(modes))[part]:
            groups[name] = [summary[part][name] for summary in modes]
    rows = []
    for name, cells in groups.items():
        rows.append([name, cells[0]["n"]])
        for cell in cells:
            half = (cell["ci95"][1] - cell["ci95"][0]) / 2
            rows[-1].append(f"{cell['accuracy']:.3f} ±{half:.2f} {cell['call_rate']:4.0%}")
    print("\n" + text_table(["", "n", *results["modes"]], rows), end="")
    print(
        f"accuracy ± half of its 95 % interval, share of questions with a call; questions about rooms never trained on; "
        f"chance {results['chance']:.2f}, the best guess from the text alone {results['text_only_chance']:.2f}"
    )
    for name, gain in results["agentic_gain_on_needs_view"].items():
        gap = gain_text({"gain": gain})
        print(f"agentic {name}, where an unseen view is needed: {gap}, n {gain['n']}")
    imagine = sum(results["cpu_seconds"][name] for name in IMAGINING)
    answer = sum(results["cpu_seconds"][name] for name in ANSWERING)
    print(
        f"CPU seconds after the same cold start: {imagine:.0f} of GRPO, {answer:.0f} for direct_only; the simulator "
        f"{results['cpu_seconds']['wm']:.0f}"
    )

    print_consistency({"simulators": {"Astra-WM": results["wm"]}, **results["wm"]})
    print(
        "seconds: " + ", ".join(f"{name} {time:.0f}" for name, time in results["seconds"].items())
    )


def write_report(results: dict, out: Path) -> None:
    """out/report.html: tables, curves, and every question as a dialogue."""
    try:
        from extras.report import pages, report
    except ImportError:
        say("No report.html: extras/, which makes it, is not here.")
        return
    folder = out / "eval" / "rooms"
    records = {}
    for row in read_log(folder / "predictions.jsonl"):
        records.setdefault((row["mode"], row["simulator"]), {})[row["key"]] = row
    answered = len(next(iter(records.values())))
    questions = load_jsonl(out / "data" / "questions_test.jsonl", Question)[:answered]
    report.write(
        out / "report.html",
        "Thinking with imagination, on a laptop",
        results,
        results["wm"],
        curves=sorted(out.glob("phase*/curves.png")),
        sheet=out / "wm" / "views.png",
        folder=folder,
        data=out / "data",
        dialogues=pages.dialogue_rows(records, questions),
    )
    pictures = ", ".join(
        f"{out}/{name}" for name in ("wm/views.png", "phase1/curves.png", "phase2/curves.png")
    )
    say(f"\nto look at: {out}/report.html, {pictures}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's flags."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", default=DEMO, help="folder of the demonstration")
    parser.add_argument("--quick", action="store_true", help="a step or two of each stage")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run all stages, then print the table."""
    args = parse_args(argv)
    out = Path(args.out)
    say(
        "The loop at its tiny preset, two processes on CPU; the paper's run is --preset astra (README)."
    )
    if args.quick:
        say("--quick: a step or two of each stage. The numbers mean nothing.")
    lock_folder(out)
    results = collect(out, run_stages(out, args.quick))
    write_json(out / "results.json", results)
    print_results(results)
    write_report(results, out)


if __name__ == "__main__":
    run_stage(main)
