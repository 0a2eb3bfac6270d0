"""Pictures in and out: (H, W, 3) uint8 arrays in memory, files that are whole or not there. `read` is the one decoder."""

import contextlib
import functools
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from lib.distributed import fail, say, split_work
from lib.records import whole_file

MAX_PIXELS = 2**26  # of a picture that is decoded: 8192 x 8192
MAX_RATIO = 200  # of the sides of a picture that a policy is shown: Qwen's limit
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no decoder that starts programs

Source = str | Path | bytes  # a file, or its bytes


# ---- the decoder -----------------------------------------------------------------------------------------------------


class PictureError(ValueError):
    """A picture that cannot be read, in a sentence that names its file."""


@contextlib.contextmanager
def decoding(name: str) -> Iterator[None]:
    """Inside, whatever goes wrong becomes a PictureError about `name`: every decoder has its own errors."""
    try:
        yield
    except PictureError:
        raise
    except FileNotFoundError:
        raise PictureError(f"{name} does not exist.") from None
    except Exception as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "it is no picture"
        raise PictureError(f"{name} cannot be read ({reason}).") from error


def check_file(path: str | Path) -> None:
    """Raises ValueError for what is no file (a pipe would wait for ever), FileNotFoundError for what is not there."""
    path = Path(path)
    path.stat()
    if not path.is_file():
        raise ValueError("it is a folder, a pipe or a device")


@contextlib.contextmanager
def opened(source: Source, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """A picture of which only the header has been read. What goes wrong inside is a PictureError."""
    in_memory = isinstance(source, (bytes, bytearray, memoryview))
    with decoding("The picture" if in_memory else f"The image {source}"):
        if not in_memory:
            check_file(source)
        with Image.open(io.BytesIO(source) if in_memory else source, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise ValueError(f"{width} x {height} pixels are more than {max_pixels:,}")
            yield picture


def decode(source: Source, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture, of an animation the first, whole and the right way up, "RGB" or "RGBA". Raises PictureError."""
    with opened(source, max_pixels) as picture:
        picture = eight_bits(ImageOps.exif_transpose(picture))
        return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def eight_bits(picture: Image.Image) -> Image.Image:
    """Sixteen-bit grey divided by 257; others as they are."""
    if picture.mode[0] not in "IF":
        return picture
    values = np.asarray(picture)  # (H, W)
    if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("its numbers are not those of 8 or 16 bits")
    return Image.fromarray((values // 257).astype(np.uint8))


def read(source: Source, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A file, or a file's bytes -> (H, W, 3) uint8; what is transparent shows white paper. Raises PictureError."""
    return on_white(np.array(decode(source, max_pixels)))


def on_white(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3 or 4) uint8 -> (H, W, 3): what is transparent shows white paper, as BAGEL takes such pictures."""
    if pixels.shape[-1] == 3:
        return pixels
    picture = Image.fromarray(pixels)
    page = Image.new("RGB", picture.size, "white")
    page.paste(picture, mask=picture.getchannel("A"))
    return np.array(page)


def read_warp(source: Source) -> np.ndarray:
    """A warped view -> (H, W, 4) uint8, its alpha 255 where something is seen. Raises PictureError."""
    picture = decode(source)
    if picture.mode != "RGBA":
        raise PictureError(f"The warp {source} has no alpha channel.")
    return np.array(picture)


def load_image(image: str | Path | np.ndarray) -> np.ndarray:
    """`read` for commands: an array passes, and what cannot be read ends the program with a sentence."""
    if isinstance(image, np.ndarray):
        return image
    try:
        return read(image)
    except PictureError as error:
        remedy = " It may be truncated: fetch or make it again." if Path(image).exists() else ""
        fail(f"{error}{remedy}")


# ---- what a policy can be shown --------------------------------------------------------------------------------------


def check_shape(image: np.ndarray, name: str = "An image") -> None:
    """Raises PictureError for a strip that Qwen's image preparation refuses. image (H, W, 3)"""
    height, width = image.shape[:2]
    if max(height, width) > MAX_RATIO * min(height, width):
        raise PictureError(
            f"{name} of {width} x {height} pixels is too narrow: the limit is 1 : {MAX_RATIO}"
        )


def fault_of_picture(path: str) -> str:
    """Why a policy cannot be shown this picture, or ""."""
    try:
        check_shape(read(path), f"The image {path}")
    except PictureError as error:
        return str(error)
    return ""


def with_pictures(questions: list[dict]) -> list[dict]:
    """The questions whose pictures can all be shown (a collective); the rest is left out, counted and named."""
    fault_once = functools.cache(fault_of_picture)  # questions share pictures

    def first_faults(rows):
        return [next(filter(None, map(fault_once, row["images"])), "") for row in rows]

    whole = []
    for question, fault in zip(questions, split_work(first_faults, questions), strict=True):
        if fault:
            say(f"Question {question.get('id')} is left out. {fault}")
        else:
            whole.append(question)
    if len(whole) < len(questions):
        missing = len(questions) - len(whole)
        say(f"{missing} of {len(questions)} questions are left out: see above.")
    return whole


# ---- files that are written ------------------------------------------------------------------------------------------


def save_image(path: str | Path, picture: np.ndarray | Image.Image) -> None:
    """uint8 (H, W, 3 or 4) or a picture -> PNG, or JPEG where the name ends in .jpg; whole or not at all."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    file = io.BytesIO()
    if Path(path).suffix == ".jpg":
        picture.save(file, "jpeg", quality=95, subsampling=0)
    else:
        picture.save(file, "png", compress_level=1)
    with whole_file(path) as beside:
        beside.write_bytes(file.getvalue())


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


def soften(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur and grain of a random strength, about as a small simulator draws: a view that is imagined is never sharp."""
    soft = image.astype(np.float32)
    rounds = int(rng.integers(0, 5))
    for _ in range(rounds):  # each round: [1 2 1] / 4 down the rows and along the columns
        wide = np.pad(soft, ((1, 1), (1, 1), (0, 0)), mode="edge")
        wide = (wide[:-2] + 2 * wide[1:-1] + wide[2:]) / 4
        soft = (wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]) / 4
    return np.clip(soft + rng.normal(0, 2 * rounds, soft.shape) + 0.5, 0, 255).astype(np.uint8)
