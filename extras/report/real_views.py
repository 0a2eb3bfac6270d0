"""
How true an imagined view of a real scene is, where no room can be rendered (lib/consistency.py does rooms).

Pose. Points of the view are matched with all context views, whose depth lifts them into the world; OpenCV finds the
camera that sees them where the view shows them (RANSAC over three matches at a time, then Levenberg-Marquardt on all
that agree). Neither the target's depth nor its picture is asked. If too few matches agree there is no camera: the view
is wrong, and in the median as far off as can be.

Content, as the paper measures it: a VLM lists categories, GroundingDINO finds them in the view and in the target, boxes
of one label are paired: precision, recall, and the left-right order of pairs.

Thresholds and sums are those of rooms (lib/consistency.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from extras.reprojection import fill_holes
from extras.scans.depth_files import read_depth
from extras.scans.frames import PosedView
from extras.scans.readers import opencv
from lib.answers import trivial_views
from lib.consistency import pose_errors, summary_of
from lib.geometry import decompose

MATCHER = "zju-community/efficientloftr"  # Apache; ETH-CVG/lightglue_superpoint fits as well
DETECTOR = "IDEA-Research/grounding-dino-tiny"
SCORE = 0.35  # of a detection, and TEXT_SCORE of its words: GroundingDINO's own demo
TEXT_SCORE = 0.25
# in focal lengths (1.1 degrees): so near a match agrees with a camera; imagined views are not sharp
NEAR = 0.02
LEAST = 12  # a camera needs so many matches that agree,
SHARE = 0.1  # and this share of all
TRIALS = 500  # of RANSAC
APART = 3 / 32  # of the width: two objects stand one to the right of the other (as in rooms)
INDOOR = tuple(  # after ScanNet's classes, without what is everywhere
    "bed, chair, sofa, table, desk, cabinet, bookshelf, counter, door, window, curtain, picture, mirror, lamp, pillow, "
    "refrigerator, television, computer, toilet, sink, bathtub, plant, box, bag, trash can".split(
        ", "
    )
)
QUESTION = (
    "These pictures show one place. List the categories of its key objects, at most 20, as nouns separated by "
    "commas and nothing else."
)


class Detection(NamedTuple):
    """An object in a picture: its box in shares of the picture (left, top, right, bottom)."""

    label: str
    box: np.ndarray
    score: float
    # two of one track are one object; None: nobody knows which it is
    track: int | str | None = None

    @property
    def centre(self) -> np.ndarray:
        """(2,) of the box."""
        return (np.asarray(self.box)[:2] + np.asarray(self.box)[2:]) / 2


# ---- pose ----------------------------------------------------------------------------------------------------------


def lift(pixels: np.ndarray, view: PosedView) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 2) of a view -> world points (n, 3), and which of them have a depth (n,)."""
    height, width = view.depth.shape
    column, row = np.floor(pixels).astype(int).T
    inside = (column >= 0) & (row >= 0) & (column < width) & (row < height)
    z = np.where(inside, view.depth[row.clip(0, height - 1), column.clip(0, width - 1)], 0)
    K = view.intrinsics
    rays = np.column_stack([(pixels - K[:2, 2]) / K[[0, 1], [0, 1]], np.ones(len(pixels))])
    return (rays * z[:, None]) @ view.c2w[:3, :3].T + view.c2w[:3, 3], z > 0


def pose_from_matches(points: np.ndarray, pixels: np.ndarray, intrinsics: np.ndarray):
    """The camera that sees world points (n, 3) at pixels (n, 2) -> (c2w (4, 4), agreement (n,) bool), or None.

    None if fewer than LEAST or than SHARE of the matches agree. The same matches give the same camera.
    """
    cv2 = opencv()
    least = max(LEAST, SHARE * len(points))
    if len(points) < least:
        return None
    cv2.setRNGSeed(0)
    K = intrinsics.astype(float)
    tolerance = float(NEAR * K[0, 0])  # pixels
    found, turn, shift, inliers = cv2.solvePnPRansac(
        points,
        pixels,
        K,
        None,
        iterationsCount=TRIALS,
        reprojectionError=tolerance,
        confidence=0.9999,
        flags=cv2.SOLVEPNP_SQPNP,
    )
    if not found or inliers is None:
        return None
    agree = np.zeros(len(points), bool)
    agree[inliers[:, 0]] = True
    for _ in range(10):  # refine on all that agree, which are chosen anew each time
        if agree.sum() < least:
            return None
        turn, shift = cv2.solvePnPRefineLM(points[agree], pixels[agree], K, None, turn, shift)
        rotation = cv2.Rodrigues(turn)[0]  # world to camera
        in_front = (points @ rotation.T + shift[:, 0])[:, 2] > 1e-6
        seen = cv2.projectPoints(points, turn, shift, K, None)[0][:, 0]
        agree = in_front & (np.linalg.norm(seen - pixels, axis=-1) < tolerance)
    c2w = np.eye(4)
    c2w[:3, :3] = rotation.T
    c2w[:3, 3] = -rotation.T @ shift[:, 0]
    return c2w, agree


def recover_pose(
    view: np.ndarray, intrinsics: np.ndarray, context: list[PosedView], match: Callable
) -> np.ndarray | None:
    """Where a view (H, W, 3) uint8 was taken from -> c2w (4, 4), or None if its matches agree on no camera.

    match   (image, image) -> pixels of the first (n, 2), of the second (n, 2); pixel centres are at +0.5
    """
    points = [np.zeros((0, 3))]
    pixels = [np.zeros((0, 2))]
    for other in context:
        own_pixels, other_pixels = match(view, other.rgb)
        world, has_depth = lift(other_pixels, other)
        points.append(world[has_depth])
        pixels.append(own_pixels[has_depth])
    found = pose_from_matches(np.concatenate(points), np.concatenate(pixels), intrinsics)
    return None if found is None else found[0]


def matcher(model: str = MATCHER, device="cpu") -> Callable:
    """`match` of `recover_pose` by a transformers keypoint matcher. Raises ValueError if it, or OpenCV, cannot be had."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForKeypointMatching

    opencv()  # if it is missing: before the work
    processor, network = pretrained(
        "--matcher", model, AutoImageProcessor, AutoModelForKeypointMatching
    )
    network = network.to(device).eval()

    def match(image, other):
        pair = [[Image.fromarray(image), Image.fromarray(other)]]
        inputs = processor(pair, return_tensors="pt").to(device)
        sizes = [(image.shape[:2], other.shape[:2])]
        with torch.inference_mode():
            (matches,) = processor.post_process_keypoint_matching(network(**inputs), sizes)
        # the processor cuts pixels to whole numbers: their centres are meant
        return [matches[key].double().cpu().numpy() + 0.5 for key in ("keypoints0", "keypoints1")]

    return match


def pretrained(flag: str, model: str, *kinds) -> list:
    """from_pretrained of each of `kinds`; a ValueError with a sentence where that fails."""
    try:
        return [kind.from_pretrained(model) for kind in kinds]
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{model} cannot be read or fetched ({reason}). Fetch it where there is a network and name its folder "
            f"with {flag}."
        ) from None


# ---- content -------------------------------------------------------------------------------------------------------


def detector(model: str = DETECTOR, device="cpu") -> Callable:
    """GroundingDINO as detect(image, categories) -> [Detection], of a score of SCORE to 1.

    Raises ValueError if the weights cannot be had.
    """
    import torch
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    processor, network = pretrained(
        "--detector", model, AutoProcessor, AutoModelForZeroShotObjectDetection
    )
    network = network.to(device).eval()

    def detect(image, names):
        """What stands in an image (H, W, 3) uint8 of some categories."""
        picture, text = Image.fromarray(image), [list(names)]
        inputs = processor(images=picture, text=text, return_tensors="pt").to(device)
        with torch.inference_mode():
            (objects,) = processor.post_process_grounded_object_detection(
                network(**inputs), inputs["input_ids"], threshold=SCORE, text_threshold=TEXT_SCORE
            )
        boxes, scores = objects["boxes"].cpu().numpy(), objects["scores"].tolist()
        detections = []
        for words, box, score in zip(objects["text_labels"], boxes, scores, strict=True):
            labels = [name for name in names if name in words]  # its words may be two names
            if labels:
                detections.append(Detection(max(labels, key=len), box, score))
        return detections

    return detect


def categories(images: list, ask: Callable | None = None) -> tuple[str, ...]:
    """What to look for in a place: listed by a VLM, ask(images, question) -> text; without one the fixed INDOOR."""
    if ask is None:
        return INDOOR
    names = [name.strip(" .\n").lower() for name in ask(images, QUESTION).split(",")]
    names = [name for name in names if 0 < len(name) <= 30 and "." not in name]
    return tuple(dict.fromkeys(names))[:20] or INDOOR


def paired(view: list[Detection], target: list[Detection]) -> dict[int, int]:
    """{number in the target: number in the view} of boxes of one label, the nearest centres first, at any distance."""
    gaps = []
    for i, own in enumerate(view):
        for j, true in enumerate(target):
            if own.label == true.label:
                gaps.append((float(np.linalg.norm(own.centre - true.centre)), i, j))
    pairs = {}
    for _, i, j in sorted(gaps):
        if j not in pairs and i not in pairs.values():
            pairs[j] = i
    return pairs


def object_counts(view: list[Detection], target: list[Detection]) -> np.ndarray:
    """What there is to count in the detections of a view beside those of the target -> (6,), as
    `consistency.content_counts`: hits and cases of precision, recall and topology. Scores are not asked.
    """
    pairs = paired(view, target)
    right, ordered = 0, 0
    for j, one in enumerate(target):
        for k, other in enumerate(target):
            if one.centre[0] - other.centre[0] > APART:
                right += 1
                both = j in pairs and k in pairs
                ordered += both and view[pairs[j]].centre[0] > view[pairs[k]].centre[0]
    return np.array([len(pairs), len(view), len(pairs), len(target), ordered, right])


# ---- both, over triples ----------------------------------------------------------------------------------------------


def compare_scans(rows: list[dict], views: dict, match: Callable, detect=None, ask=None) -> dict:
    """`consistency.compare` for triples of scans: {name: one view per row} beside what is trivial and what is perfect.

    rows    of `answers.load_triples`, their "context_depth" as paths
    match, detect, ask   as above; without a detector content is nan, without a VLM the categories are INDOOR
    The oracles are the target photograph itself (what the instruments make of the truth) and the context warped by the
    target's depth and pose. A view is taken to have the target's intrinsics.
    """
    warps = [fill_holes(row["warp"][..., :3], row["warp"][..., 3] > 0) for row in rows]
    oracles = {"warp with true depth and pose": warps, "true view": [row["target"] for row in rows]}
    groups = {"simulators": views, "baselines": trivial_views(rows), "oracles": oracles}
    lists = [seen for group in groups.values() for seen in group.values()]
    motions = np.full((len(lists), len(rows), 5), np.nan)
    counts = np.full((len(lists), len(rows), 7), np.nan)  # mse, then `object_counts`
    names = {}
    for r, row in enumerate(tqdm(rows, desc="measure", unit="triple")):
        context = context_views(row)
        start = context[row["reference"] - 1].c2w
        if detect:
            place = str(row["context_c2w"])
            if place not in names:  # one context is asked about once
                names[place] = categories(row["context"], ask)
            target = detect(row["target"], names[place])
        for k, seen in enumerate(lists):
            c2w = recover_pose(seen[r], np.array(row["intrinsics"]), context, match)
            if c2w is not None:
                motions[k, r] = decompose(start, c2w)[:5]
            counts[k, r, 0] = np.square((seen[r].astype(np.float32) - row["target"]) / 127.5).mean()
            if detect:
                counts[k, r, 1:] = object_counts(detect(seen[r], names[place]), target)
    scores = iter([summary(rows, *part) for part in zip(motions, counts, strict=True)])
    return {title: {name: next(scores) for name in group} for title, group in groups.items()}


def context_views(row: dict) -> list[PosedView]:
    """The context of a triple with its depth, which is read from its files."""
    views = []
    for k, rgb in enumerate(row["context"]):
        depth = read_depth(row["context_depth"][k])
        intrinsics = np.array(row["context_intrinsics"][k])
        views.append(PosedView(rgb, depth, np.array(row["context_c2w"][k]), intrinsics))
    return views


def summary(rows: list[dict], motions: np.ndarray, counts: np.ndarray) -> dict:
    """`consistency.summary_of` one list of views, and "found": the share of them that a camera was found for.

    motions (n, 5), nan where no camera was found;  counts (n, 7): mse, `object_counts`, nan if nothing was detected
    """
    errors = pose_errors(rows, motions)
    within = [error["within"] for error in errors]
    tight = [error["tight"] for error in errors]
    values = np.column_stack([np.ones(len(rows)), within, tight, counts])
    found = float(np.isfinite(motions[:, 0]).mean())
    return summary_of(errors, values) | {"found": found}
