"""
What the stages of a demo logged, as tables and a picture: python -m experiments curves --out out/demo

A column is what the log said at that step; of a key that is logged now and then, its newest value by then.
docs/healthy-run.md shows them for a run that went well: hold your own beside it.
"""

import argparse
from pathlib import Path

import numpy as np

from experiments.runner import DEMO, markdown
from lib.distributed import fail, say
from lib.images import save_image
from lib.records import read_log

STEPS = (1, 10, 50, 250, 1000)  # and the last
RL_KEYS = (
    "reward",
    "match",
    "format",
    "call_rate_needs_view",
    "call_rate_answerable",
    "invalid_calls",
    "gain",
    "groups_flat",
    "length",
    "entropy",
    "ratio_max",
    "mismatch",
    "grad_norm",
    "agentic match",
    "agentic call_rate",
    "direct match",
)
STAGES = {  # rows of each table; of `eval` the keys are "<mode> <key>"
    "wm": ("loss_flow", "loss_content", "grad_norm", "nearest", "mse"),
    "sft": ("loss", "facts", "grad_norm"),
    "phase1": RL_KEYS,
    "phase2": RL_KEYS,
}
PANELS = (  # of the picture: a stage and its curves
    ("wm", "loss_flow", "loss_content"),
    ("wm", "nearest", "mse"),
    ("sft", "loss"),
    ("sft", "facts"),
    ("phase1", "call_rate_needs_view", "call_rate_answerable"),
    ("phase1", "match", "agentic match", "direct match"),
    ("phase2", "call_rate_needs_view", "call_rate_answerable"),
    ("phase2", "match", "agentic match", "direct match"),
)


def rows_of(folder: Path) -> list[dict]:
    """The log of a stage, with the means of an evaluation beside the other keys."""
    rows = read_log(folder / "log.jsonl")
    for row in rows:
        for mode, means in row.pop("eval", {}).items():
            row |= {f"{mode} {key}": value for key, value in means.items()}
    return rows


def table(rows: list[dict], keys: tuple[str, ...]) -> list[str]:
    """The lines of a stage's table: a row per key that was logged, a column per step."""
    steps = rows[-1]["step"]
    if "lr" in rows[-1]:  # no evaluation, which may end the log
        steps += 1
    columns = [step for step in STEPS if step < steps] + [steps]
    cells = []
    for key in keys:
        points = [(row["step"] + 1, row[key]) for row in rows if row.get(key) is not None]
        if not points:
            continue
        values = []
        for column in columns:
            last = column == columns[-1]
            seen = [value for step, value in points if last or step <= column]
            values.append(f"{seen[-1]:.3g}" if seen else "")
        cells.append([f"`{key}`", *values])
    return markdown(["after step", *map(str, columns)], cells)


def draw(logs: dict[str, list[dict]], pyplot):
    """Panels of curves as a figure."""
    figure, axes = pyplot.subplots(2, 4, figsize=(13, 5.5), layout="constrained")
    for axis, (stage, *keys) in zip(axes.flat, PANELS, strict=True):
        for key in keys:
            rows = [row for row in logs.get(stage, []) if row.get(key) is not None]
            points = np.reshape([(row["step"], row[key]) for row in rows], (-1, 2))
            axis.plot(*points.T, marker="." if len(points) < 70 else "", linewidth=1, label=key)
        axis.set_title(stage)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    return figure


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's flags."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--out", type=Path, default=Path(DEMO), help="folder of wm/, sft/, phase1/, ..."
    )
    parser.add_argument("--picture", type=Path, help="file of the curves (takes matplotlib)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Print the tables of all stages that have a log."""
    args = parse_args(argv)
    logs = {stage: rows_of(args.out / stage) for stage in STAGES}
    logs = {stage: rows for stage, rows in logs.items() if rows}
    if not logs:
        fail(f"{args.out} holds no log of a stage. `python -m experiments demo` makes out/demo.")
    for stage, rows in logs.items():
        print(f"{stage}\n\n" + "\n".join(table(rows, STAGES[stage])) + "\n")
    if args.picture:
        from extras.report.curves import figure_image

        image = figure_image(lambda pyplot: draw(logs, pyplot))
        if image is None:
            fail("The picture takes matplotlib. Type: pip install matplotlib")
        save_image(args.picture, image)
        say(f"curves: {args.picture}")
