"""
Depth and a scale for scans that have pictures and poses alone (DL3DV, COLMAP), by a network that guesses metres.

  python -m extras.scans.depth --root DL3DV-ALL-960P

Every picture gets its depth map; then the one number is sought that the poses must be multiplied by for depth maps of
different views to agree. Where they agree nowhere the scene is refused: a motion in metres would be made up.
In: scenes as readers.nerfstudio says.  Out: depth/*.png and depth.json beside each transforms.json.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image
from tqdm import tqdm

from extras.scans.frames import Camera, Frame, collect, evenly, thousandths
from extras.scans.readers import (
    load_json,
    nerfstudio_frames,
    nerfstudio_rows,
    rescaled,
    transforms_folder,
)
from extras.scans.scene import scene_folders, scene_ids
from lib.distributed import default_device, fail, say
from lib.geometry import project, unproject
from lib.images import save_image
from lib.records import write_json
from lib.stage import run_stage

DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Metric-Indoor-Small-hf"
MAX_DISAGREEMENT = 0.15  # of depth and poses, as a share of the depth; sensors stay below 0.05
UNFINISHED = "its depth is estimated in part; run `python -m extras.scans.depth --root DIR` again, it continues."
OVERLAP = 0.2  # share of a view's points that another must see to be compared with it


def make_depth(root: str | Path, model: str) -> None:
    """Depth maps and a scale for every transforms.json below `root`; a broken scene is named, and the rest goes on."""
    try:
        ids = scene_ids("dl3dv", root)
    except ValueError as error:
        fail(error)
    try:
        predict = depth_network(model, default_device())
    except (OSError, ValueError) as error:
        fail(
            f"The depth network {model} cannot be read ({str(error).splitlines()[0]}). Give --model a folder, or "
            f"fetch it where there is a network."
        )
    refused = 0
    for id in tqdm(ids, desc="depth", unit="scene"):
        try:
            info = estimate_depth(root, id, model, predict)
        except ValueError as error:
            info = {"refused": error}
        refused += bool(info["refused"])
        say(f"{id}:", info["refused"] or f"a unit of its poses is {info['scale']:.4g} m")
    say(f"{refused} scenes have no depth with a scale; their motions cannot be told in metres.")


def estimate_depth(
    root: str | Path, id: str, model: str, predict: Callable[[ndarray], ndarray]
) -> dict:
    """Write depth/ and depth.json of a scene (see readers.nerfstudio) -> what depth.json holds.

    model     the network's name, which depth.json keeps
    predict   (H, W, 3) uint8 -> (H, W) metres: what `depth_network` gives
    Files are whole or not there, and the same call continues. The scale is where depth and poses agree best
    (`scale_of`); if they agree nowhere, depth.json says so and the reader refuses the scene. The metres are the
    network's, so only roughly metres. Raises ValueError if the scene has depth from elsewhere.
    """
    folder = transforms_folder(scene_folders("dl3dv", root, id)[0])
    file = folder / "depth.json"
    how = f"depth of single pictures by {model}"
    info = load_json(file) if file.is_file() else {}
    if (info or (folder / "depth").exists()) and info.get("how") != how:
        raise ValueError(
            f"{folder} has depth from elsewhere ({info.get('how', 'no depth.json says where')}). Remove "
            f"depth/ and depth.json to estimate it by {model}."
        )
    if info and info["refused"] != UNFINISHED:
        return info
    write_json(file, {"scale": None, "how": how, "refused": UNFINISHED})
    rows, _, load = nerfstudio_rows(folder)
    for row in rows:
        if row.image is None or row.depth.exists():
            continue
        try:
            pixels = load(row.image)
        except ValueError:  # missing or broken; the reader will count it among those without depth
            continue
        save_image(row.depth, thousandths(np.float64(predict(pixels))))
    scale, off = scale_of(collect(nerfstudio_frames(folder, 1)).frames)
    refused = ""
    if scale is None:
        refused = (
            f"its depth and poses fix no scale: they disagree by {off:.0%} of the depth, or "
            f"the camera hardly moved. Put better depth beside transforms.json."
        )
    info = {"scale": scale, "how": how, "disagreement": round(off, 4), "refused": refused}
    write_json(file, info)
    return info


def depth_network(model: str, device: str) -> Callable[[ndarray], ndarray]:
    """A transformers depth network, trained for metres, as a function (H, W, 3) uint8 -> (H, W) float32 metres."""
    from transformers import pipeline

    network = pipeline("depth-estimation", model, device=device)
    if getattr(network.model.config, "depth_estimation_type", "metric") != "metric":
        raise ValueError(
            f"{model} knows relative depth only; take one trained for metres, such as {DEPTH_MODEL}."
        )

    def predict(pixels):
        return network(Image.fromarray(pixels))["predicted_depth"].float().cpu().numpy()

    return predict


# ---- the scale of the poses ----------------------------------------------------------------------------------------------


def scale_of(frames: list[Frame], views: int = 24, width: int = 40) -> tuple[float | None, float]:
    """Metres per unit of the poses, for frames whose depth is in metres and whose poses are not.

    Of `views` frames along the capture, `width` pixels wide, each is compared with those two of the next six that stand
    farthest from it and look the same way within 40 degrees. At the true scale z / depth is one number over a pair, if
    not 1: networks err most by a factor of a whole frame. So the scale is the one where that ratio spreads least around
    its own median (of all pairs the median; a pair that hardly overlaps has the spread 1).
    returns (scale, disagreement). scale is None if the median disagreement at it is above MAX_DISAGREEMENT, or the
    spread above 60 % of what cameras that only turn would give: then no parallax shows a scale.
    """
    cameras = []
    for frame in evenly(frames, views):
        height = max(1, round(width * frame.size[1] / frame.size[0]))
        cameras.append(frame.camera((width, height)))
    poses = np.array([camera.c2w for camera in cameras])
    pairs = pairs_with_parallax(poses)
    baseline = np.median([np.linalg.norm(poses[i, :3, 3] - poses[j, :3, 3]) for i, j in pairs] or 0)
    depths = np.concatenate([camera.depth[camera.depth > 0] for camera in cameras])
    if baseline == 0 or not len(depths):
        return None, 1.0

    def pairs_at(scale):
        moved = [camera._replace(c2w=rescaled(camera.c2w, scale)) for camera in cameras]
        return [(moved[i], moved[j]) for i, j in pairs]

    def spread(scale):
        spreads = []
        for one, other in pairs_at(scale):
            ratios, share = depth_ratios(one, other)
            off = np.abs(ratios / np.median(ratios) - 1) if share > OVERLAP else 1
            spreads.append(np.median(off))
        return np.median(spreads)

    scale = np.median(depths) / baseline  # cameras as far apart as things are away
    scale = min(scale * np.logspace(-2, 0.5, 41), key=spread)
    scale = float(min(scale * np.logspace(-0.06, 0.06, 25), key=spread))
    off = float(np.median([min(1, disagreement(*pair)[0]) for pair in pairs_at(scale)]))
    clear = off <= MAX_DISAGREEMENT and spread(scale) <= 0.6 * spread(0)
    return (scale if clear else None), off


def pairs_with_parallax(poses):
    """Each of the cameras (n, 4, 4) with two of the next six: the farthest that look its way within 40 degrees."""
    apart = np.linalg.norm(poses[:, None, :3, 3] - poses[:, :3, 3], axis=-1)  # (n, n)
    same_way = poses[:, :3, 2] @ poses[:, :3, 2].T > np.cos(np.radians(40))
    pairs = []
    for i in range(len(poses)):
        near = [j for j in range(i + 1, min(i + 7, len(poses))) if same_way[i, j]]
        near.sort(key=lambda j: -apart[i, j])
        pairs += [(i, j) for j in near[:2]]
    return pairs


def depth_ratios(one: Camera, other: Camera) -> tuple[ndarray, float]:
    """How two views fit: points of one, as the other sees them.

    returns z / depth of the points that fall on valid depth of the other (n,), and their share of all points
    """
    points = unproject(*one)[one.depth > 0]  # (n, 3)
    pixel, z = project(points, other.K, other.c2w)
    height, width = other.depth.shape
    column, row = np.floor(pixel.T)
    inside = (z > 0) & (column >= 0) & (row >= 0) & (column < width) & (row < height)
    there = other.depth[row[inside].astype(int), column[inside].astype(int)]
    valid = there > 0
    return z[inside][valid] / there[valid], float(valid.sum() / max(1, len(points)))


def disagreement(one: Camera, other: Camera) -> tuple[float, float]:
    """Median of |z - depth| / depth (inf if nothing overlaps), and the share of points that fall on the other view's
    depth. Near 0 for true poses, far above 0.1 for wrong axes."""
    ratios, share = depth_ratios(one, other)
    return (float(np.median(np.abs(ratios - 1))) if share else np.inf), share


def main(argv: list[str] | None = None) -> None:
    """Estimate the depth of every scene."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", required=True, help="folder of DL3DV, or of your own")
    parser.add_argument(
        "--model",
        default=DEPTH_MODEL,
        help="transformers checkpoint that estimates depth in metres",
    )
    args = parser.parse_args(argv)
    make_depth(args.root, args.model)


if __name__ == "__main__":
    run_stage(main)
