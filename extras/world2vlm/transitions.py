"""
Transitions: what a simulator, the teacher, shows of a camera motion (World2VLM, arXiv 2604.26934, its first stage).

An anchor picture s and a program of motions a go to the teacher, which shows where the camera ends: s'. The teacher is
anything with imagine(list of Query) -> views: Astra-WM, or in rooms the true renderer. It takes one motion per call, so
programs of several motions, and motions longer than it can do, are chained: each view is imagined from the one before.

    found, dropped = transitions([room_anchor(seed)], TrueRenderer(), np.random.default_rng(seed))
    drift(simulator, [room_anchor(seed) for seed in range(20)], Motion("turn left", 20.0), 4, rng)     # error per step

A program is a list of Motions of six kinds. Their names are the paper's words ("move left" is its SHIFT LEFT); it has
none for up, down and looking. Frames that another program rendered become the same Transitions in extras/world2vlm/frames.py.
"""

from collections import Counter, defaultdict
from itertools import combinations
from typing import NamedTuple

import numpy as np
from PIL import Image

from lib.consistency import recover
from lib.geometry import Motion, Query, as_lists, instruction, move_camera, phrase
from lib.rooms import SIZE, random_room, render, ring
from lib.simulators import imagine_each
from lib.streams import numpy_stream

MOVES = ("move forward", "move backward", "move left", "move right")
TURNS = ("turn left", "turn right")
CLEARANCE = 0.1  # metres between the camera's way and walls or furniture


# ---- programs -------------------------------------------------------------------------------------------------------


def grid(low, high, step):
    """Amounts from low to high, both included."""
    return [round(low + step * i, 1) for i in range(round((high - low) / step) + 1)]


class Space(NamedTuple):
    """Which programs there are, and by how much a false amount is off at least."""

    single: dict  # kind -> amounts
    sequences: tuple  # each one a program with open amounts: ((kind, amounts), …)
    margin: dict  # unit -> amount
    often: dict = {}  # kinds -> per place a Counter of amounts, where they come unevenly; without it all come alike


def fixed(*kinds, move, turn):
    """A sequence of kinds with the same amounts for every move and for every turn."""
    return tuple((kind, move if kind in MOVES else turn) for kind in kinds)


# The paper's, for a teacher that was trained on long camera paths. Only three patterns: a policy can learn them by
# heart. And (left, forward, turn) ends where (forward, left, turn) does: its order cannot be seen.
PAPER = Space(
    {kind: grid(0.1, 6.0, 0.1) if kind in MOVES else grid(10, 100, 10) for kind in MOVES + TURNS},
    (
        (("move forward", grid(0.5, 3.5, 0.1)), ("turn left", grid(20, 80, 10))),
        (("turn right", grid(20, 80, 10)), ("move forward", grid(0.3, 3.0, 0.1))),
        (
            ("move left", grid(0.3, 3.0, 0.1)),
            ("move forward", grid(0.5, 3.5, 0.1)),
            ("turn right", grid(20, 60, 10)),
        ),
    ),
    {"meters": 0.5, "degrees": 20},
)

# Ours, for rooms: a metre from the middle stands no furniture. 32 patterns, in which moves and turns alternate and the
# turns of three are small, so that no two programs end at the same pose.
ROOMS = Space(
    {kind: grid(0.1, 1.0, 0.1) if kind in MOVES else grid(10, 100, 10) for kind in MOVES + TURNS},
    tuple(
        fixed(*kinds, move=grid(0.2, 1.0, 0.1), turn=grid(20, 80, 10))
        for move in MOVES
        for turn in TURNS
        for kinds in ((move, turn), (turn, move))
    )
    + tuple(
        fixed(a, move, b, move=grid(0.2, 1.0, 0.1), turn=grid(10, 40, 10))
        for move in MOVES
        for a in TURNS
        for b in TURNS
    ),
    {"meters": 0.3, "degrees": 20},
)

# The part of ROOMS that a simulator trained on `data.py triples --layout fine` has seen: 0.1 m and, of its turns by 15
# degrees, those on our grid; no step backward, which no view of a ring covers.
SEEN = Space(
    {
        kind: grid(0.1, 1.0, 0.1) if kind in MOVES else grid(30, 90, 30)
        for kind in MOVES + TURNS
        if kind != "move backward"
    },
    tuple(
        fixed(
            *(kind for kind, _ in sequence),
            move=grid(0.2, 1.0, 0.1),
            turn=[30, 60][: 4 - len(sequence)],
        )
        for sequence in ROOMS.sequences
        if "move backward" not in dict(sequence)
    ),
    {"meters": 0.3, "degrees": 20},
)


def draw(sequence, rng):
    """((kind, amounts), …) -> a program, its amounts uniform over the grid."""
    return [Motion(kind, float(amounts[rng.integers(len(amounts))])) for kind, amounts in sequence]


def programs(rng, space):
    """The nine programs of an anchor: each single action once, and three different sequences."""
    sequences = [space.sequences[i] for i in rng.permutation(len(space.sequences))[:3]]
    return [draw([one], rng) for one in space.single.items()] + [
        draw(sequence, rng) for sequence in sequences
    ]


def kinds_of(program):
    return tuple(motion.kind for motion in program)


def end_pose(c2w, program):
    """Where the camera stands after a program: each motion is told in the axes that the one before it left."""
    for motion in program:
        c2w = move_camera(c2w, motion)
    return c2w


# ---- transitions ----------------------------------------------------------------------------------------------------


class Anchor(NamedTuple):
    """Where programs start: image `reference` (1-based) of the images that the teacher is shown."""

    name: str
    images: list  # (H, W, 3) uint8
    reference: int = 1
    scene: dict | None = None  # rooms only, as in lib.geometry.Query


class Transition(NamedTuple):
    """What the camera saw before and after a program."""

    name: str
    source: np.ndarray  # (H, W, 3) uint8
    target: np.ndarray
    program: list  # of Motion
    agreement: float = 1.0  # of several imagined views of the same end, in (0, 1]
    room: int | None = None  # rooms only: its seed and the two poses
    poses: tuple | None = None
    focal: float = 0.5  # in picture widths; 0.5 is 90 degrees wide
    files: tuple | None = (
        None  # frames rendered elsewhere only (extras/world2vlm/frames.py): where the two pictures lie,
    )
    place: str = ""  # what no two splits may share,
    detections: tuple | None = (
        None  # and what was found in them: (objects of the source, of the target)
    )


def room_anchor(seed):
    """A view of a room, with the ring of four that the teacher knows as its context."""
    rng = numpy_stream("anchor of a room", seed)
    poses, reference = ring(rng), int(rng.integers(4)) + 1
    scene = {"room": seed, "poses": [as_lists(c2w) for c2w in poses]}
    return Anchor(
        f"room_{seed}",
        list(render(random_room(seed), scene["poses"], SIZE)["rgb"]),
        reference,
        scene,
    )


def blocked(anchor, program):
    """Whether walls or furniture of a room stand within CLEARANCE of the way; outside rooms nobody knows."""
    if anchor.scene is None:
        return False
    room, c2w = (
        random_room(anchor.scene["room"]),
        np.array(anchor.scene["poses"][anchor.reference - 1]),
    )
    half = np.array([room.width, room.length]) / 2 - CLEARANCE
    for motion in program:
        for share in np.linspace(0, 1, 11)[1:]:
            where = move_camera(c2w, Motion(motion.kind, motion.amount * share))[[0, 2], 3]
            if (np.abs(where) > half).any() or any(
                np.hypot(*(where - (thing.x, thing.z))) < thing.half + CLEARANCE
                for thing in room.things
            ):
                return True
        c2w = move_camera(c2w, motion)
    return False


def cut(program, longest):
    """A program in pieces for a simulator that takes one motion per call: (pieces, which motion each belongs to).

    longest   {"meters": 1.0, "degrees": 90}: no piece is longer; None: one piece per motion. The rest comes last, so
              that a simulator is mostly given an amount that it knows.
    """
    pieces = []
    for i, motion in enumerate(program):
        most = longest[motion.unit] if longest else motion.amount
        whole = int(motion.amount / most + 1e-9)
        rest = round(motion.amount - whole * most, 6)
        pieces += [
            (Motion(motion.kind, amount), i) for amount in [most] * whole + [rest] * (rest > 0)
        ]
    return pieces


def is_view(view, like):
    """Whether a teacher's view can be used at all: an image of the anchor's shape that is not of one flat colour."""
    return (
        isinstance(view, np.ndarray)
        and view.shape == like.shape
        and view.dtype == np.uint8
        and view.std() > 2
    )


def fitted(view, like):
    """A view in the size of the anchor: a world model rounds sizes to its patches. Another shape stays as it is."""
    (height, width), size = like.shape[:2], np.shape(view)[:2]
    if (
        size == (height, width)
        or len(size) < 2
        or abs(size[1] / size[0] * height / width - 1) > 0.1
    ):
        return view
    return np.asarray(Image.fromarray(view).resize((width, height), Image.BICUBIC))


def chains(simulator, anchors, motions, rng):
    """Imagine step by step, each view from the one before: [[view after each motion] per anchor and its motions].

    All chains take their k-th step in one call. A chain ends early at a view that cannot be used.
    """
    images, views = [list(anchor.images) for anchor in anchors], [[] for _ in anchors]
    poses = [list(anchor.scene["poses"]) if anchor.scene else None for anchor in anchors]
    for k in range(max(map(len, motions), default=0)):
        going = [i for i, way in enumerate(motions) if k < len(way) and len(views[i]) == k]
        queries = []
        for i in going:
            reference = anchors[i].reference if k == 0 else len(images[i])
            scene = poses[i] and {"room": anchors[i].scene["room"], "poses": list(poses[i])}
            queries.append(
                Query(
                    list(images[i]),
                    reference,
                    instruction(motions[i][k], reference),
                    int(rng.integers(2**31)),
                    scene,
                )
            )
        for i, query, view in zip(going, queries, imagine_each(simulator, queries)):
            given = anchors[i].images[anchors[i].reference - 1]
            view = fitted(view, given)
            if is_view(view, given):
                views[i].append(view)
                images[i].append(view)
                if poses[i]:
                    start = np.array(poses[i][query.reference - 1])
                    poses[i].append(move_camera(start, motions[i][k]).tolist())
    return views


def distance(a, b):
    """Mean squared difference of two pictures with colours in [-1, 1]."""
    return float(np.square((a.astype(np.float32) - b) / 127.5).mean())


def transitions(anchors, simulator, rng, space=ROOMS, longest=None, tries=1):
    """All transitions from some anchors -> (transitions, Counter of what became of the others).

    simulator   anything with imagine(list of Query) -> views; longest: what it can do in one call, see `cut`
    tries       views of every end, from different noise. The first is kept; agreement is exp(-d / 0.05), d their mean
                squared distance in pairs
    The source is the anchor and the target the farthest view of the chain that can be used (maximal displacement).
    Where the chain ended early the program is what was done till then, as it was commanded: summed from small steps it
    would be rounded, and the paper's smallest moves were lost that way.
    """
    plans, dropped, found = [], Counter(), []
    for anchor in anchors:
        for number, program in enumerate(programs(rng, space)):
            if blocked(anchor, program):
                dropped["the way is blocked"] += 1
            else:
                plans.append((f"{anchor.name}_{number}", anchor, program, cut(program, longest)))
    told = [
        (anchor, [piece for piece, _ in pieces])
        for _, anchor, _, pieces in plans
        for _ in range(tries)
    ]
    views = chains(simulator, *map(list, zip(*told)), rng) if told else []
    for i, (name, anchor, program, pieces) in enumerate(plans):
        several = views[i * tries : (i + 1) * tries]
        steps = min(map(len, several))
        if steps == 0:
            dropped["the teacher gave no usable view"] += 1
            continue
        done = defaultdict(float)
        for piece, owner in pieces[:steps]:
            done[owner] += piece.amount
        program = [Motion(program[owner].kind, round(amount, 6)) for owner, amount in done.items()]
        ends = [chain[steps - 1] for chain in several]
        gaps = [distance(a, b) for a, b in combinations(ends, 2)]
        room = poses = None
        if anchor.scene:
            start = np.array(anchor.scene["poses"][anchor.reference - 1])
            room, poses = anchor.scene["room"], (start, end_pose(start, program))
        found.append(
            Transition(
                name,
                anchor.images[anchor.reference - 1],
                ends[0],
                program,
                float(np.exp(-np.mean(gaps) / 0.05)) if gaps else 1.0,
                room,
                poses,
            )
        )
    return found, dropped


def drift(simulator, anchors, motion, steps, rng):
    """How the error grows when a simulator goes on from its own views: `motion`, `steps` times, from anchors in rooms.

    returns   per step medians over the anchors: {"mse", "meters", "degrees"}. mse is between the view and the true one,
              pictures in [-1, 1]; the other two tell how far from the commanded pose the view seems to be taken
    raises    ValueError if the way is blocked from every anchor
    """
    anchors = [anchor for anchor in anchors if not blocked(anchor, [motion] * steps)]
    if not anchors:
        raise ValueError(
            f"{steps} times '{phrase(motion)}' is blocked in every room: take fewer or shorter steps."
        )
    views, rows = chains(simulator, anchors, [[motion] * steps] * len(anchors), rng), []
    for k in range(steps):
        errors = []
        for anchor, chain in zip(anchors, views):
            if k < len(chain):
                room, start = (
                    random_room(anchor.scene["room"]),
                    np.array(anchor.scene["poses"][anchor.reference - 1]),
                )
                commanded = end_pose(start, [motion] * (k + 1))
                true = render(room, commanded, len(chain[k]))["rgb"][0]
                (delta,), _ = recover(room, commanded, chain[k][None], size=len(chain[k]))
                errors.append(
                    (distance(chain[k], true), np.linalg.norm(delta[:3]), np.linalg.norm(delta[3:]))
                )
        if errors:
            rows.append(dict(zip(("mse", "meters", "degrees"), np.median(errors, 0).tolist())))
    return rows
