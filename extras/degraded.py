"""
The true renderer made worse on purpose, by its name truth:YAW:MISSING: how good must a simulator be before it helps?

  python evaluate.py --mode agentic --simulator truth:20:40

turns every view 20 degrees too far, to the left or right by chance, and leaves each object out of it with a chance of
40 %. Rows "degraded-*" of `python -m experiments policy` ask a policy in a grid of both.
"""

from dataclasses import replace
from itertools import compress

from lib.distributed import fail
from lib.geometry import Array, Motion, Query, move_camera
from lib.rooms import Room, TrueRenderer
from lib.streams import numpy_stream


class DegradedRenderer(TrueRenderer):
    """Renders the commanded view, but for the errors that it was asked to make."""

    def __init__(self, yaw_error: float, missing: float):
        """yaw_error: degrees;  missing: per cent of the objects. Raises ValueError if there is no such share."""
        if not 0 <= missing <= 100:
            raise ValueError(f"{missing:g} % of the objects cannot be missing")
        self.yaw_error = yaw_error
        self.missing = missing

    def scene_of(self, query: Query) -> tuple[Room, Array]:
        """The room without some objects, and a camera that looks elsewhere; the errors are of the query's own stream."""
        room, camera = super().scene_of(query)
        rng = numpy_stream("degraded view", query.scene["room"], query.seed)
        present = rng.random(len(room.things)) * 100 >= self.missing
        side = rng.choice([-1, 1])
        if self.yaw_error:
            camera = move_camera(camera, Motion("dangle", float(side * self.yaw_error)))
        return replace(room, things=tuple(compress(room.things, present))), camera


def degraded_renderer(name: str) -> DegradedRenderer:
    """The renderer called truth:YAW:MISSING; ends the program with a sentence where that is no name of one."""
    try:
        yaw_error, missing = map(float, name.split(":")[1:])
        return DegradedRenderer(yaw_error, missing)
    except ValueError:
        fail(f"--simulator {name}: after truth come degrees and per cent, as in truth:20:40.")
