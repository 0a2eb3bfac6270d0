"""Pictures in and out: (H, W, 3) uint8 arrays in memory, files that are whole or not there."""

import io
import os

import numpy as np
from PIL import Image

from lib.common import fail


def load_image(image):
    """Any image file (or an array, which passes) -> (H, W, 3) uint8. Stops with a sentence if it cannot be read."""
    if isinstance(image, np.ndarray):
        return image
    try:
        picture = Image.open(image)
        return on_white(
            np.array(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))
        )
    except FileNotFoundError:
        fail(f"The image {image} does not exist.")
    except (
        OSError,
        SyntaxError,
    ) as error:  # Pillow's words for a truncated file or no image at all
        fail(
            f"The image {image} cannot be read ({error}); it may be truncated: fetch or make it again."
        )


def on_white(pixels):
    """(H, W, 3 or 4) uint8 -> (H, W, 3): what is transparent shows white paper, as BAGEL takes such pictures."""
    if pixels.shape[-1] == 3:
        return pixels
    alpha = pixels[..., 3:] / 255
    return np.round(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def save_image(path, pixels):
    """uint8 (H, W, 3 or 4) -> PNG, or JPEG where the name ends in .jpg; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    if path.suffix == ".jpg":
        Image.fromarray(pixels).save(beside, "jpeg", quality=95, subsampling=0)
    else:
        Image.fromarray(pixels).save(beside, "png", compress_level=1)
    beside.replace(path)


def drawn(draw):
    """`draw(pyplot)` -> the figure it returns, as a PIL image; None where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    made, buffer = draw(pyplot), io.BytesIO()
    made.savefig(buffer, dpi=110, bbox_inches="tight")
    pyplot.close(made)
    return Image.open(buffer)
