"""The pages that evaluate.py leaves: every question as a dialogue, the modes side by side, the simulators."""

import argparse
from pathlib import Path

import numpy as np

import rewards
from extras.report import report
from extras.report.curves import figure_image
from extras.report.diagnosis import tally
from lib.answers import Prediction, with_keys
from lib.geometry import Motion
from lib.images import contact_sheet, save_image
from lib.scores import title_of
from lib.simulators import phrase

EXAMPLES = ("won by looking", "lost by a wrong view", "needless")


def causes(records: dict[tuple, dict[str, Prediction]]) -> dict[str, dict]:
    """{mode: {simulator: how often which diagnosis was made}}.   records: {(mode, simulator): {key: prediction}}"""
    tallies = {}
    for (mode, simulator), predictions in records.items():
        counts = tally(list(predictions.values()))
        if counts:
            tallies.setdefault(mode, {})[simulator] = counts
    return tallies


def write_answers(
    args: argparse.Namespace, results: dict, questions: list[dict], records: dict
) -> list[str]:
    """workflow.png and, by --report, report.html -> the names of what was written."""
    out = Path(args.out)
    names = []
    workflow = figure_image(report.workflow(results))
    if workflow:  # None without matplotlib
        save_image(out / "workflow.png", workflow)
        names.append("workflow.png")
    if args.report:
        report.write(
            out / "report.html",
            f"{args.bench}: {results['policy']}",
            results,
            curves=sorted(Path(results["policy"]).parent.glob("*/curves.png")),
            dialogues=dialogue_rows(records, questions),
            folder=out,
            data=folder_of_data(args),
        )
        names.append("report.html")
    return names


def folder_of_data(args: argparse.Namespace) -> Path:
    """Where the pictures of --data lie, which may name the file of the questions, too."""
    path = Path(args.data)
    if path.is_file():
        path = path.parent
    return path.parent if path.name == "raw" else path  # MindCube's file lies one folder deeper


def write_simulators(out: Path, results: dict, rows: list[dict], views: dict) -> list[str]:
    """report.html and dose.png of --bench wm -> the names of what was written."""
    pictures = []
    most = max(len(row["context"]) for row in rows)
    blank = np.full((1, 1, 3), 255, np.uint8)  # where another context has one view more
    for index in range(0, len(rows), max(1, len(rows) // 8)):
        row = rows[index]
        context = [blank] * (most - len(row["context"])) + row["context"]
        motion = f"Image-{row['reference']}:\n{phrase(Motion(**row['motion']))}"
        imagined = [own[index] for own in views.values()]
        pictures.append([*context, motion, *imagined, row["target"]])
    names = [Path(name).name for name in views]
    head = ["context", *[""] * most, *names, "true"]
    curves = figure_image(report.dose_curves(results["dose"])) if results["dose"] else None
    report.write(
        out / "report.html",
        "Pose and content consistency of the simulator",
        wm=results,
        sheet=contact_sheet(head, pictures),
        dose=curves,
    )
    if not curves:  # None also without matplotlib
        return ["report.html"]
    save_image(out / "dose.png", curves)
    return ["report.html", "dose.png"]


def dialogue_rows(records: dict, questions: list[dict]) -> list[dict]:
    """What the report shows of every question in every mode: its prediction, in the order of the questions.

    records   {(mode, simulator): {key: prediction}}
    returns   predictions with "question", "run", "hurt": wrong after a call, though right in mode direct; "reward"; and
              "example", of EXAMPLES, for the first of its kind in a family
    """
    examples = set()
    direct = records.get(("direct", "none"), {})
    rows = []
    for key, question in with_keys(questions):
        alone = direct[key]["correct"] if key in direct else None
        for run, predictions in records.items():
            row = predictions[key]
            called = row["valid_calls"] > 0
            hurt = alone is not None and called and row["correct"] < alone
            reward = reward_parts(row, alone)
            example = example_of(row, alone)
            if (row["category"], example) in examples:
                example = None
            examples.add((row["category"], example))
            more = {"question": question, "run": title_of(*run), "hurt": hurt, "reward": reward}
            rows.append({**row, **more, "example": example})
    return rows


def example_of(row: Prediction, alone: float | None) -> str | None:
    """Which of EXAMPLES an agentic dialogue is, if any.   alone: as in `reward_parts`"""
    if row["mode"] != "agentic" or not row["diagnosis"] or not row["valid_calls"]:
        return None
    won, lost, needless = EXAMPLES
    case = row["diagnosis"]["case"]
    if not row["needs_view"]:
        return needless
    if case in ("trusted", "deviates"):
        return lost
    return won if case == "resolved" and alone == 0 else None


def reward_parts(row: Prediction, alone: float | None) -> dict[str, float]:
    """The terms of rewards.py by the paper's weights, whatever a run was trained with.

    alone   exact match in mode direct, one greedy answer, or None if it is not known
    """
    match = row["correct"]
    well_formed = float(row["well_formed"])
    calls = row["valid_calls"]
    parts = {"match": match, "format": well_formed, "calls": calls}
    parts["phase 1"] = rewards.phase1_reward(match, well_formed, calls)
    if alone is not None:
        parts["gain"] = rewards.tool_gain(match, calls, alone)
        parts["phase 2"] = rewards.phase2_reward(match, well_formed, calls, alone)
    return parts
