"""
A dataset of scans into triples: python data.py triples --dataset scannet --root DIR

Out, in out/<dataset>/: triples_{train,val,test}.jsonl, scans/ (a report of each), summary.json and sheet.jpg. An
interrupted run goes on where it was. extras/scans/scene.py has the names of datasets, and the layout of each on disk.
"""

import argparse
from pathlib import Path

from extras.scans.make import make_scans
from extras.scans.scene import READERS
from extras.scans.triples import RULES, Rules
from lib.distributed import fail
from lib.stage import bounded

COUNTS = {
    "size": "of the pictures' shorter side, in pixels",
    "frames": "looked at per scan",
    "targets": "triples per context",
    "triples": "per scan (the paper's average is 48)",
}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags behind `data.py triples`."""
    parser = argparse.ArgumentParser(
        prog="data.py triples",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count = bounded(int, 1)
    add = parser.add_argument
    add("--dataset", required=True, choices=list(READERS))
    add("--root", required=True, help="folder of the dataset")
    add("--out", help="folder of the files (default: out/<dataset>)")
    add("--threads", type=count, help="processes (default: all cores)")
    add("--seed", type=int, default=0, help="of the draws among a scan's triples")
    add("--limit", type=count, help="scans at most, evenly spread over the dataset")
    add("--val", help="file with the ids of scans for validation, instead of 2 %% of places")
    add(
        "--test",
        help="file with the ids of test scans, one per line, or an official CSV of them, instead of 5 %% of places. "
        "All scans of a listed place go with it",
    )
    for name, text in COUNTS.items():
        add(f"--{name}", type=count, default=getattr(RULES, name), help=text)
    add(
        "--coverage",
        type=float,
        default=RULES.coverage,
        help="of a target, at least (paper: 0.85)",
    )
    add(
        "--apart",
        type=float,
        nargs=2,
        default=RULES[1:3],
        metavar=("M", "DEG"),
        help="between the cameras of a context, at least one of the two (paper: 1 m, 30 degrees)",
    )
    add("--both-apart", action="store_true", help="both of the two, as the paper's text asks")
    add(
        "--slack",
        type=bounded(float, 0),
        default=RULES.slack,
        metavar="M",
        help="what the words of a motion may leave unsaid, 1 m = 30 degrees; inf: the dominant component is the motion, "
        "whatever the others (the paper)",
    )
    args = parser.parse_args(argv)
    args.command = "triples of scans"
    args.out = args.out or f"out/{args.dataset}"
    return args


def make_triples_of_scans(args: argparse.Namespace) -> None:
    """Make all triples of one dataset."""
    if not Path(args.root).is_dir():
        fail(f"--root {args.root} is no folder: give the one that holds the dataset.")
    counts = {name: getattr(args, name) for name in COUNTS}
    chosen = dict(slack=args.slack, both_apart=args.both_apart)
    rules = Rules(args.coverage, *args.apart, **chosen, **counts)
    lists = {split: file for split, file in (("val", args.val), ("test", args.test)) if file}
    make_scans(args.dataset, args.root, args.out, args.threads, args.seed, rules, lists, args.limit)
