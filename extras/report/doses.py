"""
Dose and response: how far the camera went along the commanded axis, beside how far it was told to go.

And chains: the second of two steps, whose reference is the simulator's own view after the first.
"""

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data import SIGNS, TRAINED, stands_free
from lib.answers import imagine_targets
from lib.consistency import pose_errors, recover_all, score_views
from lib.distributed import say
from lib.geometry import KINDS, Array, Motion, move_camera
from lib.protocol import motion_in
from lib.scores import text_table

# what a simulator is asked for, of each kind; some was never trained on (data.NEVER_TRAINED)
TURN_DOSES = (5, 10, 20, 30, 45, 65, 90, 110, 135, 155, 180)
MOVE_DOSES = (0.1, 0.2, 0.4, 0.6, 0.9, 1.2)
DOSES = [
    *(Motion("dangle", sign * float(amount)) for sign in SIGNS for amount in TURN_DOSES),
    *(Motion("dx", sign * amount) for sign in SIGNS for amount in MOVE_DOSES),
    *(Motion("dy", amount) for amount in MOVE_DOSES),
]


def dose_rows(rows: list[dict], rooms: int) -> list[dict]:
    """The ring of each of the first `rooms` rooms that have no more, under all motions of DOSES that end in free space.

    rows of `load_triples` -> rows without a target
    """
    first = {}
    for row in rows:
        if not any(row["provenance"]):
            first.setdefault(row["room"], row)
    doses = []
    for row in list(first.values())[:rooms]:
        given = ("room", "context", "provenance", "reference", "context_c2w")
        context = {key: row[key] for key in given}
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
        doses[name] = dose_response(rows, recover_all(rows, views)[0], TRAINED)
        for kind, dose in doses[name].items():
            points = []
            for point in dose["points"]:
                star = "" if point["trained"] else "*"
                points.append(f"{point['amount']:g}{star}->{point['median']:.3g}")
            table.append([f"{Path(name).name[:16]}, {kind}", dose["slope"], " ".join(points)])
    if table:
        head = ["", "slope", "commanded -> recovered"]
        print("\nmedian over rooms (turns: degrees, moves: meters; * = an amount never trained on)")
        print(text_table(head, table), end="")
    return doses


# ---- chains ----------------------------------------------------------------------------------------------------------


def chained_rows(simulator, rows: list[dict], folder: Path) -> list[dict]:
    """Triples whose last context view was imagined, but with the simulator's own view after it as the last of the context.

    folder   of `imagine_targets`: a simulator of None stands for the views that lie there
    """
    seconds = [row for row in rows if row["provenance"][-1]]
    firsts = {}
    for row in seconds:
        given = {key: row[key][:-1] for key in ("context", "provenance", "context_c2w")}
        call = row["provenance"][-1]
        firsts[row["room"]] = given | {
            "id": f"first/{row['room']}",
            "room": row["room"],
            "reference": call["reference_image"],
            "motion": asdict(motion_in(call)),
        }
    views = imagine_targets(simulator, list(firsts.values()), folder, title="first steps")
    own = dict(zip(firsts, views, strict=True))
    chained = []
    for row in seconds:
        context = [*row["context"][:-1], own[row["room"]]]
        chained.append({**row, "id": f"second/{row['id']}", "context": context})
    return chained


def measure_chains(rows: list[dict], folders: dict) -> dict[str, dict]:
    """{simulator: `score_views` of its second steps}, of the views in {simulator: folder}; prints the median errors."""
    chains = {}
    for name, folder in folders.items():
        seconds = chained_rows(None, rows, folder)
        if not seconds:
            continue
        views = imagine_targets(None, seconds, folder, title=f"{name}, chains")
        scores = score_views(seconds, views, recover_all(seconds, views)[0])
        chains[name] = scores
        turns, moves = (scores.get(family, {}) for family in ("turns", "moves"))
        say(
            f"{name}, second step from its own view ({scores['n']}): pose {scores['pose']:.2f}, tight "
            f"{scores['tight']:.2f}; median error of turns {turns.get('median_degrees', math.nan):.1f} degrees, of moves "
            f"{moves.get('median_meters', math.nan):.2f} m"
        )
    return chains


# ---- numbers ---------------------------------------------------------------------------------------------------------


def along(motion: Motion, recovered: Array) -> float:
    """How much of a relative pose (5,) lies along the command, in the motion's unit; below 0: the other way.

    A turn lies in [-90, 270), whatever was commanded. Cut half a turn away from the command instead, a simulator that
    turns at random would seem to follow it.
    """
    amount = np.sign(motion.amount) * recovered[KINDS.index(motion.kind)]
    return float((amount + 90) % 360 - 90 if motion.unit == "degrees" else amount)


def slope_of(commanded: Array, got: Array) -> float:
    """Least-squares slope of recovered amounts (n,) on commanded ones; 0 where these never vary."""
    x = commanded - commanded.mean()
    return float(x @ (got - got.mean()) / (x @ x)) if x.any() else 0.0


def dose_response(rows: list[dict], recovered: Array, trained: list[Motion]) -> dict[str, dict]:
    """Commanded against recovered displacement, way by way (`Motion.way`), by their size.

    rows       with "motion", recovered (n, 5) of `recover_all`;  trained: the Motions that training showed
    returns    {way: {"slope": over all views,
                       "points": [{"amount", "trained", "median", "low", "high": quartiles, "within", "n"}]}}
    """
    motions = [Motion(**row["motion"]) for row in rows]
    ways = np.array([motion.way for motion in motions])
    commanded = np.array([abs(motion.amount) for motion in motions])
    within = np.array([error["within"] for error in pose_errors(rows, recovered)])
    got = []
    for motion, delta in zip(motions, recovered, strict=True):
        got.append(along(motion, delta))
    got = np.array(got)
    result = {}
    for way in dict.fromkeys(ways.tolist()):
        own = ways == way
        amounts = [abs(motion.amount) for motion in trained if motion.way == way]
        points = []
        for amount in np.unique(commanded[own]).tolist():
            here = own & (commanded == amount)
            low, median, high = np.quantile(got[here], [0.25, 0.5, 0.75]).tolist()
            point = {"amount": amount, "trained": amount in amounts, "median": median}
            point |= {"low": low, "high": high, "within": float(within[here].mean())}
            points.append({**point, "n": int(here.sum())})
        result[way] = {"slope": slope_of(commanded[own], got[own]), "points": points}
    return result
