"""
Datasets of scans into triples: `python data.py triples --dataset NAME --root DIR`, `depth` and `heldout`.

lib/scenes.py reads a scan and lib/triples.py finds its triples; this file goes through all scans of a dataset on many
processes, splits them by place, and goes on where an earlier run stopped: every scan has a report of its own.
"""

import contextlib
import json
import os
import time
from functools import partial
from itertools import zip_longest
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lib.common import disk, fail, say, stable_seed, write_json, write_text
from lib.pictures import save_image
from lib.rows import SPLITS, load_jsonl, save_jsonl, worker
from lib.scene_depth import depth_network, estimate_depth
from lib.scenes import read_scene, scene_ids
from lib.triples import Rules, Summary, contact_sheet, write_triples

SAMPLES = 12                                          # lines of a contact sheet


def place_of(dataset, id):
    """The place that a scan shows; all scans of a place stand on one side of the split (ScanNet: scene0000_01)."""
    return id.rsplit("_", 1)[0] if dataset == "scannet" else id


def split_of(dataset, id, listed):
    """"train", "val" or "test" of a scan: as `listed` {id: split} says, else drawn by the name of its place, 5 % for
    tests and 2 % for validation."""
    draw = stable_seed("split", dataset, place_of(dataset, id)) % 100
    return listed.get(id) or ("test" if draw < 5 else "val" if draw < 7 else "train")


def scan_triples(id, dataset, root, out, seed, rules):
    """Make all triples of one scan -> the file of its report {"rows", "counts", "skipped", "note", "error", ...}.

    A scan that was finished under the same rules is not done again. A broken one is reported by a sentence ("error")
    and tried again by the next run.
    """
    file = Path(out) / "scans" / dataset / f"{id.replace('/', '_')}.json"
    asked = {"dataset": dataset, "id": id, "seed": seed, "rules": rules._asdict(), "version": 3}
    if file.exists():
        report = json.loads(file.read_text())
        if asked.items() <= report.items() and not report["error"]:
            return file
    start, report = time.process_time(), asked | {"rows": [], "counts": {}, "skipped": {}, "note": "", "error": ""}
    try:
        scene = read_scene(dataset, root, id)
        rows, counts = write_triples(scene, Path(out), stable_seed(seed, dataset, id), rules)
        report |= {"rows": rows, "counts": dict(counts), "skipped": dict(scene.skipped), "note": scene.note}
    except ValueError as error:
        report["error"] = str(error)
    write_text(file, json.dumps(report | {"cpu_seconds": round(time.process_time() - start, 2)}))
    return file


def make_scans(dataset, root, out, workers=None, seed=0, rules=Rules(), lists=None, limit=None):
    """out/triples_{train,val,test}.jsonl, scans/ (one report each), summary.json and sheet.jpg of one dataset.

    workers   processes; None: all cores.   lists   {"val": file, "test": file} with ids, one per line
    limit     scans at most, evenly spread over the dataset
    Stops with a sentence if `root` holds no scan. Whatever the workers, the files are the same.
    """
    out, listed = Path(out), {}
    for split, file in (lists or {}).items():
        if not Path(file).exists():
            fail(f"{file} does not exist; --{split} names a file with the ids of its scans, one per line.")
        listed |= dict.fromkeys(Path(file).read_text().split(), split)
    ids = scenes_of(dataset, root)
    if limit and limit < len(ids):
        ids = [ids[i] for i in np.linspace(0, len(ids) - 1, limit).astype(int)]
    job = partial(scan_triples, dataset=dataset, root=str(root), out=str(out), seed=seed, rules=rules)
    with disk(out), Pool(workers, worker) as pool:
        files = list(tqdm(pool.imap(job, ids), total=len(ids), desc=f"triples of {dataset}", unit="scan"))
    # one report in memory at a time: the paper's dataset has half a million rows
    parts = {split: out / f"triples_{split}.jsonl.partial" for split in SPLITS}
    total, samples = Summary(), []
    with contextlib.ExitStack() as stack:
        lines = {split: stack.enter_context(part.open("w")) for split, part in parts.items()}
        for file in files:
            report = json.loads(file.read_text())
            split = split_of(dataset, report["id"], listed)
            lines[split].writelines(json.dumps(row) + "\n" for row in report["rows"])
            total.add(report, split)
            samples += report["rows"][:1 + SAMPLES // len(files)]
    for part in parts.values():
        part.replace(part.with_suffix(""))
    write_json(out / "summary.json", total.as_dict())
    say(total.text())
    if samples:
        contact_sheet(out, samples, out / "sheet.jpg")
        say(f"Look at {out}/sheet.jpg: the last column is the target with every other square taken from the context; "
            f"where edges break at the squares, depth or poses are wrong.")


def make_depth(root, model):
    """Depth maps and a scale for every DL3DV scene below `root`; a broken scene is named, and the rest goes on."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids, refused = scenes_of("dl3dv", root), 0
    try:
        predict = depth_network(model, device)
    except (OSError, ValueError) as error:
        fail(f"The depth network {model} cannot be read ({str(error).splitlines()[0]}). Give --model a folder, or "
             f"fetch it where there is a network.")
    for id in tqdm(ids, desc="depth", unit="scene"):
        try:
            info = estimate_depth(root, id, model, predict=predict)
            sentence = info["refused"] or f"a unit of its poses is {info['scale']:.4g} m"
        except ValueError as error:
            info, sentence = {"refused": True}, error
        refused += bool(info["refused"])
        tqdm.write(f"{id}: {sentence}")
    say(f"{refused} scenes have no depth with a scale; their motions cannot be told in metres.")


def scenes_of(dataset, root):
    """`scene_ids`, or the end of the program with its sentence."""
    try:
        return scene_ids(dataset, root)
    except ValueError as error:
        fail(error)


def make_heldout(sources, out, per_dataset=200, seed=0):
    """out/triples_test.jsonl: `per_dataset` triples of each source's test scans, evenly spread over scans and motions.

    sources   folders of `make_scans`. The paper's evaluation set is 200 of each of five datasets. Refuses, by a
    sentence, a source whose test scans also stand among those to train on, and one with too few.
    """
    chosen = []
    if not sources:
        fail("There are no triples of scans in out/ yet: python data.py triples --dataset NAME --root DIR, or give "
             "--sources FOLDER ...")
    for source in map(Path, sources):
        train, test = (load_jsonl(source / f"triples_{split}.jsonl") for split in ("train", "test"))
        place = lambda row: (row["dataset"], place_of(row["dataset"], row["scene"].split("/", 1)[1]))       # noqa: E731
        if shared := {place(row) for row in train} & {place(row) for row in test}:
            fail(f"{source}: {len(shared)} places stand on both sides of the split, such as {min(shared)[1]}. Make its "
                 f"triples again.")
        if len(test) < per_dataset:
            fail(f"{source} has {len(test)} triples of test scans and {per_dataset} are asked for: read more scans, or "
                 f"give --per-dataset {len(test)}.")
        by_scan, rng = {}, np.random.default_rng([19, seed])
        for i in rng.permutation(len(test)):
            by_scan.setdefault(test[i]["scene"], []).append(test[i])
        turns = [row for round_ in zip_longest(*by_scan.values()) for row in round_ if row]
        chosen += turns[:per_dataset]
    chosen.sort(key=lambda row: (row["scene"], row["context"], row["reference"]))
    Path(out).mkdir(parents=True, exist_ok=True)
    relative = lambda place: os.path.relpath(place, out)                                                    # noqa: E731
    save_jsonl(Path(out) / "triples_test.jsonl",
               [{**row, "context": list(map(relative, row["context"])), "target": relative(row["target"]),
                 "context_depth": list(map(relative, row["context_depth"])), "warp": relative(row["warp"])}
                for row in chosen])
    say(f"{out}/triples_test.jsonl: {len(chosen)} triples of {len({row['scene'] for row in chosen})} test scans")


def write_folder(folder, frames, up, pictures=".jpg", per_metre=1000):
    """Frames (lib/scenes.py) as a plain folder, rgb/<i>, depth/<i>.png and scene.json: a room that stands for a scan.

    up          (3,) of the frames' world;  pictures   ".jpg", as scans have them, or ".png", which loses nothing
    per_metre   units of the 16-bit depth
    """
    rows = []
    for i, frame in enumerate(frames):
        row = {"image": f"rgb/{i}{pictures}", "depth": f"depth/{i}.png", "c2w": frame.c2w.tolist()}
        save_image(folder / row["image"], frame.image())
        save_image(folder / row["depth"], (per_metre * frame.depth()).round().astype(np.uint16))
        rows.append(row)
    write_json(folder / "scene.json", {"frames": rows, "intrinsics": frames[0].intrinsics.tolist(),
                                       "depth_scale": per_metre, "up": np.asarray(up).tolist()})
