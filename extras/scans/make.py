"""
Datasets of scans into triples: `python data.py triples --dataset NAME --root DIR`, `depth` and `heldout`.

extras/scans/scene.py reads a scan and extras/scans/triples.py finds its triples; this file goes through all scans of a dataset on many
processes, splits them by place, and goes on where an earlier run stopped: every scan has a report of its own.
"""

import contextlib
import csv
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

from extras.scans.depth import depth_network, estimate_depth
from extras.scans.scene import read_scene, scene_ids
from extras.scans.triples import Rules, Summary, contact_sheet, write_triples
from lib.common import disk, fail, say, write_json, write_text
from lib.consistency import pose_errors
from lib.geometry import decompose
from lib.images import save_image
from lib.records import SPLITS, load_jsonl, save_jsonl, worker
from lib.streams import numpy_stream, stable_hash, stream_seed

SAMPLES = 12  # lines of a contact sheet


def places_of(dataset, root, ids):
    """{id: place that the scan shows}; all scans of a place stand on one side of the split.

    ScanNet's ids tell the place (scene0000_01). ARKitScenes has 5,047 captures of 1,661 places, which only the
    visit_id of its metadata.csv tells: captures with none (NA) are left out, and without the file there are no places.
    Elsewhere every scan is a place of its own.
    """
    if dataset != "arkitscenes":
        return {id: id.rsplit("_", 1)[0] if dataset == "scannet" else id for id in ids}
    visits = {}
    for file in (*Path(root).glob("metadata.csv"), *Path(root).glob("*/metadata.csv")):
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                visit = (row.get("visit_id") or "").removesuffix(
                    ".0"
                )  # pandas writes whole numbers like this
                if visit.isdigit():
                    visits[row.get("video_id")] = visit
    return {id: visits[id] for id in ids if id in visits}


def split_of(dataset, place, listed, given=()):
    """ "train", "val" or "test" of a place: as `listed` {place: split} says, else drawn by its name, 5 % for tests and
    2 % for validation; nothing is drawn into the splits that are `given` by lists."""
    draw = stream_seed("split", dataset, place) % 100
    drawn = "test" if draw < 5 else "val" if draw < 7 else "train"
    return listed.get(place) or ("train" if drawn in given else drawn)


def read_list(split, file, ids):
    """The scans that a list names, one per line: of a CSV's line the first field that is one of `ids`."""
    if not Path(file).is_file():
        fail(
            f"{file} does not exist; --{split} names a file with the ids of its scans, one per line."
        )
    lines = [line.split(",") for line in Path(file).read_text().splitlines() if line.strip()]
    known = set(ids)
    named = [
        next((id for id in (field.strip(' "') for field in line) if id in known), None)
        for line in lines
    ]
    if not any(named):
        fail(
            f"No line of {file} names a scan that is there; --{split} needs ids such as {ids[0]}, one per line."
        )
    if None in named:
        say(
            f"--{split}: {named.count(None)} of {len(named)} lines of {file} name no scan that is there (a header is "
            f"such a line)."
        )
    return [id for id in named if id]


def sides_of(dataset, root, ids, lists):
    """({id: place} of the scans that can be split, {place: split} of those that are listed).

    lists   {"val": file, "test": file}; a place goes where one of its scans is listed. Says how many scans are left
            out because nobody knows their place; stops with a sentence where nothing could be drawn by place.
    """
    named = {split: read_list(split, file, ids) for split, file in lists.items()}
    places, sides = places_of(dataset, root, ids), {}
    if not places:
        if len(lists) < 2:
            fail(
                f"{root} has no metadata.csv with the visit_id of its captures, and without it captures of one place "
                f"would stand on both sides of the split. Copy it there (download_data.py of ARKitScenes fetches it), "
                f"or give both --val FILE and --test FILE."
            )
        places = dict(zip(ids, ids))
    for split, of_split in named.items():
        for id in of_split:
            place = places.setdefault(id, id)
            if sides.setdefault(place, split) != split:
                fail(
                    f"{lists[split]} and another list name the same place by {id}: a place stands on one side of the "
                    f"split."
                )
    if lost := len(ids) - len(places):
        say(
            f"{lost} scans are left out: nobody knows which place they show. Name them in a list to keep them."
        )
    return places, sides


def holds_others(files, key, ours):
    """Whether JSONL files hold rows, and `key` of none is one of `ours`: to write them anew would drop another set."""
    found = False
    for file in (file for file in files if file.exists()):
        with file.open() as lines:
            for line in filter(str.strip, lines):
                if json.loads(line).get(key) in ours:
                    return False
                found = True
    return found


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
    start, report = (
        time.process_time(),
        asked | {"rows": [], "counts": {}, "skipped": {}, "note": "", "error": ""},
    )
    try:
        scene = read_scene(dataset, root, id)
        rows, counts = write_triples(scene, Path(out), stable_hash(seed, dataset, id), rules)
        report |= {
            "rows": rows,
            "counts": dict(counts),
            "skipped": dict(scene.skipped),
            "note": scene.note,
        }
    except ValueError as error:
        report["error"] = str(error)
    write_text(file, json.dumps(report | {"cpu_seconds": round(time.process_time() - start, 2)}))
    return file


def make_scans(dataset, root, out, workers=None, seed=0, rules=Rules(), lists=None, limit=None):
    """out/triples_{train,val,test}.jsonl, scans/ (one report each), summary.json and sheet.jpg of one dataset.

    workers   processes; None: all cores.   lists   {"val": file, "test": file} with ids, one per line (`read_list`)
    limit     scans at most, evenly spread over the dataset
    Stops with a sentence if `root` holds no scan, or if `out` holds triples of other scans, which it would drop.
    Whatever the workers, the files are the same.
    """
    out, lists, ids = Path(out), lists or {}, scenes_of(dataset, root)
    if holds_others(
        [out / f"triples_{split}.jsonl" for split in SPLITS],
        "scene",
        {f"{dataset}/{id}" for id in ids},
    ):
        fail(
            f"{out} holds triples of something else, and they would be lost. Give {dataset} of {root} an --out of its "
            f"own: train_wm.py --data takes several folders."
        )
    places, sides = sides_of(dataset, root, ids, lists)
    ids = [id for id in ids if id in places]
    if limit and limit < len(ids):
        ids = [ids[i] for i in np.linspace(0, len(ids) - 1, limit).astype(int)]
    job = partial(
        scan_triples, dataset=dataset, root=str(root), out=str(out), seed=seed, rules=rules
    )
    with disk(out), Pool(workers, worker) as pool:
        files = list(
            tqdm(pool.imap(job, ids), total=len(ids), desc=f"triples of {dataset}", unit="scan")
        )
    # one report in memory at a time: the paper's dataset has half a million rows
    parts = {split: out / f"triples_{split}.jsonl.partial" for split in SPLITS}
    total, samples = Summary(), []
    with contextlib.ExitStack() as stack:
        lines = {split: stack.enter_context(part.open("w")) for split, part in parts.items()}
        for file in files:
            report = json.loads(file.read_text())
            place = places[report["id"]]
            split = split_of(dataset, place, sides, lists)
            lines[split].writelines(
                json.dumps(row | {"place": place}) + "\n" for row in report["rows"]
            )
            total.add(report, split)
            samples += report["rows"][: 1 + SAMPLES // len(files)]
    for part in parts.values():
        part.replace(part.with_suffix(""))
    write_json(out / "summary.json", total.as_dict())
    say(total.text())
    if samples:
        contact_sheet(out, samples, out / "sheet.jpg")
        say(
            f"Look at {out}/sheet.jpg: the last column is the target with every other square taken from the context; "
            f"where edges break at the squares, depth or poses are wrong."
        )


def make_depth(root, model):
    """Depth maps and a scale for every DL3DV scene below `root`; a broken scene is named, and the rest goes on."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids, refused = scenes_of("dl3dv", root), 0
    try:
        predict = depth_network(model, device)
    except (OSError, ValueError) as error:
        fail(
            f"The depth network {model} cannot be read ({str(error).splitlines()[0]}). Give --model a folder, or "
            f"fetch it where there is a network."
        )
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
    """out/triples_test.jsonl: `per_dataset` triples of each source's test scans, at random, the scans taking turns.

    sources   folders of `make_scans`. The paper's evaluation set is 200 of each of five datasets.
    A triple whose own pose is not within the thresholds of its words (lib/consistency.py) is left out: what words
    leave unsaid (lib/geometry.dominant_component) may bend a short move by more than 20 degrees, and the photograph
    itself would count as wrong.
    Refuses, by a sentence, a source whose test scans also stand among those to train on, and one with too few.
    """
    chosen, untrue = [], 0
    if not sources:
        fail(
            "There are no triples of scans in out/ yet: python data.py triples --dataset NAME --root DIR, or give "
            "--sources FOLDER ..."
        )
    for source in map(Path, sources):
        if not (source / "triples_test.jsonl").exists():
            fail(
                f"{source} holds no triples of scans: python data.py triples --dataset NAME --root DIR --out {source}"
            )
        train, test = (load_jsonl(source / f"triples_{split}.jsonl") for split in ("train", "test"))
        if any("place" not in row for row in train + test):
            fail(
                f"{source} does not tell the place of every triple: python data.py triples --dataset NAME --root DIR "
                f"--out {source} writes it, and makes no finished scan again."
            )
        if shared := {row["place"] for row in train} & {row["place"] for row in test}:
            fail(
                f"{source}: {len(shared)} places stand on both sides of the split, such as {min(shared)}. Make its "
                f"triples again."
            )
        way = [
            decompose(
                np.array(row["context_c2w"][row["reference"] - 1]), np.array(row["target_c2w"])
            )[:5]
            for row in test
        ]
        true = [row for row, error in zip(test, pose_errors(test, way)) if error["within"]]
        test, untrue = true, untrue + len(test) - len(true)
        if len(test) < per_dataset:
            fail(
                f"{source} has {len(test)} triples of test scans that do what their words say, and {per_dataset} are "
                f"asked for: read more scans, or give --per-dataset {len(test)}."
            )
        by_scan, rng = {}, numpy_stream("held-out scans", seed)
        for i in rng.permutation(len(test)):
            by_scan.setdefault(test[i]["scene"], []).append(test[i])
        turns = [row for round_ in zip_longest(*by_scan.values()) for row in round_ if row]
        chosen += turns[:per_dataset]
    chosen.sort(key=lambda row: (row["scene"], row["context"], row["reference"]))
    Path(out).mkdir(parents=True, exist_ok=True)
    relative = lambda place: os.path.relpath(place, out)  # noqa: E731
    save_jsonl(
        Path(out) / "triples_test.jsonl",
        [
            {
                **row,
                "context": list(map(relative, row["context"])),
                "target": relative(row["target"]),
                "context_depth": list(map(relative, row["context_depth"])),
                "warp": relative(row["warp"]),
            }
            for row in chosen
        ],
    )
    say(
        f"{out}/triples_test.jsonl: {len(chosen)} triples of {len({row['scene'] for row in chosen})} test scans; left "
        f"out: {untrue} whose own pose is not within the thresholds of their words"
    )


def write_folder(folder, frames, up, pictures=".jpg", per_metre=1000):
    """Frames (extras/scans/scene.py) as a plain folder, rgb/<i>, depth/<i>.png and scene.json: a room that stands for a scan.

    up          (3,) of the frames' world;  pictures   ".jpg", as scans have them, or ".png", which loses nothing
    per_metre   units of the 16-bit depth
    """
    rows = []
    for i, frame in enumerate(frames):
        row = {"image": f"rgb/{i}{pictures}", "depth": f"depth/{i}.png", "c2w": frame.c2w.tolist()}
        save_image(folder / row["image"], frame.image())
        save_image(folder / row["depth"], (per_metre * frame.depth()).round().astype(np.uint16))
        rows.append(row)
    write_json(
        folder / "scene.json",
        {
            "frames": rows,
            "intrinsics": frames[0].intrinsics.tolist(),
            "depth_scale": per_metre,
            "up": np.asarray(up).tolist(),
        },
    )
