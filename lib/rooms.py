"""
The embedded world: furnished rooms and a ray caster, so that everything runs without a download.

A room is a box of 5 to 7 metres with muted walls and coloured furniture. Its floor is the plane y = 0 and y points
down (OpenCV), so an eye at 1.3 m stands at y = -1.3. `render` gives colour, metric depth and instance ids from any
camera; a few thousand views of 32 x 32 pixels per second and core. bench/room_scan.py tells a room as a reader
tells a scan.
"""

from dataclasses import dataclass

import numpy as np

from lib.geometry import camera_pose, move_camera, pinhole, read_instruction
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
KINDS = ("cabinet", "barrel", "ball", "table")
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
FURNISHED = {
    "bare": (10_000_000, 2),
    "cluttered": (11_000_000, 8),
}  # the first of a million seeds, objects


@dataclass(frozen=True)
class Thing:
    """A piece of furniture: its footprint is a circle or square of half-width `half` around (x, z), metres."""

    kind: str
    colour: str
    x: float
    z: float
    yaw: float  # degrees
    half: float
    height: float

    @property
    def name(self):
        return f"{self.colour} {self.kind}"

    def solids(self):
        """The convex solids it is made of: (shape, half-width, bottom, top), heights in metres above the floor."""
        if self.kind == "table":
            under = 0.75 * self.height
            return [("box", self.half, under, self.height), ("box", 0.45 * self.half, 0.0, under)]
        shape = {"cabinet": "box", "barrel": "cylinder", "ball": "sphere"}[self.kind]
        return [(shape, self.half, 0.0, 2 * self.half if shape == "sphere" else self.height)]


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


def random_room(seed, things=None):
    """A furnished room: `things` objects of different colours around the middle, which stays free to stand in.

    things    None: as many as rooms of this seed have, 6 but for those of FURNISHED
    The objects stand in sectors of equal angle, one per sector, 1.6 metres from the origin or further unless a wall is
    too near. The same seed gives the same room; disjoint seeds make disjoint sets of scenes.
    """
    rng = numpy_stream("room", seed)
    things = things or next(
        (n for first, n in FURNISHED.values() if first <= seed < first + 1_000_000), 6
    )
    width, length = rng.uniform(5.0, 7.0, 2)
    colours = rng.permutation(list(COLOURS))[:things]
    start = rng.uniform(0, 360)
    placed = []
    for i, colour in enumerate(colours):
        half, tall = rng.uniform(0.30, 0.50), rng.uniform(0.6, 1.6)
        angle = np.radians(start + 360 / things * (i + rng.uniform(0.15, 0.85)))
        direction = np.array([np.sin(angle), np.cos(angle)])
        to_wall = np.min(
            (np.array([width, length]) / 2 - half - 0.05) / np.maximum(np.abs(direction), 1e-9)
        )
        near = min(1.6 + half, to_wall)
        x, z = direction * rng.uniform(near, max(near, min(to_wall, 3.0)))
        kind, yaw = str(rng.choice(KINDS)), float(rng.uniform(0, 90))
        placed.append(Thing(kind, str(colour), float(x), float(z), yaw, half, tall))
    return Room(
        width,
        length,
        rng.uniform(2.6, 3.0),
        tuple(rng.permutation(len(WALLS))[:4].tolist()),
        int(rng.integers(len(FLOORS))),
        int(rng.integers(len(CEILINGS))),
        tuple(placed),
    )


# ---- ray casting ----------------------------------------------------------------------------------------------
# V cameras with P rays each, N = V P rays in all; a ray leaves its eye (3,) along direction (3,), whose length along
# the camera's z axis is 1, so that a hit at distance t is a point eye + t * direction at depth t. inf = missed.


def _slab(eye, direction, low, high):
    """Entry and exit distance of the slab low <= coordinate <= high along one axis."""
    inverse = 1 / np.where(direction == 0, np.float32(1e-9), direction)
    a, b = (low - eye) * inverse, (high - eye) * inverse
    return np.minimum(a, b), np.maximum(a, b)


def _turned(thing, x, z):
    """World (x, z) in the axes of a thing that is turned by its yaw."""
    c, s = np.float32(np.cos(np.radians(thing.yaw))), np.float32(np.sin(np.radians(thing.yaw)))
    return c * x - s * z, s * x + c * z


def _may_hit(solid, thing, eyes, directions, length):
    """Indices (n,) of the rays that pass through the ball around a solid: most rays miss most furniture.

    eyes (V, 3), directions (V, 3, P), length (V, P) of the directions
    """
    shape, half, bottom, top = solid
    radius2 = (2 if shape == "box" else 1) * half**2 + (top - bottom) ** 2 / 4
    centre = np.array([thing.x, -(top + bottom) / 2, thing.z], np.float32) - eyes  # (V, 3)
    reach = np.sqrt(np.maximum((centre**2).sum(1) - radius2, 0))
    reach[reach == 0] = -np.inf  # an eye inside the ball
    return np.flatnonzero((centre[:, None] @ directions)[:, 0] >= length * reach[:, None])


def _hit(solid, thing, eye, direction):
    """Entry distance (n,) of one convex solid, inf where the ray misses it or starts inside."""
    shape, half, bottom, top = solid
    (x, y, z), (dx, dy, dz) = eye, direction
    x, z = x - np.float32(thing.x), z - np.float32(thing.z)
    enter, leave = _slab(y, dy, -top, -bottom)
    if shape == "box":
        for o, d in zip(_turned(thing, x, z), _turned(thing, dx, dz)):
            near, far = _slab(o, d, -half, half)
            enter, leave = np.maximum(enter, near), np.minimum(leave, far)
        return np.where((enter < leave) & (enter > 1e-4), enter, np.float32(np.inf))
    a, b, c = (
        dx * dx + dz * dz,
        x * dx + z * dz,
        x * x + z * z - half**2,
    )  # |o + t d|² = half² over (x, z)
    if shape == "sphere":  # … and y; a ball rests on the floor
        y = y + half
        a, b, c = a + dy * dy, b + y * dy, c + y * y
    root = b * b - a * c
    width, a = np.sqrt(np.maximum(root, 0)), np.maximum(a, np.float32(1e-9))
    enter, leave = np.maximum(enter, (-b - width) / a), np.minimum(leave, (-b + width) / a)
    return np.where((root > 0) & (enter < leave) & (enter > 1e-4), enter, np.float32(np.inf))


def _shade(solid, thing, point):
    """Brightness (n,) of surface points (3, n): light falls from above and from one side, so edges can be seen."""
    shape, half, _, top = solid
    x, y, z = (point - np.array([[thing.x], [-half], [thing.z]], np.float32)) / half
    if shape == "box":  # the face whose coordinate is largest, in the box's own axes
        u, v = _turned(thing, x, z)
        side = np.where(np.abs(u) > np.abs(v), 0.88 + 0.06 * np.sign(u), 0.76 + 0.06 * np.sign(v))
    else:
        side = 0.84 + 0.14 * x - (0.10 * y if shape == "sphere" else 0)
    return np.where((point[1] <= -top + 1e-3) & (shape != "sphere"), 1.0, side)


def _cast(room, c2w, size, with_colour):
    """One ray through every pixel centre of V cameras: depth (V, H, W), ids (V, H, W), colour (V, H, W, 3) or None."""
    centres = (np.arange(size) + 0.5 - size / 2) / pinhole(size)[0, 0]
    rays = np.stack(np.broadcast_arrays(centres[None, :], centres[:, None], 1.0)).reshape(
        3, -1
    )  # (3, P), z = 1
    eyes = c2w[:, :3, 3].astype(np.float32)  # (V, 3)
    directions = c2w[:, :3, :3].astype(np.float32) @ rays.astype(np.float32)  # (V, 3, P)
    length = np.linalg.norm(directions, axis=1)  # (V, P)
    direction = np.ascontiguousarray(directions.transpose(1, 0, 2)).reshape(3, -1)  # (3, N)
    eye = np.repeat(eyes.T, rays.shape[1], 1)  # (3, N)

    half_x, half_z = room.width / 2, room.length / 2
    walls = ((0, -half_x, half_x), (1, -room.height, 0), (2, -half_z, half_z))
    exits = [_slab(eye[axis], direction[axis], low, high)[1] for axis, low, high in walls]
    distance = np.minimum(np.minimum(exits[0], exits[1]), exits[2])
    ids = np.zeros(len(distance), np.int64)
    if with_colour:
        tones = np.stack(
            [
                *WALLS[list(room.walls[:2])],
                CEILINGS[room.ceiling],
                FLOORS[room.floor],
                *WALLS[list(room.walls[2:])],
            ]
        )  # (6, 3): each axis, minus and plus side
        axis = np.where(distance == exits[0], 0, np.where(distance == exits[1], 1, 2))
        colour = tones[2 * axis + (direction[axis, np.arange(len(axis))] > 0)]
    for i, thing in enumerate(room.things):
        for solid in thing.solids():
            near = _may_hit(solid, thing, eyes, directions, length)
            t = _hit(solid, thing, eye[:, near], direction[:, near])
            first = t < distance[near]
            near, t = near[first], t[first]
            distance[near], ids[near] = t, i + 1
            if with_colour:
                shade = _shade(solid, thing, eye[:, near] + t * direction[:, near])
                colour[near] = np.array(COLOURS[thing.colour], np.float32) * shade[:, None]
    shape = (len(c2w), size, size)
    return (
        distance.reshape(shape),
        ids.reshape(shape),
        colour.reshape(*shape, 3) if with_colour else None,
    )


def render(room, c2w, size=32, supersample=2):
    """Look into a room.

    c2w (V, 4, 4) or (4, 4), OpenCV; `size` pixels square, 90 degrees. Colour is the mean of supersample² rays per
    pixel; depth (metres along z) and ids belong to the ray through the pixel's centre.
    returns {"rgb" (V, H, W, 3) uint8, "depth" (V, H, W) float32, "ids" (V, H, W) int64: 0 room, i + 1 things[i]}
    """
    c2w = np.asarray(c2w, np.float64).reshape(-1, 4, 4)
    depth, ids, colour = _cast(room, c2w, size, with_colour=supersample == 1)
    if supersample > 1:
        fine = _cast(room, c2w, size * supersample, with_colour=True)[2]
        colour = fine.reshape(len(c2w), size, supersample, size, supersample, 3).mean((2, 4))
    return {"rgb": np.clip(colour + 0.5, 0, 255).astype(np.uint8), "depth": depth, "ids": ids}


def ring(rng, views=4):
    """Poses at one spot near the middle of the room, each one left turn of 360 / views degrees further."""
    x, z, phase = *rng.uniform(-0.2, 0.2, 2), rng.uniform(0, 360)
    return [camera_pose(x, -EYE, z, phase - 360 / views * k) for k in range(views)]


class TrueRenderer:
    """The oracle simulator: it knows the room and renders the commanded view. Same call as the trained simulator."""

    def imagine(self, queries):
        """list of Query with `scene` -> list of (H, W, 3) uint8. A camera sent through a wall stops before it."""
        views = []
        for query in queries:
            if query.scene is None:
                raise ValueError(
                    "the true renderer works in rooms only: this question carries no scene"
                )
            reference, motion = read_instruction(query.instruction)
            room, start = (
                random_room(query.scene["room"]),
                np.array(query.scene["poses"][reference - 1]),
            )
            target = move_camera(start, motion)
            half = np.array([room.width / 2, 0, room.length / 2]) - 0.1
            target[:3, 3] = np.clip(
                target[:3, 3], [-half[0], 0.1 - room.height, -half[2]], [half[0], -0.1, half[2]]
            )
            views.append(render(room, target, size=query.images[0].shape[0])["rgb"][0])
        return views
