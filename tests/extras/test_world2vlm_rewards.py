"""World2VLM's reward, against its formulas by hand: pytest tests/test_world2vlm_rewards.py.  CPU, 1 s."""

import numpy as np
import pytest

from extras.world2vlm.rewards import world2vlm


def total(task, answer, response):
    return world2vlm(task, answer, response)["total"]


@pytest.mark.parametrize(
    "response, want, parts",
    [
        ("move forward 4.3 meters", 1.0, (1, 1, 1)),
        (
            "Move  forward\n4.3 METERS.!",
            1.0,
            (1, 1, 1),
        ),  # case, white space, what stands at the end
        ("I think: move forward 4.3 meter", 1.0, (1, 1, 1)),  # anywhere; singular
        ("remove forward 4.3 meters", 1.0, (1, 1, 1)),  # no word boundary
        ("move forward 4.8 meters", 1.0, (1, 1, 1)),  # |v - v*| = 0.5: still full marks
        (
            "move forward 2.05 meters",
            0.10 + 0.35 + 0.55 * (1 - 1.75 / 4.5),
            (1, 1, 1 - 1.75 / 4.5),
        ),  # 2.25 off
        ("move forward 9.3 meters", 0.45, (1, 1, 0)),  # 5 m off
        ("move forward -0.7 meters", 0.45, (1, 1, 0)),  # a minus sign is read: 5 m off
        ("move backward 4.3 meters", 0.10, (1, 0, 0)),
        ("turn left 4.3 degrees", 0.10, (1, 0, 0)),
        (
            "move left 4.3 meters; move forward 4.3 meters",
            1.0,
            (1, 1, 1),
        ),  # listing all is not punished
        (
            "move forward 9 meters or move left 4.3 meters",
            0.10 + 0.35 + 0.55 * (1 - 4.2 / 4.5),
            (1, 1, 1 - 4.2 / 4.5),
        ),
    ],
)
def test_one_action(response, want, parts):
    """0.10 fmt + 0.35 sem + 0.55 num, each the best of all candidates; num asks for the right kind."""
    got = world2vlm("A1", "move forward 4.3 meters", response)
    assert got["total"] == pytest.approx(want)
    assert (got["format"], got["action"], got["numeric"]) == pytest.approx(parts)
    assert list(got) == ["total", "format", "action", "numeric"]


@pytest.mark.parametrize(
    "response",
    [
        "move forward 4.3 m",
        "turn left 20 deg",
        "turn left 20°",
        "move forward +4 meters",
        "move forward .5 meters",
        "move forward 4,3 meters",
        "move forward four meters",
        "move forward by 4 meters",
        "move forward 4.3meters",
        "shift left 2 meters",
        "moved forward 2 meters",
        "move up 2 meters",
        "turn forward 20 degrees",
        "",
        None,
    ],
)
def test_what_is_no_action(response):
    assert world2vlm("A1", "move forward 4.3 meters", response) == {
        "total": 0,
        "format": 0,
        "action": 0,
        "numeric": 0,
    }


@pytest.mark.parametrize("degrees, want", [(100, 1), (95, 1), (52.5, 0.5), (10, 0), (460, 0)])
def test_degrees(degrees, want):
    """lo 5, hi 90: 47.5 off is half way, 90 off is nothing; an angle does not wrap."""
    got = world2vlm("A2", "turn left 100 degrees", f"turn left {degrees} degrees")
    assert got["numeric"] == pytest.approx(want) and got["total"] == pytest.approx(
        0.45 + 0.55 * want
    )


TWO = "move forward 1.8 meters; turn left 50 degrees"


@pytest.mark.parametrize(
    "response, want",
    [
        (TWO, 1.0),
        (
            "First turn left 50 degrees, then move forward 1.8 meters",
            0.10 + 0.25,
        ),  # swapped: kinds alone
        (
            "move forward 1.8 meters",
            0.10 + 0.25 / 2 + 0.35 / 2 + 0.30 / 2,
        ),  # one missing at the end
        (
            TWO + "; turn left 5 degrees",
            0.10 + 0.25 * 2 / 3 + 0.35 + 0.30 - 0.03,
        ),  # one too many, kind used
        ("move left 1 meters; " * 5, 0.10 - 3 * 0.03),
        ("move left 1 meters; " * 6, 0.0),  # the fee eats the format
        (
            "move forward 4.55 meters; turn left 97.5 degrees",
            0.70 + 0.30 * (0.5 + 0.5) / 2,
        ),  # each half way
        ("move forward 1.8 meters; turn right 50 degrees", 0.10 + 0.25 / 2 + 0.35 / 2 + 0.30 / 2),
        ("move forward 1.8 meters; move forward 1.8 meters", 0.10 + 0.25 / 2 + 0.35 / 2 + 0.30 / 2),
        ("", 0.0),
    ],
)
def test_a_sequence(response, want):
    """max(0, 0.10 fmt + 0.25 sem + 0.35 ord + 0.30 num - 0.03 max(0, n - m)), m = 2"""
    assert total("A3", TWO, response) == total("D3", TWO, response) == pytest.approx(want)


def test_the_ladder_of_sequences():
    """The fact sheet's values."""
    assert total("A3", TWO, TWO + "; turn left 50 degrees") == pytest.approx(0.8867, abs=1e-4)
    assert total("A3", TWO, "move left 1 meters;" * 5) == pytest.approx(0.01)
    assert list(world2vlm("A3", TWO, "")) == [
        "total",
        "format",
        "action",
        "order",
        "numeric",
    ]


@pytest.mark.parametrize(
    "answer, response, want",
    [
        ("yes", "Yes.", 1.0),
        ("yes", "true", 1.0),
        ("false", " NO!\n", 1.0),
        ("no", "yes", 0.2),
        ("true", "false", 0.2),
        ("yes", "yes, it does", 0.0),
        ("yes", "the answer is yes", 0.0),
        ("yes", "", 0.0),
        ("yes", None, 0.0),
        ("A", "yes", 0.2),
    ],
)  # the released code: 0 where the reference is neither
def test_yes_or_no(answer, response, want):
    for task in ("A4", "D2", "D4"):
        got = world2vlm(task, answer, response)
        assert got["total"] == pytest.approx(want) and list(got) == ["total", "format", "accuracy"]


BOX = "[100, 200, 300, 400]"


@pytest.mark.parametrize(
    "response, want",
    [
        (BOX, 1.0),
        ("  [100,200 , 300,400]\n", 1.0),
        ("[100.0, 200, 300, 400]", 1.0),
        (f"{BOX}.", 0.88),
        (f"It is at {BOX} now, not at [0, 0, 1, 1]", 0.88),
        (f"bbox {BOX}", 0.88),
        (f"[{BOX}]", 0.88),
        ("[300, 200, 100, 400]", 1.0),
        ("[300, 400, 100, 200]", 1.0),  # released: 0.5765
        ("100, 200, 300, 400", 0.0),
        ("[100, 200, 300]", 0.0),
        ("[a, b, c, d]", 0.0),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_the_form_of_a_box(response, want):
    assert total("D1", BOX, response) == pytest.approx(want)


def test_a_box_that_is_a_little_off():
    """[150, 200, 350, 400] against [100, 200, 300, 400], 200 x 200 both.

    IoU = 150 * 200 / (2 * 40000 - 30000) = 0.6; centres 50 apart, d* = 282.84, 0.6 d* = 169.71; L1 = (50 + 50) / 4 = 25
    """
    got = world2vlm("D1", BOX, "[150, 200, 350, 400]")
    center, l1 = 1 - 50 / (0.6 * 200 * 2**0.5), 1 - 25 / 180
    geometry = 0.45 * 0.6 + 0.20 * center + 0.20 * l1 + 0.15
    assert (got["iou"], got["center"], got["l1"], got["size"]) == pytest.approx(
        (0.6, center, l1, 1.0)
    )
    assert got["validity"] == 1 and got["geometry"] == pytest.approx(geometry)
    assert got["total"] == pytest.approx(0.20 + 0.15 + 0.65 * geometry)
    assert list(got) == ["total", "format", "validity", "geometry", "iou", "center", "size", "l1"]


def test_the_size_of_a_box_and_the_least_radius_of_its_centre():
    """Half as wide: |ln 0.5| / 1.6 is lost. A small true box: 80, not 0.6 d*, is the radius."""
    assert world2vlm("D1", BOX, "[100, 200, 200, 400]")["size"] == pytest.approx(
        1 - np.log(2) / 1.6
    )
    got = world2vlm("D1", "[500, 500, 530, 540]", "[520, 500, 550, 540]")  # d* = 50
    assert got["center"] == pytest.approx(1 - 20 / 80)


def test_the_radius_of_a_centre_is_that_of_the_true_box():
    """Centres 60 apart: of d* = 282.84 the radius is 169.71, of the predicted box's 56.57 it would be 80."""
    got = world2vlm("D1", BOX, "[240, 280, 280, 320]")
    assert got["center"] == pytest.approx(1 - 60 / (0.6 * 200 * 2**0.5))
    swapped = world2vlm("D1", "[240, 280, 280, 320]", BOX)
    assert swapped["center"] == pytest.approx(1 - 60 / 80)


def test_a_box_beyond_the_picture():
    """Overflow is the mean distance outside: of (-100, 0, 0, 0) 25. It costs validity, which discounts geometry."""
    got = world2vlm("D1", "[0, 200, 300, 400]", "[-100, 200, 300, 400]")
    valid = 0.7 + 0.3 * (1 - 25 / 200)
    assert got["validity"] == pytest.approx(valid) and got["iou"] == 1
    assert got["total"] == pytest.approx(0.20 + 0.15 * valid + 0.65 * (0.3 + 0.7 * valid))
    got = world2vlm(
        "D1", BOX, "[5000, 5000, 6000, 6000]"
    )  # wholly outside: becomes the point (1000, 1000)
    assert got["validity"] == 0 and got["total"] == pytest.approx(0.20)  # released: 0.305


def test_a_box_without_width():
    """No size without a width (released: sides count as 1 at least), and it is no valid box."""
    got = world2vlm("D1", "[500, 500, 501, 600]", "[500, 500, 500, 600]")
    assert got["size"] == 0 and got["iou"] == 0 and got["validity"] == pytest.approx(0.3)
    assert world2vlm("D1", "[7, 7, 7, 7]", "[7, 7, 7, 7]")["iou"] == 0  # an empty union


@pytest.mark.parametrize(
    "task, answer", [("A1", "move left 2 meters"), ("A3", TWO), ("D2", "yes"), ("D1", BOX)]
)
def test_too_long_is_worst_whatever_it_says(task, answer):
    """200 characters are scored, 201 are not; outer white space counts (released: it does not)."""
    assert total(task, answer, answer + " " * (200 - len(answer))) == pytest.approx(1.0)
    got = world2vlm(task, answer, answer + " " * (201 - len(answer)))
    assert got["total"] == -1 and not any(value for key, value in got.items() if key != "total")
    assert got.keys() == world2vlm(task, answer, answer).keys()


def test_no_response_raises_and_all_lie_in_the_range():
    rng, answers = (
        np.random.default_rng(0),
        {
            "A1": "move left 2 meters",
            "A2": "turn left 20 degrees",
            "A3": TWO,
            "A4": "true",
            "D1": BOX,
            "D2": "no",
            "D3": TWO,
            "D4": "yes",
        },
    )
    pieces = [
        *answers.values(),
        "[",
        "]",
        "-",
        "9" * 60,
        "٣",
        "\0",
        "\ud800",
        " ",
        ";",
        "move left 1e9 meters",
        "[0,0,0,0]",
        "[9e9, -1, 2, 3]",
        "turn left -0 degrees",
        "[-99999999, 0, 1, 99999999.5]",
    ]
    for task, answer in answers.items():
        for _ in range(200):
            response = "".join(rng.choice(pieces) for _ in range(rng.integers(0, 5)))
            got = world2vlm(task, answer, response)
            low = -1 if len(response) > 200 else 0
            assert low <= got.pop("total") <= 1 + 1e-9 and all(
                0 <= part <= 1 + 1e-9 for part in got.values()
            )


def test_a_bad_reference_is_refused():
    for task, answer in (("A1", "left"), ("A3", ""), ("D1", "yes")):
        with pytest.raises(ValueError, match="reference"):
            world2vlm(task, answer, "yes")
    with pytest.raises(ValueError, match="no task 'A5'"):
        world2vlm("A5", "yes", "yes")
