"""
The one place where a simulator is chosen by name, and Reprojection, which needs no training.

A simulator is anything with `imagine(list of Query) -> list of (H, W, 3) uint8`. By name:

  tuned         the trained Astra-WM: out/wm, or out/demo/wm
  untuned       its twin, trained as long on shuffled sentences, a generic generator: out/wm-untuned
  reprojection  the given views as a point cloud, looked at from the commanded pose (rooms only: it needs depth)
  truth         the true renderer (rooms only)
  none          no simulator: a call is answered by a sentence
  http://…      a server of image edits, such as `python world_model.py --serve 8000` (extras/remote/client.py)
  anything else is the folder or hub id of a world model
"""

import numpy as np
import torch

from extras.remote.client import RemoteSimulator
from lib.common import fail, newest
from lib.geometry import fill_holes, move_camera, pinhole, project, read_instruction, unproject
from lib.rooms import TrueRenderer, random_room, render

NAMES = ("tuned", "untuned", "reprojection", "truth", "none")
NEEDS_ROOM = ("reprojection", "truth")
URLS = ("http://", "https://")  # how the name of a server begins
FOLDERS = {"tuned": "wm", "untuned": "wm-untuned"}
COMMANDS = {
    "tuned": "python train_wm.py",
    "untuned": "python train_wm.py --shuffle-instructions --out out/wm-untuned",
}


def find(name, wm=None):
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
    found = newest((FOLDERS[name],))
    return (
        str(found)
        if found
        else fail(f"There is no simulator in out/{FOLDERS[name]} yet. `{COMMANDS[name]}` makes it.")
    )


def load(name, device="cpu", wm=None):
    """The simulator called `name` (see the top of this file), ready to imagine, in bf16 on a GPU; None for "none"."""
    if name in NEEDS_ROOM or name == "none":
        return {"truth": TrueRenderer, "reprojection": Reprojection, "none": lambda: None}[name]()
    from world_model import WorldModel

    try:
        if str(name).startswith(URLS):
            return RemoteSimulator(name)
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        return WorldModel.load(find(name, wm), device, dtype)
    except (OSError, ValueError) as error:
        fail(f"The simulator {find(name, wm)} cannot be read: {error}")


class Reprojection:
    """Training-free: every pixel of a given view is a small square in space, painted into the commanded view.

    Depth belongs to given views alone (an imagined one adds no points, though a motion may start from it). In rooms it
    is rendered at the pose of the view; an image counts as given if it shows what stands at its pose.
    """

    def imagine(self, queries):
        """list of Query with `scene` -> list of (H, W, 3) uint8."""
        return [self._imagine(query) for query in queries]

    def _imagine(self, query):
        if query.scene is None:
            raise ValueError(
                "reprojection works in rooms only: this question carries no depth and no poses"
            )
        reference, motion = read_instruction(query.instruction)
        poses, size = np.array(query.scene["poses"]), query.images[0].shape[0]
        true = render(random_room(query.scene["room"]), poses, size)
        given = [
            k
            for k, image in enumerate(query.images)
            if np.abs(image - true["rgb"][k].astype(float)).mean() < 1
        ]
        clouds = [points(query.images[k], true["depth"][k], poses[k]) for k in given]
        view, seen = splat(
            *map(np.concatenate, zip(*clouds)), move_camera(poses[reference - 1], motion), size
        )
        return fill_holes(view, seen)


def points(rgb, depth, c2w, fine=3):
    """A view as coloured points: each pixel becomes fine² of them -> world points (n, 3), colours (n, 3) uint8."""
    rgb, depth = (x.repeat(fine, 0).repeat(fine, 1) for x in (rgb, depth))
    where = unproject(depth, pinhole(len(depth)), c2w)
    return where[depth > 0], rgb[depth > 0]


def splat(where, colours, c2w, size):
    """Paint points into a view of `size` pixels, the nearest on top -> rgb (H, W, 3) uint8, seen (H, W) bool."""
    pixel, z = project(where, pinhole(size), c2w)
    column, row = np.floor(pixel).astype(int).T
    kept = np.flatnonzero((z > 0.05) & (column >= 0) & (column < size) & (row >= 0) & (row < size))
    kept = kept[np.argsort(-z[kept], kind="stable")]  # far to near: the last one written stays
    view, seen = np.zeros((size, size, 3), np.uint8), np.zeros((size, size), bool)
    view[row[kept], column[kept]], seen[row[kept], column[kept]] = colours[kept], True
    return view, seen
