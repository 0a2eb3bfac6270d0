"""Pictures that take matplotlib: any figure, and the curves of a stage of RL."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from lib.distributed import say
from lib.images import decode, save_image
from lib.records import read_log


def figure_image(draw: Callable) -> Image.Image | None:
    """`draw(pyplot)` -> the figure it returns, as a picture; None where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a "$" in a name is no formula
    from matplotlib import pyplot

    figure, buffer = draw(pyplot), io.BytesIO()
    figure.savefig(buffer, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return decode(buffer.getvalue())


CURVES = (  # panels of curves.png; of `eval` the keys are "<mode> <key>"
    "reward",
    "match",
    "call_rate",
    "call_rate_needs_view",
    "gain",
    "entropy",
    "agentic match",
    "direct match",
)


def draw_curves(out: Path) -> None:
    """curves.png from log.jsonl: a panel per key of CURVES that the log has, four in a row."""
    rows = read_log(out / "log.jsonl")
    for row in rows:
        for mode, means in row.get("eval", {}).items():
            row |= {f"{mode} {key}": value for key, value in means.items()}
    curves = {}
    for key in CURVES:
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            curves[key] = np.array(points)  # (points, 2)

    def draw(pyplot):
        lines = math.ceil(len(curves) / 4)
        figure = pyplot.figure(figsize=(13, 3 * lines), layout="constrained")
        for number, (key, points) in enumerate(curves.items(), 1):
            axis = figure.add_subplot(lines, 4, number)
            axis.plot(points[:, 0], points[:, 1], marker=".")
            axis.set_title(key)
        return figure

    image = figure_image(draw)
    if image is None:
        say("No curves.png without matplotlib (pip install matplotlib); log.jsonl has the numbers.")
    else:
        save_image(out / "curves.png", image)
