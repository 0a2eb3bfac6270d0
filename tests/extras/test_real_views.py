"""Real views, measured offline: rooms stand in for scans, true matches for a matcher, colours for a detector."""

import numpy as np
import pytest
import torch

from extras.report import real_views
from extras.report.real_views import (
    INDOOR,
    Detection,
    categories,
    compare_scans,
    detector,
    lift,
    matcher,
    object_counts,
    pose_from_matches,
    recover_pose,
)
from extras.scans.frames import PosedView, thousandths
from lib.consistency import classify, content_of, delta_of, pose_error
from lib.geometry import (
    Motion,
    camera_pose,
    decompose,
    move_camera,
    pinhole,
    project,
    unproject,
    visible,
)
from lib.images import save_image
from lib.rooms import COLOURS, EYE, random_room, render

SIZE, K = 96, pinhole(96)
ROOM = random_room(1)
CONTEXT = [camera_pose(0.1, -EYE, -0.1, 17.0 - 90 * k) for k in range(4)]


class Matcher:
    """An exact matcher of pictures of rooms, spoilt: `noise` in pixels, `wrong` as the share of outliers."""

    def __init__(self, noise=0.3, wrong=0.3, most=300):
        self.seen, self.noise, self.wrong, self.most = {}, noise, wrong, most

    def look(self, c2w, room=ROOM):
        """Render a view and remember where it was taken from."""
        found = render(room, c2w, SIZE)
        self.seen[found["rgb"][0].tobytes()] = found["depth"][0], c2w
        return found["rgb"][0], found["depth"][0]

    def __call__(self, image, other):
        (depth, c2w), (other_depth, other_c2w) = (
            self.seen.get(x.tobytes(), (None, None)) for x in (image, other)
        )
        if depth is None:
            return np.zeros((0, 2)), np.zeros((0, 2))
        rng, points = np.random.default_rng(0), unproject(depth, K, c2w).reshape(-1, 3)
        mine, theirs = project(points, K, c2w)[0], project(points, K, other_c2w)[0]
        both = np.flatnonzero(np.isfinite(visible(points, other_depth, K, other_c2w)[0]))
        both = rng.permutation(both)[: self.most]
        mine, theirs = (x[both] + rng.normal(0, self.noise, (len(both), 2)) for x in (mine, theirs))
        wrong = rng.random(len(both)) < self.wrong
        mine[wrong] = rng.uniform(0, SIZE, (wrong.sum(), 2))
        return mine, theirs


def scene(cameras=CONTEXT, **spoilt):
    """-> (matcher, context as `recover_pose` takes it)."""
    match = Matcher(**spoilt)
    return match, [PosedView(*match.look(c2w), c2w, K) for c2w in cameras]


def detect(image, names=None):
    """Things of a room by colour, as a detector tells them; a box may be torn in two no more than in rooms."""
    found, shape = [], np.array(image.shape[1::-1])
    classes = classify(image[None])[0]
    for number, colour in enumerate(COLOURS):
        rows, columns = np.nonzero(classes == number)
        if len(rows) >= 0.015 * classes.size:
            low, high = (np.array([f(columns), f(rows)]) / shape for f in (np.min, np.max))
            found.append(Detection(colour, np.concatenate([low, high]), 1.0))
    return found


# ---- pose -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "motion, wrong",
    [
        (Motion("dphi", 20.0), 0.0),
        (Motion("dangle", -45.0), 0.3),
        (Motion("dx", -1.0), 0.3),
        (Motion("dy", 0.5), 0.6),
    ],
)
def test_the_camera_is_found_among_outliers(motion, wrong):
    match, context = scene(wrong=wrong)
    target = move_camera(CONTEXT[1], motion)
    found = recover_pose(match.look(target)[0], K, context, match)
    off = decompose(target, found)
    assert np.linalg.norm(off[:3]) < 0.01 and np.abs(off[3:]).max() < 0.3
    assert pose_error(delta_of(motion), decompose(CONTEXT[1], found)[:5])["within"]
    np.testing.assert_array_equal(found, recover_pose(match.look(target)[0], K, context, match))


def test_a_step_over_the_ground_is_found_by_cameras_that_look_down():
    cameras = [camera_pose(0.1, -EYE, -0.1, 17.0 - 90 * k, -20) for k in range(4)]
    match, context = scene(cameras)
    for motion in (Motion("dy", 0.8), Motion("dangle", 45.0)):
        target = match.look(move_camera(cameras[0], motion))[0]
        way = decompose(cameras[0], recover_pose(target, K, context, match))[:5]
        assert pose_error(delta_of(motion), way)["within"]
        assert np.abs(way - delta_of(motion))[:3].max() < 0.02
        assert np.abs(way - delta_of(motion))[3:].max() < 0.3


def test_points_on_one_wall_are_enough():
    """A plane is where the linear solution of six points breaks down."""
    rng, c2w = np.random.default_rng(1), camera_pose(0.2, -1.3, -1, 20)
    wall = np.column_stack([rng.uniform(-2, 2, 80), rng.uniform(-2.5, 0, 80), np.full(80, 2.0)])
    pixels = project(wall, K, c2w)[0] + rng.normal(0, 0.2, (80, 2))
    pixels[:20] = rng.uniform(0, SIZE, (20, 2))
    found, agreeing = pose_from_matches(wall, pixels, K)
    assert np.abs(decompose(c2w, found)).max() < 0.3 and np.linalg.norm((found - c2w)[:3, 3]) < 0.02
    assert agreeing[20:].all() and agreeing[:20].sum() <= 2


def test_wrong_motions_are_found_where_they_are_and_fall_step_by_step():
    match, context = scene()
    turned, moved = Motion("dangle", 30.0), Motion("dx", 1.0)
    right = [
        [
            pose_error(
                delta_of(motion),
                decompose(
                    CONTEXT[0],
                    recover_pose(
                        match.look(move_camera(CONTEXT[0], motion) @ off)[0], K, context, match
                    ),
                )[:5],
            )
            for off in offs
        ]
        for motion, offs in (
            (turned, [camera_pose(0, 0, 0, a) for a in (0, 5, 9, 13, 30)]),
            (moved, [camera_pose(0, 0, z) for z in (0, 0.15, 0.3, 0.5, 1.0)]),
        )
    ]
    assert [error["within"] for error in right[0]] == [True, True, True, False, False]
    assert [error["degrees"] for error in right[0]] == pytest.approx([0, 5, 9, 13, 30], abs=0.3)
    assert [error["within"] for error in right[1]] == [True, True, True, False, False]
    assert [error["meters"] for error in right[1]] == pytest.approx(
        [0, 0.15, 0.3, 0.5, 1.0], abs=0.015
    )


def test_where_nothing_matches_there_is_no_camera():
    match, context = scene()
    rng = np.random.default_rng(0)
    assert recover_pose(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8), K, context, match) is None
    assert recover_pose(context[0][0], K, [], match) is None
    match, context = scene(wrong=1.0)
    assert (
        recover_pose(match.look(CONTEXT[1] @ camera_pose(0, 0, 0, 30))[0], K, context, match)
        is None
    )
    assert pose_from_matches(rng.normal(size=(8, 3)), rng.uniform(0, SIZE, (8, 2)), K) is None


def test_a_match_without_depth_is_left_out():
    depth = np.array([[2.0, 0], [0, 4.0]])
    view = PosedView(None, depth, np.eye(4), pinhole(2))
    pixels = np.array([[0.5, 0.5], [1.5, 0.5], [1.25, 1.75], [5, 5]])
    points, there = lift(pixels, view)
    assert there.tolist() == [True, False, True, False]
    np.testing.assert_allclose(points[there], [[-1, -1, 2], [1, 3, 4]])


# ---- content --------------------------------------------------------------------------------------------------------


def box(left, top=0.4, side=0.1):
    return np.array([left, top, left + side, top + side])


def agreement(view, target):
    """The scores of one view whose objects are (label, left edge of the box)."""
    view, target = (
        [Detection(label, box(left), 0.5) for label, left in one] for one in (view, target)
    )
    return content_of(object_counts(view, target).astype(float))


def test_agreement_counts_objects_pairs_and_what_is_missing():
    true = [("chair", 0.1), ("lamp", 0.4), ("chair", 0.8)]
    whole = agreement(true[::-1], true)
    assert all(whole[key] == 1 for key in ("precision", "recall", "topology", "content"))
    removed = agreement(true[1:], true)
    assert removed["precision"] == 1 and removed["recall"] == pytest.approx(2 / 3)
    assert removed["topology"] == pytest.approx(1 / 3)  # two of three pairs had the first chair
    renamed = agreement([("plant", 0.1), *true[1:]], true)
    assert renamed["precision"] == renamed["recall"] == pytest.approx(2 / 3)
    swapped = agreement([("chair", 0.1), ("lamp", 0.9), ("chair", 0.8)], true)
    assert swapped["recall"] == 1 and swapped["topology"] == pytest.approx(2 / 3)
    assert agreement([], true)["content"] == 0 and np.isnan(agreement([], [])["topology"])


def test_a_vlm_lists_categories_and_without_one_they_are_fixed():
    assert categories([], lambda images, question: "Chair, wooden table,chair,\n lamp. ") == (
        "chair",
        "wooden table",
        "lamp",
    )
    assert categories([]) == INDOOR and categories([], lambda *_: "") == INDOOR


# ---- both -----------------------------------------------------------------------------------------------------------


def triples(match, folder, motions):
    """Rows of scans, as `lib.answers.load_triples` gives them, from a room."""
    context = [match.look(c2w) for c2w in CONTEXT]
    for k, (_, depth) in enumerate(context):
        save_image(folder / f"{k}_depth.png", thousandths(depth))
    rows = []
    for motion in motions:
        target = move_camera(CONTEXT[2], motion)
        view = match.look(target)[0]
        rows.append(
            {
                "id": motion.kind,
                "reference": 3,
                "context": [rgb for rgb, _ in context],
                "target": view,
                "motion": {"kind": motion.kind, "amount": motion.amount},
                "intrinsics": K.tolist(),
                "context_c2w": [c2w.tolist() for c2w in CONTEXT],
                "context_intrinsics": [K.tolist()] * 4,
                "context_depth": [folder / f"{k}_depth.png" for k in range(4)],
                "target_c2w": target.tolist(),
                "warp": np.dstack([view, np.full((SIZE, SIZE), 255, np.uint8)]),
            }
        )
    return rows


def test_a_table_of_scans_has_the_columns_of_rooms(tmp_path):
    match = Matcher()
    rows = triples(match, tmp_path, [Motion("dangle", -45.0), Motion("dx", 0.5)])
    recoloured = [row["target"][..., ::-1].copy() for row in rows]
    grey = [np.full_like(row["target"], 128) for row in rows]
    found = compare_scans(
        rows,
        {"true": [row["target"] for row in rows], "other": recoloured, "grey": grey},
        match,
        detect,
    )
    true, other, lost = found["simulators"].values()
    for perfect in (true, *found["oracles"].values()):
        assert (
            perfect["pose"] == perfect["found"] == perfect["content"] == 1 and perfect["mse"] == 0
        )
    assert (
        true["moves"]["median_meters"] < 0.01
        and true["turns"]["median_degrees"] < 0.3
        and true["turns"]["n"] == 1
    )
    assert (
        other["content"] < true["content"] and lost["pose"] == lost["found"] == lost["content"] == 0
    )
    assert lost["turns"]["median_degrees"] == lost["moves"]["median_meters"] == np.inf
    assert found["baselines"]["copy of the reference"]["pose"] == 0
    blind = compare_scans(rows[:1], {"true": [rows[0]["target"]]}, match)["simulators"]["true"]
    assert blind["pose"] == 1 and np.isnan(blind["content"]) and np.isnan(blind["recall"])


# ---- transformers ---------------------------------------------------------------------------------------------------


def test_missing_weights_are_told_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot be read or fetched .*--matcher"):
        matcher(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="cannot be read or fetched .*--detector"):
        detector(str(tmp_path / "nothing"))


def test_a_transformers_matcher_is_asked_in_its_own_format(tmp_path):
    """Untrained weights: what comes back is pixels of both pictures, as many of each."""
    from transformers import (
        EfficientLoFTRConfig,
        EfficientLoFTRForKeypointMatching,
        EfficientLoFTRImageProcessorPil,
    )

    config = EfficientLoFTRConfig(
        stage_num_blocks=[1, 1, 1, 1],
        out_features=[16, 16, 16, 32],
        hidden_size=32,
        num_attention_layers=1,
        coarse_matching_threshold=0.0,
    )
    EfficientLoFTRForKeypointMatching(config).save_pretrained(tmp_path)
    EfficientLoFTRImageProcessorPil(size={"height": 96, "width": 96}).save_pretrained(tmp_path)
    image, other = (render(ROOM, c2w, SIZE)["rgb"][0] for c2w in CONTEXT[:2])
    mine, theirs = matcher(str(tmp_path))(image, other[:64])
    assert mine.shape == theirs.shape == (len(mine), 2) and mine.dtype == np.float64 and len(mine)
    assert (mine >= 0).all() and (mine <= SIZE).all() and (theirs[:, 1] <= 64).all()


def test_grounding_dino_is_asked_in_its_own_format(tmp_path, monkeypatch):
    """Untrained weights and a threshold of 0: what comes back is categories, boxes in shares of the picture, scores."""
    from transformers import (
        BertConfig,
        BertTokenizerFast,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessorPil,
        GroundingDinoProcessor,
        SwinConfig,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "chair", "lamp", "trash", "can"]
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1] * 4,
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_indices=[2, 3, 4],
    )
    bert = BertConfig(
        vocab_size=10,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    config = GroundingDinoConfig(
        backbone_config=swin.to_dict(),
        text_config=bert.to_dict(),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=20,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GroundingDinoForObjectDetection(config).save_pretrained(tmp_path)
    GroundingDinoProcessor(
        GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}),
        BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}),
    ).save_pretrained(tmp_path)
    monkeypatch.setattr(real_views, "SCORE", 0.0)
    monkeypatch.setattr(real_views, "TEXT_SCORE", 0.0)
    found = detector(str(tmp_path))(
        render(ROOM, CONTEXT[0], SIZE)["rgb"][0][:64], ("chair", "trash can")
    )
    assert len(found) == 20 and {one.label for one in found} <= {"chair", "trash can"}
    boxes = np.stack([one.box for one in found])
    assert boxes.shape == (20, 4) and np.abs(boxes).max() < 1.5
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    scores = [one.score for one in found]
    assert (
        all(isinstance(score, float) and 0 <= score <= 1 for score in scores)
        and len(set(scores)) > 1
    )
