"""
Is a triple fit to train on: pictures sharp and well exposed, depth and poses true? (Paper: quality-verified data.)

  sharpness      of one picture: how much of the slope of its edges a small blur takes away
  exposure       of one picture: shares of nearly black and of clipped pixels, spread of luminance
  contradiction  of depth and poses alone: the share of a view's points that another view sees through
  agreement      of colours: the target beside the context that depth and pose warp onto it
`verify` measures a triple and names the first rule that fails; `study` injects faults into rooms and counts what is
caught and what is lost. A view is (rgb (H, W, 3) uint8, depth (H, W) metres with 0 = invalid, c2w (4, 4)).

Thresholds were chosen on rooms from 6,000,000 at 32, 64 and 128 pixels, to lose few good triples; `study` reports
other rooms. Rooms have no texture, and their "good" depth and poses are off by 1 %, 0.3 degrees and 1 cm: before trust
in scans, look at the share that is lost there.
"""

import io

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from lib.geometry import (
    Motion,
    camera_pose,
    coverage,
    move_camera,
    pinhole,
    project,
    unproject,
    warp,
)
from lib.rooms import EYE, random_room, render
from lib.streams import numpy_stream

LUMA = np.array([0.299, 0.587, 0.114])
SIDE = 64  # pixels: colours and depth are compared at this size, where a pose true to 0.3 degrees is subpixel
BLACK, WHITE = (
    40,
    245,
)  # luminance: below, 8 bits and JPEG leave little but noise; above, it is clipped
THRESHOLDS = {
    # at least: the worst of five sharp views has 0.75 (99 % of triples: above 0.64), motion of 3 pixels 0.61, of 5 0.48
    "sharpness": 0.63,
    # at most: rooms five stops too dark have 0.68 and more (four: 0.37), a good photograph of a dark uniform 0.51
    "dark": 0.60,
    # at most: one stop too bright, white ceilings and walls make 0.3 (one in twenty 0.47); two stops, 0.6 and more
    "bright": 0.50,
    # at least: an empty frame has 0, a photograph of one plain wall 3 to 7 by its noise alone, rooms 75 and more
    "spread": 2.0,
    # at most: 99 % of good triples are below 0.0025 at 64 pixels and 0.0038 at 128, half of them below 0.0003
    "contradiction": 0.003,
    # at least: 99 % of good triples are above 0.68 at 64 pixels, 0.70 at 128 and 0.66 at 32; the median is 0.82
    "agreement": 0.67,
}


# ---- one picture ----------------------------------------------------------------------------------------------------


def box(values, width):
    """Moving mean of `width` (odd) along the rows (H, W); their ends are repeated."""
    total = np.cumsum(np.pad(values, ((0, 0), (width // 2 + 1, width // 2)), "edge"), 1)
    return (total[:, width:] - total[:, :-width]) / width


def sharpness(rgb, width=7):
    """Focus of a picture (H, W, 3) uint8 -> number up to 1: 6/7 for ideal steps, 0 where a blur would take nothing.

    After Crété et al. 2007: what is sharp loses its slopes to a blur, what is blurred has none to lose. Energy of the
    slopes, where the blurred picture shows an edge; without the part that noise makes, in which a blurred picture would
    seem sharp. Rows or columns, the less sharp: motion blurs one way. Without edges nothing shows blur: 1.
    """
    found = []
    for rows in (rgb @ LUMA, (rgb @ LUMA).T):
        fine, coarse = np.diff(rows), np.diff(box(rows, width))
        noise = np.median(np.abs(np.diff(rows, 2))) / (0.6745 * 6**0.5)  # standard deviation
        edge = np.abs(coarse) > max(
            3, 6 * noise * 2**0.5 / width
        )  # below 3 levels per pixel it may be soft light
        if edge.sum() >= len(rows):
            fine, coarse = (
                np.square(part[edge]).mean() - 2 * noise**2 / part_width**2
                for part, part_width in ((fine, 1), (coarse, width))
            )
            found.append(1 - coarse / fine if fine > coarse else 0.0)
    return float(min(found, default=1.0))


def exposure(rgb):
    """{"dark", "bright": shares of pixels below BLACK and above WHITE, "spread": 5 to 95 % of luminance, in levels}."""
    luminance = rgb @ LUMA
    low, high = np.quantile(luminance, [0.05, 0.95])
    return {
        "dark": float((luminance < BLACK).mean()),
        "bright": float((luminance > WHITE).mean()),
        "spread": float(high - low),
    }


# ---- views beside each other ----------------------------------------------------------------------------------------


def reduced(view, intrinsics):
    """A view at about SIDE pixels, with its intrinsics: colours are averaged (float), depth is picked, for the mean
    of two depths is neither. A view may bring its intrinsics; `intrinsics` are for one that does not."""
    rgb, depth, c2w, *own = view
    factor, K = max(1, round(min(depth.shape) / SIDE)), own[0] if own else intrinsics
    K = K / [[factor], [factor], [1]]
    K[:2, 2] += 0.5 - (factor // 2 + 0.5) / factor  # the rays of the pixels whose depth is picked
    height, width = (side // factor for side in depth.shape)
    rgb = (
        rgb[: height * factor, : width * factor]
        .reshape(height, factor, width, factor, 3)
        .mean((1, 3))
    )
    return rgb, depth[factor // 2 :: factor, factor // 2 :: factor][:height, :width], c2w, K


def seen_through(view, other, tolerance=0.05):
    """Share of the points of `view` that `other` sees through: in all four pixels around, its depth is larger.

    A point behind what `other` sees is hidden, as it may be; one before it cannot be there.  `tolerance`: as in `warp`
    """
    (_, depth, c2w, K), (_, there, other_c2w, other_K) = view, other
    (height, width), (pixel, z) = there.shape, project(unproject(depth, K, c2w), other_K, other_c2w)
    corner = np.floor(pixel - 0.5)  # column, row
    inside = (depth > 0) & (z > 1e-6) & ((corner >= 0) & (corner < (width - 1, height - 1))).all(-1)
    if not inside.any():
        return 0.0
    column, row = corner[inside].astype(int).T
    nearest = np.min(
        [there[row + i, column + j] for i in (0, 1) for j in (0, 1)], 0
    )  # 0: an invalid one
    return float((nearest - z[inside] > tolerance * (1 + z[inside])).mean())


def contradictions(views):
    """Per view (n,): the median of how much it and each other view see through each other. The largest is at fault.

    The median, since one wrong view contradicts all that overlap it, and every other view contradicts only that one.
    """
    share = np.array([[seen_through(a, b) if a is not b else np.nan for b in views] for a in views])
    return np.nanmedian((share + share.T) / 2, 1)


def same_light(target, warped, seen):
    """`warped` in the light of `target`: gain and bias per channel, fitted robustly over seen, unclipped pixels."""
    x, y = warped[seen], target[seen]  # (n, 3)
    usable = (np.minimum(x, y) > 5) & (np.maximum(x, y) < 250)
    weight = usable + 1e-9
    for _ in range(10):  # reweighted least squares; Cauchy weights of 8 levels
        mean_x, mean_y = (np.average(part, 0, weight) for part in (x, y))
        covariance, variance = (
            np.average((x - mean_x) * (part - mean), 0, weight)
            for part, mean in ((y, mean_y), (x, mean_x))
        )
        gain = np.clip((covariance + 25) / (variance + 25), 0.5, 2)  # plain: gain 1
        weight = usable / (1 + ((y - mean_y - gain * (x - mean_x)) / 8) ** 2) + 1e-9
    return np.clip(mean_y + gain * (warped - mean_x), 0, 255)


def agreement(target, warped, seen, width=13, reach=3.0, levels=25):
    """Photometric agreement of a target with a warped context view, (h, w, 3) of about SIDE pixels -> [0, 1].

    Each window of `width` pixels votes, weighted with its slopes above noise: a plain wall agrees with anything. Its
    vote is the product of
      place    1 - displacement / reach, where the displacement (pixels) best explains the difference (Lucas and Kanade
               1981): what a wrong pose does
      colour   share of its slopes where target and context differ by less than `levels` from the nearest of the 3 x 3
               pixels of each other (Birchfield and Tomasi 1998, so mixed pixels at edges count as equal)
    Light may differ by a gain and a bias per channel. Without a tenth of the pixels seen, or slopes: 0, nothing agrees.
    """
    if seen.mean() < 0.1:
        return 0.0

    def window(values):
        return box(box(values, width).T, width).T

    target = target.astype(float)
    warped = np.where(seen[..., None], same_light(target, warped.astype(float), seen), target)

    middle, difference = (target + warped) @ LUMA / 2, (target - warped) @ LUMA
    down, right = np.gradient(middle) * sliding_window_view(np.pad(seen, 1), (3, 3)).all((-2, -1))
    a, b, c = window(right * right) + 0.2, window(right * down), window(down * down) + 0.2
    e, f = window(right * difference), window(down * difference)
    move = np.hypot(c * e - b * f, a * f - b * e) / (a * c - b * b)  # pixels
    place = 1 - np.minimum(move / reach, 1)

    near = [
        sliding_window_view(np.pad(part, ((1, 1), (1, 1), (0, 0)), "edge"), (3, 3), (0, 1)).reshape(
            *part.shape, 9
        )
        for part in (target, warped)
    ]
    gap = [
        np.maximum(around.min(-1) - part, part - around.max(-1)).max(-1)
        for part, around in ((warped, near[0]), (target, near[1]))
    ]
    slope = seen * np.clip(np.max([np.ptp(around, -1).max(-1) for around in near], 0) - 12, 0, 40)
    colour = 1 - window(slope * (np.maximum(*gap) >= levels)) / (window(slope) + 1)

    weight = seen * np.maximum(
        np.sqrt(np.maximum(a + c - 0.4, 0)) - 3, 0
    )  # noise of 4 levels stays below 3
    return float((weight * place * colour).sum() / weight.sum()) if weight.mean() > 0.1 else 0.0


# ---- triples --------------------------------------------------------------------------------------------------------


def broken_rules(measures, thresholds=THRESHOLDS):
    """The rules that measures of `verify` break, in the order in which a triple is judged."""
    excess = {key: measures[key] - limit for key, limit in thresholds.items()}
    broken = {
        "blurred": excess["sharpness"] < 0,
        "exposure": excess["dark"] > 0 or excess["bright"] > 0 or excess["spread"] < 0,
        "geometric": excess["contradiction"] > 0,
        "photometric": excess["agreement"] < 0,
    }
    return [rule for rule, is_broken in broken.items() if is_broken]


def verify(target, context, intrinsics, thresholds=THRESHOLDS):
    """Measure a triple; each number is that of its worst view, but "agreement": the mean over what each view covers.

    target: a view;  context: list of views;  intrinsics (3, 3): of every view that does not bring its own behind c2w
    returns  {"sharpness", "dark", "bright", "spread", "contradiction", "agreement": see THRESHOLDS,
              "suspect": number of the view that contradicts the others most (0 the target, 1 the first context view),
              "rejected": None, or the first broken rule of "blurred", "exposure", "geometric", "photometric"}
    A context view that cannot be compared (`agreement` 0) has no say; if none can, what cannot be verified is rejected.
    """
    views = [target, *context]
    light = [exposure(view[0]) for view in views]
    small = [reduced(view, intrinsics) for view in views]
    against = contradictions(small)
    warps = [warp(*small[0][1:3], [view], small[0][3]) for view in small[1:]]
    agreed = np.array([agreement(small[0][0], *warped) for warped in warps])
    covers = (agreed > 0) * [seen.mean() for _, seen in warps]
    measures = {
        "sharpness": min(sharpness(view[0]) for view in views),
        "dark": max(each["dark"] for each in light),
        "bright": max(each["bright"] for each in light),
        "spread": min(each["spread"] for each in light),
        "contradiction": float(against.max()),
        "suspect": int(against.argmax()),
        "agreement": float(agreed @ covers / max(covers.sum(), 1e-9)),
    }
    return measures | {"rejected": next(iter(broken_rules(measures, thresholds)), None)}


# ---- the study ------------------------------------------------------------------------------------------------------
# A fault is (what, where, amount). Pictures pass a camera after it: light, noise of 2 to 4 levels, JPEG of quality 90.

MOTIONS = [
    Motion(f"turn {side}", amount) for side in ("left", "right") for amount in (45.0, 90.0)
] + [Motion(f"move {way}", amount) for way in ("left", "right", "forward") for amount in (0.5, 1.0)]
GOOD = [
    ("none", "", 0),
    ("other light", "each view, stops up to", 0.5),
    ("other light", "each view, stops up to", 1.0),
]
FAULTS = (
    [
        (what, f"{where}, {unit}", amount)
        for where in ("target", "one context view")
        for what, unit, amounts in (
            ("turned", "degrees", (3, 5, 10)),
            ("moved", "m", (0.05, 0.1, 0.2, 0.3)),
        )
        for amount in amounts
    ]
    + [
        (what, f"{where}, share", amount)
        for what, where in (
            ("depth scaled", "target"),
            ("depth scaled", "all views"),
            ("depth noise", "target"),
        )
        for amount in (0.05, 0.1, 0.2)
    ]
    + [("motion blur", "one view, pixels", amount) for amount in (3, 5, 9)]
    + [("defocus", "one view, radius in pixels", amount) for amount in (1, 2, 3)]
    + [("exposed", "one view, stops", amount) for amount in (-5, -4, -3, 1, 2, 3)]
    + [("other room", "colours of the target", 0)]
)


def smeared(rgb, offsets):
    """The mean of a picture shifted by (rows, columns) of `offsets`; its rim is repeated."""
    reach = int(np.abs(offsets).max())
    padded, (height, width) = (
        np.pad(rgb, ((reach, reach), (reach, reach), (0, 0)), "edge"),
        rgb.shape[:2],
    )
    return np.mean(
        [padded[reach + i : reach + i + height, reach + j : reach + j + width] for i, j in offsets],
        0,
    )


def photograph(rgb, rng, stops=0.0):
    """A rendered picture as a camera gives it: 2.2 stops double the levels; white balance within 5 %; noise; JPEG."""
    light = np.clip(rgb * 2 ** (stops / 2.2) * rng.uniform(0.95, 1.05, 3), 0, 255)
    noisy = (
        np.clip(light + rng.normal(0, rng.uniform(2, 4), rgb.shape), 0, 255)
        .round()
        .astype(np.uint8)
    )
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "jpeg", quality=90)
    return np.array(Image.open(file))


def shaken(c2w, rng, degrees=0.0, meters=0.0):
    """A pose, turned about a random axis and moved in a random direction."""
    axis, way = (part / np.linalg.norm(part) for part in rng.normal(size=(2, 3)))
    cross, angle, change = np.cross(np.eye(3), -axis), np.radians(degrees), np.eye(4)
    change[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross  # Rodrigues
    change[:3, 3] = meters * way
    return c2w @ change


def room_triple(seed, size):
    """A triple of a room, with target first: four cameras look across it, one motion leads to the target.

    As layout `apart` of data.py, and its rule that the context covers 85 % of the target.
    """
    rng, room = numpy_stream("triples of a room", seed), random_room(seed)
    while True:
        x, z = rng.uniform(-1.2, 1.2, (2, 4))
        near = (
            np.hypot(np.subtract.outer(x, x), np.subtract.outer(z, z))[np.triu_indices(4, 1)].min()
            < 1
        )
        if near or np.hypot(x, z).max() > 1.2:
            continue
        yaw = np.degrees(np.arctan2(-x, -z)) + rng.uniform(-25, 25, 4)
        poses = [camera_pose(x[k], -EYE, z[k], yaw[k]) for k in range(4)]
        poses.insert(0, move_camera(poses[0], MOTIONS[rng.integers(len(MOTIONS))]))
        seen = render(room, np.stack(poses), size)
        views = list(zip(seen["rgb"], seen["depth"], poses))
        if (
            np.hypot(*poses[0][[0, 2], 3]) <= 1.3
            and coverage(views[0][1], warp(*views[0][1:], views[1:], pinhole(size))[1]) >= 0.85
        ):
            return views


def inject(views, fault, rng, size):
    """The views of `room_triple` with one fault, as a camera and a scanner give them."""
    (what, where, amount), views, stops = fault, list(views), np.zeros(len(views))
    one = int(rng.integers("context" in where, 1 if "target" in where else len(views)))
    rgb, depth, c2w = views[one]
    if what == "turned":
        c2w = shaken(c2w, rng, degrees=amount)
    elif what == "moved":
        c2w = shaken(c2w, rng, meters=amount)
    elif what == "depth noise":
        depth = depth * np.maximum(1 + amount * rng.normal(size=depth.shape), 0.05)
    elif what == "motion blur":
        steps, angle = np.arange(amount) - (amount - 1) / 2, rng.uniform(0, np.pi)
        rgb = smeared(rgb, np.round(np.outer(steps, [np.sin(angle), np.cos(angle)])).astype(int))
    elif what == "defocus":
        grid = np.stack(np.mgrid[-amount : amount + 1, -amount : amount + 1], -1).reshape(-1, 2)
        rgb = smeared(rgb, grid[(grid**2).sum(1) <= amount**2])
    elif what == "other room":
        rgb = render(random_room(int(rng.integers(8_000_000, 9_000_000))), c2w, size)["rgb"][0]
    elif what == "exposed":
        stops[one] = amount
    elif what == "other light":
        stops = rng.uniform(-amount, amount, len(views))
    views[one] = rgb, depth, c2w
    if what == "depth scaled":
        scale = 1 + amount * rng.choice([-1, 1])
        views = [
            (rgb, depth * scale if k == 0 or "all" in where else depth, c2w)
            for k, (rgb, depth, c2w) in enumerate(views)
        ]
    return [
        (
            photograph(rgb, rng, stop),
            depth * (1 + 0.01 * rng.normal(size=depth.shape)),
            shaken(c2w, rng, 0.3, 0.01),
        )
        for (rgb, depth, c2w), stop in zip(views, stops)
    ]


def study(rooms=range(6_700_000, 6_700_040), size=SIDE, seed=0, faults=(*GOOD, *FAULTS)):
    """Inject every fault into a triple of every room -> a list of rows.

    A row: {"fault", "where", "amount", "good": whether no fault was injected, "n", "caught": share rejected (of good
    triples: lost), "blurred", "exposure", "geometric", "photometric": share that breaks this rule}
    """
    triples, rows = [room_triple(room, size) for room in rooms], []
    for number, fault in enumerate(faults):
        broken = []
        for room, views in zip(rooms, triples):
            target, *context = inject(
                views, fault, numpy_stream("faults", seed, room, number), size
            )
            broken.append(broken_rules(verify(target, context, pinhole(size))))
        shares = {
            rule: float(np.mean([rule in rules for rules in broken]))
            for rule in ("blurred", "exposure", "geometric", "photometric")
        }
        rows.append(
            {
                "fault": fault[0],
                "where": fault[1],
                "amount": fault[2],
                "good": fault in GOOD,
                "n": len(triples),
                "caught": float(np.mean([len(rules) > 0 for rules in broken])),
            }
            | shares
        )
    return rows


def table(rows):
    """Rows of `study` as lines of markdown; shares in percent."""
    keys = ("caught", "blurred", "exposure", "geometric", "photometric")
    head = [
        "| fault | where | amount | rejected | blurred | exposure | geometric | photometric |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return head + [
        f"| {row['fault']}{' (good)' if row['good'] else ''} | {row['where']} | {row['amount']:g} | "
        + " | ".join(f"{100 * row[key]:.0f}" for key in keys)
        + " |"
        for row in rows
    ]
