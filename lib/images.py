"""Pictures in and out: (H, W, 3) uint8 arrays in memory, files that are whole or not there. `read` is the one decoder."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from lib.distributed import fail

MAX_PIXELS = 2**26  # of a picture that is decoded: 8192 x 8192
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no decoder that starts programs


class PictureError(ValueError):
    """A picture that cannot be read, in a sentence that names its file."""


def decode(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture of a file or of a file's bytes: whole, the right way up, "RGB" or "RGBA".

    Sixteen-bit grey is scaled to eight. Raises PictureError, whatever went wrong: every decoder has its own errors.
    """
    in_memory = isinstance(source, bytes)
    name = "The picture" if in_memory else f"The image {source}"
    if not in_memory and Path(source).exists() and not Path(source).is_file():
        raise PictureError(f"{name} is no file: a folder, a pipe or a device.")
    try:
        with Image.open(io.BytesIO(source) if in_memory else source, formats=FORMATS) as picture:
            width, height = picture.size  # of the header: nothing is decoded yet
            if width * height > max_pixels:
                raise ValueError(f"{width} x {height} pixels are more than {max_pixels:,}")
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):
                return Image.fromarray((np.asarray(picture) / 257).astype(np.uint8)).convert("RGB")
            return picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    except FileNotFoundError:
        raise PictureError(f"{name} does not exist.") from None
    except Exception as error:
        reason = "it is no picture" if isinstance(error, Image.UnidentifiedImageError) else error
        raise PictureError(f"{name} cannot be read ({reason}).") from error


def read(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A file, or a file's bytes -> (H, W, 3) uint8, transparency on white. Raises PictureError."""
    return on_white(np.array(decode(source, max_pixels)))


def load_image(image: str | Path | np.ndarray) -> np.ndarray:
    """`read` for commands: an array passes, and what cannot be read ends the program with a sentence."""
    if isinstance(image, np.ndarray):
        return image
    try:
        return read(image)
    except PictureError as error:
        fail(f"{error} It may be truncated: fetch or make it again.")


def on_white(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3 or 4) uint8 -> (H, W, 3): what is transparent shows white paper, as BAGEL takes such pictures."""
    if pixels.shape[-1] == 3:
        return pixels
    alpha = pixels[..., 3:] / 255
    return np.round(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def save_image(path: Path, pixels: np.ndarray) -> None:
    """uint8 (H, W, 3 or 4) -> PNG, or JPEG where the name ends in .jpg; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    if path.suffix == ".jpg":
        Image.fromarray(pixels).save(beside, "jpeg", quality=95, subsampling=0)
    else:
        Image.fromarray(pixels).save(beside, "png", compress_level=1)
    beside.replace(path)


def contact_sheet(head: list[str], rows: list[list], side: int = 96) -> Image.Image:
    """A table of pictures: a cell is a picture (H, W, 3) uint8, shown `side` pixels wide and high, or words.

    head   a title per column, "" for none; all rows have as many cells
    """
    gap, words = 6, 170
    widths = [words if isinstance(cell, str) else side for cell in rows[0]]
    lefts = [sum(widths[:k]) + gap * k for k in range(len(widths))]
    page = Image.new("RGB", (lefts[-1] + widths[-1], 20 + len(rows) * (side + gap)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for left, title in zip(lefts, head, strict=True):
        pen.text((left, 2), title, "gray", font)
    for number, row in enumerate(rows):
        top = 20 + number * (side + gap)
        for left, cell in zip(lefts, row, strict=True):
            if isinstance(cell, str):
                pen.multiline_text((left, top + side // 3), cell, "black", font)
            else:
                tile = Image.fromarray(cell).resize((side, side), Image.Resampling.NEAREST)
                page.paste(tile, (left, top))
    return page


def figure_image(draw: Callable) -> Image.Image | None:
    """`draw(pyplot)` -> the figure it returns, as a picture; None where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, buffer = draw(pyplot), io.BytesIO()
    figure.savefig(buffer, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return Image.open(buffer)
