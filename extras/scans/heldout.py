"""
The held-out set of real scans: as many triples of each dataset, from scans that nothing trains on.

  python -m extras.scans.heldout                         200 triples of test scans of every out/<dataset>
  python -m extras.scans.heldout --sources DIR DIR       of these folders of extras/scans/make.py

In: triples_{train,test}.jsonl of each source.  Out: out/heldout/triples_test.jsonl, which names the pictures where they
are. The paper's evaluation set is 200 triples of each of five datasets.

A triple whose own pose is not within the thresholds of its words (lib/consistency.py) is left out, since the photograph
itself would count as wrong: where `--slack` let words leave much unsaid (lib/geometry.dominant_component).
"""

import argparse
from pathlib import Path

import numpy as np

from extras.scans.make import with_relative_paths
from extras.scans.scene import READERS
from extras.scans.triples import in_turn
from lib.consistency import pose_errors
from lib.distributed import fail, say
from lib.geometry import decompose
from lib.records import Triple, load_jsonl, save_jsonl
from lib.stage import bounded, lock_folder, run_stage
from lib.streams import numpy_stream


def make_heldout(
    sources: list[str], out: str | Path, per_dataset: int = 200, seed: int = 0
) -> None:
    """out/triples_test.jsonl: `per_dataset` triples of each source's test scans, at random, the scans taking turns.

    Stops with a sentence at a source whose test scans also stand among those to train on, and at one with too few.
    """
    if not sources:
        fail(
            "There are no triples of scans in out/ yet: python data.py triples --dataset NAME --root DIR, or give "
            "--sources FOLDER ..."
        )
    rows, left_out = [], 0
    for source in map(Path, sources):
        candidates = rows_for_tests(source)
        true = [row for row in candidates if does_what_its_words_say(row)]
        left_out += len(candidates) - len(true)
        if len(true) < per_dataset:
            fewer = f", or give --per-dataset {len(true)}" if true else ""
            fail(
                f"{source} has {len(true)} triples of test scans that do what their words say, and {per_dataset} are "
                f"asked for: read more scans, list them by `data.py triples --dataset ... --test FILE`{fewer}."
            )
        by_scan = {}
        for i in numpy_stream("held-out scans", seed).permutation(len(true)):
            by_scan.setdefault(true[i]["scene"], []).append(true[i])
        rows += in_turn(by_scan)[:per_dataset]
    rows.sort(key=lambda row: (row["scene"], row["context"], row["reference"]))
    scans = {row["scene"] for row in rows}
    path = Path(out) / "triples_test.jsonl"
    save_jsonl(path, [with_relative_paths(row, path.parent) for row in rows])
    say(
        f"{path}: {len(rows)} triples of {len(scans)} test scans; left out: {left_out} whose own pose is not within "
        f"the thresholds of their words"
    )


def rows_for_tests(source):
    """The triples of a source's test scans; a sentence where the same places are trained on, or nobody knows."""
    if not (source / "triples_test.jsonl").exists():
        fail(
            f"{source} holds no triples of scans: python data.py triples --dataset NAME --root DIR --out {source}"
        )
    train = load_jsonl(source / "triples_train.jsonl", Triple)
    test = load_jsonl(source / "triples_test.jsonl", Triple)
    if any("place" not in row for row in train + test):
        fail(
            f"{source} does not tell the place of every triple: python data.py triples --dataset NAME --root DIR "
            f"--out {source} writes it, and makes no finished scan again."
        )
    shared = {row["place"] for row in train} & {row["place"] for row in test}
    if shared:
        fail(
            f"{source}: {len(shared)} places stand on both sides of the split, such as {min(shared)}. Make its "
            f"triples again."
        )
    return test


def does_what_its_words_say(row):
    """Whether the true pose of a target is within the thresholds of the triple's motion."""
    reference = np.array(row["context_c2w"][row["reference"] - 1])
    delta = decompose(reference, np.array(row["target_c2w"]))[:5]
    return pose_errors([row], [delta])[0]["within"]


def main(argv: list[str] | None = None) -> None:
    """Choose the held-out triples."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sources", nargs="+", help="folders of scans' triples (default: every out/<dataset>)"
    )
    parser.add_argument("--out", default="out/heldout", help="folder of the file")
    parser.add_argument(
        "--per-dataset", type=bounded(int, 1), default=200, help="triples of each (paper: 200)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    args = parser.parse_args(argv)
    lock_folder(args.out)
    finished = [f"out/{name}" for name in READERS if Path(f"out/{name}/summary.json").exists()]
    make_heldout(args.sources or finished, args.out, args.per_dataset, args.seed)


if __name__ == "__main__":
    run_stage(main)
