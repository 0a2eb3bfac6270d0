"""
Datasets of scans into triples: `python data.py triples --dataset NAME --root DIR` calls `make_scans`.

extras/scans/scene.py reads a scan and extras/scans/triples.py finds its triples; this file goes through all scans of a
dataset on many processes, splits them by place, and goes on where an earlier run stopped: every scan has a report of
its own.
"""

import contextlib
import csv
import json
import os
import time
from collections.abc import Iterable
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from tqdm import tqdm

from data import worker
from extras.scans.frames import evenly
from extras.scans.scene import read_scene, scene_ids
from extras.scans.summary import SHEET_LINES, Summary, sheet_of
from extras.scans.triples import RULES, Rules, write_triples
from lib.distributed import fail, say
from lib.images import save_image
from lib.records import PICTURES, SPLITS, disk, read_log, whole_file, write_json, write_text
from lib.stage import lock_folder
from lib.streams import stable_hash, stream_seed

VERSION = 6  # of a scan's report: another one is made again


def make_scans(
    dataset: str,
    root: str | Path,
    out: str | Path,
    workers: int | None = None,
    seed: int = 0,
    rules: Rules = RULES,
    lists: dict[str, str] | None = None,
    limit: int | None = None,
) -> None:
    """out/triples_{train,val,test}.jsonl, scans/ (one report each), summary.json and sheet.jpg of one dataset.

    workers   processes; None: all cores.   lists   {"val": file, "test": file} with ids, one per line (`read_list`)
    limit     scans at most, evenly spread over the dataset
    Stops with a sentence if `root` holds no scan, or if `out` holds triples of other scans, which it would drop.
    Whatever the workers, the files are the same.
    """
    out, lists = Path(out), lists or {}
    try:
        ids = scene_ids(dataset, root)
    except ValueError as error:
        fail(error)
    files = [out / f"triples_{split}.jsonl" for split in SPLITS]
    if holds_others(files, "scene", {f"{dataset}/{id}" for id in ids}):
        fail(
            f"{out} holds triples of something else, and they would be lost. Give {dataset} of {root} an --out of its "
            f"own: train_wm.py --data takes several folders."
        )
    lock_folder(out)
    places, by_list = places_and_lists(dataset, root, ids, lists)
    splits = {id: split_of(dataset, place, by_list, lists) for id, place in places.items()}
    ids = [id for id in ids if id in places]
    ids = evenly(ids, limit or len(ids))
    job = partial(
        scan_triples, dataset=dataset, root=str(root), out=str(out), seed=seed, rules=rules
    )
    with disk(out), Pool(workers, worker) as pool:
        jobs = pool.imap(job, ids)
        reports = list(tqdm(jobs, total=len(ids), desc=f"triples of {dataset}", unit="scan"))
        pool.close()  # as in data.build
        pool.join()
    write_splits(out, reports, places, splits)


def scan_triples(id: str, dataset: str, root: str, out: str, seed: int, rules: Rules) -> Path:
    """Make all triples of one scan -> the file of its report {"rows", "counts", "skipped", "gravity", "error", ...}.

    A scan that was finished under the same rules is not done again. A broken one is reported by a sentence ("error")
    and tried again by the next run.
    """
    file = Path(out) / "scans" / dataset / f"{id.replace('/', '_')}.json"
    task = {
        "dataset": dataset,
        "id": id,
        "seed": seed,
        "rules": rules._asdict(),
        "version": VERSION,
    }
    if file.exists():
        report = json.loads(file.read_text())
        if task.items() <= report.items() and not report["error"]:
            return file
    start = time.process_time()
    report = task | {
        "rows": [],
        "counts": {},
        "skipped": {},
        "gravity": "",
        "note": "",
        "error": "",
    }
    try:
        scene = read_scene(dataset, root, id)
        rows, counts = write_triples(scene, Path(out), stable_hash(seed, dataset, id), rules)
        report |= {"rows": rows, "counts": dict(counts)}
        report |= {"skipped": dict(scene.skipped), "gravity": scene.gravity, "note": scene.note}
    except ValueError as error:
        report["error"] = str(error)
    report["cpu_seconds"] = round(time.process_time() - start, 2)
    write_text(file, json.dumps(report))
    return file


def write_splits(out, reports, places, splits):
    """The reports of all scans as triples_{split}.jsonl, summary.json and sheet.jpg.

    places, splits   {id of a scan: its place}, {id: its split}
    One report is in memory at a time: the paper's dataset has half a million rows.
    """
    total, samples, files = Summary(), [], {}
    with contextlib.ExitStack() as stack:
        for split in SPLITS:
            beside = stack.enter_context(whole_file(out / f"triples_{split}.jsonl"))
            files[split] = stack.enter_context(beside.open("w"))
        for path in reports:
            report = json.loads(path.read_text())
            place, split = places[report["id"]], splits[report["id"]]
            for row in report["rows"]:
                files[split].write(json.dumps(row | {"place": place}) + "\n")
            total.add(report, split)
            samples += report["rows"][: 1 + SHEET_LINES // len(reports)]
    write_json(out / "summary.json", total.facts)
    say(total.text())
    for split in ("val", "test"):
        if not total.facts["splits"][split]:
            say(f"no scan for {split}: --{split} FILE lists them")
    if samples:
        save_image(out / "sheet.jpg", sheet_of(out, samples))
        say(
            f"Look at {out}/sheet.jpg: the last column is the target with every other square taken from the context; "
            f"where edges break at the squares, depth or poses are wrong."
        )


# ---- splits by place -----------------------------------------------------------------------------------------------------


def places_of(dataset: str, root: str | Path, ids: list[str]) -> dict[str, str]:
    """{id: place that the scan shows}; all scans of a place stand on one side of the split.

    ScanNet's ids tell the place (scene0000_01). ARKitScenes has 5,047 captures of 1,661 places, which only the
    visit_id of its metadata.csv tells: captures with none (NA) are left out, and without the file there are no places.
    Elsewhere every scan is a place of its own.
    """
    if dataset == "scannet":
        return {id: id.rsplit("_", 1)[0] for id in ids}
    if dataset != "arkitscenes":
        return {id: id for id in ids}
    rows, known, places = [], set(ids), {}
    for file in (*Path(root).glob("metadata.csv"), *Path(root).glob("*/metadata.csv")):
        with file.open(newline="") as lines:
            rows += csv.DictReader(lines)
    for row in rows:
        visit = (row.get("visit_id") or "").removesuffix(".0")  # as pandas writes numbers
        if visit.isdigit() and row.get("video_id") in known:
            places[row["video_id"]] = visit
    return places


def split_of(dataset: str, place: str, by_list: dict[str, str], lists: Iterable[str] = ()) -> str:
    """ "train", "val" or "test" of a place: as `by_list` {place: split} says, else drawn by its name, 5 % for tests and
    2 % for validation; nothing is drawn into the splits that have `lists`."""
    if place in by_list:
        return by_list[place]
    draw = stream_seed("split", dataset, place) % 100
    split = "test" if draw < 5 else "val" if draw < 7 else "train"
    return "train" if split in lists else split


def read_list(split, file, ids):
    """The scans that a list names, one per line: of a CSV's line the first field that is one of `ids`."""
    if not Path(file).is_file():
        fail(
            f"{file} does not exist; --{split} names a file with the ids of its scans, one per line."
        )
    known, scans = set(ids), []
    lines = [line for line in Path(file).read_text().splitlines() if line.strip()]
    for line in lines:
        fields = [field.strip(' "') for field in line.split(",")]
        id = next((field for field in fields if field in known), None)
        if id is not None:
            scans.append(id)
    if not scans:
        fail(
            f"No line of {file} names a scan that is there; --{split} needs ids such as {ids[0]}, one per line."
        )
    unknown = len(lines) - len(scans)
    if unknown:
        say(
            f"--{split}: {unknown} of {len(lines)} lines of {file} name no scan that is there (a header is such a line)."
        )
    return scans


def places_and_lists(
    dataset: str, root: str | Path, ids: list[str], lists: dict[str, str | Path]
) -> tuple[dict[str, str], dict[str, str]]:
    """({id: place} of the scans that can be split, {place: split} of those that lists name).

    lists   {"val": file, "test": file}; a place goes where one of its scans is named. Says how many scans are left
            out because nobody knows their place; stops with a sentence where nothing could be drawn by place.
    """
    scans = {split: read_list(split, file, ids) for split, file in lists.items()}
    places = places_of(dataset, root, ids)
    by_list = {}
    if not places:
        if len(lists) < 2:
            fail(
                f"{root} has no metadata.csv with the visit_id of its captures, and without it captures of one place "
                f"would stand on both sides of the split. Copy it there (download_data.py of ARKitScenes fetches it), "
                f"or give both --val FILE and --test FILE."
            )
        places = {id: id for id in ids}
    for split in scans:
        for id in scans[split]:
            place = places.setdefault(id, id)
            if by_list.setdefault(place, split) != split:
                fail(
                    f"{lists[split]} and another list name the same place by {id}: a place stands on one side of the "
                    f"split."
                )
    lost = len(ids) - len(places)
    if lost:
        say(
            f"{lost} scans are left out: nobody knows which place they show. Name them in a list to keep them."
        )
    return places, by_list


# ---- rows on disk --------------------------------------------------------------------------------------------------------


def holds_others(files: Iterable[Path], key: str, ours: set) -> bool:
    """Whether JSONL files hold rows, and `key` of none is one of `ours`: to write them anew would drop another set."""
    any_row = False
    for file in files:
        for row in read_log(file):
            if row.get(key) in ours:
                return False
            any_row = True
    return any_row


def with_relative_paths(row: dict, folder: Path) -> dict:
    """A row whose pictures are named from `folder`, as rows of a file there are; the inverse of load_jsonl's paths."""
    row = dict(row)
    for key in PICTURES:
        if isinstance(row.get(key), list):
            row[key] = [os.path.relpath(path, folder) for path in row[key]]
        elif key in row:
            row[key] = os.path.relpath(row[key], folder)
    return row
