"""
Look around in a room of the demo, step by step: what the simulator imagines beside what is there.

  python world_model.py --interactive          the newest model of out/ and out/demo/; --model names another

A room that nothing was trained on is given by four views. A key moves or turns the camera from the reference; the view
that the simulator imagines becomes the next image and the next reference, so errors add up along a chain, until a key
goes back to a given view. Pictures are drawn in half blocks of 24-bit colour. Without a terminal, commands are lines of
stdin.
"""

import contextlib
import math
import shutil
import sys
import textwrap
from collections.abc import Iterator

import numpy as np
from PIL import Image

from data import FIRST_ROOM
from extras.report.diagnosis import error_of_view
from lib.geometry import Array, Motion, Query, move_camera
from lib.protocol import call_of
from lib.rooms import random_room, render, ring
from lib.simulators import instruction, read_phrase
from lib.streams import numpy_stream

STEPS = {
    "w": Motion("dy", 0.5),
    "s": Motion("dy", -0.5),
    "a": Motion("dx", -0.5),
    "d": Motion("dx", 0.5),
    "q": Motion("dangle", -45.0),
    "e": Motion("dangle", 45.0),
    "r": Motion("dz", 0.5),
    "f": Motion("dz", -0.5),
    "i": Motion("dphi", 15.0),
    "k": Motion("dphi", -15.0),
}
HELP = (
    "w s a d  move 0.5 m    q e  turn 45 degrees    r f  up, down    i k  tilt",
    "1-4  back to a given view    n  next room    x  exit    :  type",
)
TAUGHT = "The demo's simulator was taught w a d q e i k, from given views and one step on; the rest is for curiosity."
WALL = 0.1  # metres that a camera keeps from it


class Walk:
    """A room and what was seen of it.

    images   the given views, then imagined ones, each the reference of the next
    poses    where they were taken, (4, 4), of imagined ones where the commands lead if carried out
    """

    def __init__(self, model, number: int = 0):
        """model: a WorldModel; number: which held-out room."""
        self.model = model
        self.number = number
        self.seed = FIRST_ROOM["test"] + number
        self.room = random_room(self.seed)
        self.size = model.settings.vae_limits[1]  # the shortest side that the simulator takes
        self.given = ring(numpy_stream("triples of a room", self.seed))
        self.back_to(1)

    def back_to(self, reference: int) -> None:
        """Forget what was imagined and stand at a given view (1-based)."""
        self.images = list(render(self.room, np.stack(self.given), self.size)["rgb"])
        self.poses = list(self.given)
        self.provenance = [None] * len(self.given)
        self.reference = reference
        self.views = [(f"from Image-{reference}", self.images[reference - 1])]
        self.words = ["", ""]

    def step(self, motion: Motion) -> None:
        """Imagine the view after a motion from the reference. Raises ValueError where no camera can stand."""
        start = self.poses[self.reference - 1]
        pose = move_camera(start, motion)
        if not self.is_inside(pose):
            raise ValueError("No camera can stand there: the way leads out of the room.")
        sentence = instruction(motion)
        seed = len(self.images)
        query = Query(
            list(self.images), self.reference, sentence, seed, provenance=list(self.provenance)
        )
        imagined = self.model.imagine([query])[0]
        true = render(self.room, pose, self.size)["rgb"][0]

        shown = min(len(self.images), self.model.settings.max_context)
        error = error_of_view(self.room, start, motion, imagined)
        sight = f"It sees {shown} images, Image-{self.reference} last: "
        self.words = [sight + sentence, in_words(error)]
        self.images.append(imagined)
        self.poses.append(pose)
        self.provenance.append(call_of(self.reference, motion))
        self.views = [
            (f"from Image-{self.reference}", self.images[self.reference - 1]),
            (f"imagined Image-{len(self.images)}", imagined),
            ("true view", true),
        ]
        self.reference = len(self.images)

    def is_inside(self, pose: Array) -> bool:
        """Whether a camera is inside the room."""
        x, y, z = pose[:3, 3]
        beside = abs(x) <= self.room.width / 2 - WALL and abs(z) <= self.room.length / 2 - WALL
        return beside and WALL - self.room.height <= y <= -WALL

    def screen(self, message: str) -> str:
        """All of it as text for a terminal."""
        columns, lines = shutil.get_terminal_size((100, 33))
        # of a picture, in characters; half as many lines, and a quarter of the given views above it
        width = max(8, min(32, (columns - 4) // 3, (lines - 10) * 4 // 3) // 4 * 4)
        text = [f"Room {self.seed}, which no model was trained on"]
        given = [(f"Image-{n}", view) for n, view in enumerate(self.images[: len(self.given)], 1)]
        text += panels(given, width // 2)
        text += panels(self.views, width)
        for words in (*self.words, message, *HELP):
            text += textwrap.wrap(words, columns - 1) or [""]
        return "\n".join(text)


def in_words(error: dict) -> str:
    """Of `pose_error`: how far the camera of an imagined view is from where the command says."""
    if error["family"] == "turns":
        off = f"{error['degrees']:.0f} degrees"
    else:
        off = f"{error['meters']:.2f} m, {error['direction']:.0f} degrees of direction"
    verdict = "as commanded" if error["within"] else "not as commanded"
    return f"Camera of the imagined view: {off} off, {verdict}."


# ---- drawn in characters ---------------------------------------------------------------------------------------------


def half_blocks(pixels: Array) -> list[str]:
    """(H, W, 3) uint8, H even -> H / 2 lines of W characters: the upper half of each has its own colour."""
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        line = ""
        for (r, g, b), (r2, g2, b2) in zip(upper, lower, strict=True):
            line += f"\x1b[38;2;{r};{g};{b}m\x1b[48;2;{r2};{g2};{b2}m▀"
        lines.append(line + "\x1b[0m")
    return lines


def panels(pictures: list[tuple[str, Array]], width: int) -> list[str]:
    """Pictures (H, H, 3) beside each other, each `width` characters wide below its title."""
    lines = ["  ".join(title[:width].ljust(width) for title, _ in pictures)]
    columns = []
    for _, image in pictures:
        small = Image.fromarray(image).resize((width, width), Image.BOX)
        columns.append(half_blocks(np.asarray(small)))
    lines += ["  ".join(row) for row in zip(*columns, strict=True)]
    return lines


# ---- commands --------------------------------------------------------------------------------------------------------


def read_motion(text: str) -> Motion:
    """A key, "q 30", or words such as "turn left 30" -> Motion. Raises ValueError for anything else."""
    key, _, amount = text.partition(" ")
    try:
        if key not in STEPS:
            return read_phrase(text)
        step = STEPS[key]
        size = float(amount or abs(step.amount))
        return Motion(step.kind, math.copysign(size, step.amount))
    except ValueError:
        raise ValueError(
            f"{text!r} is no command. Press a key of the list, or type a motion: turn left 30"
        ) from None


def obey(walk: Walk, command: str) -> Walk:
    """Do what a command says -> the walk, maybe of another room."""
    if command == "n":
        return Walk(walk.model, walk.number + 1)
    if command in ("1", "2", "3", "4"):
        walk.back_to(int(command))
    elif command:
        walk.step(read_motion(command))
    return walk


@contextlib.contextmanager
def commands_of_user() -> Iterator[Iterator[str]]:
    """Single keys of a terminal, where ":" begins a line, or lines of stdin. The terminal is left as it was."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield (line.strip() for line in sys.stdin)
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)

    def keys():
        while key := sys.stdin.read(1):
            if key == ":":
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
                print(": ", end="", flush=True)
                key = sys.stdin.readline().strip()
                tty.setcbreak(sys.stdin)
            yield key.strip()

    try:
        tty.setcbreak(sys.stdin)
        print("\x1b[?1049h\x1b[?25l", end="")  # another screen, no cursor
        yield keys()
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        print("\x1b[?25h\x1b[?1049l", end="", flush=True)


def look_around(model) -> None:
    """Step through held-out rooms with a WorldModel until x, Ctrl-C or the end of stdin."""
    walk = Walk(model)
    clear = "\x1b[H\x1b[J" if sys.stdout.isatty() else ""
    with contextlib.suppress(KeyboardInterrupt), commands_of_user() as commands:
        print(clear + walk.screen(TAUGHT), flush=True)
        for command in commands:
            if command == "x":
                break
            message = ""
            try:
                walk = obey(walk, command)
            except ValueError as error:
                message = str(error)
            print(clear + walk.screen(message), flush=True)
