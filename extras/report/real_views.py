"""
How true an imagined view of a real scene is, where no room can be rendered (lib/consistency.py does rooms).

Pose. Points of the view are matched with all context views, whose depth lifts them into the world; extras/report/pnp.py finds
the camera that sees them where the view shows them. Neither the target's depth nor its picture is asked. If too few
matches agree there is no camera: the view is wrong, and in the median as far off as can be.

Content, as the paper measures it: a VLM lists categories, GroundingDINO finds them in the view and in the target, boxes
of one label are paired: precision, recall, and the left-right order of pairs.

Thresholds and sums are those of rooms (lib/consistency.py).
"""

import numpy as np
from PIL import Image
from tqdm import tqdm

from extras.report.pnp import pose_from_matches
from lib.consistency import content_of, pose_errors, scores_of, trivial_views
from lib.geometry import decompose, fill_holes

MATCHER = (
    "zju-community/efficientloftr"  # Apache licence; ETH-CVG/lightglue_superpoint fits as well
)
DETECTOR = "IDEA-Research/grounding-dino-tiny"
SCORE, TEXT_SCORE = 0.35, 0.25  # of a detection and of its words (GroundingDINO's own demo)
APART = 3 / 32  # of the width: two objects stand one to the right of the other (as in rooms)
INDOOR = (
    "bed",
    "chair",
    "sofa",
    "table",
    "desk",
    "cabinet",
    "bookshelf",
    "counter",
    "door",
    "window",
    "curtain",
    "picture",
    "mirror",
    "lamp",
    "pillow",
    "refrigerator",
    "television",
    "computer",
    "toilet",
    "sink",
    "bathtub",
    "plant",
    "box",
    "bag",
    "trash can",
)  # after ScanNet's classes, without what is everywhere
QUESTION = (
    "These pictures show one place. List the categories of its key objects, at most 20, as nouns separated by "
    "commas and nothing else."
)


# ---- pose -----------------------------------------------------------------------------------------------------------


def lift(pixels, depth, K, c2w):
    """Pixels (n, 2) of a view with depth (H, W) -> world points (n, 3), and which of them have a depth (n,)."""
    column, row = np.floor(pixels).astype(int).T
    inside = (column >= 0) & (row >= 0) & (column < depth.shape[1]) & (row < depth.shape[0])
    z = np.where(
        inside, depth[row.clip(0, depth.shape[0] - 1), column.clip(0, depth.shape[1] - 1)], 0
    )
    flat = np.column_stack([(pixels - K[:2, 2]) / K[[0, 1], [0, 1]], np.ones(len(pixels))])
    return (flat * z[:, None]) @ c2w[:3, :3].T + c2w[:3, 3], z > 0


def recover_pose(view, K, context, match):
    """Where a view was taken from -> c2w (4, 4), or None if its matches agree on no camera.

    view     (H, W, 3) uint8, K (3, 3) its intrinsics
    context  [(rgb, depth (H, W), K, c2w)] of the context views, lengths in the unit of their poses
    match    (image, image) -> pixels of the first (n, 2), of the second (n, 2); pixel centres are at +0.5
    """
    points, pixels = [np.zeros((0, 3))], [np.zeros((0, 2))]
    for rgb, depth, own_K, c2w in context:
        mine, theirs = match(view, rgb)
        where, there = lift(theirs, depth, own_K, c2w)
        points.append(where[there])
        pixels.append(mine[there])
    found = pose_from_matches(np.concatenate(points), np.concatenate(pixels), K)
    return found and found[0]


def matcher(model=MATCHER, device="cpu"):
    """`match` of `recover_pose` by a transformers keypoint matcher. Raises ValueError if it cannot be had."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForKeypointMatching

    processor, network = weights(
        "--matcher", model, AutoImageProcessor, AutoModelForKeypointMatching
    )
    network = network.to(device).eval()

    def match(image, other):
        inputs = processor(
            [[Image.fromarray(image), Image.fromarray(other)]], return_tensors="pt"
        ).to(device)
        with torch.inference_mode():
            (found,) = processor.post_process_keypoint_matching(
                network(**inputs), [(image.shape[:2], other.shape[:2])]
            )
        # the processor cuts pixels to whole numbers: their centres are meant
        return tuple(
            found[key].double().cpu().numpy() + 0.5 for key in ("keypoints0", "keypoints1")
        )

    return match


def weights(flag, model, *kinds):
    """from_pretrained of each of `kinds`; a ValueError with a sentence where that fails."""
    try:
        return [kind.from_pretrained(model) for kind in kinds]
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"{model} cannot be read or fetched ({str(error).strip().splitlines()[0]}). Fetch it where "
            f"there is a network and name its folder with {flag}."
        ) from None


# ---- content --------------------------------------------------------------------------------------------------------


def detector(model=DETECTOR, device="cpu"):
    """GroundingDINO as detect(image, categories) -> [(category, box, score)]: a box in shares of the picture, left,
    top, right, bottom; a score of SCORE to 1. Raises ValueError if the weights cannot be had."""
    import torch
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    processor, network = weights(
        "--detector", model, AutoProcessor, AutoModelForZeroShotObjectDetection
    )
    network = network.to(device).eval()

    def detect(image, names):
        """What stands in an image (H, W, 3) uint8 of some categories, as told above."""
        inputs = processor(
            images=Image.fromarray(image), text=[list(names)], return_tensors="pt"
        ).to(device)
        with torch.inference_mode():
            (found,) = processor.post_process_grounded_object_detection(
                network(**inputs), inputs["input_ids"], threshold=SCORE, text_threshold=TEXT_SCORE
            )
        named = [
            max(
                (name for name in names if name in words), key=len, default=None
            )  # its words may be two names
            for words in found["text_labels"]
        ]
        return [
            (name, box, score)
            for name, box, score in zip(
                named, found["boxes"].cpu().numpy(), found["scores"].tolist()
            )
            if name
        ]

    return detect


def categories(images, ask=None):
    """What to look for in a place: listed by a VLM, ask(images, question) -> text; without one the fixed INDOOR."""
    names = [name.strip(" .\n").lower() for name in ask(images, QUESTION).split(",")] if ask else []
    return (
        tuple(dict.fromkeys(name for name in names if 0 < len(name) <= 30 and "." not in name))[:20]
        or INDOOR
    )


def object_counts(made, true):
    """What there is to count in the detections of a view beside those of the target -> (8,), as
    `consistency.content_counts`: hits and cases of precision, recall and order; no thirds.

    made, true   as `detector` finds them; scores are not asked. Boxes of one label are paired, the nearest centres
    first, at any distance: where things stand is what `order` asks.
    """
    centre = lambda box: (np.asarray(box)[:2] + np.asarray(box)[2:]) / 2  # noqa: E731
    gaps = sorted(
        (float(np.linalg.norm(centre(a) - centre(b))), i, j)
        for i, (label, a, _) in enumerate(made)
        for j, (other, b, _) in enumerate(true)
        if label == other
    )
    pair = {}  # true -> made
    for _, i, j in gaps:
        if j not in pair and i not in pair.values():
            pair[j] = i
    x, true_x = ([centre(box)[0] for _, box, _ in part] for part in (made, true))
    right = [
        (j, k) for j in range(len(true)) for k in range(len(true)) if true_x[j] - true_x[k] > APART
    ]
    ordered = sum(j in pair and k in pair and x[pair[j]] > x[pair[k]] for j, k in right)
    return np.array([len(pair), len(made), len(pair), len(true), ordered, len(right), 0, 0])


def object_agreement(made, true):
    """`object_counts` as {"precision", "recall", "f1", "order", "thirds": nan, "content": mean of f1 and order}."""
    return {
        key: float(value)
        for key, value in content_of(object_counts(made, true).astype(float)).items()
    }


# ---- both, over triples ---------------------------------------------------------------------------------------------


def compare(rows, views, match, detect=None, ask=None):
    """`consistency.compare` for triples of scans: {name: one view per row} beside what is trivial and what is perfect.

    rows    of `lib.views.load_triples`, their "context_depth" as paths;  match, detect, ask: as above, the latter two
            may be missing: without a detector content is nan, without a VLM the categories are INDOOR
    The oracles are the target photograph itself (what the instruments make of the truth) and the context warped by the
    target's depth and pose. A view is taken to have the target's intrinsics.
    """
    oracles = {
        "warp with true depth and pose": [
            fill_holes(row["warp"][..., :3], row["warp"][..., 3] > 0) for row in rows
        ],
        "true view": [row["target"] for row in rows],
    }
    groups = {"simulators": views, "baselines": trivial_views(rows), "oracles": oracles}
    lists, names = [seen for group in groups.values() for seen in group.values()], {}
    recovered, each = (
        np.full((len(lists), len(rows), 5), np.nan),
        np.full((len(lists), len(rows), 9), np.nan),
    )
    for r, row in enumerate(tqdm(rows, desc="measure", unit="triple")):
        poses, place = np.array(row["context_c2w"]), str(row["context_c2w"])
        depths = [np.array(Image.open(file)) / 1000 for file in row["context_depth"]]
        context = list(zip(row["context"], depths, np.array(row["context_intrinsics"]), poses))
        if detect and place not in names:  # one context is asked about once
            names[place] = categories(row["context"], ask)
        true = detect(row["target"], names[place]) if detect else []
        for k, seen in enumerate(lists):
            c2w = recover_pose(seen[r], np.array(row["intrinsics"]), context, match)
            if c2w is not None:
                recovered[k, r] = decompose(poses[row["reference"] - 1], c2w)[:5]
            each[k, r, 0] = np.square((seen[r].astype(np.float32) - row["target"]) / 127.5).mean()
            if detect:
                each[k, r, 1:] = object_counts(detect(seen[r], names[place]), true)
    scores = iter([summary(rows, *part) for part in zip(recovered, each)])
    return {title: {name: next(scores) for name in group} for title, group in groups.items()}


def summary(rows, recovered, each):
    """`consistency.consistency` of one list of views, and "found": the share of them that a camera was found for.

    recovered (n, 5), nan where no camera was found;  each (n, 9): mse, `object_counts`, nan if nothing was detected
    """
    errors = pose_errors(rows, recovered)
    each = np.column_stack([np.ones(len(rows)), [error["within"] for error in errors], each])

    def scores(members):
        found = {key: float(value) for key, value in scores_of(each[members].sum(0)).items()}
        if np.isnan(each[:, 3:]).any():
            found |= {"f1": np.nan, "content": np.nan}
        return found | {
            "found": float(np.isfinite(recovered[members, 0]).mean()),
            "n": len(members),
        }

    result = scores(list(range(len(rows))))
    for family in ("moves", "turns"):
        members = [i for i, error in enumerate(errors) if error["family"] == family]
        if members:
            keys = [key for key in ("meters", "direction", "degrees") if key in errors[members[0]]]
            far = {
                key: np.nan_to_num([errors[i][key] for i in members], nan=np.inf) for key in keys
            }
            result[family] = scores(members) | {
                f"median_{key}": float(np.median(far[key])) for key in keys
            }
    return result
