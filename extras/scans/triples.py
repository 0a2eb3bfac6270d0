"""
Which frames of a scanned scene make triples: poses first, then what the context sees, then the pictures themselves.

A triple is (context views, one motion in words, target view). The paper's rules (of its view consistency
tuning): the context covers at least 85 % of the target; its cameras are at least 1 m apart, horizontally or vertically,
and at least 30 degrees, in yaw or pitch; one of them is the reference, and the dominant component of the way from
there to the target becomes the words. Ours: no other component may be large, or the words would not be true
(lib/geometry.dominant_component), and every kept triple is verified in colour (extras/scans/quality.py).

All pairs of a scene are compared by pose alone, in a few matrix operations. Depth is then looked at for one reference
at a time: which part of its targets each camera sees that may stand beside it (`seen_context`), as points of a coarse
grid. Only what passes is loaded in full, measured once more, and verified.
"""

import itertools
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from extras.scans import quality
from lib.geometry import (
    Motion,
    coverage,
    decompose,
    dominant_component,
    instruction,
    motion_along,
    unproject,
    visible,
    warp,
)
from lib.images import load_image, save_image
from lib.streams import numpy_stream

GRID = (
    48  # pixels of a depth map's longer side while contexts are sought; every other one is a point
)
REACH = 6.0  # metres: a camera further from the reference does not stand in its context
TRIES = 3  # targets are looked at until so many times those to keep have been, of each context
NEIGHBOURS = 64  # cameras that a context is chosen from, at random
WORTH = 0.1  # a further camera must bring so many targets' worth of coverage
COARSE = 0.05  # the coarse grid may underestimate a coverage by so much


# ---- by pose ---------------------------------------------------------------------------------------------------------


class Rules(NamedTuple):
    """What makes a triple; the first three are the paper's."""

    coverage: float = 0.85  # share of the target's valid pixels that the context sees, at least
    apart_meters: float = (
        1.0  # between any two cameras of a context, at least; horizontally or vertically
    )
    apart_degrees: float = 30.0  # … and in yaw or pitch
    least_meters: float = 0.2  # shorter moves and smaller turns are not worth a view
    least_degrees: float = 10.0
    context: int = 4  # views of a context at most (lib/bagel.Settings.max_context)
    contexts: int = 6  # of a scene; times targets = 48 triples, the paper's average
    targets: int = 8  # of a context
    frames: int = 240  # of a scene that are looked at, evenly spread over the capture
    size: int = 512  # pixels of a written picture's shorter side: BAGEL enlarges what is smaller


def fit(size, pixels, side=max):
    """(width, height) of a frame shrunk so that its longer (side=min: shorter) side is `pixels`; never enlarged."""
    scale = min(1.0, pixels / side(size))
    return tuple(max(1, round(length * scale)) for length in size)


def motions_between(c2w, metric, rules):
    """All pairs of N cameras by pose: (N, N, 6) `decompose`, (N, N) dominant component or -1, and why pairs fell out.

    metric   whether lengths are metres; without a scale no pair is told as a move
    """
    delta = decompose(c2w[:, None], c2w[None])  # from row to column
    main, counts = dominant_component(delta), Counter()
    size = np.take_along_axis(np.abs(delta), np.maximum(main, 0)[..., None], -1)[..., 0]
    off_diagonal = ~np.eye(len(c2w), dtype=bool)
    rules_of_pose = {
        "not one motion": main < 0,
        "a move without a metric scale": (main < 3) & (not metric),
        "too small a motion": size
        < np.where(main < 3, rules.least_meters, rules.least_degrees) - 1e-6,
    }
    kept = off_diagonal
    for reason, refused in rules_of_pose.items():
        counts[reason] += int((kept & refused).sum())
        kept = kept & ~refused
    return delta, np.where(kept, main, -1), counts


def apart(c2w, up, metric, rules):
    """(N, N) bool: two cameras far enough from each other to stand in one context (the paper's rule).

    Of a scene without a metric scale the angle alone decides.
    """
    delta = decompose(c2w[:, None], c2w[None])
    turned = np.abs(delta[..., 3:5]).max(-1) >= rules.apart_degrees - 1e-6
    way = c2w[:, None, :3, 3] - c2w[None, :, :3, 3]
    height = way @ up
    level = np.linalg.norm(way - height[..., None] * up, axis=-1)
    return turned & (
        (np.maximum(level, np.abs(height)) >= rules.apart_meters - 1e-6) | (not metric)
    )


def assorted(delta, main, rng, count):
    """Up to `count` indices of targets, kinds of motion taking turns and each kind in random order.

    delta, main   of all frames seen from one reference: (N, 6) and (N,), main -1 = not a target
    """
    kinds = {}
    for k in rng.permutation(len(main)):
        if main[k] >= 0:
            kinds.setdefault((main[k], delta[k, main[k]] > 0), []).append(int(k))
    turns = [
        k for round_ in itertools.zip_longest(*kinds.values()) for k in round_ if k is not None
    ]
    return turns[:count]


def choose_context(reference, others, may_stand, seen, shares, rules):
    """Cameras beside the reference, one after the other: each time the one that covers most of what is not yet seen.

    others      cameras to choose from;  may_stand   (N, N) bool of `apart`
    seen        {camera: (P,) bool, which points of all targets it sees};  shares(mask) -> (T,) share of each target
    returns     the chosen cameras, the reference first
    """
    chosen, have = [reference], seen[reference]
    while len(chosen) < rules.context:
        others = [k for k in others if may_stand[k, chosen].all()]
        if not others:
            break
        # a target counts up to what is asked of it: more of the same view brings nothing
        worth = {
            k: np.minimum(shares(have | seen[k]), rules.coverage).sum() + 1e-3 * seen[k].mean()
            for k in others
        }
        best = max(others, key=worth.get)
        if len(chosen) > 1 and worth[best] - np.minimum(shares(have), rules.coverage).sum() < WORTH:
            break
        chosen, have = [*chosen, best], have | seen[best]
    return chosen


def find_triples(scene, rng, rules):
    """Contexts of a scene with the targets that its poses and coarse depth allow -> (list of dicts, Counter, frames).

    Each dict: "context" (frames, the reference anywhere among them), "reference" (its 0-based place) and "targets",
    [(frame, Motion)], in the order in which they should be tried; frames are indices into the returned list. The
    Counter tells what fell out by which rule.
    """
    counts, frames, depths = Counter(), [], []
    for k in np.unique(
        np.linspace(0, len(scene.frames) - 1, min(rules.frames, len(scene.frames))).astype(int)
    ):
        try:
            depths.append(scene.frames[k].depth(fit(scene.frames[k].size, GRID)))
            frames.append(scene.frames[k])
        except ValueError as error:
            counts[f"unreadable frame: {str(error).split(':')[-1].strip()}"] += 1
    if len(frames) < 3:
        return [], counts, frames
    c2w = np.stack([frame.c2w for frame in frames])
    delta, main, by_pose = motions_between(c2w, scene.metric, rules)
    may_stand = apart(c2w, scene.up, scene.metric, rules)
    counts.update(by_pose)
    cameras = [
        (depth, frame.K(fit(frame.size, GRID)), frame.c2w) for frame, depth in zip(frames, depths)
    ]
    found = []
    for reference in rng.permutation(len(frames))[: TRIES * rules.contexts]:
        if len(found) == rules.contexts:
            break
        targets = assorted(delta[reference], main[reference], rng, TRIES * rules.targets)
        near = np.linalg.norm(c2w[:, :3, 3] - c2w[reference, :3, 3], axis=1) <= (
            REACH if scene.metric else np.inf
        )
        others = np.flatnonzero(may_stand[reference] & near)
        if not targets or not len(others):
            counts["reference without targets or neighbours"] += 1
            continue
        others = rng.permutation(others)[:NEIGHBOURS].tolist()
        points = [
            unproject(*cameras[k])[1::2, 1::2].reshape(-1, 3)[cameras[k][0][1::2, 1::2].ravel() > 0]
            for k in targets
        ]
        context, covered = seen_context(int(reference), others, may_stand, points, cameras, rules)
        pairs = [
            (k, motion_along(delta[reference, k], main[reference, k]), c)
            for k, c in zip(targets, covered)
        ]
        repeated = {
            k for k in targets for j in context if j != reference and alike(delta[j, k], rules)
        }
        counts["candidates"] += len(pairs)
        counts["a context view repeats the target"] += len(repeated)
        counts["coverage, coarse"] += int(
            sum(c < rules.coverage - COARSE for k, _, c in pairs if k not in repeated)
        )
        pairs = [
            (k, motion)
            for k, motion, c in pairs
            if k not in repeated and c >= rules.coverage - COARSE
        ]
        if pairs:
            order = rng.permutation(len(context))
            found.append(
                {
                    "context": [context[i] for i in order],
                    "reference": int(np.argmin(order)),
                    "targets": pairs,
                }
            )
    return found, counts, frames


def seen_context(reference, others, may_stand, points, cameras, rules):
    """The context of one reference, and (T,) the share of each target's `points` (P_t, 3) that it covers."""
    ends = np.cumsum([len(part) for part in points])[:-1]
    flat = np.concatenate(points)
    if not len(flat):
        return [reference], np.zeros(len(points))
    seen = {k: np.isfinite(visible(flat, *cameras[k])[0]) for k in (reference, *others)}
    shares = lambda mask: np.array(
        [part.mean() if len(part) else 0.0 for part in np.split(mask, ends)]
    )  # noqa: E731
    context = choose_context(reference, others, may_stand, seen, shares, rules)
    return context, shares(np.any([seen[k] for k in context], 0))


def alike(delta, rules):
    """Whether two cameras differ by less than the smallest motion that is worth a view; delta (6,)."""
    return (
        np.linalg.norm(delta[:3]) < rules.least_meters
        and np.abs(delta[3:]).max() < rules.least_degrees
    )


# ---- by picture ------------------------------------------------------------------------------------------------------


def write_triples(scene, out, seed, rules):
    """Find, verify and write the triples of one scene below `out` -> (rows as in data.py, Counter of what fell out).

    Pictures are JPEG, out/<dataset>/<scene>/<frame>.jpg, each frame once; the warps PNG. Beside the pictures of a
    context stands their depth, <frame>_depth.png, by which `evaluate.py --bench wm` finds poses: uint16, thousandths of
    the poses' unit (millimetres where the scene is metric), 0 = unknown or too far to be written. Nothing but `seed`,
    the scene and the rules decides what comes out.
    """
    rng = numpy_stream("triples of a scan", seed)
    found, counts, frames = find_triples(scene, rng, rules)
    counts["frames"] = len(frames)
    folder, rows, views, written = Path(scene.dataset) / scene.id.replace("/", "_"), [], {}, set()
    for number, group in enumerate(found, 1):
        place = frames[group["context"][group["reference"]]]
        context, kept = [look(frames, k, views, counts, rules) for k in group["context"]], 0
        depths = [f"{folder}/{frames[k].name}_depth.png" for k in group["context"]]
        if None in context:
            counts["a context view cannot be read"] += len(group["targets"])
            continue
        for k, motion in group["targets"]:
            if kept == rules.targets:
                counts["enough of this context"] += 1
                continue
            target = look(frames, k, views, counts, rules)
            if target is None:
                continue
            warped, seen = warp(*target[1:3], context, target[3])
            covered = coverage(target[1], seen)
            measures = {"rejected": "coverage"}
            if covered >= rules.coverage:
                measures = quality.verify(target, context, target[3])
            if reason := measures["rejected"]:
                counts[reason] += 1
                continue
            name = f"{folder}/{number}_{place.name}_{motion.kind.replace(' ', '_')}_{motion.amount:g}_{frames[k].name}"
            shown = {j: f"{folder}/{frames[j].name}.jpg" for j in (*group["context"], k)}
            for j, view in zip(shown, (*context, target)):
                if j not in written:  # contexts share frames
                    save_image(out / shown[j], view[0])
                    written.add(j)
            save_image(
                out / f"{name}_warp.png",
                np.concatenate([warped, 255 * seen[..., None].astype(np.uint8)], -1),
            )
            rows.append(
                {
                    "id": name,
                    "scene": f"{scene.dataset}/{scene.id}",
                    "dataset": scene.dataset,
                    "context": [shown[j] for j in group["context"]],
                    "reference": group["reference"] + 1,
                    "motion": {"kind": motion.kind, "amount": motion.amount},
                    "instruction": instruction(motion, group["reference"] + 1),
                    "target": shown[k],
                    "warp": f"{name}_warp.png",
                    "coverage": round(covered, 4),
                    "metric": scene.metric,
                    "agreement": round(measures["agreement"], 4),
                    "intrinsics": np.round(target[3], 4).tolist(),
                    "context_c2w": [np.round(view[2], 6).tolist() for view in context],
                    "context_intrinsics": [np.round(view[3], 4).tolist() for view in context],
                    "context_depth": depths,
                    "target_c2w": np.round(target[2], 6).tolist(),
                }
            )
            kept += 1
        for file, view in zip(depths, context if kept else ()):
            if file not in written:
                save_image(out / file, thousandths(view[1]))
                written.add(file)
        views.clear()  # of one context at a time: memory
    counts["kept"] = len(rows)
    return rows, counts


def thousandths(depth):
    """(H, W) depth as a uint16 picture; what does not fit is 0, unknown."""
    scaled = np.round(1000 * np.nan_to_num(depth, posinf=0, neginf=0))
    return np.where((scaled > 0) & (scaled <= 65535), scaled, 0).astype(np.uint16)


def look(frames, k, views, counts, rules):
    """(image, depth, c2w, intrinsics) of frame k at the size that is written; None, counted once, if it is broken."""
    if k not in views:
        size = fit(frames[k].size, rules.size, min)
        try:
            views[k] = (
                frames[k].image(size),
                frames[k].depth(size),
                frames[k].c2w,
                frames[k].K(size),
            )
        except ValueError as error:
            counts[f"unreadable frame: {str(error).split(':')[-1].strip()}"] += 1
            views[k] = None
    return views[k]


# ---- for a person to judge -------------------------------------------------------------------------------------------


class Summary:
    """What came of many scans: add their reports (extras/scans/make.py) one by one, then read it or keep it as JSON."""

    def __init__(self):
        self.splits, self.counts, self.skipped, self.motions, self.notes = (
            Counter() for _ in range(5)
        )
        self.amounts, self.broken, self.cpu_seconds = (
            {"degrees": Counter(), "meters": Counter()},
            {},
            0.0,
        )

    def add(self, report, split):
        """Count one scan of a split."""
        self.splits[split] += 1
        self.counts.update(report["counts"])
        self.skipped.update(report["skipped"])
        self.notes.update([report["note"]] if report["note"] else [])
        self.cpu_seconds += report["cpu_seconds"]
        if report["error"]:
            self.broken[report["id"]] = report["error"]
        for row in report["rows"]:
            motion = Motion(**row["motion"])
            self.motions[motion.kind] += 1
            step = {"meters": 0.5, "degrees": 30}[motion.unit]
            self.amounts[motion.unit][round(int(motion.amount / step + 1e-9) * step, 1)] += 1

    def as_dict(self):
        """{"scans", "frames", "candidates", "kept", "per_scan", "rejected" by rule, "motions", "amounts", …};
        an amount stands for itself and what lies above it, up to the next one."""
        scans, rest = sum(self.splits.values()), dict(self.counts.most_common())
        totals = {key: rest.pop(key, 0) for key in ("frames", "candidates", "kept")}
        return {
            "scans": scans,
            "splits": dict(self.splits),
            **totals,
            "per_scan": round(totals["kept"] / scans, 1),
            "rejected": rest,
            "frames_skipped": dict(self.skipped.most_common()),
            "motions": dict(self.motions.most_common()),
            "amounts": {unit: dict(sorted(count.items())) for unit, count in self.amounts.items()},
            "notes": dict(self.notes),
            "broken": self.broken,
            "cpu_seconds": round(self.cpu_seconds, 1),
        }

    def text(self):
        """The same in lines to read, with a histogram of amounts."""
        s = self.as_dict()
        lines = [
            f"{s['scans']} scans ({', '.join(f'{n} {split}' for split, n in s['splits'].items())}), {s['frames']} "
            f"frames looked at, {s['candidates']} candidates, {s['kept']} triples kept: {s['per_scan']} per scan "
            f"(the paper keeps 48), {s['cpu_seconds'] / s['scans']:.1f} CPU-seconds per scan"
        ]
        for title, key in (
            ("pairs and candidates that fell out, by rule", "rejected"),
            ("frames skipped by the reader", "frames_skipped"),
            ("kept, by motion", "motions"),
            ("notes", "notes"),
        ):
            lines += (
                [f"  {title}", *(f"    {count:8}  {name}" for name, count in s[key].items())]
                if s[key]
                else []
            )
        for unit, counts in s["amounts"].items():
            lines += [f"  kept, by {unit} from"] if counts else []
            lines += [
                f"    {low:8g} {count:6} {'#' * round(40 * count / max(counts.values()))}"
                for low, count in counts.items()
            ]
        return "\n".join(lines + [f"  broken: {id}: {error}" for id, error in s["broken"].items()])


def contact_sheet(out, rows, path):
    """A page to judge by eye, of 12 rows at most: context (reference framed) | words | target | warp | target and warp
    in squares."""
    side, rows = 160, [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, 12).astype(int))]
    columns = max(len(row["context"]) for row in rows)
    page = Image.new("RGB", ((side + 4) * (columns + 4), (side + 4) * len(rows)), "white")
    draw = ImageDraw.Draw(page)

    def put(pixels, line, column, frame=False):
        scale = side / max(pixels.shape)
        picture = Image.fromarray(pixels).resize(
            [round(n * scale) for n in pixels.shape[1::-1]], Image.BOX
        )
        page.paste(picture, (column * (side + 4) + 2, line * (side + 4) + 2))
        if frame:
            x, y = column * (side + 4) + 2, line * (side + 4) + 2
            draw.rectangle(
                (x, y, x + picture.width - 1, y + picture.height - 1), outline="red", width=3
            )

    for line, row in enumerate(rows):
        target, warped = load_image(out / row["target"]), np.array(Image.open(out / row["warp"]))
        height, width = target.shape[:2]
        squares = (
            np.add.outer(np.arange(height) * 8 // height, np.arange(width) * 8 // width) % 2 == 0
        )[..., None]
        for column, place in enumerate(row["context"]):
            put(load_image(out / place), line, column, frame=column + 1 == row["reference"])
        words = (
            f"{row['scene']}\n{row['motion']['kind']} {row['motion']['amount']:g}\nfrom the framed view\n"
            f"coverage {row['coverage']:.2f}\nagreement {row['agreement']:.2f}"
        )
        draw.text((columns * (side + 4) + 4, line * (side + 4) + 8), words, "black")
        mixed = np.where(squares & (warped[..., 3:] > 0), warped[..., :3], target)
        for k, pixels in enumerate((target, warped[..., :3], mixed), 1):
            put(np.ascontiguousarray(pixels), line, columns + k)
    page.save(path, quality=90)
