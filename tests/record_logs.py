"""
The first twenty steps of every stage on one thread, as they were recorded: a change that should change no number can
show that it changed none.

  python tests/record_logs.py             train again and compare with tests/data/logs, digit by digit: 4 minutes
  python tests/record_logs.py --record    write them anew; the commit says why the numbers moved

Logs agree to the last digit on one kind of processor only, so this is a tool beside the tests and not one of them.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "tests" / "data" / "logs"
NOT_COMPARED = {"seconds"}  # a stopwatch
STEPS = 20
DATA = "--out {tmp}/data --rooms 64"
STAGES = {  # each reads what those before it wrote; RL needs a policy that can say something
    "train_wm": "train_wm.py --data {tmp}/data --out {tmp}/wm --steps 20 --eval-every 10 --eval-contexts 4",
    "train_sft": "train_sft.py --data {tmp}/data --out {tmp}/sft --steps 200 --see-steps 150",
    "train_rl_phase1": "train_rl.py --phase 1 --policy {tmp}/sft --wm {tmp}/wm --data {tmp}/data --out {tmp}/phase1 "
    "--steps 20 --questions 4 --eval-every 10 --eval-questions 8",
    "train_rl_phase2": "train_rl.py --phase 2 --policy {tmp}/phase1 --wm {tmp}/wm --data {tmp}/data --out {tmp}/phase2 "
    "--steps 20 --questions 4 --eval-every 10 --eval-questions 8",
}


def rows(path):
    """The lines of a log without what no two runs share."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in NOT_COMPARED}
        for line in lines[:STEPS]
    ]


def holds(made, kept):
    """Whether a line has all that was recorded; a key that is new since then is not compared."""
    if isinstance(kept, dict) and isinstance(made, dict):
        return all(key in made and holds(made[key], value) for key, value in kept.items())
    return made == kept


def run(command, tmp):
    """One command of the project, on one thread."""
    alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [sys.executable, *command.format(tmp=tmp).split()],
        cwd=ROOT,
        env=os.environ | alone,
        check=True,
    )


def main():
    """Train every stage for twenty steps; record its log, or say where it differs."""
    wrong = 0
    with tempfile.TemporaryDirectory() as tmp:
        for kind in ("triples", "questions"):
            run(f"data.py {kind} {DATA}", tmp)
        for name, command in STAGES.items():
            run(command, tmp)
            made = rows(Path(tmp) / name.replace("train_", "").replace("rl_", "") / "log.jsonl")
            file = LOGS / f"{name}.jsonl"
            if "--record" in sys.argv:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("".join(json.dumps(row) + "\n" for row in made))
                continue
            kept = rows(file)
            pairs = zip(kept, made, strict=False)
            differ = [row["step"] for row, other in pairs if not holds(other, row)]
            if differ or len(kept) != len(made):
                wrong += 1
                print(
                    f"{name}: {len(differ)} of {len(kept)} lines differ, first at step {(differ or [len(made)])[0]}"
                )
            else:
                print(f"{name}: all {len(kept)} lines are equal")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
