"""
Depth and a scale for scenes that have pictures and poses alone (DL3DV), by a network that guesses metres.

  python data.py depth --root DL3DV-ALL-960P

Every picture gets its depth map; then the one number is sought that the poses must be multiplied by for depth maps of
different views to agree. Where they agree nowhere the scene is refused: a motion in metres would be made up.
"""

import numpy as np
from PIL import Image

from extras.scans.scene import (
    collect,
    dl3dv_folder,
    dl3dv_frames,
    dl3dv_rows,
    longer,
    read_json,
    scene_folders,
)
from lib.common import write_json
from lib.geometry import project, unproject
from lib.images import save_image

DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Metric-Indoor-Small-hf"
MAX_DISAGREEMENT = (
    0.15  # of depth and poses, as a share of the depth; sensors stay below 0.05, networks do not
)
UNFINISHED = (
    "its depth is estimated in part; run `python data.py depth --root DIR` again, it continues."
)


def estimate_depth(root, id, model, predict):
    """Write depth/ and depth.json of a DL3DV scene (see `dl3dv`) with a depth network -> what depth.json holds.

    model     the network's name, which depth.json keeps
    predict   (H, W, 3) uint8 -> (H, W) metres: what `depth_network` gives
    Files are whole or not there, and the same call continues. The scale is where depth and poses agree best
    (`scale_of`); if they agree nowhere, depth.json says so and the reader refuses the scene. The metres are the
    network's, so only roughly metres. Raises ValueError if the scene has depth from elsewhere.
    """
    folder = dl3dv_folder(scene_folders("dl3dv", root, id)[0])
    note, how = folder / "depth.json", f"depth of single pictures by {model}"
    info = read_json(note) if note.is_file() else {}
    if (info or (folder / "depth").exists()) and info.get("how") != how:
        raise ValueError(
            f"{folder} has depth from elsewhere ({info.get('how', 'no depth.json says where')}). Remove "
            f"depth/ and depth.json to estimate it by {model}."
        )
    if info and info["refused"] != UNFINISHED:
        return info
    rows, full, load = dl3dv_rows(folder)
    write_json(note, {"scale": None, "how": how, "refused": UNFINISHED})
    for _, image, depth, *_ in rows:
        if image is None or depth.exists():
            continue
        try:
            pixels = load(image)
        except ValueError:  # missing or broken; the reader will count it among those without depth
            continue
        thousandths = np.nan_to_num(1000 * np.float64(predict(pixels)), nan=0, posinf=0, neginf=0)
        save_image(
            depth,
            np.where((thousandths > 0) & (thousandths < 65535), thousandths, 0)
            .round()
            .astype(np.uint16),
        )
    scale, off = scale_of(collect(dl3dv_frames(rows, full, load, 1)).frames)
    refused = (
        ""
        if scale
        else (
            f"its depth and poses fix no scale: they disagree by {off:.0%} of the depth, or "
            f"the camera hardly moved. Put better depth beside transforms.json."
        )
    )
    write_json(
        note,
        info := {"scale": scale, "how": how, "disagreement": round(off, 4), "refused": refused},
    )
    return info


def depth_network(model, device):
    """A transformers depth network, trained for metres, as a function (H, W, 3) uint8 -> (H, W) float32 metres."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    processor, network = (
        kind.from_pretrained(model) for kind in (AutoImageProcessor, AutoModelForDepthEstimation)
    )
    if getattr(network.config, "depth_estimation_type", "metric") != "metric":
        raise ValueError(
            f"{model} knows relative depth only; take one trained for metres, such as {DEPTH_MODEL}."
        )
    network = network.to(device).eval()

    def predict(pixels):
        inputs = processor(images=Image.fromarray(pixels), return_tensors="pt").to(device)
        with torch.inference_mode():
            (depth,) = processor.post_process_depth_estimation(
                network(**inputs), target_sizes=[pixels.shape[:2]]
            )
        return depth["predicted_depth"].float().cpu().numpy()

    return predict


def depth_ratios(one, other):
    """How two views (depth (H, W), K, c2w) fit: points of one, as the other sees them.

    returns z / depth of the points that fall on valid depth of the other (n,), and their share of all points
    """
    (depth, K, c2w), (other_depth, other_K, other_c2w) = one, other
    pixel, z = project(unproject(depth, K, c2w)[depth > 0], other_K, other_c2w)
    column, row = np.floor(pixel.T)
    inside = (
        (z > 0)
        & (column >= 0)
        & (row >= 0)
        & (column < other_depth.shape[1])
        & (row < other_depth.shape[0])
    )
    there = other_depth[row[inside].astype(int), column[inside].astype(int)]
    return z[inside][there > 0] / there[there > 0], float((there > 0).sum() / max(1, len(pixel)))


def disagreement(one, other):
    """Median of |z - depth| / depth (inf if nothing overlaps), and the share of points that fall on the other view's
    depth. Near 0 for true poses, far above 0.1 for wrong axes."""
    ratios, share = depth_ratios(one, other)
    return (float(np.median(np.abs(ratios - 1))) if share else np.inf), share


def scale_of(frames, views=24, width=40):
    """Metres per unit of the poses, for frames whose depth is in metres and whose poses are not.

    Of `views` frames along the capture, `width` pixels wide, each is compared with those two of the next six that stand
    farthest from it and look the same way within 40 degrees. At the true scale z / depth is one number over a pair, if
    not 1: networks err most by a factor of a whole frame. So the scale is the one where that ratio spreads least around
    its own median (of all pairs the median; a pair that hardly overlaps has the spread 1).
    returns (scale, disagreement). scale is None if the median disagreement at it is above MAX_DISAGREEMENT, or the
    spread above 60 % of what cameras that only turn would give: then no parallax shows a scale.
    """
    looks = []
    for frame in [frames[i] for i in np.unique(np.linspace(0, len(frames) - 1, views).astype(int))]:
        size = (width, max(1, round(width * frame.size[1] / frame.size[0])))
        looks.append((frame.depth(size), frame.K(size), frame.c2w))
    poses = np.array([c2w for *_, c2w in looks])
    apart = np.linalg.norm(poses[:, None, :3, 3] - poses[:, :3, 3], axis=-1)  # (views, views)
    alike = poses[:, :3, 2] @ poses[:, :3, 2].T > np.cos(np.radians(40))
    choices = [
        [j for j in range(i + 1, min(i + 7, len(looks))) if alike[i, j]] for i in range(len(looks))
    ]
    pairs = [
        (i, j)
        for i, near in enumerate(choices)
        for j in sorted(near, key=lambda j: -apart[i, j])[:2]
    ]
    baseline, deep = (
        np.median([apart[pair] for pair in pairs] or [0]),
        np.concatenate([d.ravel() for d, *_ in looks]),
    )
    if baseline == 0 or not deep.any():
        return None, 1.0

    def pairs_at(scale):
        moved = [(depth, K, longer(c2w, scale)) for depth, K, c2w in looks]
        return [(moved[i], moved[j]) for i, j in pairs]

    def spread(scale):
        found = [depth_ratios(*pair) for pair in pairs_at(scale)]
        return np.median(
            [
                np.median(np.abs(ratios / np.median(ratios) - 1)) if share > 0.2 else 1
                for ratios, share in found
            ]
        )

    scale = np.median(deep[deep > 0]) / baseline  # cameras as far apart as things are away
    scale = min(scale * np.logspace(-2, 0.5, 41), key=spread)
    scale = float(min(scale * np.logspace(-0.06, 0.06, 25), key=spread))
    off = float(np.median([min(1, disagreement(*pair)[0]) for pair in pairs_at(scale)]))
    return (scale if off <= MAX_DISAGREEMENT and spread(scale) <= 0.6 * spread(0) else None), off
