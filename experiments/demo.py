"""
The whole loop on a laptop: `make demo`, or python -m experiments demo.

    data ─┬─ wm ──┬──── phase1 ── phase2 ── eval        at most two stages run at once, one thread each, so
          │       └─ eval_wm                            that two cores are busy and never wait for each other
          └─ sft ─┬─ (phase1)
                  └─ direct ── eval_direct

Every stage is a command that one could type; its output goes to out/demo/logs/. Ctrl-C stops all of them with their
work saved, and the same command goes on from there. At the end: one table, results.json, report.html, pictures.

`direct` is the baseline that never imagines. It starts from the same cold start and goes on learning to answer
directly for about as long as the simulator and both phases of reinforcement learning take together; the CPU seconds
of both stand below the table.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from extras.report import report
from lib import common
from lib.records import load_jsonl


class Stage(NamedTuple):
    """A command, the stages it waits for, and the folder below out/demo that it fills."""

    name: str
    needs: tuple
    command: str
    folder: str


STAGES = (
    Stage("data", (), "data.py --threads 2", "data"),
    Stage("wm", ("data",), "train_wm.py --data {out}/data", "wm"),
    Stage("sft", ("data",), "train_sft.py --data {out}/data", "sft"),
    Stage(
        "phase1",
        ("sft", "wm"),
        "train_rl.py --phase 1 --data {out}/data --wm {out}/wm --policy {out}/sft",
        "phase1",
    ),
    Stage(
        "phase2",
        ("phase1",),
        "train_rl.py --phase 2 --data {out}/data --wm {out}/wm --policy {out}/phase1",
        "phase2",
    ),
    Stage(
        "direct",
        ("sft",),
        "train_sft.py --lessons direct --steps 1800 --data {out}/data --start {out}/sft",
        "direct",
    ),
    Stage(
        "eval_wm",
        ("wm",),
        "evaluate.py --bench wm --limit 300 --dose-rooms 8 --data {out}/data --wm {out}/wm",
        "eval/wm",
    ),
    Stage(
        "eval_direct",
        ("direct",),
        "evaluate.py --mode direct --data {out}/data --policy {out}/direct",
        "eval/direct",
    ),
    Stage(
        "eval",
        ("phase2",),
        "evaluate.py --data {out}/data --wm {out}/wm --policy {out}/phase2",
        "eval/rooms",
    ),
)
IMAGINING, ANSWERING = (
    ("wm", "phase1", "phase2"),
    ("direct",),
)  # what each side trains after the same cold start
WATCHED = ("loss_flow", "nearest", "loss", "facts", "match", "call_rate")


class Running:
    """A stage under way: its process, its log, its bar."""

    def __init__(self, stage, out, place):
        self.stage, self.folder, self.log = (
            stage,
            out / stage.folder,
            out / "logs" / f"{stage.name}.log",
        )
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [
            *(part.format(out=out) for part in stage.command.split()),
            "--out",
            str(self.folder),
        ]
        command += [] if "--threads" in command else ["--threads", "1"]
        self.process = subprocess.Popen(  # a session of its own: Ctrl-C reaches it through us alone
            [sys.executable, "-u", *command],
            stdout=open(self.log, "w"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,
        )
        self.start = time.time()
        self.bar = tqdm(desc=f"{stage.name:11}", position=place, leave=False, dynamic_ncols=True)

    def show(self):
        """Move the bar to where the stage's own last bar stands, with the newest numbers of its log."""
        counts = re.findall(r"(\d+)/(\d+) \[", self.log.read_text()[-2000:])
        if counts:
            self.bar.n, self.bar.total = map(int, counts[-1])
        rows = common.read_log(self.folder / "log.jsonl")
        told = (
            {key: f"{rows[-1][key]:.2f}" for key in WATCHED if isinstance(rows[-1].get(key), float)}
            if rows
            else {}
        )
        self.bar.set_postfix(told, refresh=False)
        self.bar.refresh()

    def complaint(self):
        """What to say if it failed: the end of its log."""
        lines = [line for line in re.split(r"[\r\n]+", self.log.read_text()) if line.strip()]
        return f"The stage {self.stage.name} stopped; the end of {self.log}:\n" + "\n".join(
            lines[-12:]
        )


def run_stages(out):
    """Run every stage once its needs are met, two at a time -> {stage: wall seconds}. Stops all if one fails."""
    waiting, running, seconds = list(STAGES), [], {}
    try:
        while waiting or running:
            ready = [stage for stage in waiting if all(need in seconds for need in stage.needs)]
            for stage in ready[: 2 - len(running)]:
                waiting.remove(stage)
                running.append(
                    Running(stage, out, place=int(any(job.bar.pos == 0 for job in running)))
                )
            time.sleep(0.5)
            for job in list(running):
                job.show()
                if (code := job.process.poll()) is not None:
                    running.remove(job)
                    job.bar.close()
                    if code:
                        raise RuntimeError(job.complaint())
                    seconds[job.stage.name] = time.time() - job.start
                    common.say(f"{job.stage.name:11} done, {seconds[job.stage.name]:6.0f} s")
    except (KeyboardInterrupt, RuntimeError) as error:
        for sig in (signal.SIGINT, signal.SIGTERM):  # a second one must not tear the saving apart
            signal.signal(sig, signal.SIG_IGN)
        common.fail(
            str(error)
            or "Stopped, with the work so far saved. The same command goes on from there."
        )
    finally:  # whatever ended us: none goes on unseen
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()
            job.bar.close()
    return seconds


def durations(out, seconds):
    """{stage: wall seconds} over interruptions: a trained stage knows its own, others keep their longest run."""
    file, known = out / "seconds.json", {}
    before = json.loads(file.read_text()) if file.exists() else {}
    for stage in STAGES:
        done = out / stage.folder / "done.json"
        known[stage.name] = (
            json.loads(done.read_text())["seconds"]
            if done.exists()
            else round(max(seconds[stage.name], before.get(stage.name, 0)), 1)
        )
    common.write_json(file, known)
    return known


def collect(out, seconds):
    """The stages' results as one dictionary, for results.json."""
    from lib.scores import paired_bootstrap  # late: it loads the models' libraries

    read = {
        name: json.loads((out / "eval" / name / "results.json").read_text())
        for name in ("rooms", "direct", "wm")
    }
    done = {
        stage.name: json.loads((out / stage.folder / "done.json").read_text())
        for stage in STAGES
        if (out / stage.folder / "done.json").exists()
    }

    def unseen(name, mode):
        lines = (out / "eval" / name / "predictions.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["mode"] == mode and row["needs_view"]]

    agentic = unseen("rooms", "agentic")
    return {
        "modes": {**read["rooms"]["modes"], "direct_only": read["direct"]["modes"]["direct"]},
        "chance": read["rooms"]["chance"],
        "text_only_chance": read["rooms"]["text_only_chance"],
        "agentic_gain_on_needs_view": {
            "over direct": paired_bootstrap(agentic, unseen("rooms", "direct")),
            "over direct_only": paired_bootstrap(agentic, unseen("direct", "direct")),
        },
        "wm": {
            **next(iter(read["wm"]["simulators"].values())),
            "baselines": read["wm"]["baselines"],
            "oracles": read["wm"]["oracles"],
        },
        "seconds": durations(out, seconds),
        "cpu_seconds": {name: row["cpu_seconds"] for name, row in done.items()},
    }


def show(results, out):
    """Print the table and write report.html."""

    def cell(part):
        return f"{part['accuracy']:.3f} [{part['ci95'][0]:.2f} {part['ci95'][1]:.2f}] calls {part['call_rate']:4.0%}"

    print(
        f"\n{'':14}{'all questions':34}{'an unseen view is needed':34}{'the given views answer':34}"
    )
    for mode, summary in results["modes"].items():
        parts = [summary, summary["by_need"]["needs_view"], summary["by_need"]["answerable"]]
        print(f"{mode:14}" + "".join(f"{cell(part):34}" for part in parts))
    print(
        f"accuracy [95 % interval], share of questions with a call; {results['modes']['direct']['n']} questions "
        f"about rooms never trained on;\nchance {results['chance']:.2f}, the best guess from the text alone "
        f"{results['text_only_chance']:.2f}"
    )
    for name, gain in results["agentic_gain_on_needs_view"].items():
        print(
            f"agentic {name}, where an unseen view is needed: {gain['difference']:+.3f} "
            f"[{gain['ci95'][0]:+.3f} {gain['ci95'][1]:+.3f}], n {gain['n']}"
        )
    spent = [
        sum(results["cpu_seconds"][name] for name in names) for names in (IMAGINING, ANSWERING)
    ]
    print(
        f"CPU seconds after the same cold start: {spent[0]:.0f} to imagine, {spent[1]:.0f} for direct_only"
    )

    print(f"\n{'simulator':40}{'pose':>6}{'content':>9}")
    oracles = {f"oracle: {name}": scores for name, scores in results["wm"]["oracles"].items()}
    for name, scores in (
        {"Astra-WM": results["wm"]} | results["wm"]["baselines"] | oracles
    ).items():
        print(f"{name:40}{scores['pose']:6.2f}{scores['content']:9.2f}")
    print(
        "\nseconds: "
        + ", ".join(f"{name} {spent:.0f}" for name, spent in results["seconds"].items())
    )

    from extras.report.pages import dialogue_rows

    place, told = out / "eval" / "rooms", {}
    for row in common.read_log(place / "predictions.jsonl"):
        told.setdefault((row["mode"], row["simulator"]), {})[row["key"]] = row
    logs = {name: out / name / "log.jsonl" for name in ("wm", "sft", "phase1", "phase2")}
    report.write(
        out / "report.html",
        "Thinking with imagination, on a laptop",
        results,
        results["wm"],
        logs=logs,
        sheet=out / "wm" / "views.png",
        folder=place,
        dialogues=dialogue_rows(told, load_jsonl(out / "data" / "questions_test.jsonl")),
    )
    print(
        f"\nto look at: {out}/report.html, {out}/wm/views.png, {out}/phase1/curves.png, {out}/phase2/curves.png"
    )


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", default="out/demo", help="folder of the demonstration")
    return p.parse_args(argv)


def main(argv=None):
    out = Path(parse_args(argv).out)
    print(
        "The loop at its tiny preset, two processes on CPU; the paper's run is --preset astra (README)."
    )
    results = collect(out, run_stages(out))
    common.write_json(out / "results.json", results)
    show(results, out)


if __name__ == "__main__":
    common.run(main)
