"""
The instrument of lib/consistency.py, measured, and what it says of a simulator's obedience.

Calibration: scores of views whose error is known, since a metric says something only if they fall with it.
Dose and response: how far the camera went along the commanded axis, beside how far it was told to go, kind by kind.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from data import MOTIONS, SIDES, WAYS, stands_free
from lib.answers import imagine_targets
from lib.consistency import compare, pose_errors, recover_all
from lib.geometry import TABLE, Array, Motion, camera_pose, move_camera
from lib.rooms import COLOURS, Room, random_room, render
from lib.scores import text_table

# ---- calibration ----------------------------------------------------------------------------------------------------

CALIBRATED = 40  # triples on which the scores are calibrated
ERRORS = ("none", "10 degrees", "20 degrees", "0.3 m", "0.6 m", "removed", "moved", "recoloured")


def wrong_view(row: dict, error: str) -> Array:
    """The target view of a triple, rendered with one `error` of ERRORS.

    degrees      the camera is turned further to the right by so many
    m            the camera stands so far aside: at a right angle to a commanded move, to its right otherwise
    removed, moved, recoloured   the thing that fills most of the view is gone; stands 40 degrees further round the
                 camera, to the right, as far away; has a colour that no thing of the room has
    """
    room = random_room(row["room"])
    c2w = np.array(row["target_c2w"])
    if error.endswith("degrees"):
        c2w = c2w @ camera_pose(0, 0, 0, float(error.split()[0]))
    elif error.endswith(" m"):
        metres = float(error.split()[0])
        sideways = row["motion"]["kind"] in ("move left", "move right")
        c2w = c2w @ (camera_pose(0, 0, metres) if sideways else camera_pose(metres, 0, 0))
    elif error != "none":
        room = changed_room(room, c2w, error)
    return render(room, c2w, len(row["target"]))["rgb"][0]


def changed_room(room: Room, c2w: Array, error: str) -> Room:
    """The room without the thing that fills most of the view, or with another in its place; see `wrong_view`."""
    ids = render(room, c2w)["ids"].ravel()
    pixels = np.bincount(ids, minlength=len(room.things) + 1)[1:]
    thing = room.things[pixels.argmax()]
    things = [other for other in room.things if other is not thing]
    if error == "moved":
        camera = c2w[:3, 3]
        turn = camera_pose(0, 0, 0, 40)[:3, :3]
        x, _, z = camera + turn @ (np.array([thing.x, 0, thing.z]) - camera)
        things.append(replace(thing, x=x, z=z))
    elif error == "recoloured":
        spare = min(set(COLOURS) - {other.colour for other in room.things})
        things.append(replace(thing, colour=spare))
    return replace(room, things=tuple(things))


def calibrate(rows: list[dict], most: int = CALIBRATED) -> dict[str, dict]:
    """Scores of views with a known error, for every one of ERRORS -> {error: scores}; of about `most` of the rows."""
    rows = rows[:: max(1, len(rows) // most)]
    lists = {}
    for error in ERRORS:
        lists[error] = [wrong_view(row, error) for row in rows]
    return compare(rows, {"calibration": lists})["calibration"]


# ---- dose and response ----------------------------------------------------------------------------------------------

DOSES = [
    *(Motion(f"turn {side}", 15.0 * i) for side in SIDES for i in range(1, 13)),
    *(Motion(f"move {way}", 0.25 * i) for way in WAYS for i in range(1, 6)),
]


def dose_rows(rows: list[dict], rooms: int) -> list[dict]:
    """One context of each of the first `rooms` rooms, under all motions of DOSES that end in free space.

    rows of `load_triples` -> rows without a target
    """
    first = {}
    for row in rows:
        first.setdefault(row["room"], row)
    doses = []
    for row in list(first.values())[:rooms]:
        context = {key: row[key] for key in ("room", "context", "reference", "context_c2w")}
        start = np.array(row["context_c2w"][row["reference"] - 1])
        for motion in DOSES:
            if stands_free(move_camera(start, motion)):
                name = f"dose/{row['room']}_{motion.kind}_{motion.amount:g}"
                command = {"kind": motion.kind, "amount": motion.amount}
                doses.append({**context, "id": name, "motion": command})
    return doses


def measure_doses(rows: list[dict], folders: dict) -> dict[str, dict]:
    """{simulator: `dose_response`} of the views of `dose_rows` that lie in {simulator: folder}; prints the table."""
    doses = {}
    table = []
    for name, folder in folders.items() if rows else ():
        views = imagine_targets(None, rows, folder, title=f"{name}, doses")
        doses[name] = dose_response(rows, recover_all(rows, views)[0], MOTIONS)
        for kind, dose in doses[name].items():
            points = []
            for point in dose["points"]:
                star = "" if point["trained"] else "*"
                points.append(f"{point['amount']:g}{star}->{point['median']:.3g}")
            slopes = [dose[key] for key in ("slope", "slope_trained", "slope_new", "correlation")]
            table.append([f"{Path(name).name[:16]}, {kind}", *slopes, " ".join(points)])
    if table:
        head = ["", "slope", "trained", "new", "correlation", "commanded -> recovered"]
        print("\nmedian over rooms (turns: degrees, moves: meters; * = an amount never trained on)")
        print(text_table(head, table), end="")
    return doses


def along(motion: Motion, recovered: Array) -> float:
    """How much of a relative pose (5,) lies along the commanded axis, in the motion's unit; below 0: the other way.

    A turn lies in [-90, 270), whatever was commanded. Cut half a turn away from the command instead, a simulator that
    turns at random would seem to follow it.
    """
    kind = TABLE[motion.kind]
    amount = kind.sign * recovered[kind.component]
    return float((amount + 90) % 360 - 90 if kind.unit == "degrees" else amount)


def slope_of(commanded: Array, got: Array) -> tuple[float, float]:
    """Least-squares slope and correlation of recovered amounts (n,) on commanded ones; 0 where either never varies."""
    x = commanded - commanded.mean()
    y = got - got.mean()
    slope = float(x @ y / (x @ x)) if x.any() else 0.0
    correlation = float(x @ y / np.sqrt((x @ x) * (y @ y))) if x.any() and y.any() else 0.0
    return slope, correlation


def dose_response(rows: list[dict], recovered: Array, trained: list[Motion]) -> dict[str, dict]:
    """Commanded against recovered displacement, kind by kind.

    rows       with "motion", recovered (n, 5) of `recover_all`;  trained: the Motions that training showed
    returns    {kind: {"slope", "correlation": over all views, "slope_trained", "slope_new": over the amounts that
                       training showed, over the others,
                       "points": [{"amount", "trained", "median", "low", "high": quartiles, "within", "n"}]}}
    """
    kinds = np.array([row["motion"]["kind"] for row in rows])
    commanded = np.array([row["motion"]["amount"] for row in rows])
    within = np.array([error["within"] for error in pose_errors(rows, recovered)])
    got = []
    for row, delta in zip(rows, recovered, strict=True):
        got.append(along(Motion(**row["motion"]), delta))
    got = np.array(got)
    result = {}
    for kind in dict.fromkeys(kinds.tolist()):
        own = kinds == kind
        known = np.isin(commanded, [motion.amount for motion in trained if motion.kind == kind])
        points = []
        for amount in np.unique(commanded[own]).tolist():
            here = own & (commanded == amount)
            low, median, high = np.quantile(got[here], [0.25, 0.5, 0.75]).tolist()
            point = {"amount": amount, "trained": bool(known[here].all()), "median": median}
            point |= {"low": low, "high": high, "within": float(within[here].mean())}
            points.append({**point, "n": int(here.sum())})
        slope, correlation = slope_of(commanded[own], got[own])
        result[kind] = {"slope": slope, "correlation": correlation}
        for key, some in (("slope_trained", own & known), ("slope_new", own & ~known)):
            result[kind][key] = slope_of(commanded[some], got[some])[0] if some.any() else None
        result[kind]["points"] = points
    return result
