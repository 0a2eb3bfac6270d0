"""
How true an imagined view is: to the commanded pose, and to the contents of the room.

Pose, by analysis by synthesis. The room is rendered from a fine grid of poses around the reference; the render nearest
to the view in pixel space, refined, is where the view was taken from; what it shows of its own depth is never asked.
Two numbers, our reading of the two that the paper prints without names: the share of moves and that of turns (and looks)
which are within the thresholds below, ours too: the paper prints none. "pose" asks for the right motion, "tight" for
the right amount.

Content, by colours: no two things of a room share one, so a colour is an instance. As in the paper, three numbers:
  precision   share of the objects that a view shows which stand in the true view
  recall      share of the true view's objects which the view shows
  topology    share of the true view's pairs that stand in the same left-right order (an object that is missing: wrong)
"content" is their mean, where one number must do.
tests/test_consistency.py shows how both fall with errors of known size. Relative poses are (5,): dx, dy, dz in
metres, dangle and dphi in degrees, as lib/geometry.py decomposes them.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from lib.geometry import DEGREES_PER_METER, Array, Motion, camera_pose, compose, delta_of
from lib.rooms import COLOURS, Room, random_room, render

# How far a view may be off: an amount, or a share of what was commanded where that is more.
MOVE_BARS = {"within": (0.25, 0.30), "tight": (0.08, 0.20)}  # metres
TURN_BARS = {"within": (10.0, 0.0), "tight": (3.0, 0.10)}  # degrees
DIRECTION = 20.0  # degrees that the direction of a move may be off, in both
SCALE = np.array([1, 1, 1, DEGREES_PER_METER, DEGREES_PER_METER])  # makes relative poses comparable
POSE_THRESHOLDS = "within 0.25 m or 30% and 20° of direction (moves), 10° (turns); tight: 0.08 m or 20%, 3° or 10%"


# ---- pose -----------------------------------------------------------------------------------------------------------


def motion_grid() -> Array:
    """Every motion kind over its range, as relative poses (G, 5); the pose of the reference itself is one of them."""
    metres = np.arange(-15, 16) * 0.1
    upwards = np.arange(-5, 6) * 0.1
    yaw = np.arange(-35, 37) * 5.0
    pitch = np.arange(-9, 10) * 5.0
    rows = [np.zeros(5)]
    for component, amounts in enumerate((metres, metres, upwards, yaw, pitch)):
        for amount in amounts[np.abs(amounts) > 1e-9]:
            rows.append(np.eye(5)[component] * amount)
    return np.array(rows)


def render_at(room: Room, reference: Array, deltas: Array, size: int, supersample=1) -> Array:
    """Render from relative poses (n, 5) -> pixels (n, P) in [0, 1], float32; P = size * size * 3."""
    poses = np.stack([compose(reference, delta) for delta in deltas])
    renders = []
    for start in range(0, len(poses), 16):
        views = render(room, poses[start : start + 16], size, supersample=supersample)
        renders.append(views["rgb"])
    return np.concatenate(renders).reshape(len(poses), -1).astype(np.float32) / 255


def recover(room: Room, reference: Array, views: Array, size: int = 32) -> Array:
    """Where views were taken from: (n, H, W, 3) uint8 -> relative poses (n, 5) to `reference`.

    The nearest of the grid; then in each of four rounds a step of h to and fro in each of the five components, and the
    Gauss-Newton step that these ten renders imply; the best of all stays, and h is halved.
    """
    n = len(views)
    pixels = views.reshape(n, -1).astype(np.float32) / 255  # (n, P)
    grid = motion_grid()
    renders = render_at(room, reference, grid, size)  # (G, P)
    squares = (pixels**2).mean(1)[:, None] + (renders**2).mean(1)  # |a - b|² = |a|² + |b|² - 2 a.b
    errors = (squares - 2 / pixels.shape[1] * (pixels @ renders.T)).clip(0)  # (n, G)
    best_pose = grid[errors.argmin(1)]  # (n, 5)
    best_error = errors.min(1)  # (n,)
    to_and_fro = np.concatenate([np.eye(5), -np.eye(5)]) * SCALE  # (10, 5)
    for halvings in range(4):
        h = 0.2 * 0.5**halvings  # metres, or 30 times as many degrees
        supersample = 1 if halvings < 2 else 2
        poses = best_pose[:, None] + h * to_and_fro  # (n, 10, 5)
        renders = render_at(room, reference, poses.reshape(-1, 5), size, supersample)
        renders = renders.reshape(n, 10, -1)  # (n, 10, P)
        # Gauss-Newton: J d = pixels - middle, by the normal equations (J Jᵀ + ε I) d = J (pixels - middle)
        middle = renders.mean(1)  # (n, P)
        jacobian = (renders[:, :5] - renders[:, 5:]) / (2 * h)  # (n, 5, P)
        normal = jacobian @ jacobian.transpose(0, 2, 1) + 1e-3 * np.eye(5)  # (n, 5, 5)
        gradient = jacobian @ (pixels - middle)[..., None]  # (n, 5, 1)
        step = np.linalg.solve(normal, gradient)[..., 0].clip(-2 * h, 2 * h)  # (n, 5)
        jump = best_pose + step * SCALE
        jump_renders = render_at(room, reference, jump, size, supersample)  # (n, P)
        poses = np.concatenate([poses, jump[:, None]], 1)  # (n, 11, 5)
        renders = np.concatenate([renders, jump_renders[:, None]], 1)  # (n, 11, P)
        errors = ((renders - pixels[:, None]) ** 2).mean(2)  # (n, 11)
        nearest = poses[np.arange(n), errors.argmin(1)]  # (n, 5)
        better = errors.min(1) < best_error
        best_pose = np.where(better[:, None], nearest, best_pose)
        best_error = np.minimum(errors.min(1), best_error)
    return best_pose


def angle_of(cosine: float) -> float:
    """Degrees."""
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def pose_error(commanded: Array, recovered: Array) -> dict:
    """Compare two relative poses (5,) -> {"family", "within", "tight", and metres, direction (degrees) or degrees}.

    A move is judged by its translation alone: its length to within a bar, and its direction; a turn by its rotation alone.
    """
    want, got = commanded[:3], recovered[:3]
    if np.abs(want).max() > 0:
        size, got_size = np.linalg.norm(want), np.linalg.norm(got)
        direction = angle_of(want @ got / (size * got_size)) if size * got_size > 1e-9 else 180.0
        meters = float(np.linalg.norm(got - want))
        error = {"family": "moves", "meters": meters, "direction": direction}
        off = abs(got_size - size) if direction <= DIRECTION else np.inf
    else:
        rotation = camera_pose(0, 0, 0, *commanded[3:])[:3, :3]
        rotation = rotation.T @ camera_pose(0, 0, 0, *recovered[3:])[:3, :3]
        size, off = np.abs(commanded[3:]).max(), angle_of((np.trace(rotation) - 1) / 2)
        error = {"family": "turns", "degrees": off}
    bars = MOVE_BARS if error["family"] == "moves" else TURN_BARS
    for name, (amount, share) in bars.items():
        error[name] = bool(off <= max(amount, share * size))
    return error


def pose_errors(rows: list[dict], recovered: Array) -> list[dict]:
    """`pose_error` of every row of triples, whose camera was recovered at (n, 5)."""
    errors = []
    for row, delta in zip(rows, recovered, strict=True):
        errors.append(pose_error(delta_of(Motion(**row["motion"])), delta))
    return errors


# ---- content --------------------------------------------------------------------------------------------------------

SHADES = np.linspace(0.7, 1.0, 4)  # how light falls on a thing
PALETTE = np.concatenate([np.outer(SHADES, rgb) for rgb in COLOURS.values()]).astype(np.float32)
SATURATED = 0.30 * 255  # walls and floors stay below, furniture above
STRONG = 16  # pixels of 1,024: surely seen
WEAK = 8  # perhaps seen: from here to STRONG neither a hit nor a miss
APART = 3 / 32  # of the width: two objects stand one to the right of the other


class Content(NamedTuple):
    """What n views show of the 8 colours."""

    count: Array  # (n, 8) pixels of 1,024
    middle: Array  # (n, 8) mean column in [0, 1]
    dominant: Array  # (n, 3) the colour with most pixels in each third of the width; -1: none has 2 % of the view


def classify(views: Array) -> Array:
    """Views (n, H, W, 3) uint8 -> number of the colour of COLOURS (n, H, W), -1 where a pixel shows no object."""
    pixels = views.reshape(-1, 3).astype(np.float32)
    colour = np.full(len(pixels), -1)
    vivid = np.flatnonzero(pixels.max(1) - pixels.min(1) > SATURATED)
    # |pixel - shade|² without |pixel|², which is the same for all shades
    distances = (PALETTE**2).sum(1) - 2 * pixels[vivid] @ PALETTE.T  # (vivid, 8 * 4)
    colour[vivid] = distances.argmin(1) // len(SHADES)
    return colour.reshape(views.shape[:3])


def describe(views: Array) -> Content:
    """What views (n, H, W, 3) show."""
    _, height, width, _ = views.shape
    is_colour = classify(views)[..., None] == np.arange(len(COLOURS))  # (n, H, W, 8)
    columns = is_colour.sum(1)  # (n, W, 8)
    count = columns.sum(1)  # (n, 8)
    scale = 1024 / (height * width)
    places = np.arange(width)[:, None] + 0.5
    middle = (columns * places).sum(1) / np.maximum(count, 1) / width
    dominant = []
    for third in np.array_split(np.arange(width), 3):
        share = columns[:, third].sum(1) * scale  # (n, 8)
        dominant.append(np.where(share.max(1) >= 0.02 * 1024, share.argmax(1), -1))
    return Content(count * scale, middle, np.stack(dominant, 1))


def content_counts(views: Array, true: Array) -> Array:
    """What there is to count in views (n, H, W, 3) beside the true ones -> (n, 6): three pairs of hits and cases.

    precision   objects that a view shows: those that stand in the true view
    recall      objects of the true view: those that the view shows
    topology    pairs of the true view, one to the right of the other: those in the same order
    """
    view, target = describe(views), describe(true)
    in_view = view.count >= STRONG  # (n, 8)
    in_target = target.count >= STRONG
    pairs = target.middle[:, :, None] - target.middle[:, None, :] > APART  # first right of second
    pairs &= in_target[:, :, None] & in_target[:, None, :]  # (n, 8, 8)
    faint = view.count >= WEAK
    ordered = view.middle[:, :, None] > view.middle[:, None, :]
    ordered &= faint[:, :, None] & faint[:, None, :]
    counts = []
    for hit, case in (
        (target.count >= WEAK, in_view),
        (faint, in_target),
        (ordered, pairs),
    ):
        for flags in (hit & case, case):
            counts.append(flags.reshape(len(views), -1).sum(1))
    return np.stack(counts, 1)


def content_of(counts: Array) -> dict[str, Array]:
    """Sums of `content_counts` (..., 6) -> {"precision", ..., "content"}, each (...); nan where there is no case."""
    hits, cases = counts[..., ::2], counts[..., 1::2]  # (..., 3)
    with np.errstate(invalid="ignore"):  # 0 / 0
        shares = hits / cases
        content = np.nansum(shares, -1) / (cases > 0).sum(-1)
    precision, recall, topology = np.moveaxis(shares, -1, 0)
    return {"precision": precision, "recall": recall, "topology": topology, "content": content}


def recover_all(rows: list[dict], *lists: list[Array]) -> list[Array]:
    """`recover` for several lists of views, one view per row each -> per list (n, 5).

    The grid of a reference is rendered once; a picture that occurs twice in a room (a copied reference) is seen once.
    """
    members_of = defaultdict(list)  # rows with one reference view
    for index, row in enumerate(rows):
        members_of[row["room"], row["reference"], str(row["context_c2w"])].append(index)
    recovered = [np.zeros((len(rows), 5)) for _ in lists]
    for (room, reference, _), members in members_of.items():
        reference_c2w = np.array(rows[members[0]]["context_c2w"][reference - 1])
        stack = []
        for views in lists:
            stack += [views[index] for index in members]
        distinct, number = np.unique(np.stack(stack), axis=0, return_inverse=True)
        poses = recover(random_room(room), reference_c2w, distinct, size=distinct.shape[1])
        for result, own in zip(recovered, np.split(poses[number], len(lists)), strict=True):
            result[members] = own
    return recovered


def per_view(rows: list[dict], views: list[Array], errors: list[dict]) -> Array:
    """What single views are worth, in numbers to be summed: (n, 10), see `scores_of`; errors: of `pose_errors`.

    Columns: 1; pose within the thresholds; the tight pose; squared error, pictures in [-1, 1]; the six of `content_counts`.
    """
    views = np.stack(views)
    true = np.stack([row["target"] for row in rows])
    squared = np.square((views.astype(np.float32) - true) / 127.5).mean((1, 2, 3))
    within = [error["within"] for error in errors]
    tight = [error["tight"] for error in errors]
    counts = content_counts(views, true)
    return np.column_stack([np.ones(len(rows)), within, tight, squared, counts])


def scores_of(sums: Array) -> dict[str, Array]:
    """Sums over views (..., 10) of `per_view` -> {"pose", "tight", "mse", "content" and its parts}, each (...)."""
    n, within, tight, squared, *counts = np.moveaxis(sums, -1, 0)
    pose = {"pose": within / n, "tight": tight / n, "mse": squared / n}
    return pose | content_of(np.stack(counts, -1))


def score_views(rows: list[dict], views: list[Array], recovered: Array) -> dict:
    """`summary_of` one view (H, W, 3) uint8 per row of `load_triples`; recovered: (n, 5) of `recover_all`."""
    errors = pose_errors(rows, recovered)
    return summary_of(errors, per_view(rows, views, errors))


def summary_of(errors: list[dict], values: Array) -> dict:
    """The mean scores of n views by their `pose_errors` and `per_view` (n, 10), nan errors (no camera found) as inf.

    returns   `mean_scores`, and of "moves" and "turns" each the same with their median errors
    """
    result = mean_scores(values)
    for family in ("moves", "turns"):
        members = [i for i, error in enumerate(errors) if error["family"] == family]
        if not members:
            continue
        result[family] = mean_scores(values[members])
        for key in ("meters", "direction", "degrees"):
            if key in errors[members[0]]:
                sizes = np.nan_to_num([errors[i][key] for i in members], nan=np.inf)
                result[family][f"median_{key}"] = float(np.median(sizes))
    return result


def mean_scores(values: Array) -> dict:
    """`scores_of` the sum over views (n, 10), as numbers, and "n"."""
    scores = {key: float(value) for key, value in scores_of(values.sum(0)).items()}
    return {**scores, "n": len(values)}


def compare(rows: list[dict], groups: dict[str, dict[str, list[Array]]]) -> dict:
    """Score {title: {name: one view per row}}, all of a room at once -> {title: {name: of `score_views`}}."""
    lists = [views for group in groups.values() for views in group.values()]
    recovered = iter(recover_all(rows, *lists))
    results = {}
    for title, group in groups.items():
        results[title] = {}
        for name, views in group.items():
            results[title][name] = score_views(rows, views, next(recovered))
    return results
