"""Quality of triples: each measure on cases known by hand, and faults caught in rooms: pytest tests/test_quality.py"""

import numpy as np
import pytest

from extras.scans.quality import (
    THRESHOLDS,
    agreement,
    box,
    broken_rules,
    contradictions,
    exposure,
    inject,
    photograph,
    room_triple,
    same_light,
    seen_through,
    shaken,
    sharpness,
    smeared,
    study,
    table,
    verify,
)
from lib.geometry import Motion, camera_pose, move_camera, pinhole, warp

SIZE, ROOMS = 64, range(6_600_000, 6_600_004)
TRIPLES = [room_triple(room, SIZE) for room in ROOMS]
ALL = np.ones((SIZE, SIZE), bool)

pytestmark = pytest.mark.filterwarnings("error")


def grey(levels):
    """(H, W) levels -> (H, W, 3) uint8."""
    return np.repeat(np.asarray(levels)[..., None], 3, -1).astype(np.uint8)


def step(*levels, each=20):
    """Vertical stripes of the given levels, `each` pixels wide, and their transpose below: edges both ways."""
    rows = np.tile(np.repeat(levels, each), (len(levels) * each, 1))
    return grey(np.maximum(rows, rows.T))


def mean_agreement(change):
    """Mean agreement of targets whose pose is changed, with all context views, as `verify` takes it."""
    found = []
    for number, (target, *context) in enumerate(TRIPLES):
        c2w = change(target[2], np.random.default_rng(number))
        found.append(verify((*target[:2], c2w), context, pinhole(SIZE))["agreement"])
    return np.mean(found)


def test_an_ideal_step_loses_six_sevenths_to_a_blur_of_seven():
    """A step of h has energy h²; blurred over seven pixels it is seven slopes of h / 7, energy h² / 7."""
    ideal = np.tile(np.repeat([50.0, 200.0], 20), (40, 1))
    np.testing.assert_allclose(np.diff(box(ideal, 7)).max(), 150 / 7)
    noise = 2 * (1 - 1 / 49) / (150**2 / 7)  # the correction for noise, with its floor of one level
    assert sharpness(grey(ideal)) == pytest.approx(6 / 7, abs=7 * noise)


def test_more_blur_is_less_sharp_whatever_the_contrast():
    for contrast in (1.0, 0.4):
        picture = 128 + contrast * (step(60, 200, 110).astype(float) - 128)
        for blur in ("along", "disc"):
            scores = []
            for width in (1, 3, 5, 9):
                offsets = (
                    [(0, j) for j in range(-(width // 2), width // 2 + 1)]
                    if blur == "along"
                    else [
                        (i, j)
                        for i in range(-4, 5)
                        for j in range(-4, 5)
                        if i * i + j * j <= (width // 2) ** 2
                    ]
                )
                scores.append(
                    sharpness(
                        photograph(smeared(picture, np.array(offsets)), np.random.default_rng(0))
                    )
                )
            assert all(a > b + 0.05 for a, b in zip(scores, scores[1:])), (contrast, blur, scores)
            assert scores[0] > THRESHOLDS["sharpness"] > scores[2]


def test_plain_walls_are_not_blurred_even_in_soft_light():
    light = np.tile(np.linspace(110, 170, SIZE), (SIZE, 1))  # about one level per pixel
    for wall in (grey(np.full((SIZE, SIZE), 150)), grey(light)):
        assert sharpness(wall) == 1
        for seed in range(10):
            picture = photograph(wall, np.random.default_rng(seed))
            assert (
                sharpness(picture) > THRESHOLDS["sharpness"]
                and exposure(picture)["spread"] > THRESHOLDS["spread"]
            )


def test_exposure_counts_pixels():
    picture = grey(np.repeat([0, 30, 100, 255], 16)[None].repeat(SIZE, 0))
    assert exposure(picture) == pytest.approx({"dark": 0.5, "bright": 0.25, "spread": 255})


def test_light_is_fitted_in_spite_of_outliers_and_does_not_change_agreement():
    (target, *context) = TRIPLES[0]
    warped, seen = warp(*target[1:], context, pinhole(SIZE))
    truth = warped.astype(float)
    dimmed = truth * [0.8, 0.7, 0.75] + [10, 20, 5]
    spoiled = dimmed.copy()
    spoiled[:12] = 90.0  # a fifth of the target shows something else
    fitted = same_light(spoiled, truth, seen)[12:][seen[12:]]
    assert np.abs(fitted - dimmed[12:][seen[12:]]).mean() < 2
    plain = agreement(target[0], warped, seen)
    assert agreement(target[0] * 0.8 + 15, warped, seen) == pytest.approx(plain, abs=0.03)
    assert agreement(target[0], (warped * 0.8 + 15).astype(np.uint8), seen) == pytest.approx(
        plain, abs=0.03
    )


def test_agreement_is_one_for_equal_views_and_measures_a_shift():
    picture = TRIPLES[0][0][0]
    assert agreement(picture, picture, ALL) == pytest.approx(1)
    shifted = [agreement(picture, np.roll(picture, pixels, 1), ALL) for pixels in range(4)]
    assert all(a > b + 0.1 for a, b in zip(shifted, shifted[1:])), shifted


def test_agreement_falls_step_by_step_as_the_pose_is_off():
    turned = [mean_agreement(lambda c2w, rng: shaken(c2w, rng, degrees=off)) for off in (0, 5, 10)]
    moved = [mean_agreement(lambda c2w, rng: shaken(c2w, rng, meters=off)) for off in (0, 0.2, 0.4)]
    for scores in (turned, moved):
        assert all(a > b + 0.01 for a, b in zip(scores, scores[1:])), scores


def test_a_plain_wall_or_an_unseen_context_agrees_with_nothing():
    wall, other = (
        photograph(grey(np.full((SIZE, SIZE), level)), np.random.default_rng(level))
        for level in (120, 170)
    )
    assert agreement(wall, other, ALL) == 0
    assert agreement(wall, other, ~ALL) == 0
    assert agreement(TRIPLES[0][0][0], wall, ALL) < THRESHOLDS["agreement"]


def test_a_point_before_what_another_view_sees_contradicts_it_and_a_hidden_one_does_not():
    """Two cameras at one place before a wall at 3 m; one of them says that four of its eight columns stand at 2 m."""
    wall, half = np.full((8, 8), 3.0), np.full((8, 8), 3.0)
    half[:, 2:6] = 2.0
    views = [(None, depth, np.eye(4), pinhole(8)) for depth in (half, wall)]
    # Points fall on pixel centres, so the four pixels around are found for 7 x 7 points: 4 columns of them are before.
    assert seen_through(*views) == pytest.approx(4 / 7)
    assert seen_through(*views[::-1]) == 0
    half[:7, 2:4] = 0  # invalid points say nothing: 2 columns of 5 are left
    assert seen_through(*views) == pytest.approx(2 / 5)
    away = (None, wall, camera_pose(0, 0, 0, 180), pinhole(8))
    assert seen_through(views[0], away) == 0


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
            spoiled = [
                (
                    rgb,
                    depth,
                    shaken(c2w, np.random.default_rng(number), 8.0, 0.2) if k == wrong else c2w,
                    pinhole(SIZE),
                )
                for k, (rgb, depth, c2w) in enumerate(views)
            ]
            hits += contradictions(spoiled).argmax() == wrong
    assert hits >= 6  # of 8; by chance 1.6


def test_true_triples_pass_and_the_first_broken_rule_is_named():
    results = [verify(target, context, pinhole(SIZE)) for target, *context in TRIPLES]
    assert all(result["rejected"] is None for result in results)
    assert all(result["contradiction"] < 1e-3 for result in results)
    target, *context = inject(
        TRIPLES[1], ("exposed", "one view, stops", 3), np.random.default_rng(0), SIZE
    )
    assert verify(target, context, pinhole(SIZE))["rejected"] == "exposure"
    strict = THRESHOLDS | {"sharpness": 2.0}
    result = verify(target, context, pinhole(SIZE), strict)
    assert result["rejected"] == "blurred" and broken_rules(result, strict)[:2] == [
        "blurred",
        "exposure",
    ]


def test_large_pictures_are_judged_as_small_ones():
    views = [room_triple(ROOMS[1], size) for size in (64, 128)]
    small, large = (verify(target, context, pinhole(len(target[1]))) for target, *context in views)
    assert small["rejected"] is None and large["rejected"] is None
    assert small["agreement"] == pytest.approx(large["agreement"], abs=0.1)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_degenerate_triples_have_defined_values(level):
    flat = (grey(np.full((48, 70), level)), np.zeros((48, 70)), np.eye(4))
    away = (flat[0], np.full((48, 70), 2.0), move_camera(np.eye(4), Motion("turn left", 180.0)))
    for context in ([flat], [away], [flat, away]):
        result = verify(flat, context, pinhole(70))
        assert all(np.isfinite(value) for key, value in result.items() if key != "rejected")
        assert (
            result["agreement"] == 0
            and result["contradiction"] == 0
            and result["rejected"] == "exposure"
        )


def test_the_study_catches_gross_faults_and_keeps_good_triples():
    faults = [
        ("none", "", 0),
        ("turned", "target, degrees", 10),
        ("depth scaled", "target, share", 0.2),
        ("motion blur", "one view, pixels", 9),
        ("other room", "colours of the target", 0),
    ]
    rows = study(ROOMS, SIZE, seed=1, faults=faults)
    assert rows[0]["good"] and rows[0]["caught"] <= 1 / 4
    for row, rule in zip(rows[1:], ("geometric", "geometric", "blurred", "photometric")):
        assert not row["good"] and row["caught"] == 1 and row[rule] >= 3 / 4, row
    assert table(rows)[3].startswith("| turned | target, degrees | 10 | 100 |")


def test_a_view_may_bring_its_own_intrinsics():
    """The same pictures cut out of their frames: what was measured with one K is measured with a K of each view."""
    target, *context = TRIPLES[0]
    own = [
        (rgb[:, 4:], depth[:, 4:], c2w, pinhole(SIZE) - [[0, 0, 4], [0, 0, 0], [0, 0, 0]])
        for rgb, depth, c2w in context
    ]
    wrong = [(rgb[:, 4:], depth[:, 4:], c2w) for rgb, depth, c2w in context]
    assert verify(target, own, pinhole(SIZE))["contradiction"] < THRESHOLDS["contradiction"]
    assert verify(target, wrong, pinhole(SIZE))["contradiction"] > 10 * THRESHOLDS["contradiction"]
