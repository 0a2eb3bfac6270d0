"""
The simulator's own bench on disk: triples with their pictures, and the views that a simulator gives for them.

`evaluate.py --bench wm` and the evidence measure these (lib/consistency.py, extras/report/real_views.py).
"""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from lib import common
from lib.geometry import Motion, Query, instruction
from lib.images import save_image
from lib.records import load_jsonl
from lib.simulators import SimulatorError
from lib.streams import stable_hash, stream_seed


def load_triples(path, limit=None):
    """Rows of triples_*.jsonl with context, target and warp as arrays; files are read once. The depth of the context,
    which rows of scans have, stays in its files."""
    rows, images = load_jsonl(path)[:limit], {}

    def read(place, kind="RGB"):
        if place not in images:
            images[place] = np.array(Image.open(place).convert(kind))
        return images[place]

    try:
        return [
            {
                **row,
                "context": [read(place) for place in row["context"]],
                "target": read(row["target"]),
                "warp": read(row["warp"], "RGBA"),
            }
            for row in rows
        ]
    except OSError as error:
        common.fail(
            f"A picture of {path} cannot be read ({error}). Remove {path} and make it again: "
            f"python data.py triples"
        )


def fingers(row):
    """A number that changes with the pictures a simulator is shown: an old view of other pictures is no view."""
    return stable_hash([hashlib.sha256(image.tobytes()).hexdigest() for image in row["context"]])


def imagine_targets(simulator, rows, folder=None, batch=64, title="imagine"):
    """The view that the simulator gives for every triple; kept in `folder` so that a killed run continues.

    Raises SimulatorError if a server fails, once the views that it gave are kept.
    """
    views = []
    for start in tqdm(
        range(0, len(rows), batch), desc=title, unit="batch", disable=not common.is_main()
    ):
        part = rows[start : start + batch]
        kept = [
            folder and Path(folder) / f"{row['id'].replace('/', '_')}_{fingers(row):016x}.png"
            for row in part
        ]
        queries = [
            Query(
                row["context"],
                row["reference"],
                instruction(Motion(**row["motion"]), row["reference"]),
                stream_seed("imagine", row["id"]),
                {"room": row["room"], "poses": row["context_c2w"]} if "room" in row else None,
            )
            for row, place in zip(part, kept)
            if not (place and place.exists())
        ]
        try:
            new = iter(simulator.imagine(queries) if queries else [])
        except SimulatorError as error:
            missing = [place for place in kept if not (place and place.exists())]
            for place, view in zip(missing, error.results):
                if place and not isinstance(view, SimulatorError):
                    save_image(place, view)
            raise
        for row, place in zip(part, kept):
            if place and place.exists():
                view = np.array(Image.open(place))
            else:
                view = np.asarray(next(new))
                if place:
                    save_image(place, view)
            shape = row["context"][row["reference"] - 1].shape  # the target's shape as well
            if view.shape != shape:
                view = np.asarray(Image.fromarray(view).resize(shape[1::-1], Image.BICUBIC))
            views.append(view)
    return views
