"""Quality of triples: each measure on cases known by hand, and faults in rooms: pytest tests/test_quality.py"""

import io
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from extras.scans.frames import PosedView
from extras.scans.quality import (
    THRESHOLDS,
    Bounds,
    agreement,
    box,
    broken_rules,
    contradictions,
    exposure,
    faults_of_pictures,
    picture_measures,
    registration,
    same_light,
    see_through,
    sharpness,
    stray_points,
    verify_triple,
)
from lib.geometry import Motion, camera_pose, coverage, move_camera, pinhole, warp
from lib.rooms import EYE, random_room, render
from lib.streams import numpy_stream

SIZE, ROOMS = 64, range(6_600_000, 6_600_004)
ALL = np.ones((SIZE, SIZE), bool)

pytestmark = pytest.mark.filterwarnings("error")


# ---- rooms as triples, and what may be wrong with them -----------------------------------------------------------------


MOTIONS = [Motion("dangle", degrees) for degrees in (-45.0, -90.0, 45.0, 90.0)]
MOTIONS += [Motion("dx", meters) for meters in (-0.5, -1.0, 0.5, 1.0)]
MOTIONS += [Motion("dy", meters) for meters in (0.5, 1.0)]


def room_triple(seed, size=SIZE):
    """Views of a room, the target first: four cameras look across it, one motion leads to the target.

    As layout `apart` of data.py, and its rule that the context covers 85 % of the target.
    """
    rng, room = numpy_stream("triples of a room", seed), random_room(seed)
    while True:
        x, z = rng.uniform(-1.2, 1.2, (2, 4))
        distances = np.hypot(np.subtract.outer(x, x), np.subtract.outer(z, z))
        if distances[np.triu_indices(4, 1)].min() < 1 or np.hypot(x, z).max() > 1.2:
            continue
        yaw = np.degrees(np.arctan2(-x, -z)) + rng.uniform(-25, 25, 4)
        poses = [camera_pose(x[k], -EYE, z[k], yaw[k]) for k in range(4)]
        poses.insert(0, move_camera(poses[0], MOTIONS[rng.integers(len(MOTIONS))]))
        if np.hypot(*poses[0][[0, 2], 3]) > 1.3:
            continue
        seen = render(room, np.stack(poses), size)
        pairs = zip(seen["rgb"], seen["depth"], poses, strict=True)
        views = [PosedView(*pair, pinhole(size)) for pair in pairs]
        _, mask = warp(views[0].depth, views[0].c2w, views[1:], pinhole(size))
        if coverage(views[0].depth, mask) >= 0.85:
            return views


TRIPLES = [room_triple(room) for room in ROOMS]


def photograph(rgb, rng, stops=0.0):
    """A rendered picture as a camera gives it: 2.2 stops double the levels; white balance within 5 %; noise; JPEG."""
    light = np.clip(rgb * 2 ** (stops / 2.2) * rng.uniform(0.95, 1.05, 3), 0, 255)
    noisy = np.clip(light + rng.normal(0, rng.uniform(2, 4), rgb.shape), 0, 255)
    file = io.BytesIO()
    Image.fromarray(noisy.round().astype(np.uint8)).save(file, "jpeg", quality=90)
    return np.array(Image.open(file))


def photographed(views, stops=0.0):
    """The views as a camera and a scanner give them; the target at other `stops`."""
    rng, taken = np.random.default_rng(0), []
    for k, view in enumerate(views):
        rgb = photograph(view.rgb, rng, stops if k == 0 else 0.0)
        depth = view.depth * (1 + 0.01 * rng.normal(size=view.depth.shape))
        taken.append(view._replace(rgb=rgb, depth=depth, c2w=shaken(view.c2w, rng, 0.3, 0.01)))
    return taken


def smeared(rgb, offsets):
    """The mean of a picture shifted by (rows, columns) of `offsets`; its rim is repeated."""
    reach = int(np.abs(offsets).max())
    padded = np.pad(rgb, ((reach, reach), (reach, reach), (0, 0)), "edge")
    return np.mean([np.roll(padded, (i, j), (0, 1)) for i, j in offsets], 0)[
        reach : reach + len(rgb), reach : reach + rgb.shape[1]
    ]


def shaken(c2w, rng, degrees=0.0, meters=0.0):
    """A pose, turned about a random axis and moved in a random direction."""
    axis, way = (part / np.linalg.norm(part) for part in rng.normal(size=(2, 3)))
    cross, angle, change = np.cross(np.eye(3), -axis), np.radians(degrees), np.eye(4)
    change[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross  # Rodrigues
    change[:3, 3] = meters * way
    return c2w @ change


def grey(levels):
    """(H, W) levels -> (H, W, 3) uint8."""
    return np.repeat(np.asarray(levels)[..., None], 3, -1).astype(np.uint8)


def step(*levels, each=20):
    """Vertical stripes of the given levels, `each` pixels wide, and their transpose below: edges both ways."""
    rows = np.tile(np.repeat(levels, each), (len(levels) * each, 1))
    return grey(np.maximum(rows, rows.T))


def mean_agreement(**off):
    """Mean agreement of targets whose pose is off, with all context views, as `verify_triple` takes it."""
    found = []
    for number, (target, *context) in enumerate(TRIPLES):
        c2w = shaken(target.c2w, np.random.default_rng(number), **off)
        found.append(verify_triple(target._replace(c2w=c2w), context)[1]["agreement"])
    return np.mean(found)


def test_an_ideal_step_loses_six_sevenths_to_a_blur_of_seven():
    """A step of h has energy h²; blurred over seven pixels it is seven slopes of h / 7, energy h² / 7."""
    ideal = np.tile(np.repeat([50.0, 200.0], 20), (40, 1))
    np.testing.assert_allclose(np.diff(box(ideal, 7)).max(), 150 / 7)
    noise = 2 * (1 - 1 / 49) / (150**2 / 7)  # the correction for noise, with its floor of one level
    assert sharpness(grey(ideal)) == pytest.approx(6 / 7, abs=7 * noise)


def blurs(kind, width):
    """(rows, columns) over which a picture is smeared: along its rows, or over a disc."""
    reach = width // 2
    if kind == "along":
        return [(0, j) for j in range(-reach, reach + 1)]
    square = [(i, j) for i in range(-reach, reach + 1) for j in range(-reach, reach + 1)]
    return [(i, j) for i, j in square if i * i + j * j <= reach**2]


@pytest.mark.parametrize("kind", ["along", "disc"])
@pytest.mark.parametrize("contrast", [1.0, 0.4])
def test_more_blur_is_less_sharp_whatever_the_contrast(contrast, kind):
    picture = 128 + contrast * (step(60, 200, 110).astype(float) - 128)
    scores = []
    for width in (1, 3, 5, 9):
        blurred = smeared(picture, blurs(kind, width))
        scores.append(sharpness(photograph(blurred, np.random.default_rng(0))))
    assert all(a > b + 0.05 for a, b in pairwise(scores)), scores
    assert scores[0] > THRESHOLDS["sharpness"].low > scores[2]


def test_plain_walls_are_not_blurred_even_in_soft_light():
    light = np.tile(np.linspace(110, 170, SIZE), (SIZE, 1))  # about one level per pixel
    for wall in (grey(np.full((SIZE, SIZE), 150)), grey(light)):
        assert sharpness(wall) == 1
        for seed in range(10):
            picture = photograph(wall, np.random.default_rng(seed))
            assert sharpness(picture) > THRESHOLDS["sharpness"].low
            assert exposure(picture)[2] > THRESHOLDS["spread"].low


def test_exposure_counts_pixels():
    picture = grey(np.repeat([0, 30, 100, 255], 16)[None].repeat(SIZE, 0))
    assert exposure(picture) == pytest.approx((0.5, 0.25, 255))


def test_light_is_fitted_in_spite_of_outliers_and_does_not_change_agreement():
    (target, *context) = TRIPLES[0]
    warped, seen = warp(target.depth, target.c2w, context, pinhole(SIZE))
    truth = warped.astype(float)
    dimmed = truth * [0.8, 0.7, 0.75] + [10, 20, 5]
    spoiled = dimmed.copy()
    spoiled[:12] = 90.0  # a fifth of the target shows something else
    fitted = same_light(spoiled, truth, seen)[12:][seen[12:]]
    assert np.abs(fitted - dimmed[12:][seen[12:]]).mean() < 2
    plain = agreement(target.rgb, warped, seen)
    assert agreement(target.rgb * 0.8 + 15, warped, seen) == pytest.approx(plain, abs=0.03)
    assert agreement(target.rgb, (warped * 0.8 + 15).astype(np.uint8), seen) == pytest.approx(
        plain, abs=0.03
    )


def test_agreement_is_one_for_equal_views_and_measures_a_shift():
    picture = TRIPLES[0][0].rgb
    assert agreement(picture, picture, ALL) == pytest.approx(1)
    shifted = [agreement(picture, np.roll(picture, pixels, 1), ALL) for pixels in range(4)]
    assert all(a > b + 0.1 for a, b in pairwise(shifted)), shifted


@pytest.mark.slow
def test_agreement_falls_step_by_step_as_the_pose_is_off():
    turned = [mean_agreement(degrees=off) for off in (0, 5, 10)]
    moved = [mean_agreement(meters=off) for off in (0, 0.2, 0.4)]
    for scores in (turned, moved):
        assert all(a > b + 0.01 for a, b in pairwise(scores)), scores


def test_a_plain_wall_or_an_unseen_context_agrees_with_nothing():
    wall, other = (
        photograph(grey(np.full((SIZE, SIZE), level)), np.random.default_rng(level))
        for level in (120, 170)
    )
    assert agreement(wall, other, ALL) == 0
    assert agreement(wall, other, ~ALL) == 0
    assert agreement(TRIPLES[0][0].rgb, wall, ALL) < THRESHOLDS["agreement"].low


def test_a_point_before_what_another_view_sees_contradicts_it_and_a_hidden_one_does_not():
    """Two cameras at one place before a wall at 3 m; one of them says that four of its eight columns stand at 2 m."""
    wall, half = np.full((8, 8), 3.0), np.full((8, 8), 3.0)
    half[:, 2:6] = 2.0
    views = [PosedView(None, depth, np.eye(4), pinhole(8)) for depth in (half, wall)]
    # Points fall on pixel centres, so the four pixels around are found for 7 x 7 points: 4 columns of them are before.
    assert see_through(*views) == pytest.approx(4 / 7)
    assert see_through(*views[::-1]) == 0
    half[:7, 2:4] = 0  # invalid points say nothing: 2 columns of 5 are left
    assert see_through(*views) == pytest.approx(2 / 5)
    away = PosedView(None, wall, camera_pose(0, 0, 0, 180), pinhole(8))
    assert see_through(views[0], away) == 0


def test_a_shaken_pose_is_off_by_what_was_asked():
    start = camera_pose(1, 2, 3, 40)
    change = np.linalg.inv(start) @ shaken(start, np.random.default_rng(0), 5.0, 0.2)
    assert np.degrees(np.arccos((np.trace(change[:3, :3]) - 1) / 2)) == pytest.approx(5)
    assert np.linalg.norm(change[:3, 3]) == pytest.approx(0.2)
    np.testing.assert_allclose(change[:3, :3] @ change[:3, :3].T, np.eye(3), atol=1e-12)


def test_contradictions_name_the_wrong_view():
    hits = 0
    for number, views in enumerate(TRIPLES):
        for wrong in (0, 2):
            c2w = shaken(views[wrong].c2w, np.random.default_rng(number), 8.0, 0.2)
            spoiled = [*views[:wrong], views[wrong]._replace(c2w=c2w), *views[wrong + 1 :]]
            hits += contradictions(spoiled).argmax() == wrong
    assert hits >= 6  # of 8; by chance 1.6


def faults_of(views):
    """All rules that the pictures of a triple and the triple break, the target first."""
    broken = []
    for view in views:
        broken += broken_rules(picture_measures(view.rgb))
    return broken + broken_rules(verify_triple(views[0], views[1:])[1])


def test_true_triples_pass_and_the_first_broken_rule_is_named(monkeypatch):
    for target, *context in TRIPLES:
        rejected, measures = verify_triple(target, context)
        assert rejected is None and measures["contradiction"] < 1e-3
    target = photographed(TRIPLES[1], stops=3)[0]
    assert faults_of_pictures([picture_measures(target.rgb)]) == ["exposure"]
    monkeypatch.setitem(THRESHOLDS, "contradiction", Bounds("geometric", high=-1.0))
    monkeypatch.setitem(THRESHOLDS, "agreement", Bounds("photometric", low=2.0))
    rejected, measures = verify_triple(*TRIPLES[0][:1], TRIPLES[0][1:])
    assert rejected == "geometric" and broken_rules(measures) == ["geometric", "photometric"]


def test_blur_is_judged_by_the_sharpest_frames_of_the_scan():
    def faults(*sharpness):
        light = {"dark": 0.0, "bright": 0.0, "spread": 100.0}
        return faults_of_pictures([{"sharpness": value} | light for value in sharpness])

    sharp = [0.8] * 20
    assert faults(*sharp, 0.62, 0.64) == [None] * 20 + ["blurred", None]  # as in rooms: 0.63
    soft = [0.7] * 20
    assert faults(*soft, 0.55, 0.57) == [None] * 20 + ["blurred", None]  # 0.8 of the scan's own
    assert faults(*[0.45] * 20) == ["blurred"] * 20  # what is blurred throughout has no excuse


def test_depth_of_another_camera_is_seen_in_single_views():
    """Edges of depth four pixels beside those of the pictures; the same depth and poses agree with each other."""
    triple = room_triple(ROOMS[0], 128)
    moved = [view._replace(depth=np.roll(view.depth, 4, 1)) for view in triple]
    assert registration(triple) > 1.1 and registration(moved) < 0.95
    assert faults_of(moved)[0] == "registration"
    wall = triple[0]._replace(depth=np.full((128, 128), 3.0))
    assert registration([wall]) == 1  # nothing tells


def test_thin_things_and_stray_points_are_counted_in_single_views():
    depth = np.full((8, 8), 3.0)
    assert stray_points(depth) == 0
    depth[:, 3] = 2.0  # a pole
    assert stray_points(depth) == 8 / 64
    depth[:, 4] = 2.0  # a board hides what is behind it
    assert stray_points(depth) == 0
    depth[0, 0] = 1.0  # the rim has no second neighbour
    assert stray_points(depth) == 0
    assert stray_points(np.zeros((4, 4))) == 0


def test_large_pictures_are_judged_as_small_ones():
    small, large = (room_triple(ROOMS[1], size) for size in (64, 128))
    small, large = verify_triple(small[0], small[1:]), verify_triple(large[0], large[1:])
    assert small[0] is None and large[0] is None
    assert small[1]["agreement"] == pytest.approx(large[1]["agreement"], abs=0.1)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_degenerate_triples_have_defined_values(level):
    flat = PosedView(grey(np.full((48, 70), level)), np.zeros((48, 70)), np.eye(4), pinhole(70))
    back = move_camera(np.eye(4), Motion("dangle", -180.0))
    away = flat._replace(depth=np.full((48, 70), 2.0), c2w=back)
    for context in ([flat], [away], [flat, away]):
        rejected, measures = verify_triple(flat, context)
        assert np.isfinite(list(measures.values())).all() and rejected == "photometric"
        assert measures["agreement"] == measures["contradiction"] == 0
        assert broken_rules(picture_measures(flat.rgb)) == ["exposure"] * (2 - (level == 128))


FAULTS = {
    "geometric": lambda view, rng: view._replace(c2w=shaken(view.c2w, rng, degrees=10)),
    "geometric, by depth": lambda view, rng: view._replace(depth=view.depth * 1.2),
    "blurred": lambda view, rng: view._replace(
        rgb=smeared(view.rgb, [(0, j) for j in range(-4, 5)])
    ),
    "photometric": lambda view, rng: view._replace(rgb=other_room(view.c2w)),
}


def other_room(c2w):
    return render(random_room(8_000_000), c2w, SIZE)["rgb"][0]


@pytest.mark.parametrize("fault", FAULTS)
def test_gross_faults_are_rejected_by_their_rule(fault):
    for number, (target, *context) in enumerate(TRIPLES):
        spoiled = FAULTS[fault](target, np.random.default_rng(number))
        target, *context = photographed([spoiled, *context])
        assert fault.split(",")[0] in faults_of([target, *context]), number


def test_good_photographs_are_accepted():
    faults = [faults_of(photographed(views)) for views in TRIPLES]
    assert faults.count([]) >= 3  # of 4


def test_every_view_is_measured_with_its_own_intrinsics():
    """The same pictures cut out of their frames."""
    target, *context = TRIPLES[0]
    shift = np.array([[0, 0, 4], [0, 0, 0], [0, 0, 0]])
    wrong = [view._replace(rgb=view.rgb[:, 4:], depth=view.depth[:, 4:]) for view in context]
    right = [view._replace(intrinsics=pinhole(SIZE) - shift) for view in wrong]
    assert verify_triple(target, right)[1]["contradiction"] < THRESHOLDS["contradiction"].high
    assert verify_triple(target, wrong)[1]["contradiction"] > 10 * THRESHOLDS["contradiction"].high
