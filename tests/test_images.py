"""The one decoder of pictures: odd files give the right value, or one error that names them. `pytest tests/test_images.py`"""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lib import images

WHITE = [255, 255, 255]
RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))  # from black to white
RED_LEFT = np.zeros((24, 40, 3), np.uint8)  # 40 wide, 24 high, the left third red
RED_LEFT[:, :13, 0] = 255
ORIENTATION = 0x0112  # the EXIF tag


def encoded(pixels, kind="png", **options):
    """An array or a PIL image as the bytes of a file."""
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, bits, colour, rows):
    """A PNG file from its parts."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


def see_through():
    """A palette of magenta, which is transparent, and blue, in the middle."""
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([255, 0, 255, 0, 0, 255] + [0] * 762)
    palette.paste(1, (4, 4, 12, 12))
    return palette


def turned(kind, orientation, **options):
    picture = Image.fromarray(RED_LEFT)
    tag = picture.getexif()
    tag[ORIENTATION] = orientation
    return encoded(picture, kind, exif=tag, **options)


def grey_alpha():
    pixels = np.zeros((16, 16, 2), np.uint8)
    pixels[4:12, 4:12] = (100, 255)
    return pixels


def animation(kind, **options):
    first, second = (Image.new("RGB", (16, 16), (grey,) * 3) for grey in (10, 200))
    return encoded(first, kind, save_all=True, append_images=[second], **options)


GREY = [int(RAMP[32, 32]) // 257] * 3
RGBA = np.zeros((16, 16, 4), np.uint8)
RGBA[..., 0] = 255
RGBA[4:12, 4:12, 3] = 255
VALUES = {  # bytes of a file -> colours of its first pixel and of that in the middle
    "RGBA": (encoded(RGBA), WHITE, [255, 0, 0]),
    "half transparent": (encoded(np.uint8([[[0, 0, 0, 51]]])), [204] * 3, [204] * 3),
    "grey and alpha": (encoded(grey_alpha()), WHITE, [100] * 3),
    "palette": (encoded(see_through(), transparency=0), WHITE, [0, 0, 255]),
    "palette of alphas": (encoded(see_through(), transparency=b"\0\x80"), WHITE, [127, 127, 255]),
    "GIF": (encoded(see_through(), "gif", transparency=0), WHITE, [0, 0, 255]),
    "16-bit PNG": (encoded(RAMP), [0] * 3, GREY),
    "16-bit TIFF": (encoded(RAMP, "tiff"), [0] * 3, GREY),
    "16-bit TIFF, big-endian": (encoded(RAMP.astype(">u2"), "tiff"), [0] * 3, GREY),
    "16-bit PGM": (b"P5 64 64 65535\n" + RAMP.astype(">u2").tobytes(), [0] * 3, GREY),
    "32-bit TIFF of 16 bits": (encoded(RAMP.astype(np.int32), "tiff"), [0] * 3, GREY),
    "CMYK": (encoded(Image.fromarray(RED_LEFT).convert("CMYK"), "tiff"), [255, 0, 0], [0] * 3),
    "one bit": (encoded(Image.new("1", (9, 9), 1)), WHITE, WHITE),
    "animated GIF": (animation("gif"), [10] * 3, [10] * 3),
    "animated PNG": (animation("png"), [10] * 3, [10] * 3),
    "animated WebP": (animation("webp", lossless=True), [10] * 3, [10] * 3),
    "TIFF of pages": (animation("tiff"), [10] * 3, [10] * 3),
}


@pytest.mark.parametrize("name", VALUES)
def test_odd_pictures_show_what_every_viewer_shows(tmp_path, name):
    content, first, middle = VALUES[name]
    (tmp_path / "picture").write_bytes(content)
    for source in (content, bytearray(content), tmp_path / "picture", str(tmp_path / "picture")):
        pixels = images.read(source)
        height, width, _ = pixels.shape
        assert pixels.dtype == np.uint8 and pixels[0, 0].tolist() == first
        assert pixels[height // 2, width // 2].tolist() == middle


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_a_photo_is_seen_the_right_way_up(tmp_path, kind):
    """A phone stores its picture sideways, with a tag that says how to turn it."""
    # where the red third ends up: left, right, right, left, top, top, bottom, bottom
    edges = "left right right left top top bottom bottom".split()
    for orientation, edge in enumerate(edges, 1):
        file = tmp_path / f"{orientation}"
        file.write_bytes(turned(kind, orientation))
        seen = images.read(file)
        assert seen.shape == ((24, 40, 3) if edge in ("left", "right") else (40, 24, 3))
        sides = {"left": seen[:, 2], "right": seen[:, -3], "top": seen[2], "bottom": seen[-3]}
        red = [side for side, pixels in sides.items() if pixels[5:-5, 0].mean() > 200]
        assert red == [edge], orientation


def test_whatever_is_wrong_with_a_picture_is_one_error_that_names_it(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 1_500_000, zip=True)
    texts = PngImagePlugin.PngInfo()
    for number in range(80):
        texts.add_text(f"{number}", "x" * 900_000, zip=True)
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    broken = {
        "text.png": encoded(RGBA, pnginfo=text),
        "texts.png": encoded(RGBA, pnginfo=texts),
        # 192 million pixels of one bit each: a small file
        "bomb.png": png(16_000, 12_000, 1, 0, b"\0" * 2001 * 12_000),
        "large.png": png(8200, 8200, 1, 0, b"\0" * 1026 * 8200),
        "floats.tiff": encoded(np.float32(RAMP / 65535), "tiff"),
        "ints.tiff": encoded(np.int32(RAMP) * 300, "tiff"),
        "empty.png": b"",
        "words.png": b"no picture",
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    }
    for kind in ("png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm"):
        content = encoded(noise, kind)
        broken[f"half.{kind}"] = content[: len(content) // 2]
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(images.PictureError):
            images.read(content)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    names = ["pipe.png", "folder.png", "zero.png", "loop.png", "missing.png", "x" * 300, "a\0b"]
    for name in [*broken, *names]:
        with pytest.raises(images.PictureError, match=name):
            images.read(tmp_path / name)
    for odd in (None, 5, "", [], b""):
        with pytest.raises(images.PictureError):
            images.read(odd)


def test_questions_whose_pictures_cannot_be_shown_are_left_out_and_named(tmp_path, capsys):
    images.save_image(tmp_path / "good.png", RED_LEFT)
    images.save_image(tmp_path / "strip.png", np.zeros((2, 450, 3), np.uint8))
    (tmp_path / "words.png").write_text("no picture")
    questions = []
    for name in ("good", "strip", "words", "good"):
        paths = [str(tmp_path / "good.png"), str(tmp_path / f"{name}.png")]
        questions.append({"id": f"q{len(questions)}", "images": paths})
    kept = images.with_pictures(questions)
    assert [question["id"] for question in kept] == ["q0", "q3"]
    said = capsys.readouterr().out
    assert "q1 is left out. The image" in said and "strip.png of 450 x 2 pixels" in said
    assert "words.png cannot be read" in said and "2 of 4 questions are left out" in said
    assert said.count("strip.png") == 1
