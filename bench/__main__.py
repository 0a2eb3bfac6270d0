"""
Speed of the fast paths, as ratios to the straightforward way (bench/naive.py) in the same run.

  python -m bench wm                   the world model on two CPU cores: 10 minutes, with nothing else on the machine
  python -m bench wm --quick           the same at toy size, in seconds: shows that it runs, measures nothing
  python -m bench rollout              dialogues of the policy, two calls each, against `generate` every turn: a minute

One GPU, the published shapes, no files needed (bench/gpu.py):
  python -m bench wm --preset astra          seconds per view and MFU: 5 minutes
  python -m bench rollout --preset astra     prefill and decoding against the memory's bound: 5 minutes
  python -m bench train_wm --preset astra    an update of the simulator, with as many layers as fit
  python -m bench train_rl --preset astra    an update of the policy by GRPO, the same

Prints tables for a reader; the last line is one JSON object for a program.
"""

import argparse

from bench import gpu, policy, wm
from lib.stage import bounded, run_stage

BENCHES = {  # what -> preset -> function
    "wm": {"tiny": wm.wm, "astra": gpu.wm},
    "rollout": {"tiny": policy.rollout_bench, "astra": gpu.rollout},
    "train_wm": {"tiny": gpu.train_wm, "astra": gpu.train_wm},
    "train_rl": {"tiny": gpu.train_rl, "astra": gpu.train_rl},
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole = bounded(int, 1)
    p.add_argument("what", choices=list(BENCHES))
    p.add_argument(
        "--preset",
        choices=("tiny", "astra"),
        default="tiny",
        help="tiny: on the CPU; astra: the published size on one GPU",
    )
    p.add_argument("--quick", action="store_true", help="tiny: toy sizes, one run of each kind")
    p.add_argument("--repeats", type=whole, default=3, help="runs of each kind; medians count")
    p.add_argument("--threads", type=whole, help="CPU threads (default: wm 2, others 1)")
    p.add_argument("--steps", type=whole, help="wm: Euler steps (25; --quick 2, astra 49)")
    p.add_argument("--layers", type=whole, help="astra, train_*: default as many as fit")
    args = p.parse_args(argv)
    args.threads = args.threads or (2 if args.what == "wm" else 1)
    if args.steps is None:
        args.steps = 2 if args.quick else {"tiny": 25, "astra": 49}[args.preset]
    return args


def main(argv: list[str] | None = None) -> None:
    """Run one benchmark."""
    args = parse_args(argv)
    BENCHES[args.what][args.preset](args)


if __name__ == "__main__":
    run_stage(main)
