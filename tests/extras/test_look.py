"""world_model.py --interactive: lines of stdin drive it, a pseudo-terminal is left as it was. `pytest tests/extras/test_look.py`"""

import io
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest

import world_model
from extras.report import look
from lib.geometry import Motion, move_camera
from lib.rooms import TrueRenderer
from lib.simulators import read_instruction
from world_model import WorldModel

ROOT = Path(__file__).resolve().parents[2]


class TrueModel(WorldModel):
    """A world model that imagines the true view, for where the commands lead."""

    def imagine(self, queries):
        walk = self.walk
        views = []
        for query in queries:
            scene = {"room": walk.seed, "poses": walk.poses}
            views += TrueRenderer().imagine([query._replace(scene=scene)])
        return views


@pytest.fixture(scope="module")
def model():
    return TrueModel.tiny()


@pytest.fixture
def walk(model):
    walk = look.Walk(model)
    model.walk = walk
    return walk


def test_a_step_moves_the_camera_and_the_imagined_view_is_the_next_reference(walk):
    start = walk.poses[1]
    walk.back_to(2)
    walk = look.obey(walk, "turn left 30")
    walk = look.obey(walk, "w")
    turned = move_camera(start, Motion("dangle", -30.0))
    np.testing.assert_allclose(walk.poses[4], turned)
    np.testing.assert_allclose(walk.poses[5], move_camera(turned, Motion("dy", 0.5)))
    assert walk.reference == 6 and len(walk.images) == 6
    (_, reference), (_, imagined), (_, true) = walk.views
    assert reference is walk.images[4] and imagined is walk.images[5]
    assert np.array_equal(imagined, true)  # this model draws the truth: pose and room are the same
    assert "as commanded" in walk.words[1] and "not" not in walk.words[1]


def test_the_sentence_is_the_one_that_the_simulator_reads(walk):
    look.obey(walk, "2")
    look.obey(walk, "q")
    sight, sentence = walk.words[0].split(": ")
    assert read_instruction(sentence) == (None, Motion("dangle", -45.0))
    assert f"{len(walk.model.arrange(walk.images[:4], 2)[0])} images, Image-2 last" in sight


def test_a_given_view_begins_again_and_n_is_another_room(walk):
    look.obey(walk, "q")
    look.obey(walk, "3")
    assert walk.reference == 3 and len(walk.images) == 4
    other = look.obey(walk, "n")
    assert other.seed == walk.seed + 1 and not np.array_equal(other.images[0], walk.images[0])


@pytest.mark.parametrize(
    "text, kind, amount",
    [
        ("w", "dy", 0.5),
        ("s 1", "dy", -1.0),
        ("a", "dx", -0.5),
        ("turn left 30", "dangle", -30.0),
        ("e", "dangle", 45.0),
        ("look down 20", "dphi", -20.0),
        ("move 1.5 meters to the left", "dx", -1.5),
    ],
)
def test_motions_as_they_may_be_typed(text, kind, amount):
    assert look.read_motion(text) == Motion(kind, amount)


@pytest.mark.parametrize("text", ["zz", "w 0", "turn", "30", "turn left -30"])
def test_what_is_no_motion_is_a_sentence(text):
    with pytest.raises(ValueError):
        look.read_motion(text)


def test_no_camera_leaves_the_room(walk):
    before = list(walk.images)
    for command in ("w 9", "r 5", "f 5"):
        with pytest.raises(ValueError, match="out of the room"):
            look.obey(walk, command)
    assert walk.images == before


def test_half_blocks_give_back_the_pixels():
    pixels = np.arange(4 * 3 * 3, dtype=np.uint8).reshape(4, 3, 3)
    lines = look.half_blocks(pixels)
    assert len(lines) == 2
    for line, upper, lower in zip(lines, pixels[::2], pixels[1::2], strict=True):
        colours = np.array(re.findall(r"8;2;(\d+);(\d+);(\d+)m", line), int)
        assert np.array_equal(colours[::2], upper) and np.array_equal(colours[1::2], lower)
        assert line.endswith("\x1b[0m")


@pytest.mark.parametrize("columns, lines", [(80, 24), (100, 34), (200, 60)])
def test_a_screen_fits_its_terminal(walk, monkeypatch, columns, lines):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(lines))
    look.obey(walk, "q")
    rows = re.sub(r"\x1b\[[\d;]*m", "", walk.screen(look.TAUGHT)).split("\n")
    assert len(rows) < lines and max(map(len, rows)) <= columns


def test_lines_of_stdin_drive_it(tmp_path, monkeypatch, capsys):
    """The command itself, with a model in a folder; a bad line goes on, the end of stdin ends it."""
    monkeypatch.chdir(tmp_path)
    WorldModel.tiny().save(tmp_path / "out" / "wm")
    monkeypatch.setattr(sys, "stdin", io.StringIO("q\nnonsense\n\n"))
    world_model.main(["--interactive", "--steps", "1"])
    output = capsys.readouterr().out
    assert output.count("Room 3000000") == 4
    assert "'nonsense' is no command" in output and "turn 45 degrees to the left" in output
    assert "\x1b[?1049h" not in output


@pytest.mark.parametrize("flags", ["", "--motion x", "--images a.png", "--interactive --motion x"])
def test_one_picture_or_the_walk(flags, capsys):
    with pytest.raises(SystemExit):
        world_model.parse_args(flags.split())
    assert "--images and --motion" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("last", ["x", "\x03"])
def test_a_terminal_is_left_as_it_was(tmp_path, last):
    """A key, a typed motion, then x or Ctrl-C: the cursor and the modes are back."""
    WorldModel.tiny().save(tmp_path / "out" / "wm")
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, ROOT / "world_model.py", "--interactive", "--steps", "1"],
        cwd=tmp_path,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=controlling_terminal,
    )
    output, end = b"", look.HELP[-1].encode()  # of a screen
    for key, screens in (("q", 1), (":", 2), (last, 3)):
        while output.count(end) < screens:
            output += os.read(ours, 65536)
        os.write(ours, key.encode())
        if key == ":":
            # a line that comes while the terminal changes its modes is never seen as a line
            while not output.endswith(b": "):
                output += os.read(ours, 65536)
            os.write(ours, b"turn right 90\n")
    while b"\x1b[?1049l" not in output:
        output += os.read(ours, 65536)
    assert process.wait(60) == 0
    assert b"turn 90 degrees to the right" in output and b"\x1b[?25h" in output
    assert termios.tcgetattr(theirs)[3] == before[3]
    assert b"Traceback" not in output


def controlling_terminal():
    """Make stdin the terminal of a new session, so that Ctrl-C reaches it."""
    import fcntl
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background ignore it
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
