"""
Scenes from disk: five scan datasets and your own, all as extras/scans/frames.py says what a scene is.

Nothing is downloaded: --root is a folder that its user filled, after signing the dataset's terms. Below it

  scannet         scans/<id>/{color,depth,pose,intrinsic}/ as the official exporter writes them, or <id>.sens itself
  scannetpp       data/<id>/iphone/{pose_intrinsic_imu.json, rgb/, depth/}; the toolkit extracts the last two
  matterport      v1/scans/<house>/undistorted_{camera_parameters,color_images,depth_images}/
  arkitscenes     3dod/{Training,Validation}/<id>/<id>_frames/, or raw/{Training,Validation}/<id>/
  dl3dv           <batch>/<hash>/{transforms.json, images_4/}, and depth that is not in the dataset: readers.nerfstudio
  nerfstudio      <id>/{transforms.json, images/, depth/, depth.json}: your own, posed by COLMAP; the same reader
  folder          <id>/scene.json: your own, see docs/scans.md
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from extras.scans import readers
from extras.scans.frames import Scene


class Reader(NamedTuple):
    """Where a dataset has its scans, and who reads one."""

    read: Callable[[Path], Scene]
    folders: tuple[str, ...]  # patterns below the root; {} is the id
    marks: tuple[str, ...]  # files by which a folder is known for a scan: any of them


READERS = {
    "scannet": Reader(readers.scannet, ("{}", "scans/{}", "scans_test/{}"), ("color", "*.sens")),
    "scannetpp": Reader(readers.scannetpp, ("{}", "data/{}"), ("iphone/pose_intrinsic_imu.json",)),
    "matterport": Reader(
        readers.matterport, ("{}", "v1/scans/{}"), ("undistorted_camera_parameters/*.conf",)
    ),
    "arkitscenes": Reader(
        readers.arkitscenes,
        ("3dod/*/{}", "raw/*/{}", "Training/{}", "Validation/{}", "{}"),
        ("*_frames/lowres_wide.traj", "lowres_wide.traj"),
    ),
    "dl3dv": Reader(readers.nerfstudio, ("{}", "*K/{}"), readers.TRANSFORMS),
    "nerfstudio": Reader(readers.nerfstudio, ("{}",), readers.TRANSFORMS),
    "folder": Reader(readers.plain_folder, ("{}",), ("scene.json",)),
}


def scene_ids(dataset: str, root: str | Path) -> list[str]:
    """Sorted ids of the scenes below `root`. Raises ValueError, with the layout it looked for, if there is none."""
    return sorted({folder.name for folder in scene_folders(dataset, root)})


def read_scene(dataset: str, root: str | Path, id: str) -> Scene:
    """One Scene; poses and sizes are read, pictures are not. Raises ValueError if it is missing, broken or empty."""
    folder = scene_folders(dataset, root, id)[0]
    try:
        return READERS[dataset].read(folder)._replace(dataset=dataset, id=id)
    except (ValueError, LookupError, TypeError, AttributeError, OSError, struct.error) as error:
        reason = f"a file has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"The {dataset} scene {folder} cannot be used: {reason}") from error


def scene_folders(dataset: str, root: str | Path, id: str = "*") -> list[Path]:
    """Folders of all scenes, or of one (ARKitScenes: two copies that differ; the first counts, 3dod before raw)."""
    if dataset not in READERS:
        raise ValueError(f"There is no reader for {dataset!r}; there are: {', '.join(READERS)}.")
    if id != "*" and (Path(id).name != id or set(id) & set("*?[")):
        raise ValueError(f"{id!r} is not the id of a scene: that is the name of its folder.")
    _, patterns, marks = READERS[dataset]
    folders = []
    for pattern in patterns:
        for folder in sorted(Path(root).glob(pattern.format(id))):
            if any(any(folder.glob(mark)) for mark in marks):
                folders.append(folder)
    if not folders:
        scene = "<id>" if id == "*" else id
        layouts = [f"{pattern.format(scene)}/{mark}" for pattern in patterns for mark in marks]
        raise ValueError(
            f"{root} holds no scene {scene} of {dataset}. Looked in it for {' or '.join(layouts)}."
        )
    return folders
