"""
The embedded world: furnished rooms and a ray caster, so that everything runs without a download.

A room is a box of 5 to 7 metres with muted walls and coloured furniture. Its floor is the plane y = 0 and y points down
(OpenCV), so an eye at 1.3 m stands at y = -1.3. A few thousand views of 32 x 32 pixels per second and core.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from lib.geometry import Array, camera_pose, move_camera, pinhole
from lib.simulators import read_instruction
from lib.streams import numpy_stream

COLOURS = {
    "red": (215, 25, 30),
    "green": (20, 150, 45),
    "blue": (35, 60, 225),
    "yellow": (240, 220, 20),
    "purple": (135, 30, 190),
    "orange": (250, 130, 10),
    "cyan": (30, 205, 220),
    "pink": (250, 110, 185),
}
FURNITURE = ("cabinet", "barrel", "ball", "table")
WALLS = np.array(
    [
        (172, 160, 148),
        (150, 162, 172),
        (160, 172, 152),
        (178, 172, 150),
        (168, 152, 166),
        (140, 146, 150),
        (186, 180, 176),
        (152, 140, 132),
    ],
    np.float32,
)
FLOORS = np.array([(120, 104, 88), (104, 100, 100), (132, 120, 100), (96, 104, 98)], np.float32)
CEILINGS = np.array([(226, 224, 220), (214, 218, 222), (222, 214, 208)], np.float32)
EYE = 1.3  # metres above the floor
SIZE = 32  # pixels of the tiny world's pictures; the field of view is 90 degrees, so a ring of four tiles
THINGS = 6  # objects of a room


class Solid(NamedTuple):
    """A convex piece of furniture; lengths in metres, heights above the floor."""

    shape: str  # "box", "cylinder" or "sphere"
    half: float  # half-width
    bottom: float
    top: float


@dataclass(frozen=True)
class Thing:
    """A piece of furniture: its footprint is a circle or square of half-width `half` around (x, z), metres."""

    kind: str  # of FURNITURE
    colour: str
    x: float
    z: float
    yaw: float  # degrees
    half: float
    height: float

    def solids(self) -> list[Solid]:
        """What it is made of: a table of a top and a foot, everything else of one piece."""
        if self.kind == "table":
            under = 0.75 * self.height
            top = Solid("box", self.half, under, self.height)
            return [top, Solid("box", 0.45 * self.half, 0.0, under)]
        if self.kind == "ball":
            return [Solid("sphere", self.half, 0.0, 2 * self.half)]
        shape = {"cabinet": "box", "barrel": "cylinder"}[self.kind]
        return [Solid(shape, self.half, 0.0, self.height)]


@dataclass(frozen=True)
class Room:
    """Width (x) and length (z) are centred on the origin; `walls` are the tones at -x, +x, -z, +z."""

    width: float
    length: float
    height: float
    walls: tuple
    floor: int
    ceiling: int
    things: tuple


def random_room(seed: int) -> Room:
    """A furnished room: THINGS objects of different colours around the middle, which stays free to stand in.

    The objects stand in sectors of equal angle, 1.6 metres from the origin or further unless a wall is too near. The same
    seed gives the same room; disjoint seeds make disjoint sets of scenes.
    """
    rng = numpy_stream("room", seed)
    width, length = rng.uniform(5.0, 7.0, 2)
    colours = rng.permutation(list(COLOURS))[:THINGS]
    start = rng.uniform(0, 360)
    objects = []
    for i, colour in enumerate(colours):
        half = rng.uniform(0.30, 0.50)
        tall = rng.uniform(0.6, 1.6)
        angle = np.radians(start + 360 / THINGS * (i + rng.uniform(0.15, 0.85)))
        direction = np.array([np.sin(angle), np.cos(angle)])  # in (x, z)
        limit = np.array([width, length]) / 2 - half - 0.05
        to_wall = np.min(limit / np.maximum(np.abs(direction), 1e-9))
        near = min(1.6 + half, to_wall)
        x, z = direction * rng.uniform(near, max(near, min(to_wall, 3.0)))
        kind = str(rng.choice(FURNITURE))
        yaw = float(rng.uniform(0, 90))
        objects.append(Thing(kind, str(colour), float(x), float(z), yaw, half, tall))
    return Room(
        width,
        length,
        height=rng.uniform(2.6, 3.0),
        walls=tuple(rng.permutation(len(WALLS))[:4].tolist()),
        floor=int(rng.integers(len(FLOORS))),
        ceiling=int(rng.integers(len(CEILINGS))),
        things=tuple(objects),
    )


# ---- ray casting -----------------------------------------------------------------------------------------------------
# A ray leaves its `eye` (3, n) along its `direction` (3, n), both float32 and in world axes. The direction has length 1
# along the camera's z axis, so that a hit at distance t is the point eye + t * direction at depth t. inf = missed.


def _camera_rays(c2w, size):
    """One ray through every pixel centre of V cameras (V, 4, 4): eye and direction (3, V * size * size)."""
    centres = (np.arange(size) + 0.5 - size / 2) / pinhole(size)[0, 0]
    grid = np.broadcast_arrays(centres[None, :], centres[:, None], 1.0)  # x, y, z = 1
    rays = np.stack(grid).reshape(3, -1).astype(np.float32)
    eyes = c2w[:, :3, 3].astype(np.float32)
    directions = c2w[:, :3, :3].astype(np.float32) @ rays  # (V, 3, size * size)
    return np.repeat(eyes.T, size * size, 1), np.concatenate(list(directions), 1)


def _slab(eye, direction, low, high):
    """Entry and exit distance of the slab low <= coordinate <= high along one axis."""
    inverse = 1 / np.where(direction == 0, np.float32(1e-9), direction)
    a = (low - eye) * inverse
    b = (high - eye) * inverse
    return np.minimum(a, b), np.maximum(a, b)


def _own_axes(thing, x, z):
    """World (x, z) in the axes of a thing that is turned by its yaw."""
    c = np.float32(np.cos(np.radians(thing.yaw)))
    s = np.float32(np.sin(np.radians(thing.yaw)))
    return c * x - s * z, s * x + c * z


def _hit(solid, thing, eye, direction):
    """Entry distance (n,) of one convex solid, inf where the ray misses it or starts inside."""
    half = solid.half
    x, y, z = eye
    dx, dy, dz = direction
    x = x - np.float32(thing.x)
    z = z - np.float32(thing.z)
    enter, leave = _slab(y, dy, -solid.top, -solid.bottom)
    if solid.shape == "box":
        for o, d in zip(_own_axes(thing, x, z), _own_axes(thing, dx, dz), strict=True):
            near, far = _slab(o, d, -half, half)
            enter = np.maximum(enter, near)
            leave = np.minimum(leave, far)
    else:  # |o + t d|² = half², in (x, z): a t² + 2 b t + c = 0
        a = dx * dx + dz * dz
        b = x * dx + z * dz
        c = x * x + z * z - half**2
        if solid.shape == "sphere":  # ... and in y; a ball rests on the floor
            y = y + half
            a = a + dy * dy
            b = b + y * dy
            c = c + y * y
        discriminant = b * b - a * c
        root = np.sqrt(np.maximum(discriminant, 0))
        a = np.maximum(a, np.float32(1e-9))
        enter = np.maximum(enter, (-b - root) / a)
        leave = np.where(discriminant > 0, np.minimum(leave, (-b + root) / a), -np.inf)
    return np.where((enter < leave) & (enter > 1e-4), enter, np.float32(np.inf))


def _shade(solid, thing, point):
    """Brightness (n,) of surface points (3, n): light falls from above and from one side, so edges can be seen."""
    middle = np.array([[thing.x], [-solid.half], [thing.z]], np.float32)
    x, y, z = (point - middle) / solid.half
    if solid.shape == "sphere":
        return 0.84 + 0.14 * x - 0.10 * y
    side = 0.84 + 0.14 * x
    if solid.shape == "box":  # the face whose coordinate is largest, in the box's own axes
        u, v = _own_axes(thing, x, z)
        side = np.where(np.abs(u) > np.abs(v), 0.88 + 0.06 * np.sign(u), 0.76 + 0.06 * np.sign(v))
    return np.where(point[1] <= -solid.top + 1e-3, 1.0, side)


def _hit_walls(room, eye, direction):
    """Where rays leave an empty room: distance (n,) and colour (n, 3)."""
    half_x = room.width / 2
    half_z = room.length / 2
    _, x_exit = _slab(eye[0], direction[0], -half_x, half_x)
    _, y_exit = _slab(eye[1], direction[1], -room.height, 0)
    _, z_exit = _slab(eye[2], direction[2], -half_z, half_z)
    distance = np.minimum(np.minimum(x_exit, y_exit), z_exit)
    axis = np.where(distance == x_exit, 0, np.where(distance == y_exit, 1, 2))
    forward = direction[axis, np.arange(len(axis))] > 0
    minus_x, plus_x, minus_z, plus_z = WALLS[list(room.walls)]
    tones = [minus_x, plus_x, CEILINGS[room.ceiling], FLOORS[room.floor], minus_z, plus_z]
    return distance, np.stack(tones)[2 * axis + forward]


def _cast(room, c2w, size):
    """One ray through every pixel centre of V cameras: depth (V, H, W), ids (V, H, W), colour (V, H, W, 3)."""
    eye, direction = _camera_rays(c2w, size)
    distance, colour = _hit_walls(room, eye, direction)
    ids = np.zeros(len(distance), np.int64)
    for i, thing in enumerate(room.things, 1):
        paint = np.array(COLOURS[thing.colour], np.float32)
        for solid in thing.solids():
            t = _hit(solid, thing, eye, direction)
            first = np.flatnonzero(t < distance)
            t = t[first]
            point = eye[:, first] + t * direction[:, first]
            distance[first] = t
            ids[first] = i
            colour[first] = paint * _shade(solid, thing, point)[:, None]
    shape = (len(c2w), size, size)
    return distance.reshape(shape), ids.reshape(shape), colour.reshape(*shape, 3)


def render(room: Room, c2w: Array, size: int = SIZE, supersample: int = 2) -> dict[str, Array]:
    """Look into a room.

    c2w (V, 4, 4) or (4, 4), OpenCV; `size` pixels square, 90 degrees. Colour is the mean of supersample² rays per
    pixel; depth (metres along z) and ids belong to the ray through the pixel's centre.
    returns {"rgb" (V, H, W, 3) uint8, "depth" (V, H, W) float32, "ids" (V, H, W) int64: 0 room, i + 1 things[i]}
    """
    c2w = np.asarray(c2w, np.float64).reshape(-1, 4, 4)
    depth, ids, colour = _cast(room, c2w, size)
    if supersample > 1:
        _, _, fine = _cast(room, c2w, size * supersample)
        colour = fine.reshape(len(c2w), size, supersample, size, supersample, 3).mean((2, 4))
    return {"rgb": np.clip(colour + 0.5, 0, 255).astype(np.uint8), "depth": depth, "ids": ids}


def ring(rng: Generator, pitch: float = 0.0) -> list[Array]:
    """Four poses at one spot near the middle of the room, each one left turn of 90 degrees further; pitch > 0 looks up."""
    x, z = rng.uniform(-0.2, 0.2, 2)
    phase = rng.uniform(0, 360)
    return [camera_pose(x, -EYE, z, phase - 90 * k, pitch) for k in range(4)]


def pitched(rng: Generator) -> list[Array]:
    """A ring whose four cameras all look up, or all down, by the same 10 to 25 degrees."""
    return ring(rng, pitch=rng.choice([-1, 1]) * rng.uniform(10, 25))


class TrueRenderer:
    """The oracle simulator: it knows the room and renders the commanded view. Same call as the trained simulator."""

    def imagine(self, queries: list) -> list[Array]:
        """list of Query with `scene` -> list of (H, W, 3) uint8. A camera sent through a wall stops before it."""
        views = []
        for query in queries:
            room, target = self.scene_of(query)
            half_x, half_z = room.width / 2 - 0.1, room.length / 2 - 0.1
            low = [-half_x, 0.1 - room.height, -half_z]
            target[:3, 3] = np.clip(target[:3, 3], low, [half_x, -0.1, half_z])
            views.append(render(room, target, size=len(query.images[0]))["rgb"][0])
        return views

    def scene_of(self, query) -> tuple[Room, Array]:
        """The room, and the camera (4, 4) that is asked for."""
        _, motion = read_instruction(query.instruction)
        start = np.array(query.scene["poses"][query.reference - 1])
        return random_room(query.scene["room"]), move_camera(start, motion)
