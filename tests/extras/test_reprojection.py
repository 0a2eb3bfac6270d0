"""The simulator that needs no training: views as a point cloud."""

import numpy as np
import pytest
from test_consistency import ROWS, query

from extras.reprojection import Reprojection, fill_holes, points, splat
from lib.consistency import recover_all, score_views
from lib.geometry import Motion, move_camera


@pytest.mark.slow
def test_reprojection_shows_the_commanded_view():
    rows = [row for row in ROWS if row["motion"]["kind"] != "dphi"]
    views = Reprojection().imagine([query(row, None) for row in rows])
    result = score_views(rows, views, recover_all(rows, views)[0])
    assert result["pose"] == 1 and result["content"] > 0.95


def test_reprojection_takes_no_depth_from_an_imagined_view():
    """An imagined view at a commanded pose adds no points, however wrong it is; a motion may still start from it."""
    row, grey = ROWS[0], np.full((32, 32, 3), 90, np.uint8)
    elsewhere = move_camera(np.array(row["context_c2w"][1]), Motion("dx", 1.0)).tolist()
    plain, more = Reprojection().imagine(
        [
            query(row, None),
            query(row, None, [*row["context"], grey], [*row["context_c2w"], elsewhere]),
        ]
    )
    np.testing.assert_array_equal(plain, more)
    with pytest.raises(ValueError, match="no depth"):
        Reprojection().imagine([query(row, None)._replace(scene=None)])


def test_splat_keeps_the_nearest_and_holes_take_the_nearest_colour():
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    view, seen = splat(
        np.array([[0.1, 0.1, 2.0], [0.05, 0.05, 1.0], [0.1, 0.1, -1.0]]), colours, np.eye(4), 4
    )
    assert seen.sum() == 1 and view[2, 2].tolist() == [0, 255, 0]
    assert (fill_holes(view, seen) == [0, 255, 0]).all()
    black = np.zeros((4, 4, 3), np.uint8)
    assert (fill_holes(black, np.zeros((4, 4), bool)) == 0).all()
    where, rgb = points(view, np.array([[1.0, 0, 0, 0]] * 4), np.eye(4), fine=2)
    assert where.shape == (16, 3) and rgb.shape == (16, 3)


def test_holes_take_the_nearest_colour_and_none_from_across_the_edge():
    view, seen = np.zeros((1, 5, 3), np.uint8), np.array([[True, False, True, False, False]])
    view[0, 0], view[0, 2] = (255, 0, 0), (0, 255, 0)
    want = np.array([[255, 0, 0], [255, 0, 0], [0, 255, 0], [0, 255, 0], [0, 255, 0]])
    for turn in (
        lambda x: x,
        lambda x: x[:, ::-1],
        lambda x: x.swapaxes(0, 1),
        lambda x: x[:, ::-1].swapaxes(0, 1),
    ):
        filled = fill_holes(turn(view), turn(seen))
        ours = turn(want[None])
        assert (filled[turn(seen)] == turn(view)[turn(seen)]).all()
        ends = turn(
            np.array([[False, False, False, True, True]])
        )  # the one between may take either
        assert (filled[ends] == ours[ends]).all()
