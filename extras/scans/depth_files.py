"""Depth as scans store it, and the size of a picture that is not decoded yet."""

from pathlib import Path

import numpy as np

from lib.images import check_file, decoding, opened

ORIENTATION = 0x0112  # the EXIF tag; from 5 on it turns a picture by 90 degrees


def read_depth(path: str | Path, per_metre: float = 1000) -> np.ndarray:
    """A 16-bit picture of units of 1 / per_metre, or a .npy of metres -> (H, W) float32 metres, 0 = invalid.

    Raises PictureError.
    """
    with decoding(f"The depth {path}"):
        check_file(path)
        if Path(path).suffix == ".npy":
            # mapped, since the header of a small file may claim any size
            metres = np.load(path, mmap_mode="r")
            kinds, units = "fiu", 1
        else:
            with opened(path) as picture:
                metres = np.asarray(picture)
            kinds, units = "iu", per_metre
        if metres.ndim != 2 or metres.dtype.kind not in kinds or metres.dtype.itemsize < 2:
            raise ValueError(
                "it is no depth: a picture of one channel and 16 bits, or a .npy array"
            )
        metres = metres / units
        return np.where(np.isfinite(metres) & (metres > 0), metres, 0).astype(np.float32)


def size_in_header(path: str | Path) -> tuple[int, int]:
    """(width, height) of a picture the right way up, or of a .npy array, which is not read. Raises PictureError."""
    if Path(path).suffix == ".npy":
        with decoding(f"The depth {path}"):
            check_file(path)
            height, width = np.load(path, mmap_mode="r").shape
            return width, height
    with opened(path) as picture:
        is_turned = picture.getexif().get(ORIENTATION, 1) >= 5
        # Pillow gives the size of a TIFF the right way up
        return picture.size[::-1] if is_turned and picture.format != "TIFF" else picture.size
