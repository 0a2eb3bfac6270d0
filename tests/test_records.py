"""Files that are whole or not there, logs, and the one decoder of pictures. `pytest tests/test_records.py`"""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from lib import images, records


def test_a_folder_shows_all_files_or_none(tmp_path):
    with pytest.raises(KeyError), records.whole_folder(tmp_path) as part:
        (part / "model.bin").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with records.whole_folder(tmp_path) as part:
        (part / "model.bin").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["model.bin"]


def test_the_log_of_a_resumed_run_has_each_step_once(tmp_path):
    log = records.MetricLog(tmp_path / "log.jsonl")
    for step in range(4):
        log.write(step, reward=step / 3, broken=float("nan"))
    with open(log.path, "a") as file:
        file.write('{"step": 4, "rew')  # the process was killed here
    log = records.MetricLog(log.path, resume_step=2)
    log.write(2, reward=torch.tensor(7.0))
    assert records.read_log(log.path) == [
        {"step": 0, "reward": 0.0, "broken": None},
        {"step": 1, "reward": 0.333333, "broken": None},
        {"step": 2, "reward": 7.0},
    ]


@pytest.mark.parametrize(
    "line, sentence", [("{", "line 2 is not JSON"), ("[1]", "line 2 is not a JSON object")]
)
def test_a_bad_line_is_named(tmp_path, line, sentence):
    file = tmp_path / "questions_train.jsonl"
    file.write_text(f'{{"id": 1}}\n{line}\n')
    with pytest.raises(SystemExit, match=sentence):
        records.load_jsonl(file)
    with pytest.raises(SystemExit, match="`python data.py triples --out"):
        records.load_jsonl(tmp_path / "triples_val.jsonl")


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_a_photo_is_seen_the_right_way_up(tmp_path):
    """A phone stores its picture sideways, with a tag that says how to turn it."""
    pixels = np.zeros((24, 40, 3), np.uint8)  # 40 wide, 24 high, the left third red
    pixels[:, :13, 0] = 255
    picture = Image.fromarray(pixels)
    tag = picture.getexif()
    tag[0x0112] = 6  # to be shown turned by 90 degrees, clockwise
    picture.save(tmp_path / "phone.jpg", exif=tag, quality=95)
    for source in (tmp_path / "phone.jpg", (tmp_path / "phone.jpg").read_bytes()):
        upright = images.read(source)
        assert upright.shape == (40, 24, 3)
        assert upright[2, 12, 0] > 200 and upright[-3, 2, 0] < 60  # red is at the top


def test_what_is_transparent_is_white(tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 0] = 255
    pixels[4:12, 4:12, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([255, 0, 255, 0, 0, 255] + [0] * 762)
    palette.paste(1, (4, 4, 12, 12))
    palette.save(tmp_path / "palette.png", transparency=0)
    for name in ("rgba.png", "palette.png"):
        assert images.read(tmp_path / name)[0, 0].tolist() == [255] * 3


def test_sixteen_bits_of_grey_become_eight(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    assert images.read(tmp_path / "ramp.png")[32, 32].tolist() == [ramp[32, 32] // 257] * 3


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_whatever_is_wrong_with_a_picture_is_one_error_that_names_it(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 1_500_000, zip=True)
    Image.new("RGB", (32, 32), "green").save(tmp_path / "text.png", pnginfo=text)
    row = b"\0" * (1 + 16_000 // 8)  # 192 million pixels of one bit each: a small file
    head = struct.pack(">IIBBBBB", 16_000, 12_000, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row * 12_000, 1))
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b""))
    whole = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(whole, "png")
    (tmp_path / "half.png").write_bytes(whole.getvalue()[:80])
    (tmp_path / "words.png").write_text("no picture")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("text.png", "large.png", "half.png", "words.png", "pipe.png", "missing.png"):
        with pytest.raises(images.PictureError, match=name):
            images.read(tmp_path / name)
    with pytest.raises(images.PictureError):
        images.read(b"no picture")
