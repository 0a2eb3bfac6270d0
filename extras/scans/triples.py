"""
Which frames of a scanned scene make triples: poses first, then what the context sees, then the pictures themselves.

A triple is (context views, one motion in words, target view). The paper's rules (of its view consistency
tuning): the context covers at least 85 % of the target; its cameras are at least 1 m apart, horizontally or vertically,
and 30 degrees, in yaw or pitch (ours: or, `may_stand_together`); one of them is the reference, and the dominant
component of the way from there to the target becomes the words. Ours: no other component may be large, or the words
would not be true (lib/geometry.dominant_component), and every triple is verified in colour (extras/scans/quality.py).

All pairs of a scene are compared by pose alone, in a few matrix operations. Depth is then looked at for one reference
at a time, of those that have targets and neighbours, until the scene has its triples: which part of its targets each
camera sees that may stand beside it (`cover_targets`), as points of a coarse grid. Only what passes is loaded in full,
measured once more, and verified.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from extras.scans import quality
from extras.scans.frames import Camera, Frame, PosedView, Scene, Size, evenly, thousandths
from lib.geometry import (
    SLACK,
    Motion,
    coverage,
    decompose,
    dominant_component,
    motion_along,
    unproject,
    visible,
    warp,
)
from lib.images import save_image
from lib.simulators import instruction
from lib.streams import numpy_stream

GRID = 48  # pixels of a depth map's longer side in the search; every other one is a point
REACH = 6.0  # metres: a camera further from the reference does not stand in its context
TRIES = 3  # targets are looked at until so many times those to keep have been, of each context
NEIGHBOURS = 64  # cameras that a context is chosen from, at random
WORTH = 0.1  # a further camera must bring so many targets' worth of coverage
COARSE = 0.05  # the coarse grid may underestimate a coverage by so much


class Rules(NamedTuple):
    """What makes a triple. The first three are the paper's; `both_apart` and an infinite `slack` make it the paper's rule."""

    coverage: float = 0.85  # share of the target's known pixels that the context sees, at least
    apart_meters: float = 1.0  # between any two cameras of a context, horizontally or vertically
    apart_degrees: float = 30.0  # … or in yaw or pitch
    both_apart: bool = False  # True: not or, but and: the paper's text
    least_meters: float = 0.2  # shorter moves and smaller turns are not worth a view
    least_degrees: float = 10.0
    slack: float = SLACK  # metres that the words may leave unsaid; inf: the paper's rule
    known: float = 0.5  # share of a frame's pixels with depth, at least: no rule sees the rest
    context: int = 4  # views of a context at most (lib/bagel.Settings.max_context)
    targets: int = 8  # of a context
    triples: int = 48  # of a scene, the paper's average
    frames: int = 240  # of a scene that are looked at, evenly spread over the capture
    size: int = 512  # pixels of a written picture's shorter side: BAGEL enlarges what is smaller


RULES = Rules()


class Candidates(NamedTuple):
    """A context and the targets that poses and coarse depth allow; frames are indices into a list."""

    context: list[int]  # the reference anywhere among them
    reference: int  # 0-based, among the context
    targets: list[tuple[int, Motion]]  # in the order in which they should be tried


class VerifiedTarget(NamedTuple):
    """A target that passed, with its picture in memory."""

    frame: int
    motion: Motion
    view: PosedView
    coverage: float
    agreement: float
    warp: ndarray  # (H, W, 4) uint8: the context warped into it, alpha 255 where it is seen


def fit(size: Size, pixels: int, side: Callable = max) -> Size:
    """(width, height) of a frame shrunk so that its longer (side=min: shorter) side is `pixels`; never enlarged."""
    scale = min(1.0, pixels / side(size))
    return tuple(max(1, round(length * scale)) for length in size)


# ---- by pose -------------------------------------------------------------------------------------------------------------


def motions_between(c2w: ndarray, metric: bool, rules: Rules) -> tuple[ndarray, ndarray, Counter]:
    """All pairs of N cameras by pose: (N, N, 6) `decompose`, (N, N) dominant component or -1, and why pairs fell out.

    metric   whether lengths are metres; without a scale no pair is told as a move
    """
    delta = decompose(c2w[:, None], c2w[None])  # from row to column
    main = dominant_component(delta, rules.slack)
    amount = np.take_along_axis(np.abs(delta), np.maximum(main, 0)[..., None], -1)[..., 0]
    is_move = main < 3
    least = np.where(is_move, rules.least_meters, rules.least_degrees)
    refusals = {
        "a camera looks straight up or down": np.isnan(delta[..., 5]),
        "not one motion": main < 0,
        "a move without a metric scale": is_move & (not metric),
        "too small a motion": amount < least - 1e-6,
    }
    counts = Counter()
    allowed = ~np.eye(len(c2w), dtype=bool)
    for reason, refused in refusals.items():
        counts[reason] += int((allowed & refused).sum())
        allowed = allowed & ~refused
    return delta, np.where(allowed, main, -1), counts


def may_stand_together(delta: ndarray, metric: bool, rules: Rules) -> ndarray:
    """(N, N) bool: two cameras differ enough to stand in one context; delta (N, N, 6), `decompose` from row to column.

    The paper's text asks for a metre and 30 degrees (`both_apart`). Its figure prints "Delta Distance > 1.0, Angle > 30" below
    a sample that is a turn of 44 degrees. Ours: either will do, or who turns on the spot gives no context. Of a scene
    without a metric scale the angle alone decides.
    """
    level = np.linalg.norm(delta[..., :2], axis=-1)
    moved = np.maximum(level, np.abs(delta[..., 2]))
    turned = np.abs(delta[..., 3:5]).max(-1)  # yaw or pitch
    is_far = moved >= rules.apart_meters - 1e-6
    is_turned = turned >= rules.apart_degrees - 1e-6
    if not metric:
        return is_turned
    return is_far & is_turned if rules.both_apart else is_far | is_turned


def in_turn(groups: dict[Any, list]) -> list:
    """The first of every group, then the second of every group that has one ..."""
    turns = []
    for one_of_each in zip_longest(*groups.values()):
        turns += [member for member in one_of_each if member is not None]
    return turns


def targets_in_turn(delta, main, rng):
    """Indices of targets, kinds of motion taking turns and each kind in random order.

    delta, main   of all frames seen from one reference: (N, 6) and (N,), main -1 = not a target
    """
    kinds = {}
    for k in rng.permutation(len(main)).tolist():
        if main[k] >= 0:
            kinds.setdefault((main[k], delta[k, main[k]] > 0), []).append(k)
    return in_turn(kinds)


def repeats(delta, rules):
    """Whether two cameras differ by less than the smallest motion that is worth a view; delta (6,)."""
    is_near = np.linalg.norm(delta[:3]) < rules.least_meters
    return is_near and np.abs(delta[3:]).max() < rules.least_degrees


# ---- by coarse depth -----------------------------------------------------------------------------------------------------


def find_triples(
    frames: list[Frame], cameras: list[Camera], metric: bool, rng, rules: Rules, counts: Counter
) -> Iterator[Candidates]:
    """Contexts of a scene with the targets that may go with them; `counts` what falls out, by rule.

    frames, cameras   of `open_cameras`;  metric   whether lengths are metres
    """
    c2w = np.stack([frame.c2w for frame in frames])
    delta, main, by_pose = motions_between(c2w, metric, rules)
    counts.update(by_pose)
    together = may_stand_together(delta, metric, rules)
    beside = together & ((np.linalg.norm(delta[..., :3], axis=-1) <= REACH) | (not metric))
    is_reference = (main >= 0).any(1) & beside.any(1)
    counts["reference without targets or neighbours"] += int((~is_reference).sum())
    for reference in rng.permutation(np.flatnonzero(is_reference)).tolist():
        targets = targets_in_turn(delta[reference], main[reference], rng)[: TRIES * rules.targets]
        others = rng.permutation(np.flatnonzero(beside[reference]))[:NEIGHBOURS].tolist()
        context, shares = cover_targets(reference, others, together, targets, cameras, rules)
        pairs = []
        for k, share in zip(targets, shares, strict=True):
            counts["candidates"] += 1
            if any(repeats(delta[j, k], rules) for j in context if j != reference):
                counts["a context view repeats the target"] += 1
            elif share < rules.coverage - COARSE:
                counts["coverage, coarse"] += 1
            else:
                pairs.append((k, motion_along(delta[reference, k], main[reference, k])))
        if pairs:
            order = rng.permutation(len(context))
            context = [context[i] for i in order]
            yield Candidates(context, context.index(reference), pairs)


def open_cameras(scene, rules):
    """The frames that are looked at and are fit to stand in a triple, their cameras, and why others fell out."""
    looked_at, pictures, counts = [], [], Counter()
    for frame in evenly(scene.frames, rules.frames):
        try:
            camera = frame.camera(fit(frame.size, GRID))
            rgb = frame.image(fit(frame.size, quality.FINE, min))
        except ValueError as error:
            counts[unreadable(error)] += 1
            continue
        if (camera.depth > 0).mean() < rules.known:
            counts["depth of too little of the frame"] += 1
            continue
        looked_at.append((frame, camera))
        pictures.append(quality.picture_measures(rgb))
    frames, cameras = [], []
    faults = quality.faults_of_pictures(pictures) if pictures else []
    for (frame, camera), fault in zip(looked_at, faults, strict=True):
        if fault:
            counts[fault] += 1
            continue
        frames.append(frame)
        cameras.append(camera)
    counts["frames"] = len(looked_at)
    return frames, cameras, counts


def unreadable(error):
    """The reason under which a broken frame is counted."""
    return f"unreadable frame: {str(error).split(':')[-1].strip()}"


def cover_targets(reference, others, together, targets, cameras, rules):
    """The context of one reference, and (T,) the share of each target's points that it covers."""
    points = []
    for k in targets:
        depth = cameras[k].depth[1::2, 1::2]
        points.append(unproject(*cameras[k])[1::2, 1::2][depth > 0])  # (P_t, 3)
    flat = np.concatenate(points)  # (P, 3)
    owner = np.repeat(np.eye(len(targets)), [len(part) for part in points], axis=0)  # (P, T)
    sees = np.zeros((len(cameras), len(flat)), bool)
    for k in (reference, *others):
        sees[k] = np.isfinite(visible(flat, *cameras[k])[0])
    return choose_context(reference, others, together, sees, owner, rules)


def choose_context(
    reference: int,
    others: list[int],
    together: ndarray,
    sees: ndarray,
    owner: ndarray,
    rules: Rules,
) -> tuple[list[int], ndarray]:
    """The reference and then, one after the other, the camera that covers most of what is not yet covered.

    others     cameras to choose from;  together   (N, N) bool of `may_stand_together`
    sees       (N, P) bool: which points of all targets a camera sees
    owner      (P, T): 1 where a point is of a target
    returns    the context, and (T,) the share of each target that it covers
    """
    points = np.maximum(owner.sum(0), 1)  # of each target

    def worth(masks):
        # a target counts up to what is asked of it: more of the same view brings nothing
        return np.minimum(masks @ owner / points, rules.coverage).sum(-1)

    context, union = [reference], sees[reference]  # of what the context sees
    while len(context) < rules.context:
        others = [k for k in others if together[k, context].all()]
        if not others:
            break
        gains = worth(union | sees[others]) + 1e-3 * sees[others].mean(-1)
        best = gains.argmax()
        if len(context) > 1 and gains[best] - worth(union) < WORTH:
            break
        context.append(others[best])
        union = union | sees[others[best]]
    return context, union @ owner / points


# ---- by picture ----------------------------------------------------------------------------------------------------------


def write_triples(scene: Scene, out: Path, seed: int, rules: Rules) -> tuple[list[dict], Counter]:
    """Find, verify and write the triples of one scene below `out` -> (rows: records.Triple, what fell out).

    Pictures are JPEG, out/<dataset>/<scene>/<frame>.jpg, each frame once; the warps PNG. Beside the pictures of a
    context stands their depth, <frame>_depth.png, by which `evaluate.py --bench wm` finds poses: uint16, thousandths of
    the poses' unit (millimetres where the scene is metric), 0 = unknown or too far to be written. Nothing but `seed`,
    the scene and the rules decides what comes out.
    """
    frames, cameras, counts = open_cameras(scene, rules)
    rng = numpy_stream("triples of a scan", seed)
    groups = find_triples(frames, cameras, scene.metric, rng, rules, counts) if frames else ()
    folder = f"{scene.dataset}/{scene.id.replace('/', '_')}"
    rows, files = [], set()

    def save(name, pixels):
        if name not in files:  # contexts share frames
            save_image(out / name, pixels)
            files.add(name)

    for number, group in enumerate(groups, 1):
        if len(rows) == rules.triples:
            break
        context = [frames[k].view(fit(frames[k].size, rules.size, min)) for k in group.context]
        names = [frames[k].name for k in group.context]
        limit = min(rules.targets, rules.triples - len(rows))
        targets = verified_targets(group, context, frames, limit, rules, counts)
        for name, view in zip(names, context if targets else [], strict=False):
            save(f"{folder}/{name}.jpg", view.rgb)
            save(f"{folder}/{name}_depth.png", thousandths(view.depth))
        for target in targets:
            view, motion = target.view, target.motion
            name = frames[target.frame].name
            command = f"{motion.kind}_{motion.amount:g}"
            id = f"{folder}/{number}_{names[group.reference]}_{command}_{name}"
            save(f"{folder}/{name}.jpg", view.rgb)
            save(f"{id}_warp.png", target.warp)
            row = {
                "id": id,
                "scene": f"{scene.dataset}/{scene.id}",
                "dataset": scene.dataset,
                "context": [f"{folder}/{name}.jpg" for name in names],
                "reference": group.reference + 1,
                "motion": {"kind": motion.kind, "amount": motion.amount},
                "instruction": instruction(motion, group.reference + 1),
                "target": f"{folder}/{name}.jpg",
                "warp": f"{id}_warp.png",
                "coverage": round(target.coverage, 4),
                "metric": scene.metric,
                "agreement": round(target.agreement, 4),
                "intrinsics": rounded(view.intrinsics, 4),
                "context_c2w": [rounded(view.c2w, 6) for view in context],
                "context_intrinsics": [rounded(view.intrinsics, 4) for view in context],
                "context_depth": [f"{folder}/{name}_depth.png" for name in names],
                "target_c2w": rounded(view.c2w, 6),
            }
            rows.append(row)
    counts["kept"] = len(rows)
    return rows, counts


def rounded(values, digits):
    """An array as nested lists, for JSON."""
    return np.round(values, digits).tolist()


def verified_targets(group, context, frames, limit, rules, counts):
    """The targets of a context that pass when they are looked at in full, `limit` at most; `counts` the rest."""
    targets = []
    for k, motion in group.targets:
        if len(targets) == limit:
            counts["enough of this context"] += 1
            continue
        view = frames[k].view(fit(frames[k].size, rules.size, min))
        rgb, mask = warp(view.depth, view.c2w, context, view.intrinsics)
        share = coverage(view.depth, mask)
        reason = "coverage"
        if share >= rules.coverage:
            reason, measures = quality.verify_triple(view, context)
        if reason:
            counts[reason] += 1
            continue
        rgba = np.concatenate([rgb, 255 * mask[..., None].astype(np.uint8)], -1)
        targets.append(VerifiedTarget(k, motion, view, share, measures["agreement"], rgba))
    return targets
