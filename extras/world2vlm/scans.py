"""
World2VLM's questions about scans: what a world model, the teacher, shows of motions from their views.

A teacher such as Astra-WM starts at the context of a triple, and goes through the paper's nine programs, longer motions
step by step (transitions.py). What is held out is its own, too: scans have no true renderer.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from extras.world2vlm.questions import records_with_pictures, write_motion_questions
from extras.world2vlm.transitions import PAPER, Anchor, transitions
from lib.distributed import fail, say
from lib.images import load_image
from lib.records import (
    SPLITS,
    TRIPLE_KEYS,
    Triple,
    check_triple,
    disk,
    load_jsonl,
    read_log,
    save_jsonl,
)
from lib.streams import numpy_stream, stable_hash

AT_ONCE = {"meters": 1.0, "degrees": 45.0}  # of a motion, in one call of the teacher; ours


def make_scan_questions(
    out, source, names: tuple, simulator, detect: Callable | None, limit=None
) -> None:
    """out/questions_{train,val,test}.jsonl about what a world model shows of motions in scans, over the paper's ranges.

    source   folder of scans' triples: each of their contexts that has a metric scale is where motions start, or the
             first `limit` of each split
    names    of the teacher and of the detector: with others, everything is made again
    detect   as in `records`; None: A1 to A4 alone
    A context takes 18 views. What is done stands in out/records_<split>.jsonl, from which an interrupted run goes on.
    """
    out, questions = Path(out), 0
    for split in SPLITS:
        log = out / f"records_{split}.jsonl"
        earlier = {tuple(entry["key"]): entry for entry in read_log(log)}
        save_jsonl(log, earlier.values())  # without a line that a kill tore
        contexts = metric_contexts(Path(source) / f"triples_{split}.jsonl", limit)
        entries = []
        for seed, triple in tqdm(contexts.items(), desc=f"world2vlm, {split}"):
            key = (seed, *names)
            entry = earlier.get(key)
            if entry is None:
                entry = {"key": key, **context_records(triple, seed, split, simulator, detect, out)}
                with disk(log), log.open("a") as lines:
                    lines.write(json.dumps(entry) + "\n")
            entries.append(entry)
        rows = [row for entry in entries for row in entry["records"]]
        failures = sum(entry["failures"] for entry in entries)
        write_motion_questions(out, split, rows, f"{len(contexts)} views of scans", split, failures)
        questions += len(rows)
    if not questions:
        fail(
            f"No question was made: --anchors {source} must hold triples of scans with a metric scale, as of data.py "
            f"triples --dataset NAME, from which the teacher shows usable views."
        )


def metric_contexts(file: Path, limit=None) -> dict[int, dict]:
    """{hash of a context and its reference: a triple of it}, of those whose lengths are metres."""
    contexts = {}
    for row in load_jsonl(file, Triple, check_triple, (*TRIPLE_KEYS, "scene")):
        if row.get("metric"):
            paths = [os.path.relpath(path, file.parent) for path in row["context"]]
            contexts[stable_hash(*paths, row["reference"])] = row
    if not contexts:
        say(f"{file} has no view of a scan with a metric scale.")
    return dict(list(contexts.items())[:limit])


def context_records(triple: dict, seed: int, split: str, simulator, detect, out: Path) -> dict:
    """What a teacher shows from the context of a triple -> {"records", "failures": programs without a usable view}."""
    rng, name = numpy_stream("motion questions", seed), f"{split}_{seed:016x}"
    images = [load_image(path) for path in triple["context"]]
    anchor = Anchor(name, images, triple["reference"])
    results, failures = transitions([anchor], simulator, rng, PAPER, AT_ONCE)
    rows = []
    for transition in results:
        rows += records_with_pictures(transition, out, name, rng, PAPER, detect)
    return {"records": [row | {"cluster": triple["scene"]} for row in rows], "failures": failures}
