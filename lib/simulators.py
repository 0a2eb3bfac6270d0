"""
The one place where a simulator is chosen by name, how it fails, and Reprojection, which needs no training.

A simulator is anything with `imagine(list of Query) -> list of (H, W, 3) uint8`. By name:

  tuned         the trained Astra-WM: out/wm, or out/demo/wm
  untuned       its twin, trained as long on shuffled sentences, a generic generator: out/wm-untuned
  reprojection  the given views as a point cloud, looked at from the commanded pose (rooms only: it needs depth)
  truth         the true renderer (rooms only)
  none          no simulator: a call is answered by a sentence
  http://…      a server of image edits (extras/remote)
  anything else is the folder or hub id of a world model
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from lib.distributed import fail, say
from lib.geometry import (
    Array,
    Query,
    move_camera,
    pinhole,
    project,
    read_instruction,
    unproject,
)
from lib.rooms import TrueRenderer, random_room, render
from lib.stage import newest

NAMES = ("tuned", "untuned", "reprojection", "truth", "none")
NEEDS_ROOM = ("reprojection", "truth")
URLS = ("http://", "https://")  # how the name of a server begins
FOLDERS = {"tuned": "wm", "untuned": "wm-untuned"}
COMMANDS = {
    "tuned": "python train_wm.py",
    "untuned": "python train_wm.py --shuffle-instructions --out out/wm-untuned",
}
NO_VIEW = "This view could not be imagined. Answer from the images, or ask for another view."


class SimulatorError(ValueError):
    """A view, or an answer of a served policy, that failed for good, in a sentence with its full stop.

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


# ---- by name --------------------------------------------------------------------------------------------------------


def find_weights(name: str | Path, wm: str | Path | None = None) -> str | None:
    """The world-model folder or hub id behind a simulator's name; None for those that have no weights.

    wm   the folder of "tuned", if it is not the default
    Ends the program with a sentence that says which command makes what is missing.
    """
    if name in NEEDS_ROOM or name == "none":
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
    return name not in (*NEEDS_ROOM, "none") and not str(name).startswith(URLS)


def load_simulator(
    name: str | Path, device: torch.device | str = "cpu", wm: str | Path | None = None, **options
):
    """The simulator called `name` (see the top of this file), ready to imagine, in bf16 on a GPU; None for "none".

    options   of `WorldModel.load`; what is no world model says that they change nothing
    """
    if options and name != "none" and not is_world_model(name):
        say(f"{name} is no world model of ours: {', '.join(options)} change nothing in it.")
    if name == "none":
        return None
    if name == "truth":
        return TrueRenderer()
    if name == "reprojection":
        return Reprojection()
    try:
        if str(name).startswith(URLS):
            from extras.remote.client import RemoteSimulator

            return RemoteSimulator(name)
        from world_model import WorldModel

        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        return WorldModel.load(find_weights(name, wm), device, dtype, **options)
    except (OSError, ValueError) as error:
        fail(f"The simulator {find_weights(name, wm)} cannot be read: {error}")


# ---- reprojection ---------------------------------------------------------------------------------------------------


class Reprojection:
    """Training-free: every pixel of a given view is a small square in space, painted into the commanded view.

    Depth belongs to given views alone (an imagined one adds no points, though a motion may start from it). In rooms it
    is rendered at the pose of the view; an image counts as given if it shows what stands at its pose.
    """

    def imagine(self, queries: list[Query]) -> list[Array]:
        """Queries with `scene` -> (H, W, 3) uint8 each. Raises ValueError without a scene."""
        return [self.reproject(query) for query in queries]

    def reproject(self, query: Query) -> Array:
        """One query -> (H, W, 3) uint8."""
        if query.scene is None:
            raise ValueError(
                "reprojection works in rooms only: this question carries no depth and no poses"
            )
        reference, motion = read_instruction(query.instruction)
        poses = np.array(query.scene["poses"])
        size = len(query.images[0])
        true = render(random_room(query.scene["room"]), poses, size)
        positions, colours = [], []
        for image, rgb, depth, c2w in zip(
            query.images, true["rgb"], true["depth"], poses, strict=True
        ):
            if np.abs(image - rgb.astype(float)).mean() < 1:
                xyz, rgb = points(image, depth, c2w)
                positions.append(xyz)
                colours.append(rgb)
        target = move_camera(poses[reference - 1], motion)
        view, covered = splat(np.concatenate(positions), np.concatenate(colours), target, size)
        return fill_holes(view, covered)


def points(rgb: Array, depth: Array, c2w: Array, fine: int = 3) -> tuple[Array, Array]:
    """A view as coloured points: each pixel becomes fine² of them -> world points (n, 3), colours (n, 3) uint8."""
    rgb = rgb.repeat(fine, 0).repeat(fine, 1)
    depth = depth.repeat(fine, 0).repeat(fine, 1)
    xyz = unproject(depth, pinhole(len(depth)), c2w)
    return xyz[depth > 0], rgb[depth > 0]


def splat(xyz: Array, colours: Array, c2w: Array, size: int) -> tuple[Array, Array]:
    """Paint points into a view of `size` pixels, the nearest on top -> rgb (H, W, 3) uint8, covered (H, W) bool."""
    pixel, z = project(xyz, pinhole(size), c2w)
    column, row = np.floor(pixel).astype(int).T
    inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    visible = np.flatnonzero((z > 0.05) & inside)
    far_to_near = visible[np.argsort(-z[visible], kind="stable")]  # the last one written stays
    view = np.zeros((size, size, 3), np.uint8)
    covered = np.zeros((size, size), bool)
    view[row[far_to_near], column[far_to_near]] = colours[far_to_near]
    covered[row[far_to_near], column[far_to_near]] = True
    return view, covered


def fill_holes(view: Array, mask: Array) -> Array:
    """Let pixels outside `mask` (H, W) take the colour of the nearest one inside (in steps up, down, left, right)."""
    view = view.copy()
    known = mask.copy()
    while known.any() and not known.all():
        view_before = view.copy()
        known_before = known.copy()
        for axis, step in ((1, 1), (1, -1), (0, 1), (0, -1)):
            from_there = np.roll(known_before, step, axis)
            edge = 0 if step == 1 else -1  # np.roll wraps round: undo
            from_there[(slice(None),) * axis + (edge,)] = False
            take = from_there & ~known
            view[take] = np.roll(view_before, step, axis)[take]
            known |= take
    return view
