"""Depth as scans store it: odd files give metres, or one error that names them. `pytest tests/extras/test_depth_files.py`"""

import io
import os

import numpy as np
import pytest
from PIL import Image

from extras.scans.depth_files import ORIENTATION, read_depth, size_in_header
from lib.images import PictureError, read

RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))  # from black to white


def encoded(pixels, kind="png", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_the_header_tells_the_size_of_the_picture_the_right_way_up(tmp_path, kind):
    tag = Image.Exif()
    for orientation in range(1, 9):
        tag[ORIENTATION] = orientation
        file = tmp_path / f"{orientation}"
        file.write_bytes(encoded(np.zeros((24, 40, 3), np.uint8), kind, exif=tag))
        assert size_in_header(file) == read(file).shape[1::-1]


@pytest.mark.parametrize("name", ["pipe.png", "folder.png", "missing.png", "empty.png", "half.png"])
def test_what_is_no_depth_is_one_error_that_names_it(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "half.png").write_bytes(encoded(RAMP)[:100])
    with pytest.raises(PictureError, match=name):
        read_depth(tmp_path / name)


def test_depth_keeps_its_sixteen_bits_and_fits_its_file(tmp_path):
    (tmp_path / "depth.png").write_bytes(encoded(RAMP))
    np.testing.assert_array_equal(read_depth(tmp_path / "depth.png"), np.float32(RAMP / 1000))
    metres = np.float32([[1.5, np.nan], [-1, np.inf]])
    np.save(tmp_path / "depth.npy", metres)
    assert read_depth(tmp_path / "depth.npy").tolist() == [[1.5, 0], [0, 0]]
    assert size_in_header(tmp_path / "depth.npy") == (2, 2)
    whole = (tmp_path / "depth.npy").read_bytes()
    np.save(tmp_path / "nine.npy", np.ones((9, 9), np.float32))
    nine = (tmp_path / "nine.npy").read_bytes()
    claims = {
        "claims.npy": nine.replace(b"(9, 9), } ", b"(9, 90), }"),
        "half.npy": whole[:-4],
        "eight_bits.png": encoded(np.uint8(RAMP // 257)),
        "colours.png": encoded(np.zeros((16, 16, 4), np.uint8)),
    }
    for name, content in claims.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "letters.npy", np.array([["a", "b"]]))
    np.save(tmp_path / "pickle.npy", np.array([[{}]]), allow_pickle=True)
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2), np.float32))
    for name in [*claims, "letters.npy", "pickle.npy", "cube.npy"]:
        with pytest.raises(PictureError, match=name):
            read_depth(tmp_path / name)
