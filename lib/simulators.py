"""
What a simulator is told, the one place where it is chosen by name, and how it fails.
A simulator is anything with `imagine(list of Query) -> list of (H, W, 3) uint8`. By name:

  tuned         the trained Astra-WM: the newest of out/wm, out/wm-astra, out/demo/wm
  untuned       its twin, trained as long with motions exchanged, our stand-in for a generic generator: out/wm-untuned
  reprojection  the given views as a point cloud, looked at from the commanded pose (extras/reprojection.py; rooms only)
  truth         the true renderer (rooms only); truth:20:40 is made worse on purpose (extras/degraded.py)
  none          no simulator: a call is answered by a sentence
  http://…      a server of image edits (extras/remote)
  anything else is the folder or hub id of a world model
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from lib.distributed import fail, say
from lib.geometry import KINDS, UNITS, Array, Motion, Query, camera_pose
from lib.protocol import call_poses
from lib.stage import newest

SIMULATORS = ("tuned", "untuned", "reprojection", "truth", "none")
NEEDS_ROOM = ("reprojection", "truth")
URLS = ("http://", "https://")  # how the name of a server begins
FOLDERS = {"tuned": "wm", "untuned": "wm-untuned"}
COMMANDS = {
    "tuned": "python train_wm.py",
    "untuned": "python train_wm.py --shuffle-instructions --out out/wm-untuned",
}
NO_VIEW = "This view could not be imagined. Answer from the images, or ask for another view."


class SimulatorError(ValueError):
    """A view, a picture of a question, or an answer of a served policy, that failed for good; in a sentence.

    down      True: the server is the reason, so others would fail alike; False: it was this request alone
    results   of a batch: what the others gave, in order, and a SimulatorError in the place of each that failed
    """

    def __init__(self, sentence: str, down: bool = False, results: Iterable = ()):
        super().__init__(sentence)
        self.down = down
        self.results = list(results)


def imagine_each(simulator, queries: list[Query]) -> list[Array | None]:
    """`simulator.imagine`, but None in the place of a view that it refuses. Raises SimulatorError if it is down."""
    if not queries:
        return []
    try:
        return simulator.imagine(queries)
    except SimulatorError as error:
        if error.down or len(error.results) != len(queries):
            raise
        say(f"{error} The dialogues go on without.")
        return [None if isinstance(view, SimulatorError) else view for view in error.results]


# ---- motions in words ------------------------------------------------------------------------------------------------

TURN_WORDINGS = (
    "turn {n} degrees to the {way}",
    "rotate {n} degrees to the {way}",
    "rotate to the {way} by {n} degrees",
    "rotate {n} degrees {way} to the ground",
)
# kind -> the way of a positive and of a negative amount, and the wordings, the first of which is what we write. All are
# printed in the paper's figures but the vertical move, which is ours.
WORDINGS = {
    "dx": ("right", "left", ("move {n} meters to the {way}",)),
    "dy": ("forward", "backward", ("move {way} by {n} meters parallel to the ground",)),
    "dz": ("up", "down", ("move {way} by {n} meters",)),
    "dangle": ("right", "left", TURN_WORDINGS),
    "dphi": ("up", "down", ("pitch {way} by {n} degrees",)),
}
# How the sentences that the paper prints name their reference.
SENTENCES = (
    "Based on the last image, {motion}.",
    "Base on the viewpoint of Image-{number}, {motion}.",
    "Based on the viewpoint of the image {number}, {Motion}.",
    "Based on Image {number}, {Motion}.",
)


def phrase(motion: Motion, wording: int = 0) -> str:
    """Motion -> words: "turn 30 degrees to the left". `read_phrase` is the exact inverse of every wording."""
    positive, negative, wordings = WORDINGS[motion.kind]
    size = repr(float(abs(motion.amount))).removesuffix(".0")
    way = positive if motion.amount > 0 else negative
    return wordings[wording].format(n=size, way=way)


def instruction(
    motion: Motion, number: int | None = None, sentence: str = "", wording: int = 0
) -> str:
    """The sentence u_t that tells a simulator what to do.

    number     of the reference in the order shown; without one it is the last image
    sentence   of SENTENCES, by default one of the first two;  wording: which of WORDINGS
    """
    words = phrase(motion, wording)
    sentence = sentence or SENTENCES[1 if number else 0]
    return sentence.format(number=number, motion=words, Motion=words[0].upper() + words[1:])


def random_instruction(motion: Motion, number: int, rng: np.random.Generator) -> str:
    """One of all the sentences that say the same."""
    sentence = SENTENCES[rng.integers(len(SENTENCES))]
    return instruction(motion, number, sentence, int(rng.integers(len(WORDINGS[motion.kind][2]))))


def renumbered(sentence: str, number: int) -> str:
    """A sentence whose reference has another number among the images that the simulator is shown."""
    return re.sub(r"(image[- ]?)\d+", rf"\g<1>{number}", sentence, count=1, flags=re.IGNORECASE)


VERBS = {"move": KINDS[:3], "turn": ("dangle",), "rotate": ("dangle",), "pitch": ("dphi",)}
VERBS |= {"look": ("dphi",)}  # no wording of ours, but of people
UNIT_WORDS = dict.fromkeys(("meters", "meter", "metres", "metre", "m"), "meters")
UNIT_WORDS |= dict.fromkeys(("degrees", "degree", "deg", "°"), "degrees")
WORD = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?|[a-z]+|\S")
FILLERS = {"to", "the", "by", "parallel", "ground"}


def read_phrase(text: str) -> Motion:
    """Words -> Motion: every wording, and what people type: "Turn left 30", "move forward 1 m", "look down 20°".

    A verb, then one way and one number in any order. Raises ValueError with the list of wordings if it is none.
    """
    verb, *rest = WORD.findall(text.strip().lower().removesuffix(".")) or [""]
    rest = [word for word in rest if word not in FILLERS]
    numbers = [word for word in rest if word[0] in "0123456789"]
    units = [UNIT_WORDS[word] for word in rest if word in UNIT_WORDS]
    ways = [word for word in rest if word not in numbers and word not in UNIT_WORDS]
    for kind in VERBS.get(verb, ()):
        positive, negative, _ = WORDINGS[kind]
        fits = len(numbers) == 1 and units in ([], [UNITS[kind]])
        if ways in ([positive], [negative]) and fits:
            return Motion(kind, float(numbers[0]) * (1 if ways == [positive] else -1))
    known = []
    for positive, negative, (wording, *_) in WORDINGS.values():
        known.append(wording.format(n="<number>", way=f"{positive}/{negative}"))
    raise ValueError(f"cannot read the motion {text!r}; write one of: {'; '.join(known)}")


SENTENCE = re.compile(
    r"based? on (?:the viewpoint of )?(?:the )?(?:last image|image[- ]?(\d{1,9})), *(.+)",
    re.IGNORECASE,
)


def read_instruction(text: str) -> tuple[int | None, Motion]:
    """A sentence -> (number of the reference, None for the last image; Motion). Raises ValueError for any other."""
    match = SENTENCE.fullmatch(text.strip())
    if not match:
        known = "; ".join(SENTENCES).format(number=2, motion="…", Motion="…")
        raise ValueError(f"cannot read the instruction {text!r}; write one of: {known}")
    return match[1] and int(match[1]), read_phrase(match[2])


# ---- where images stand ----------------------------------------------------------------------------------------------


def image_poses(count: int, provenance: Sequence[dict | None] = ()) -> Array:
    """Where `count` images are taken to stand: c2w (n, 4, 4), the first at the origin.

    Given ones are a level ring, each a left turn of 90 degrees further; an imagined one stands where its call leads.
    provenance   of `Query`
    """
    imagined = [call for call in provenance if call]  # they come last
    ring = [camera_pose(0, 0, 0, -90.0 * k) for k in range(count - len(imagined))]
    return call_poses({"poses": ring}, imagined)


# ---- by name --------------------------------------------------------------------------------------------------------


def find_weights(name: str | Path, wm: str | Path | None = None) -> str | None:
    """The world-model folder or hub id behind a simulator's name; None for those that have no weights.

    wm   the folder of "tuned", if it is not the default
    Ends the program with a sentence that says which command makes what is missing.
    """
    if needs_room(name) or name == "none":
        return None
    if name == "tuned" and wm:
        return str(wm)
    if name not in FOLDERS:
        return str(name)
    folder = newest((FOLDERS[name],))
    if folder is None:
        fail(f"There is no simulator in out/{FOLDERS[name]} yet. `{COMMANDS[name]}` makes it.")
    return str(folder)


def is_world_model(name: str | Path) -> bool:
    """Whether a simulator's name stands for weights that are loaded here."""
    return not needs_room(name) and name != "none" and not str(name).startswith(URLS)


def needs_room(name: str | Path) -> bool:
    """Whether a simulator's name stands for one that must know the room."""
    return str(name) in NEEDS_ROOM or str(name).startswith("truth:")


def load_simulator(
    name: str | Path, device: torch.device | str = "cpu", wm: str | Path | None = None, **options
):
    """The simulator called `name` (see the top of this file), ready to imagine, in bf16 on a GPU; None for "none".

    options   of `WorldModel.load`; what is no world model says that they change nothing
    """
    if name == "none":
        return None
    if options and not is_world_model(name):
        say(f"{name} is no world model of ours: {', '.join(options)} change nothing in it.")
    if name == "truth":
        from lib.rooms import TrueRenderer

        return TrueRenderer()
    if str(name).startswith("truth:"):
        from extras.degraded import degraded_renderer

        return degraded_renderer(name)
    if name == "reprojection":
        from extras.reprojection import Reprojection

        return Reprojection()
    folder = find_weights(name, wm)
    if name in FOLDERS and folder != str(wm):
        say(f"simulator: {folder}")
    try:
        if str(name).startswith(URLS):
            from extras.remote.client import RemoteSimulator

            return RemoteSimulator(name, context=options.get("max_context", 4))
        from world_model import WorldModel

        return WorldModel.load(folder, device, **options)
    except (OSError, ValueError) as error:
        fail(f"The simulator {folder} cannot be read: {error}")
