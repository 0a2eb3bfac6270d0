"""
One page to look at after a run: report.html, whole in itself (pictures inside, nothing fetched).

  table       accuracy, interval and calls: every part of the questions, every mode
  figures     accuracy by category and mode (a sentence without matplotlib), and the curves.png of the RL stages
  diagnosis   how often answers are right or wrong for which reason (extras/report/diagnosis.py)
  simulator   pose and content beside the trivial baselines and the oracles; a sheet context | motion | imagined |
              true; commanded against recovered motion
  dialogues   every question: what the policy asked for, what it was shown, what it would have seen in the room itself

The page is a template, page.html, which escapes what models and data say. It is made to be handed on: no absolute
path stands in it, and no picture from outside the folders of data and views, wherever a row may point. A thousand dialogues open quickly: each is a
<template>, built when it is opened, and each picture stands once in the page, as a thumbnail.
"""

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from extras.benches.common import open_image
from extras.report.curves import figure_image
from extras.report.diagnosis import CASES, true_views
from lib.geometry import UNITS
from lib.images import PictureError, load_image
from lib.protocol import motion_in
from lib.records import write_text
from lib.scores import CELL, COLUMNS, accuracy_text, consistency_row
from lib.simulators import phrase

FILTERS = {
    "wrong": "wrong only",
    "example": "an example of its family",
    "tool": "used the tool",
    "hurt": "the tool hurt (right without)",
    "invalid": "invalid call",
}
THUMBNAIL = 160  # pixels of the longer side
ABSOLUTE_PATH = re.compile(r"(?:file://|(?<![\w/.<~]))/(?!/)(?:[^\s/'\"<>()]+/)+([^\s/'\"<>()]*)")
MOST_IMAGES = 12  # given images of a question; of a video these many, evenly


def write(
    path: str | Path,
    title: str,
    results: dict | None = None,
    wm: dict | None = None,
    curves: list[Path] = (),
    sheet: Image.Image | str | None = None,
    dose: Image.Image | None = None,
    dialogues: list[dict] = (),
    folder: str | Path = ".",
    data: str | Path | None = None,
) -> None:
    """Write report.html; what is not given is left out.

    results     as results.json of a bench of questions;  wm: as results.json of --bench wm
    curves      curves.png of stages;  sheet: `images.contact_sheet` or a file;  dose: `dose_curves` as a picture
    dialogues   of pages.dialogue_rows;  folder: below which their imagined views lie;  data: the given ones
    """
    pictures = Pictures([folder, data or folder])
    page = {"title": title, "boxes": FILTERS, "pictures": pictures.uris}
    if results:
        page["results"] = results_table(results)
        page["note"] = results_note(results)
        page["workflow"] = data_uri(figure_image(workflow(results)))
    if results and results.get("diagnosis"):
        page["diagnosis"] = diagnosis_table(results["diagnosis"])
    if wm:
        page["wm"] = consistency_table(wm)
    if sheet is not None:
        page["sheet"] = data_uri(sheet)
    page["dose"] = data_uri(dose)
    page["curves"] = {file.parent.name: data_uri(file) for file in curves}
    page["dialogues"] = [dialogue_data(one, pictures, folder) for one in dialogues]
    cases = [one["diagnosis"]["case"] for one in dialogues if one["diagnosis"]]
    runs = [one["run"] for one in dialogues]
    page["selects"] = [
        {"name": "run", "label": "mode", "options": list(dict.fromkeys(runs))},
        {"name": "case", "label": "diagnosis", "options": list(dict.fromkeys(cases))},
    ]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, finalize=without_folders)
    page = environment.get_template("page.html").render(page)
    write_text(path, page)


def without_folders(value):
    """A text of the page, absolute paths in it cut down to their last part; pictures and all else as they are."""
    is_text = isinstance(value, str) and not hasattr(value, "__html__")
    if not is_text or value.startswith("data:image/"):
        return value
    return ABSOLUTE_PATH.sub(r"…/\1", value)


def data_uri(image: Image.Image | str | Path | None) -> str | None:
    """A picture, or its file, as a PNG inside the page; None for None."""
    if image is None:
        return None
    if not isinstance(image, Image.Image):
        image = Image.fromarray(load_image(image))
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---- tables: (head, rows of words and numbers) ---------------------------------------------------------------------------


def results_table(results: dict) -> tuple:
    """The final table of results.json: all, the strata of need, the categories; one column per mode."""
    modes = results["modes"]
    rows = [["all", *map(accuracy_text, modes.values())]]
    for group in ("by_need", "by_category"):
        for name in names_in(modes, group):
            parts = [summary[group][name] for summary in modes.values()]
            rows.append([name, *map(accuracy_text, parts)])
    return ["", *modes], rows


def names_in(modes: dict, group: str) -> list[str]:
    """The names of a group of questions, "by_need" or "by_category": all modes have the same questions."""
    return list(next(iter(modes.values()))[group])


def results_note(results: dict) -> str:
    """What the numbers of `results_table` are."""
    chances = {
        "guessing": results.get("chance"),
        "from the text alone": results.get("text_only_chance"),
    }
    known = [f"{name} {value:.3f}" for name, value in chances.items() if value is not None]
    return f"{CELL}. Chance: {', '.join(known)}."


def consistency_table(wm: dict) -> tuple:
    """Pose and content of the simulators (of --bench wm's results.json, or that itself), and what stands beside."""
    groups = {
        "simulators": wm.get("simulators") or {"simulator": wm},
        "baselines": wm["baselines"],
        "oracles": wm["oracles"],
    }
    rows = []
    for title, group in groups.items():
        for name, scores in group.items():
            rows.append([name, *consistency_row(scores), title])
    return ["", *COLUMNS, ""], rows


def diagnosis_table(diagnosis: dict) -> tuple:
    """results["diagnosis"]: {mode: {simulator: counts}} -> how many answers stand in which case."""
    runs = {}
    for mode, simulators in diagnosis.items():
        for name, counts in simulators.items():
            runs[f"{mode}, {name}"] = counts
    rows = []
    for case, meaning in CASES.items():
        counts = [run["cases"][case] for run in runs.values()]
        rows.append([f"{case}, {meaning}", *counts])
    for key, title in (("uses", ""), ("deviations", "wrong view: ")):
        for name in sorted({name for run in runs.values() for name in run[key]}):
            counts = [run[key].get(name, 0) for run in runs.values()]
            rows.append([title + name, *counts])
    return ["questions", *runs], rows


# ---- figures ---------------------------------------------------------------------------------------------------------


def workflow(results: dict) -> Callable:
    """results.json -> draw(pyplot): accuracy per category and overall, one bar per mode with its interval.

    With direct, forced and agentic of one policy this is the paper's Figure 3.
    """
    modes = results["modes"]
    names = names_in(modes, "by_category")

    def draw(pyplot):
        """One group of bars per category, and a last one for all questions."""
        figure, axes = pyplot.subplots(figsize=(max(9, 0.9 * len(names) + 2), 3))
        ticks, width = np.arange(len(names) + 1), 0.8 / len(modes)
        for m, (mode, summary) in enumerate(modes.items()):
            parts = [*(summary["by_category"][name] for name in names), summary]
            heights = np.array([part["accuracy"] for part in parts])
            bounds = np.array([part["ci95"] for part in parts])
            spread = np.maximum(0, [heights - bounds[:, 0], bounds[:, 1] - heights])
            shift = (m - (len(modes) - 1) / 2) * width
            axes.bar(ticks + shift, heights, width, yerr=spread, error_kw={"lw": 0.8}, label=mode)
        if results.get("chance") is not None:
            axes.axhline(results["chance"], color="gray", lw=0.8, ls=":")
        axes.axvline(len(names) - 0.5, color="gray", lw=0.8)
        axes.set_xticks(ticks, [*names, "overall"], rotation=30, ha="right")
        axes.set_ylim(0, 1)
        axes.set_ylabel("accuracy")
        axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return figure

    return draw


def dose_curves(dose: dict) -> Callable:
    """{simulator: `doses.dose_response`} -> draw(pyplot): commanded against recovered, a panel per kind.

    Medians and quartiles over rooms; filled where training showed that amount, hollow where it never did.
    """
    kinds = list(dict.fromkeys(kind for responses in dose.values() for kind in responses))

    def draw(pyplot):
        """A panel per kind of motion, a line per simulator."""
        size = (2.7 * len(kinds), 3)
        figure, axes = pyplot.subplots(1, len(kinds), figsize=size, squeeze=False)
        figure.set_layout_engine("constrained")
        for axis, kind in zip(axes[0], kinds, strict=True):
            responses = {name: own[kind] for name, own in dose.items() if kind in own}
            draw_responses(axis, responses)
            axis.set_title(f"{kind}, {UNITS[kind[1:]]}", fontsize=9)
            axis.set_xlabel("commanded (filled: trained on)", fontsize=8)
            axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2))
            axis.tick_params(labelsize=7)
        axes[0, 0].set_ylabel("recovered", fontsize=8)
        return figure

    return draw


def draw_responses(axis, responses: dict) -> None:
    """One panel of `dose_curves`: a line per simulator beside the diagonal."""
    end = max(point["amount"] for own in responses.values() for point in own["points"])
    axis.plot([0, end], [0, end], color="gray", lw=0.8, ls=":")
    for k, (name, response) in enumerate(responses.items()):
        points, colour = response["points"], f"C{k}"
        x = np.array([point["amount"] for point in points])
        y = np.array([point["median"] for point in points])
        low = np.array([point["low"] for point in points])
        high = np.array([point["high"] for point in points])
        label = f"slope {response['slope']:.2f}: {Path(name).name}"  # "_x" would be no label
        axis.errorbar(x, y, [y - low, high - y], color=colour, lw=0.8, label=label)
        fill = [colour if point["trained"] else "white" for point in points]
        axis.scatter(x, y, 22, fill, edgecolors=colour, zorder=3)


# ---- dialogues -------------------------------------------------------------------------------------------------------


class Pictures:
    """The pictures of a page, each once, as thumbnails; dialogues name them by number.

    folders   no file from outside them is shown
    """

    def __init__(self, folders: list[str | Path]):
        self.folders = [Path(folder).resolve() for folder in folders]
        self.uris = []
        self.numbers = {}

    def add(self, caption: str, source: str | np.ndarray, bench: str = "rooms") -> dict:
        """{"number" of a picture, "caption"}; the number is None for what is unreadable or not to be shown.

        source   (H, W, 3) uint8, or a file, opened as the bench has it
        """
        key = source if isinstance(source, str) else source.tobytes()
        if key not in self.numbers:
            self.numbers[key] = self.store(source, bench)
        return {"number": self.numbers[key], "caption": caption}

    def may_show(self, path: Path) -> bool:
        """Does a file lie in the folders, links followed?"""
        return any(path.resolve().is_relative_to(folder) for folder in self.folders)

    def store(self, source: str | np.ndarray, bench: str) -> int | None:
        """A thumbnail of a picture -> its number."""
        try:
            if isinstance(source, np.ndarray):
                image = Image.fromarray(source)
            elif self.may_show(Path(source)):
                image = open_image(source, bench)
            else:
                return None
        except PictureError:
            return None
        kind = "png" if max(image.size) <= 64 else "jpeg"  # in the tiny world every pixel counts
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=80)
        data = base64.b64encode(buffer.getvalue()).decode()
        self.uris.append(f"data:image/{kind};base64,{data}")
        return len(self.uris) - 1


def dialogue_data(record: dict, pictures: Pictures, folder: str | Path) -> dict:
    """One question in one mode, as the template shows it: its line, images, turns with their views, verdict, reward.

    record   of pages.dialogue_rows;  folder: below which its views lie
    """
    question = record["question"]
    images, left_out = given_images(question, pictures)
    words = [question["question"], *(question.get("options") or ()), left_out]
    diagnosis = record["diagnosis"] or {}
    wrong = record.get("exact", record["correct"]) < 1
    data = {
        "wrong": int(wrong),
        "example": int(bool(record["example"])),
        "tool": int(record["valid_calls"] > 0),
        "hurt": int(record["hurt"]),
        "invalid": int(record["invalid_calls"] > 0),
        "run": record["run"],
        "case": diagnosis.get("case", ""),
    }
    example = f"{record['example']}: " if record["example"] else ""
    rewards = [f"{name} {value:.3g}" for name, value in record["reward"].items()]
    return {
        "wrong": wrong,
        "data": data,
        "line": f"{example}{record['key']}, {record['run']}: {question['question'][:100]}",
        "images": images,
        "words": [line for line in words if line],
        "turns": turns_with_views(record, pictures, Path(folder)),
        "verdict": verdict_words(record),
        "reward": ", ".join(rewards),
        "because": "; ".join(value for value in diagnosis.values() if value),
    }


def given_images(question: dict, pictures: Pictures) -> tuple[list[dict], str]:
    """The images of a question, and a sentence if only some of them are shown."""
    paths = question["images"]
    count = min(len(paths), MOST_IMAGES)
    numbers = np.unique(np.linspace(1, len(paths), count).round().astype(int)).tolist()
    images = []
    for number in numbers:
        path = str(paths[number - 1])
        images.append(pictures.add(f"Image-{number}", path, question["bench"]))
    few = len(numbers) < len(paths)
    return images, f"{len(numbers)} of {len(paths)} images are shown." if few else ""


def turns_with_views(record: dict, pictures: Pictures, folder: Path) -> list[dict]:
    """The turns of a dialogue, what was replied, and the imagined view beside the true one."""
    given = len(record["question"]["images"])
    true = true_views(record["question"], record["calls"])
    turns = []
    replies = [*record["replies"], (None, None)]
    for text, (reply, number) in zip(record["turns"], replies, strict=False):
        views = []
        if number:
            k = number - given - 1
            call, file = record["calls"][k], folder / record["views"][k]
            motion = phrase(motion_in(call))
            caption = f"Image-{number}: imagined from Image-{call['reference_image']}, {motion}"
            views.append(pictures.add(caption, str(file)))
            if true:
                views.append(pictures.add("the true view", true[k]))
        turns.append({"text": text, "reply": reply, "views": views})
    return turns


def verdict_words(record: dict) -> str:
    """What was answered, or why not; and the true answer."""
    if record["error"]:
        verdict = record["error"]
    elif record["said"] is None:
        verdict = "no answer"
    else:
        verdict = f"answered {record['said']}"
    return verdict if record["gold"] is None else f"{verdict}; true answer {record['gold']}"
