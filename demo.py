"""
The whole loop on a laptop: `make demo`, or python demo.py.

    data ─┬─ wm ───────┬─ phase1 ── phase2 ── eval          at most two stages run at once, one thread each,
          ├─ sft ──────┘                                    so two cores are busy without waiting for each other
          │   └─ direct ── eval_direct
          └─ (wm) ── eval_wm

Every stage is a command that one could type; its output goes to out/demo/logs/. Ctrl-C stops all of them with their
work saved, and the same command goes on from there. At the end: one table, results.json, report.html, pictures.

`direct` is the baseline that never imagines: it starts from the same cold start and is trained to answer directly for
as long as the simulator and both phases of reinforcement learning take together (CPU seconds in results.json).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from lib import common, report


class Stage(NamedTuple):
    """A command, the stages it waits for, and the folder below out/demo that it fills."""

    name: str
    needs: tuple
    command: str
    folder: str


STAGES = (
    Stage("data", (), "data.py --out {out}/data", "data"),
    Stage("wm", ("data",), "train_wm.py --data {out}/data --out {out}/wm", "wm"),
    Stage("sft", ("data",), "train_sft.py --data {out}/data --out {out}/sft", "sft"),
    Stage("phase1", ("sft", "wm"), "train_rl.py --phase 1 --data {out}/data --wm {out}/wm --policy {out}/sft --out {out}/phase1",
          "phase1"),
    Stage("phase2", ("phase1",), "train_rl.py --phase 2 --data {out}/data --wm {out}/wm --policy {out}/phase1 --out {out}/phase2",
          "phase2"),
    Stage("direct", ("sft",), "train_sft.py --lessons direct --steps 1800 --start {out}/sft --data {out}/data --out {out}/direct", "direct"),
    Stage("eval_wm", ("wm",), "evaluate.py --bench wm --limit 300 --data {out}/data --wm {out}/wm --out {out}/eval/wm", "eval/wm"),
    Stage("eval_direct", ("direct",), "evaluate.py --mode direct --policy {out}/direct --data {out}/data --out {out}/eval/direct",
          "eval/direct"),
    Stage("eval", ("phase2",), "evaluate.py --mode all --policy {out}/phase2 --data {out}/data --wm {out}/wm --out {out}/eval/rooms",
          "eval/rooms"),
)


class Running:
    """A stage under way: its process, its log, its bar."""

    def __init__(self, stage, out, place):
        self.stage, self.folder, self.log = stage, out / stage.folder, out / "logs" / f"{stage.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-u", *stage.command.format(out=out).split(), "--threads", "1" if stage.name != "data" else "2"]
        self.process = subprocess.Popen(command, stdout=open(self.log, "w"), stderr=subprocess.STDOUT,
                                        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
        self.bar, self.start = tqdm(desc=f"{stage.name:11}", position=place, leave=False, dynamic_ncols=True), time.time()

    def show(self):
        """Move the bar to the last step in the stage's log."""
        rows = common.read_log(self.folder / "log.jsonl")
        if rows and (self.folder / "args.json").exists():
            self.bar.total = json.loads((self.folder / "args.json").read_text())["steps"]
            self.bar.n = rows[-1]["step"]
            told = {key: f"{rows[-1][key]:.2f}" for key in ("loss_flow", "pose", "loss", "facts", "match", "call_rate")
                    if isinstance(rows[-1].get(key), float)}
            self.bar.set_postfix(told, refresh=False)
        self.bar.refresh()


def run_stages(out):
    """Run every stage when its needs are met, two at once -> {stage: wall seconds of this run}. Exits if one fails."""
    waiting, running, seconds = list(STAGES), [], {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            for stage in [s for s in waiting if all(need in seconds for need in s.needs)][:2 - len(running)]:
                waiting.remove(stage)
                places = {job.bar.pos for job in running}
                running.append(Running(stage, out, 0 if 0 not in places else 1))
            time.sleep(0.5)
            for job in list(running):
                job.show()
                if (code := job.process.poll()) is not None:
                    running.remove(job)
                    job.bar.close()
                    if code:
                        raise RuntimeError(f"The stage {job.stage.name} stopped with code {code}; the end of {job.log}:\n"
                                           + "\n".join(job.log.read_text().replace("\r", "\n").splitlines()[-12:]))
                    seconds[job.stage.name] = time.time() - job.start
                    common.say(f"{job.stage.name:11} done, {seconds[job.stage.name]:6.0f} s")
    except (KeyboardInterrupt, RuntimeError) as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)          # a second Ctrl-C must not tear the saving apart
        for job in running:                                   # each has a session of its own: this is its only signal
            job.process.send_signal(signal.SIGINT)
        for job in running:
            job.process.wait()
            job.bar.close()
        common.fail(str(error) or "Stopped, with the work so far saved. The same command goes on from there.")
    return seconds


def collect(out, seconds):
    """Put the stages' results together as results.json."""
    read = {name: json.loads((out / "eval" / name / "results.json").read_text()) for name in ("rooms", "direct", "wm")}
    done = {s.name: json.loads((out / s.folder / "done.json").read_text()) for s in STAGES
            if (out / s.folder / "done.json").exists()}
    before = json.loads((out / "seconds.json").read_text()) if (out / "seconds.json").exists() else {}
    seconds = {name: done[name]["seconds"] if name in done else round(max(s, before.get(name, 0)), 1) for name, s in seconds.items()}
    common.write_json(out / "seconds.json", seconds)
    records = {name: [json.loads(line) for line in (out / "eval" / name / "predictions.jsonl").read_text().splitlines()]
               for name in ("rooms", "direct")}
    from evaluate import paired_bootstrap                    # after the stages: it loads the models' libraries
    need = {mode: [r for r in rows if r["mode"] == mode and r["needs_view"]] for rows, mode in
            ((records["rooms"], "agentic"), (records["rooms"], "direct"))}
    only = [r for r in records["direct"] if r["needs_view"]]
    wm = next(iter(read["wm"]["simulators"].values()))
    return {
        "modes": {**read["rooms"]["modes"], "direct_only": read["direct"]["modes"]["direct"]},
        "chance": read["rooms"]["chance"], "text_only_chance": read["rooms"]["text_only_chance"],
        "needs_view_gain": {"over_direct": paired_bootstrap(need["agentic"], need["direct"]),
                            "over_direct_only": paired_bootstrap(need["agentic"], only)},
        "wm": {**wm, "baselines": read["wm"]["baselines"], "oracles": read["wm"]["oracles"]},
        "seconds": seconds, "cpu_seconds": {name: row["cpu_seconds"] for name, row in done.items()}}


def show(results, out):
    """Print the table and write report.html."""
    print(f"\n{'':12}{'all':>22}{'needs an unseen view':>34}{'given views answer':>30}")
    for mode, s in results["modes"].items():
        cells = [s, s["by_need"]["needs_view"], s["by_need"]["answerable"]]
        print(f"{mode:12}" + "".join(f"{c['accuracy']:8.3f} [{c['ci95'][0]:.2f} {c['ci95'][1]:.2f}] calls {c['call_rate']:4.0%}" for c in cells))
    print("accuracy [95 % interval], share of questions with a call; chance "
          f"{results['chance']:.2f}, from the text alone {results['text_only_chance']:.2f}")
    for name, gain in results["needs_view_gain"].items():
        print(f"agentic {name.replace('_', ' ')}, where a view is needed: {gain['difference']:+.3f} "
              f"[{gain['ci95'][0]:+.3f} {gain['ci95'][1]:+.3f}], n {gain['n']}")
    wm = results["wm"]
    rows = {"Astra-WM": wm, **wm["baselines"], **{f"oracle: {k}": v for k, v in wm["oracles"].items()}}
    print("\nsimulator" + " " * 25 + "pose  content")
    for name, s in rows.items():
        print(f"{name:32}{s['pose']:6.2f}{s['content']:9.2f}")
    print("seconds: " + ", ".join(f"{name} {s:.0f}" for name, s in results["seconds"].items()))
    from policy import Trajectory
    folders = sorted((out / "eval" / "rooms" / "dialogues").glob("agentic*"))
    report.write(out / "report.html", "Thinking with imagination, on a laptop", results, wm,
                 logs={name: out / name / "log.jsonl" for name in ("wm", "sft", "phase1", "phase2")}, sheet=out / "wm" / "views.png",
                 dialogues=[(folder.name, Trajectory.load(folder)) for folder in folders])
    print(f"\n{out}/results.json, {out}/report.html (the page to look at), {out}/wm/views.png, {out}/phase1/curves.png, "
          f"{out}/phase2/curves.png")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="out/demo", help="folder of the demonstration")
    return p.parse_args(argv)


def main(argv=None):
    out = Path(parse_args(argv).out)
    print("tiny preset, two processes on CPU: simulator, cold start, two phases of RL, evaluation; the paper's run is --preset astra")
    seconds = run_stages(out)
    results = collect(out, seconds)
    common.write_json(out / "results.json", results)
    show(results, out)


if __name__ == "__main__":
    main()
