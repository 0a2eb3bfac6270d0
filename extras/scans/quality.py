"""
Is a triple fit to train on: pictures sharp and well exposed, depth and poses true? (Paper: quality-verified data.)

  sharpness      of one picture: how much of the slope of its edges a small blur takes away
  exposure       of one picture: shares of nearly black and of clipped pixels, spread of luminance
  registration   of single views: do edges of depth fall on edges of the picture?
  contradiction  of depth and poses alone: the share of a view's points that another view sees through
  agreement      of colours: the target beside the context that depth and pose warp onto it
`verify_triple` measures a triple of pictures that are fit (`picture_measures`), and names the first rule that it breaks.

Thresholds were chosen on rooms from 6,000,000 at 32, 64 and 128 pixels, to lose few good triples; their "good" depth and
poses are off by 1 %, 0.3 degrees and 1 cm. What a sensor is excused for, its own frames say, each by itself: views that
agree with each other may be wrong alike. docs/scans.md has a real scan beside the rooms.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray
from numpy.lib.stride_tricks import sliding_window_view

from extras.scans.frames import PosedView
from lib.geometry import CORNERS, project, unproject, warp

LUMA = np.array([0.299, 0.587, 0.114])
SIDE = 64  # pixels: colours and depth are compared at this size, where 0.3 degrees are subpixel
FINE = 240  # pixels: sharpness, and whether edges of depth are those of the picture
ON_EDGE = 2.3  # pixels that an edge of depth may be off,
BESIDE = (3, 10)  # and so many are elsewhere
EDGES = 300  # pixels of edges in all views: fewer tell nothing
BLACK = 40  # luminance: below, 8 bits and JPEG leave little but noise
WHITE = 245  # above, it is clipped
SEEN_AT_LEAST = 0.1  # share of the target: a context that sees less cannot be compared with it
JUMP = 0.07
STEEP = 60  # levels per pixel: a steeper slope counts no more
EXCUSED = 0.002  # share of points: no sensor is excused for more
SOFT = (0.50, 0.8)  # the lowest limit of sharpness, and its share of a scan's sharpest frames'


class Bounds(NamedTuple):
    """What a measure may be, both included, and the rule that is broken elsewhere."""

    rule: str
    low: float = -np.inf
    high: float = np.inf


THRESHOLDS = {
    # the worst of five sharp views has 0.75 (99 % of triples: above 0.64), motion of 3 pixels 0.61, of 5 0.48
    "sharpness": Bounds("blurred", low=0.63),
    # rooms five stops too dark have 0.68 and more (four: 0.37), a good photograph of a dark uniform 0.51
    "dark": Bounds("exposure", high=0.60),
    # one stop too bright, white ceilings and walls make 0.3 (one in twenty 0.47); two stops, 0.6 and more
    "bright": Bounds("exposure", high=0.50),
    # an empty frame has 0, a photograph of one plain wall 3 to 7 by its noise alone, rooms 75 and more
    "spread": Bounds("exposure", low=2.0),
    # below 1 edges of the picture are stronger 3 pixels beside the edges of depth
    "registration": Bounds("registration", low=1.0),
    # 99 % of good triples are below 0.0025 at 64 pixels and 0.0038 at 128, half of them below 0.0003
    "contradiction": Bounds("geometric", high=0.003),
    # 99 % of good triples are above 0.68 at 64 pixels, 0.70 at 128 and 0.66 at 32; the median is 0.82
    "agreement": Bounds("photometric", low=0.67),
}


# ---- triples -------------------------------------------------------------------------------------------------------------


def verify_triple(
    target: PosedView, context: list[PosedView]
) -> tuple[str | None, dict[str, float]]:
    """The first rule of THRESHOLDS that a triple breaks (None: it is fit), and what was measured.

    "contradiction" is that of its worst view, beyond what thin things and stray points of single views explain;
    "agreement" the mean over what each view covers. A context view that cannot be compared (`agreement` 0) has no say;
    if none can, what cannot be verified is rejected.
    """
    views = [target, *context]
    small = [reduced(view, SIDE) for view in views]
    scores, weights = [], []
    for view in small[1:]:
        warped, mask = warp(small[0].depth, small[0].c2w, [view], small[0].intrinsics)
        scores.append(agreement(small[0].rgb, warped, mask))
        weights.append(mask.mean() if scores[-1] > 0 else 0.0)
    stray = min(np.mean([stray_points(view.depth) for view in small]), EXCUSED)
    measures = {
        "registration": registration([reduced(view, FINE) for view in views]),
        "contradiction": float(contradictions(small).max() - stray),
        "agreement": float(np.dot(scores, weights) / max(sum(weights), 1e-9)),
    }
    return next(iter(broken_rules(measures)), None), measures


def broken_rules(measures, thresholds=THRESHOLDS):
    """The rules that measures break, in the order of `thresholds`."""
    broken = []
    for measure, (rule, low, high) in thresholds.items():
        if measure in measures and not low <= measures[measure] <= high:
            broken.append(rule)
    return broken


# ---- one picture ---------------------------------------------------------------------------------------------------------


def box(values, width):
    """Moving mean of `width` (odd) along the rows (H, W); their ends are repeated."""
    total = np.cumsum(np.pad(values, ((0, 0), (width // 2 + 1, width // 2)), "edge"), 1)
    return (total[:, width:] - total[:, :-width]) / width


def sharpness(rgb: ndarray, width: int = 7) -> float:
    """Focus of a picture (H, W, 3) uint8 -> number up to 1: 6/7 for ideal steps, 0 where a blur would take nothing.

    After Crété et al. 2007: what is sharp loses its slopes to a blur, what is blurred has none to lose. Energy of the
    slopes, where the blurred picture shows an edge; without the part that noise makes, in which a blurred picture would
    seem sharp. Rows or columns, the less sharp: motion blurs one way. Without edges nothing shows blur: 1.
    """
    luminance = rgb @ LUMA
    least = 1.0
    for rows in (luminance, luminance.T):
        fine = np.diff(rows)
        coarse = np.diff(box(rows, width))
        noise = np.median(np.abs(np.diff(rows, 2))) / (0.6745 * 6**0.5)  # standard deviation
        # below 3 levels per pixel it may be soft light
        edge = np.abs(coarse) > max(3, 6 * noise * 2**0.5 / width)
        if edge.sum() < len(rows):
            continue
        fine_energy = np.square(fine[edge]).mean() - 2 * noise**2
        coarse_energy = np.square(coarse[edge]).mean() - 2 * noise**2 / width**2
        lost = 1 - coarse_energy / fine_energy if fine_energy > coarse_energy else 0.0
        least = min(least, lost)
    return float(least)


def picture_measures(rgb: ndarray) -> dict[str, float]:
    """What THRESHOLDS bounds of one picture (H, W, 3) uint8."""
    dark, bright, spread = exposure(rgb)
    return {"sharpness": sharpness(rgb), "dark": dark, "bright": bright, "spread": spread}


def faults_of_pictures(pictures: list[dict[str, float]]) -> list[str | None]:
    """The first rule that each picture of a scan breaks, by its `picture_measures`; None: it is fit.

    A scanner's lens may be softer than rooms: the limit of sharpness is a share of the scan's own sharpest frames', between
    the bounds of SOFT and THRESHOLDS.
    """
    least, share = SOFT
    most = THRESHOLDS["sharpness"].low
    own = share * np.quantile([measures["sharpness"] for measures in pictures], 0.9)
    limit = Bounds("blurred", low=np.clip(own, least, most))
    thresholds = THRESHOLDS | {"sharpness": limit}
    return [next(iter(broken_rules(measures, thresholds)), None) for measures in pictures]


def exposure(rgb: ndarray) -> tuple[float, float, float]:
    """Shares of pixels below BLACK and above WHITE, and the spread of luminance: 5 to 95 %, in levels."""
    luminance = rgb @ LUMA
    low, high = np.quantile(luminance, [0.05, 0.95])
    return (luminance < BLACK).mean(), (luminance > WHITE).mean(), high - low


# ---- depth and poses of views --------------------------------------------------------------------------------------------


def reduced(view, side):
    """A view at about `side` pixels: colours are averaged (float), depth is picked, for the mean of two is neither."""
    factor = max(1, round(min(view.depth.shape) / side))
    height, width = (length // factor for length in view.depth.shape)
    rgb = view.rgb[: height * factor, : width * factor]
    rgb = rgb.reshape(height, factor, width, factor, 3).mean((1, 3))
    first = factor // 2
    depth = view.depth[first::factor, first::factor][:height, :width]
    K = view.intrinsics / [[factor], [factor], [1]]
    K[:2, 2] += 0.5 - (first + 0.5) / factor  # the rays of the pixels whose depth is picked
    return PosedView(rgb, depth, view.c2w, K)


def registration(views: list[PosedView]) -> float:
    """How much stronger edges of pictures are where edges of depth are than beside them; each view by itself.

    The mean slope of the pictures at all edges of depth, shifted by some pixels: the largest of shifts up to ON_EDGE over
    the largest of those in BESIDE. Depth of another camera than the picture's is off by more in some part of a room. Without
    edges, 1.
    """
    near, far = BESIDE
    slopes = np.zeros((2 * far + 1, 2 * far + 1))  # of the shifts in rows and columns
    edges = 0
    for view in views:
        height, width = view.depth.shape
        rows, columns = near_edges(view.depth)[far : height - far, far : width - far].nonzero()
        slope = np.hypot(*np.gradient(view.rgb @ LUMA))
        slope = np.minimum(slope, STEEP) / max(slope.mean(), 1e-9)
        edges += len(rows)
        for i, j in np.ndindex(slopes.shape):
            slopes[i, j] += slope[rows + i, columns + j].sum()
    if edges < EDGES:
        return 1.0
    shift = np.hypot(*np.indices(slopes.shape) - far)
    beside = slopes[(shift >= near) & (shift <= far)].max()
    return float(slopes[shift <= ON_EDGE].max() / max(beside, 1e-9))


def near_edges(depth):
    """Pixels (H, W) of what stands before its background: there 1 / depth leaves every plane by more than a twentieth."""
    inverse = 1 / np.where(depth > 0, depth, np.nan)
    edge = np.zeros(depth.shape, bool)
    for axis in (0, 1):
        around = np.roll(inverse, 2, axis) + np.roll(inverse, -2, axis)
        edge |= 2 * inverse - around > JUMP * inverse
    return edge


def stray_points(depth: ndarray, tolerance: float = 0.05) -> float:
    """Share of the points of depth (H, W) that stand before both neighbours in their row or column: thin things and a
    sensor's noise, which other views see through."""
    padded = np.pad(depth, 1)
    stray = np.zeros(depth.shape, bool)
    for axis in (0, 1):
        nearer = np.minimum(np.roll(padded, 1, axis), np.roll(padded, -1, axis))[1:-1, 1:-1]
        stray |= nearer - depth > tolerance * (1 + depth)
    known = depth > 0
    return float(stray[known].mean()) if known.any() else 0.0


def see_through(view, other, tolerance=0.05):
    """Share of the points of `view` that `other` sees through: in all four pixels around, its depth is larger.

    A point behind what `other` sees is hidden, as it may be; one before it cannot be there.  `tolerance`: as in `warp`
    """
    height, width = other.depth.shape
    points = unproject(view.depth, view.intrinsics, view.c2w)  # (H, W, 3)
    pixel, z = project(points, other.intrinsics, other.c2w)  # (H, W, 2), (H, W)
    corner = np.floor(pixel - 0.5)  # column, row of the upper left of four pixels
    within = ((corner >= 0) & (corner < (width - 1, height - 1))).all(-1)
    compared = (view.depth > 0) & (z > 1e-6) & within
    if not compared.any():
        return 0.0
    column, row = np.floor(pixel[compared][:, None] + CORNERS).astype(int).T  # (4, n)
    nearest = other.depth[row, column].min(0)  # 0: one is invalid
    z = z[compared]
    return float((nearest - z > tolerance * (1 + z)).mean())


def contradictions(views):
    """Per view (n,): the median of how much it and each other view see through each other. The largest is at fault.

    The median, since one wrong view contradicts all that overlap it, and every other view contradicts only that one.
    """
    share = np.full((len(views), len(views)), np.nan)
    for i, one in enumerate(views):
        for j, other in enumerate(views):
            if i != j:
                share[i, j] = see_through(one, other)
    return np.nanmedian((share + share.T) / 2, 1)


# ---- colours of a target and of its warped context -----------------------------------------------------------------------


def same_light(target, warped, mask):
    """`warped` in the light of `target`: gain and bias per channel, fitted robustly over seen, unclipped pixels."""
    x, y = warped[mask], target[mask]  # (n, 3)
    usable = (np.minimum(x, y) > 5) & (np.maximum(x, y) < 250)
    weight = usable + 1e-9
    for _ in range(10):  # reweighted least squares; Cauchy weights of 8 levels
        mean_x = np.average(x, 0, weight)
        mean_y = np.average(y, 0, weight)
        covariance = np.average((x - mean_x) * (y - mean_y), 0, weight)
        variance = np.average((x - mean_x) ** 2, 0, weight)
        gain = np.clip((covariance + 25) / (variance + 25), 0.5, 2)  # plain: gain 1
        error = y - mean_y - gain * (x - mean_x)
        weight = usable / (1 + (error / 8) ** 2) + 1e-9
    return np.clip(mean_y + gain * (warped - mean_x), 0, 255)


def agreement(target: ndarray, warped: ndarray, mask: ndarray) -> float:
    """Photometric agreement of a target with a warped context view, (h, w, 3) of about SIDE pixels -> [0, 1].

    Each window of 13 pixels votes, weighted with its slopes above noise: a plain wall agrees with anything. Its vote is
    the product of
      place    1 - displacement / 3 pixels, where the displacement best explains the difference (Lucas and Kanade
               1981): what a wrong pose does
      colour   share of its slopes where target and context differ by less than 25 levels from the nearest of the 3 x 3
               pixels of each other (Birchfield and Tomasi 1998, so mixed pixels at edges count as equal)
    mask (h, w) is true where the context is seen. Light may differ by a gain and a bias per channel. Without a tenth of
    the pixels seen, or slopes: 0, nothing agrees.
    """
    if mask.mean() < SEEN_AT_LEAST:
        return 0.0
    target = target.astype(float)
    lit = same_light(target, warped.astype(float), mask)
    warped = np.where(mask[..., None], lit, target)

    # the displacement solves [xx xy; xy yy] d = [x; y]: slopes of the mean picture, and their product with the difference
    mean = (target + warped) @ LUMA / 2  # (h, w)
    difference = (target - warped) @ LUMA
    inner = sliding_window_view(np.pad(mask, 1), (3, 3)).all((-2, -1))  # all neighbours are seen
    down, right = np.gradient(mean) * inner
    xx = window(right * right) + 0.2
    xy = window(right * down)
    yy = window(down * down) + 0.2
    x = window(right * difference)
    y = window(down * difference)
    determinant = xx * yy - xy * xy
    displacement = np.hypot(yy * x - xy * y, xx * y - xy * x) / determinant  # pixels
    place = 1 - np.minimum(displacement / 3.0, 1)

    near_target = neighbourhood(target)  # (h, w, 3, 9)
    near_warped = neighbourhood(warped)
    gap = np.maximum(outside_of(near_target, warped), outside_of(near_warped, target))
    contrast = np.maximum(np.ptp(near_target, -1), np.ptp(near_warped, -1)).max(-1)
    slope = mask * np.clip(contrast - 12, 0, 40)
    colour = 1 - window(slope * (gap >= 25)) / (window(slope) + 1)

    # noise of 4 levels stays below 3
    steepness = np.sqrt(np.maximum(xx + yy - 0.4, 0))
    weight = mask * np.maximum(steepness - 3, 0)
    if weight.mean() <= 0.1:
        return 0.0
    return float((weight * place * colour).sum() / weight.sum())


def window(values, width=13):
    """The mean of the square of `width` around every pixel (H, W)."""
    return box(box(values, width).T, width).T


def neighbourhood(rgb):
    """The 3 x 3 pixels around every pixel: (H, W, 3) -> (H, W, 3, 9)."""
    padded = np.pad(rgb, ((1, 1), (1, 1), (0, 0)), "edge")
    return sliding_window_view(padded, (3, 3), (0, 1)).reshape(*rgb.shape, 9)


def outside_of(near, rgb):
    """How far a picture (H, W, 3) leaves the range of another's 3 x 3 pixels (H, W, 3, 9): its worst channel (H, W)."""
    return np.maximum(near.min(-1) - rgb, rgb - near.max(-1)).max(-1)
