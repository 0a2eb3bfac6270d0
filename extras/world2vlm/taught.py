"""
World2VLM's questions about scans: what a world model, the teacher, shows of motions from their views.

A teacher such as Astra-WM starts at the context of a triple, and goes through the paper's nine programs, longer motions
step by step (extras/world2vlm/transitions.py). What is held out is its own, too: scans have no true renderer.
"""

import json
import os
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from extras.report import real_views
from extras.world2vlm.frames import in_pixels
from extras.world2vlm.questions import image_detections, with_pictures, write_motion_questions
from extras.world2vlm.transitions import PAPER, Anchor, transitions
from lib import simulators
from lib.common import disk, fail, read_log, say
from lib.images import load_image
from lib.records import SPLITS, load_jsonl, save_jsonl
from lib.streams import numpy_stream, stable_hash

AT_ONCE = {"meters": 1.0, "degrees": 45.0}  # of a motion, in one call of the teacher; ours


def make_taught(out, source, teacher, detector=None, limit=None):
    """out/questions_{train,val,test}.jsonl about what a world model shows of motions in scans, over the paper's ranges.

    source     folder of scans' triples: each of their contexts that has a metric scale is where motions start, or the
               first `limit` of each split
    teacher    as in lib/simulators.load_simulator
    detector   folder or hub id of a GroundingDINO; None: A1 to A4 alone
    A context takes 36 views. What is done stands in out/records_<split>.jsonl, from which an interrupted run goes on.
    """
    out, device = Path(out), "cuda" if torch.cuda.is_available() else "cpu"
    simulator = simulators.load_simulator(teacher, device)
    try:
        detect = detector and image_detections(in_pixels(real_views.detector(detector, device)))
    except ValueError as error:
        fail(error)
    for split in SPLITS:
        file, log = Path(source) / f"triples_{split}.jsonl", out / f"records_{split}.jsonl"
        contexts = {
            (*(os.path.relpath(path, source) for path in row["context"]), row["reference"]): row
            for row in load_jsonl(file)
            if row.get("metric")
        }
        contexts = dict([*contexts.items()][:limit])
        if not contexts:
            say(f"{file} has no view of a scan with a metric scale.")
        done = {(part["of"], part["teacher"], part["detector"]): part for part in read_log(log)}
        save_jsonl(log, done.values())  # without a line that a kill tore
        rows, dropped = [], Counter()
        for key, row in tqdm(contexts.items(), desc=f"world2vlm, {split}"):
            asked = {"of": stable_hash(*key), "teacher": str(teacher), "detector": detector}
            part = done.get(tuple(asked.values()))
            if part is None:
                part = asked | told(
                    row, f"{split}_{asked['of']:016x}", simulator, detect, out, asked["of"]
                )
                with disk(log), log.open("a") as lines:
                    lines.write(json.dumps(part) + "\n")
            rows += part["records"]
            dropped.update(part["lost"])
        faults = write_motion_questions(out, split, rows, f"{len(contexts)} views of scans", split)
        for reason, count in (dropped + faults).most_common():
            say(f"  {count:6}  left out: {reason}")


def told(row, name, simulator, detect, out, seed):
    """What a teacher shows from the context of a triple -> {"records", "lost": {reason: programs}}."""
    rng, place = numpy_stream("motion questions", seed), row["reference"] - 1
    anchor = Anchor(name, [load_image(path) for path in row["context"]], row["reference"])
    found, lost = transitions([anchor], simulator, rng, PAPER, AT_ONCE, tries=2)
    focal = row["context_intrinsics"][place][0][0] / anchor.images[place].shape[1]
    return {
        "lost": lost,
        "records": [
            record | {"cluster": row["scene"]}
            for transition in found
            for record in with_pictures(
                transition._replace(focal=focal), out, name, rng, PAPER, detect
            )
        ],
    }
