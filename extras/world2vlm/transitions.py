"""
Transitions: what a simulator, the teacher, shows of a camera motion (World2VLM, arXiv 2604.26934, its first stage).

An anchor picture s and a program of motions a go to the teacher, which shows where the camera ends: s'. The teacher is
anything with imagine(list of Query) -> views: Astra-WM, or in rooms the true renderer. It takes one motion per call, so
programs of several motions, and motions longer than it can do, are chained: each view is imagined from the one before.

    results, failures = transitions([room_anchor(seed)], TrueRenderer(), np.random.default_rng(seed))

A program is a list of Motions, six actions in the paper's words ("move left" is its SHIFT LEFT); it has none for up,
down and looking.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from extras.world2vlm.words import ACTIONS, action_of, motion_of
from lib.geometry import Motion, Query, as_lists, move_camera
from lib.protocol import call_of
from lib.rooms import SIZE, random_room, render, ring
from lib.simulators import imagine_each, instruction
from lib.streams import numpy_stream

MOVES = tuple(ACTIONS)[:4]
TURNS = tuple(ACTIONS)[4:]

Program = list[Motion]
Pattern = tuple[tuple[str, list], ...]  # ((action, its amounts), ...): a program with open amounts


# ---- programs -------------------------------------------------------------------------------------------------------


class Space(NamedTuple):
    """Which programs there are, and by how much a false amount is off at least."""

    single: dict[str, list]  # action -> amounts
    sequences: tuple[Pattern, ...]
    margin: dict[str, float]  # unit -> amount


def grid(low: float, high: float, step: float) -> list[float]:
    """Amounts from low to high, both included."""
    return [round(low + step * i, 1) for i in range(round((high - low) / step) + 1)]


def singles(move: list, turn: list) -> dict[str, list]:
    """The six actions, with the same amounts for every move and for every turn."""
    return dict.fromkeys(MOVES, move) | dict.fromkeys(TURNS, turn)


def alternating(moves: tuple, pair_turns: list, triple_turns: list) -> tuple[Pattern, ...]:
    """Sequences in which moves and turns alternate: move and turn, turn and move, turn and move and turn."""
    steps = grid(0.2, 1.0, 0.1)
    pairs = [((move, steps), (turn, pair_turns)) for move in moves for turn in TURNS]
    patterns = [pattern for pair in pairs for pattern in (pair, pair[::-1])]
    for move in moves:
        for first in TURNS:
            for last in TURNS:
                patterns.append(((first, triple_turns), (move, steps), (last, triple_turns)))
    return tuple(patterns)


# The paper's, for a teacher that was trained on long camera paths. Only three patterns: a policy can learn them by
# heart. And (left, forward, turn) ends where (forward, left, turn) does: its order cannot be seen.
PAPER = Space(
    singles(grid(0.1, 6.0, 0.1), grid(10, 100, 10)),
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
    singles(grid(0.1, 1.0, 0.1), grid(10, 100, 10)),
    alternating(MOVES, grid(20, 80, 10), grid(10, 40, 10)),
    {"meters": 0.3, "degrees": 20},
)

# The part of ROOMS that a simulator is asked for when it teaches: moves by 0.1 m and turns by 30 degrees; no
# step backward, which no view of a ring covers.
SEEN_MOVES = ("move forward", "move left", "move right")
SEEN = Space(
    dict.fromkeys(SEEN_MOVES, grid(0.1, 1.0, 0.1)) | dict.fromkeys(TURNS, grid(30, 90, 30)),
    alternating(SEEN_MOVES, [30, 60], [30]),
    {"meters": 0.3, "degrees": 20},
)


def random_program(pattern: Pattern, rng) -> Program:
    """A program of a pattern, its amounts uniform over the grid."""
    return [motion_of(action, amounts[rng.integers(len(amounts))]) for action, amounts in pattern]


def programs(rng, space: Space) -> list[Program]:
    """The nine programs of an anchor: each single action once, and three different sequences."""
    sequences = [space.sequences[i] for i in rng.permutation(len(space.sequences))[:3]]
    patterns = [(single,) for single in space.single.items()] + sequences
    return [random_program(pattern, rng) for pattern in patterns]


def actions_of(program: Program) -> tuple[str, ...]:
    """("move left", "turn right"): a program without its amounts."""
    return tuple(map(action_of, program))


def end_pose(c2w: np.ndarray, program: Program) -> np.ndarray:
    """Where the camera (4, 4) stands after a program: each motion starts where the one before it ended."""
    for motion in program:
        c2w = move_camera(c2w, motion)
    return c2w


def cut(motion: Motion, longest: dict | None) -> Program:
    """A motion in pieces, for a simulator that cannot do all of it in one call.

    longest   {"meters": 1.0, "degrees": 90}: no piece is longer; None: one piece. The rest comes last, so that a
              simulator is mostly given an amount that it knows.
    """
    whole = abs(motion.amount)
    most = longest[motion.unit] if longest else whole
    count = int(whole / most + 1e-9)
    rest = round(whole - count * most, 6)
    amounts = [most] * count + [rest] * (rest > 0)
    return [motion_of(action_of(motion), amount) for amount in amounts]


# ---- anchors --------------------------------------------------------------------------------------------------------


class Anchor(NamedTuple):
    """Where programs start: image `reference` (1-based) of the images that the teacher is shown."""

    name: str
    images: list  # (H, W, 3) uint8
    reference: int = 1
    scene: dict | None = None  # rooms only, as in lib.geometry.Query

    @property
    def image(self) -> np.ndarray:
        return self.images[self.reference - 1]

    @property
    def pose(self) -> np.ndarray:
        return np.array(self.scene["poses"][self.reference - 1])


def room_anchor(seed: int) -> Anchor:
    """A view of a room, with the ring of four that the teacher knows as its context."""
    rng = numpy_stream("anchor of a room", seed)
    poses = [as_lists(c2w) for c2w in ring(rng)]
    reference = int(rng.integers(4)) + 1
    images = render(random_room(seed), poses, SIZE)["rgb"]
    return Anchor(f"room_{seed}", list(images), reference, {"room": seed, "poses": poses})


# ---- the teacher ----------------------------------------------------------------------------------------------------


class Chain:
    """A program from an anchor, imagined step by step, each view from the one before; `longest` as in `cut`."""

    def __init__(self, anchor: Anchor, program: Program, longest: dict | None):
        self.anchor = anchor
        self.program = program
        self.steps = []  # one motion per call
        self.ends = []  # after how many steps each motion of the program is done
        for motion in program:
            self.steps += cut(motion, longest)
            self.ends.append(len(self.steps))
        self.calls = []  # one per step
        for k, motion in enumerate(self.steps):
            reference = len(anchor.images) + k if k else anchor.reference
            self.calls.append(call_of(reference, motion))
        self.views = []  # so far

    def pose(self, steps: int) -> np.ndarray:
        """Rooms only: the commanded pose after some steps."""
        return end_pose(self.anchor.pose, self.steps[:steps])

    def query(self, seed: int) -> Query:
        """What the teacher is asked for next."""
        anchor, steps = self.anchor, len(self.views)
        reference = self.calls[steps]["reference_image"]
        scene = None
        if anchor.scene:
            poses = [self.pose(k + 1).tolist() for k in range(steps)]
            scene = anchor.scene | {"poses": anchor.scene["poses"] + poses}
        images = [*anchor.images, *self.views]
        provenance = [None] * len(anchor.images) + self.calls[:steps]
        return Query(images, reference, instruction(self.steps[steps]), seed, scene, provenance)

    def add(self, view: np.ndarray | None) -> bool:
        """Take the view of a `query`; whether the chain goes on. It ends early at a view that cannot be used."""
        view = fitted(view, self.anchor.image)
        if not is_view(view, self.anchor.image):
            return False
        self.views.append(view)
        return len(self.views) < len(self.steps)


def imagine_chains(simulator, chains, rng) -> None:
    """Fill chains with views; all take their k-th step in one call."""
    going = chains
    while going:
        queries = [chain.query(int(rng.integers(2**31))) for chain in going]
        views = imagine_each(simulator, queries)
        going = [chain for chain, view in zip(going, views, strict=True) if chain.add(view)]


def fitted(view: np.ndarray | None, like: np.ndarray) -> np.ndarray | None:
    """A view in the size of the anchor: a world model rounds sizes to its patches. Another shape stays as it is."""
    (height, width), size = like.shape[:2], np.shape(view)[:2]
    if size == (height, width) or len(size) < 2:
        return view
    if abs(size[1] / size[0] * height / width - 1) > 0.1:
        return view
    return np.asarray(Image.fromarray(view).resize((width, height), Image.BICUBIC))


def is_view(view: np.ndarray | None, like: np.ndarray) -> bool:
    """Whether a view can be used at all: an image of the anchor's shape that is not of one flat colour."""
    if not isinstance(view, np.ndarray) or view.dtype != np.uint8:
        return False
    return view.shape == like.shape and view.std() > 2


# ---- transitions ----------------------------------------------------------------------------------------------------


class Transition(NamedTuple):
    """What the camera saw before and after a program."""

    name: str
    source: np.ndarray  # (H, W, 3) uint8
    target: np.ndarray
    program: Program
    room: int | None = None  # rooms only: the seed, and the poses of source and target
    poses: tuple | None = None


def transitions(
    anchors: list[Anchor], simulator, rng, space=ROOMS, longest=None
) -> tuple[list[Transition], int]:
    """All transitions from some anchors, and how many programs the teacher gave no usable view of.

    simulator   anything with imagine(list of Query) -> views; longest: what it can do in one call, see `cut`
    """
    chains = {}
    for anchor in anchors:
        for number, program in enumerate(programs(rng, space)):
            chains[f"{anchor.name}_{number}"] = Chain(anchor, program, longest)
    imagine_chains(simulator, list(chains.values()), rng)
    results = []
    for name, chain in chains.items():
        if len(chain.views) >= chain.ends[0]:
            results.append(transition_of(name, chain))
    return results, len(chains) - len(results)


def transition_of(name: str, chain: Chain) -> Transition:
    """What a chain shows: from its anchor to the last view that ends a motion (maximal displacement).

    Where it ended early the program is what was done till then, as it was commanded: summed from small steps it would
    be rounded, and the paper's smallest moves were lost that way.
    """
    anchor = chain.anchor
    done = sum(end <= len(chain.views) for end in chain.ends)  # motions
    steps = chain.ends[done - 1]
    room = poses = None
    if anchor.scene:
        room = anchor.scene["room"]
        poses = (anchor.pose, chain.pose(steps))
    target = chain.views[steps - 1]
    return Transition(name, anchor.image, target, chain.program[:done], room, poses)
