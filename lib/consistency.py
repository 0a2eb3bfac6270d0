"""
How true an imagined view is: to the commanded pose, and to the contents of the room.

Pose, by analysis by synthesis. The room is rendered from a fine grid of poses around the reference; the render nearest
to the view in pixel space, refined, is where the view was taken from; what it shows of its own depth is never asked.
Within the threshold: a turn or look whose rotation is off by at most 10 degrees; a move whose direction is off by at
most 20 degrees and whose length by at most 0.25 m or 30 % (the paper compares the same two and prints no threshold).

Content, by colours: no two things of a room share one, so a colour is an instance. Compared with the true view:
  objects   F1 of the objects seen
  order     share of the true view's pairs that stand in the same left-right order (an object that is missing: wrong)
  thirds    share of the left, centre and right thirds whose dominant object is the true one
Content is the mean of the three.

Dose: how far the camera went along the commanded axis, beside how far it was told to go, motion by motion.

Calibration: the same scores of views whose error is known, since a metric says something only if they fall with it.
"""

from dataclasses import replace

import numpy as np

from lib.geometry import (
    DEGREES_PER_METER,
    TABLE,
    Motion,
    camera_pose,
    decompose,
    fill_holes,
    move_camera,
)
from lib.rooms import COLOURS, random_room, render
from lib.streams import numpy_stream

LENGTH, SHARE, DIRECTION, ROTATION = (
    0.25,
    0.30,
    20.0,
    10.0,
)  # metres, of the commanded length, degrees, degrees
SCALE = np.array(
    [1, 1, 1, DEGREES_PER_METER, DEGREES_PER_METER]
)  # (dx, dy, dz, yaw, pitch) in comparable units


# ---- pose -----------------------------------------------------------------------------------------------------------


def delta_of(motion):
    """The relative pose (5,) that a motion commands: dx, dy, dz in metres, yaw, pitch in degrees."""
    return decompose(np.eye(4), move_camera(np.eye(4), motion))[:5]


def motion_grid():
    """Every motion kind over its range, as relative poses (G, 5); the pose of the reference itself is one of them."""
    rows = [np.zeros(5)]
    along, upwards = np.arange(-15, 16) * 0.1, np.arange(-5, 6) * 0.1  # metres
    yaw, pitch = np.arange(-35, 37) * 5.0, np.arange(-9, 10) * 5.0  # degrees
    for component, amounts in enumerate((along, upwards, along, yaw, pitch)):
        for amount in amounts[np.abs(amounts) > 1e-9]:
            rows.append(np.eye(5)[component] * amount)
    return np.array(rows)


def look(room, reference, deltas, size, supersample=1):
    """Render from relative poses (n, 5) -> pixels (n, H * W * 3) in [0, 1], float32."""
    poses = np.stack([reference @ camera_pose(*delta) for delta in deltas])
    parts = [
        render(room, poses[i : i + 16], size, supersample=supersample)["rgb"]
        for i in range(0, len(poses), 16)
    ]
    return np.concatenate(parts).reshape(len(poses), -1).astype(np.float32) / 255


def distance(a, b):
    """Mean squared pixel difference of every pair: (n, P), (m, P) -> (n, m)."""
    return ((a**2).mean(1)[:, None] + (b**2).mean(1) - 2 / a.shape[1] * (a @ b.T)).clip(0)


def recover(room, reference, views, rounds=4, size=32):
    """Where views were taken from: (n, H, W, 3) uint8 -> relative poses (n, 5) to `reference`, and pixel errors (n,).

    The nearest of the grid; then in each round a step of h to and fro in each of the five components, and the
    Gauss-Newton step that these ten renders imply; the best of all stays, and h is halved.
    """
    pixels = views.reshape(len(views), -1).astype(np.float32) / 255
    grid = motion_grid()
    errors = distance(pixels, look(room, reference, grid, size))  # (n, G)
    found, error = grid[errors.argmin(1)], errors.min(1)
    steps = np.concatenate([np.eye(5), -np.eye(5)]) * SCALE  # (10, 5)
    for turn in range(rounds):
        h, supersample = (
            0.2 * 0.5**turn,
            1 if turn < 2 else 2,
        )  # metres, or 30 times as many degrees
        near = found[:, None] + h * steps  # (n, 10, 5)
        looks = look(room, reference, near.reshape(-1, 5), size, supersample).reshape(
            len(views), 10, -1
        )
        middle, slope = looks.mean(1), (looks[:, :5] - looks[:, 5:]) / (2 * h)  # (n, P), (n, 5, P)
        normal = slope @ slope.transpose(0, 2, 1) + 1e-3 * np.eye(5)  # (n, 5, 5)
        jump = (
            np.linalg.solve(normal, slope @ (pixels - middle)[..., None])[..., 0].clip(
                -2 * h, 2 * h
            )
            * SCALE
        )
        jumped = found + jump
        tried = np.concatenate([near, jumped[:, None]], 1)  # (n, 11, 5)
        looks = np.concatenate(
            [looks, look(room, reference, jumped, size, supersample)[:, None]], 1
        )
        errors = ((looks - pixels[:, None]) ** 2).mean(2)  # (n, 11)
        best, rows = errors.argmin(1), np.arange(len(views))
        better = errors[rows, best] < error
        found = np.where(better[:, None], tried[rows, best], found)
        error = np.where(better, errors[rows, best], error)
    return found, error


def angle(a, b):
    """Degrees between two vectors; 180 where one of them has no length."""
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return (
        float(np.degrees(np.arccos(np.clip(a @ b / lengths, -1, 1)))) if lengths > 1e-9 else 180.0
    )


def pose_error(commanded, recovered):
    """Compare two relative poses (5,) -> {"family", "within", and metres, direction (degrees) or degrees}."""
    if np.abs(commanded[:3]).max() > 0:
        (want, got), length = (commanded[:3], recovered[:3]), np.linalg.norm(commanded[:3])
        direction, gap = angle(want, got), abs(np.linalg.norm(got) - length)
        return {
            "family": "moves",
            "meters": float(np.linalg.norm(got - want)),
            "direction": direction,
            "within": bool(direction <= DIRECTION and gap <= max(LENGTH, SHARE * length)),
        }
    relative = (
        camera_pose(0, 0, 0, *commanded[3:])[:3, :3].T
        @ camera_pose(0, 0, 0, *recovered[3:])[:3, :3]
    )
    degrees = float(np.degrees(np.arccos(np.clip((np.trace(relative) - 1) / 2, -1, 1))))
    return {"family": "turns", "degrees": degrees, "within": degrees <= ROTATION}


def pose_errors(rows, recovered):
    """`pose_error` of every row of triples, whose camera was recovered at (n, 5)."""
    return [
        pose_error(delta_of(Motion(**row["motion"])), delta) for row, delta in zip(rows, recovered)
    ]


# ---- content --------------------------------------------------------------------------------------------------------

SHADES = np.linspace(0.7, 1.0, 4)
PALETTE = np.array(
    [np.array(rgb) * shade for rgb in COLOURS.values() for shade in SHADES], np.float32
)  # (8 * 4, 3)
SATURATED = 0.30 * 255  # walls and floors stay below, furniture above
STRONG, WEAK = (
    16,
    8,
)  # of 1,024 pixels: surely seen; perhaps seen (neither a hit nor a miss below STRONG)


def classify(views):
    """Views (n, H, W, 3) uint8 -> number of the colour of COLOURS (n, H, W), -1 where a pixel shows no object."""
    x = views.reshape(-1, 3).astype(np.float32)
    found = np.full(len(x), -1)
    vivid = np.flatnonzero(x.max(1) - x.min(1) > SATURATED)
    found[vivid] = ((PALETTE**2).sum(1) - 2 * x[vivid] @ PALETTE.T).argmin(1) // len(SHADES)
    return found.reshape(views.shape[:3])


def describe(views):
    """What views show: pixels of 1,024 per colour (n, 8), mean column in [0, 1] (n, 8), dominant in each third (n, 3).

    A third is dominated by the colour with most pixels in it, if these are 2 % of the view; else -1.
    """
    classes, width = classify(views), views.shape[2]
    columns = (classes[..., None] == np.arange(len(COLOURS))).sum(1)  # (n, W, 8)
    scale, count = 1024 / (views.shape[1] * width), columns.sum(1)
    middle = (columns * (np.arange(width)[:, None] + 0.5)).sum(1) / np.maximum(count, 1) / width
    thirds = [columns[:, part].sum(1) * scale for part in np.array_split(np.arange(width), 3)]
    dominant = np.stack(
        [np.where(part.max(1) >= 0.02 * 1024, part.argmax(1), -1) for part in thirds], 1
    )
    return count * scale, middle, dominant


def content_counts(views, true):
    """What there is to count in views (n, H, W, 3) beside the true ones -> (n, 8): four pairs of hits and cases.

    precision   objects that a view shows: those that stand in the true view
    recall      objects of the true view: those that the view shows
    order       pairs of the true view, one to the right of the other: those in the same order
    thirds      thirds of the true view with a dominant object: those with the same one
    """
    (count, middle, dominant), (true_count, true_middle, true_dominant) = (
        describe(views),
        describe(true),
    )
    seen, truly = count >= STRONG, true_count >= STRONG
    apart = (
        true_middle[:, :, None] - true_middle[:, None, :] > 3 / 32
    )  # (n, 8, 8): the first stands to the right
    pairs = apart & truly[:, :, None] & truly[:, None, :]
    both = (count >= WEAK)[:, :, None] & (count >= WEAK)[:, None, :]
    ordered = both & (middle[:, :, None] > middle[:, None, :])
    cases = (
        (true_count >= WEAK, seen),
        (count >= WEAK, truly),
        (ordered, pairs),
        (dominant == true_dominant, true_dominant >= 0),
    )
    counts = [part for hit, case in cases for part in (hit & case, case)]
    return np.stack([part.reshape(len(views), -1).sum(1) for part in counts], 1)


def content_of(counts):
    """Sums of `content_counts` (..., 8) -> {"precision", "recall", "f1", "order", "thirds", "content"}, each (...).

    A part that the true views give no occasion for is nan and leaves the mean.
    """
    hits, cases = counts[..., ::2], counts[..., 1::2]
    shares = np.divide(hits, cases, out=np.full(hits.shape, np.nan), where=cases > 0)
    precision, recall, order, thirds = np.moveaxis(shares, -1, 0)
    total = np.where(
        precision + recall > 0, precision + recall, np.inf
    )  # neither shown nor missed: 0
    f1 = 2 * np.nan_to_num(precision * recall) / total
    return {
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "order": order,
        "thirds": thirds,
        "content": np.nanmean([f1, order, thirds], 0),
    }


def content_scores(views, true):
    """`content_of` all views (n, H, W, 3) together, as numbers."""
    return {
        key: float(value) for key, value in content_of(content_counts(views, true).sum(0)).items()
    }


# ---- both, over triples ---------------------------------------------------------------------------------------------


def recover_all(rows, *lists):
    """`recover` for several lists of views (one view per row each) -> per list (n, 5), aligned with rows.

    The grid of a reference is rendered once, and a picture that occurs twice in one room (a copied reference) is looked
    at once.
    """
    places = {}
    for r, row in enumerate(rows):
        places.setdefault((row["room"], row["reference"], str(row["context_c2w"])), []).append(r)
    found = [np.zeros((len(rows), 5)) for _ in lists]
    for (seed, reference, _), members in places.items():
        reference_c2w = np.array(rows[members[0]]["context_c2w"][reference - 1])
        distinct = {views[r].tobytes(): views[r] for views in lists for r in members}
        size = next(iter(distinct.values())).shape[0]
        poses, _ = recover(
            random_room(seed), reference_c2w, np.stack(list(distinct.values())), size=size
        )
        by_picture = dict(zip(distinct, poses))
        for views, out in zip(lists, found):
            for r in members:
                out[r] = by_picture[views[r].tobytes()]
    return found


def per_view(rows, views, recovered):
    """What single views are worth, in numbers to be summed: (n, 11), see `scores_of`.

    rows, views, recovered (n, 5) as in `consistency`
    Columns: 1; pose within the thresholds; squared error, pictures in [-1, 1]; the eight of `content_counts`.
    """
    views, true = np.stack(views), np.stack([row["target"] for row in rows])
    squared = np.square((views.astype(np.float32) - true) / 127.5).mean((1, 2, 3))
    within = [error["within"] for error in pose_errors(rows, recovered)]
    return np.column_stack([np.ones(len(rows)), within, squared, content_counts(views, true)])


def scores_of(sums):
    """Sums over views (..., 11) of `per_view` -> {"pose", "mse", "content" and its parts}, each (...)."""
    return {
        "pose": sums[..., 1] / sums[..., 0],
        "mse": sums[..., 2] / sums[..., 0],
        **content_of(sums[..., 3:]),
    }


def difference(values, others, rooms, resamples=2000):
    """Pose, content and mse of one list of views minus those of another -> {key: (difference, low, high)}.

    values, others   (n, 11) of `per_view`, over the same rows;  rooms: (n,), the room of each row
    The 95 % interval draws whole rooms with replacement: views of one room are not independent.
    """
    _, member = np.unique(rooms, return_inverse=True)
    count = member.max() + 1
    drawn = numpy_stream("bootstrap", 0).multinomial(
        count, np.full(count, 1 / count), resamples
    )  # how often each room
    drawn = np.vstack([np.ones((1, count)), drawn])  # first: each once
    own, other = (
        scores_of(drawn @ np.stack([np.bincount(member, column, count) for column in part.T], 1))
        for part in (values, others)
    )
    gaps = {key: own[key] - other[key] for key in ("pose", "content", "mse")}
    return {
        key: (float(gap[0]), *np.nanquantile(gap[1:], [0.025, 0.975]).tolist())
        for key, gap in gaps.items()
    }


def consistency(rows, views, recovered=None):
    """Score one view per triple.

    rows       of triples_*.jsonl, their "target" as an array;  views: (H, W, 3) uint8 each
    recovered  (n, 5) of `recover_all`, if it is known
    returns    {"pose": share within the thresholds, "mse": of pictures in [-1, 1], "content" and its parts, "n",
                "moves": {…}, "turns": {…}}
    """
    recovered = recover_all(rows, views)[0] if recovered is None else recovered
    errors, each = pose_errors(rows, recovered), per_view(rows, views, recovered)

    def scores(members):
        return {key: float(value) for key, value in scores_of(each[members].sum(0)).items()} | {
            "n": len(members)
        }

    result = scores(range(len(rows)))
    for family in ("moves", "turns"):
        members = [i for i, error in enumerate(errors) if error["family"] == family]
        if members:
            keys = [key for key in ("meters", "direction", "degrees") if key in errors[members[0]]]
            result[family] = scores(members) | {
                f"median_{key}": float(np.median([errors[i][key] for i in members])) for key in keys
            }
    return result


def trivial_views(rows):
    """What needs no model, {name: views}: copy of the reference, mean of the context, nearest context view by pose."""

    def nearest(row):
        target = move_camera(
            np.array(row["context_c2w"][row["reference"] - 1]), Motion(**row["motion"])
        )
        gaps = [
            np.abs(decompose(np.array(c2w), target)[:5] / SCALE).sum() for c2w in row["context_c2w"]
        ]
        return row["context"][int(np.argmin(gaps))]

    return {
        "copy of the reference": [row["context"][row["reference"] - 1] for row in rows],
        "mean image": [np.mean(row["context"], 0).astype(np.uint8) for row in rows],
        "nearest context view": [nearest(row) for row in rows],
    }


def oracle_views(rows):
    """What only the room itself can give, {name: views}: context warped by the target's depth and pose; true render.

    The warp's holes take the nearest colour. No bar: a simulator need not beat them.
    """
    warped = [fill_holes(row["warp"][..., :3], row["warp"][..., 3] > 0) for row in rows]
    true = [
        render(random_room(row["room"]), row["target_c2w"], len(row["target"]))["rgb"][0]
        for row in rows
    ]
    return {"warp with true depth and pose": warped, "true render": true}


def compare(rows, views):
    """Score {name: one view per row} beside what is trivial and what is perfect.

    returns {"simulators": {name: scores}, "baselines": {name: scores}, "oracles": {name: scores}}, see `consistency`
    """
    groups = {"simulators": views, "baselines": trivial_views(rows), "oracles": oracle_views(rows)}
    lists = [seen for group in groups.values() for seen in group.values()]
    scores = iter(
        [consistency(rows, seen, found) for seen, found in zip(lists, recover_all(rows, *lists))]
    )
    return {title: {name: next(scores) for name in group} for title, group in groups.items()}


# ---- calibration ----------------------------------------------------------------------------------------------------

ERRORS = ("none", "10 degrees", "20 degrees", "0.3 m", "0.6 m", "removed", "moved", "recoloured")


def wrong_view(row, error):
    """The target view of a triple, rendered with one `error` of ERRORS.

    degrees      the camera is turned further to the right by so many
    m            the camera stands so far aside: at a right angle to a commanded move, to its right otherwise
    removed, moved, recoloured   the thing that fills most of the view is gone; stands 40 degrees further round the
                 camera, to the right, as far away; has a colour that no thing of the room has
    """
    room, c2w, (amount, *unit) = (
        random_room(row["room"]),
        np.array(row["target_c2w"]),
        error.split(),
    )
    if unit == ["degrees"]:
        c2w = c2w @ camera_pose(0, 0, 0, float(amount))
    elif unit:
        sideways = row["motion"]["kind"] in ("move left", "move right")
        c2w = c2w @ (
            camera_pose(0, 0, float(amount)) if sideways else camera_pose(float(amount), 0, 0)
        )
    elif error != "none":
        pixels = np.bincount(render(room, c2w)["ids"].ravel(), minlength=len(room.things) + 1)[1:]
        thing = room.things[pixels.argmax()]
        camera, where = c2w[:3, 3], np.array([thing.x, 0, thing.z])
        x, _, z = camera + camera_pose(0, 0, 0, 40)[:3, :3] @ (where - camera)
        spare = min(set(COLOURS) - {other.colour for other in room.things})
        changed = {
            "removed": [],
            "moved": [replace(thing, x=x, z=z)],
            "recoloured": [replace(thing, colour=spare)],
        }
        room = replace(
            room, things=(*(other for other in room.things if other is not thing), *changed[error])
        )
    return render(room, c2w, len(row["target"]))["rgb"][0]


def calibration(rows):
    """`consistency` of views with a known error, for every one of ERRORS -> {error: scores}."""
    lists = [[wrong_view(row, error) for row in rows] for error in ERRORS]
    return {
        error: consistency(rows, views, found)
        for error, views, found in zip(ERRORS, lists, recover_all(rows, *lists))
    }


# ---- dose and response ----------------------------------------------------------------------------------------------

DOSES = [
    Motion(f"turn {side}", float(degrees))
    for side in ("left", "right")
    for degrees in range(15, 181, 15)
] + [
    Motion(f"move {way}", meters)
    for way in ("left", "right", "forward")
    for meters in (0.25, 0.5, 0.75, 1.0, 1.25)
]


def along(motion, recovered):
    """How much of a relative pose (5,) lies along the commanded axis, in the motion's unit; below 0: the other way.

    A turn lies in [-90, 270), whatever was commanded. Cut half a turn away from the command instead, a simulator that
    turns at random would seem to follow it.
    """
    _, unit, component, sign = TABLE[motion.kind]
    amount = sign * recovered[component]
    return float((amount + 90) % 360 - 90 if unit == "degrees" else amount)


def slope(commanded, got):
    """Least-squares slope and correlation of recovered amounts (n,) on commanded ones; 0 where either never varies."""
    x, y = commanded - commanded.mean(), got - got.mean()
    return (
        float(x @ y / (x @ x)) if x.any() else 0.0,
        float(x @ y / np.sqrt((x @ x) * (y @ y))) if x.any() and y.any() else 0.0,
    )


def dose_response(rows, recovered, trained):
    """Commanded against recovered displacement, kind by kind.

    rows       with "motion", recovered (n, 5) of `recover_all`;  trained: the Motions that training showed
    returns    {kind: {"slope", "correlation": over all views, "slope_trained", "slope_new": over the amounts that
                       training showed, over the others,
                       "points": [{"amount", "trained", "median", "low", "high": quartiles, "within", "n"}]}}
    """
    kinds, commanded = (
        np.array([row["motion"][key] for row in rows]) for key in ("kind", "amount")
    )
    got = np.array([along(Motion(**row["motion"]), delta) for row, delta in zip(rows, recovered)])
    within, result = np.array([error["within"] for error in pose_errors(rows, recovered)]), {}
    for kind in dict.fromkeys(kinds.tolist()):
        points, mine = [], kinds == kind
        known = np.isin(commanded, [motion.amount for motion in trained if motion.kind == kind])
        for amount in np.unique(commanded[mine]).tolist():
            here = mine & (commanded == amount)
            low, median, high = np.quantile(got[here], [0.25, 0.5, 0.75]).tolist()
            points.append(
                {
                    "amount": amount,
                    "trained": bool(known[here].all()),
                    "median": median,
                    "low": low,
                    "high": high,
                    "within": float(within[here].mean()),
                    "n": int(here.sum()),
                }
            )
        all_views, *parts = (
            slope(commanded[part], got[part]) if part.any() else (None, None)
            for part in (mine, mine & known, mine & ~known)
        )
        result[kind] = {
            "slope": all_views[0],
            "correlation": all_views[1],
            "slope_trained": parts[0][0],
            "slope_new": parts[1][0],
            "points": points,
        }
    return result
