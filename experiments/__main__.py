"""
The demo, its curves and the evidence: python -m experiments demo | curves | simulator | policy | questions | world2vlm   (each with --help)
"""

import importlib
import sys

from lib.stage import run_stage

EXPERIMENTS = ("demo", "curves", "simulator", "policy", "questions", "world2vlm")

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in EXPERIMENTS:
        raise SystemExit(__doc__)
    name = sys.argv.pop(1)
    module = importlib.import_module(f"experiments.{name}")
    run_stage(module.main)
