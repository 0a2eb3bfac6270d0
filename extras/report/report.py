"""
One page to look at after a run: report.html, whole in itself (pictures inside, nothing fetched).

  table       accuracy, interval and calls: every part of the questions, every mode
  figures     accuracy by category and mode, and the curves of the stages' log.jsonl (a sentence without matplotlib)
  diagnosis   how often answers are right or wrong for which reason (extras/report/diagnosis.py)
  simulator   pose and content beside the trivial baselines, the oracles and views with a known error; a sheet
              context | motion | imagined | true; commanded against recovered motion
  dialogues   every question: what the policy asked for, what it was shown, what it would have seen in the room itself

A thousand dialogues open quickly: each is a <template>, built when it is opened, and each picture stands once in the
page, as a thumbnail. What models and data say is escaped; the one script takes nothing from them but numbers.
"""

import base64
import io
import json
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from extras.benches.common import open_image
from extras.report.diagnosis import CASES, true_views
from lib.common import read_log, write_text
from lib.geometry import Motion, phrase
from lib.images import PictureError, figure_image

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1040px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}small{color:#888}figure{display:inline-block;margin:4px 10px 4px 0}
figcaption{font-size:12px;color:#666}img.view{width:112px;image-rendering:pixelated}img.wide{max-width:100%}
.turn{font-family:ui-monospace,monospace;font-size:13px;white-space:pre-wrap}.reply{color:#777}
details{border-bottom:1px solid #ddd;padding:.2em 0}details>div{border-left:3px solid #ddd;padding-left:1em}
#filters label{margin-right:1.2em}.wrong{color:#b22}.right{color:#282}"""
SCRIPT = """const find = query => [...document.querySelectorAll(query)];
const all = find('details'), controls = find('#filters [name]');
const pictures = JSON.parse(document.getElementById('pictures').textContent);
function filter() {
  for (const d of all) d.hidden = !controls.every(c => c.type == 'checkbox' ? !c.checked || d.dataset[c.name] == 1
                                                                            : !c.value || d.dataset[c.name] == c.value);
  document.getElementById('count').textContent = all.filter(d => !d.hidden).length + ' of ' + all.length;
}
for (const c of controls) c.onchange = filter;
for (const d of all) d.ontoggle = () => {
  const template = d.querySelector('template');
  if (template) template.replaceWith(template.content);
  for (const image of d.querySelectorAll('img:not([src])')) image.src = pictures[image.dataset.picture];
};
filter();"""
FILTERS = {
    "wrong": "wrong only",
    "tool": "used the tool",
    "hurt": "the tool hurt (right without)",
    "invalid": "invalid call",
}
THUMBNAIL = 160  # pixels of the longer side
SHOWN = 12  # given images of a question; of a video these many, evenly
CURVES = (
    "reward",
    "match",
    "call_rate_needs_view",
    "call_rate_answerable",
    "invalid_calls",
    "gain",
    "entropy",
    "loss",
    "loss_flow",
    "nearest",
    "mse",
    "facts",
)  # of these a log shows the ones it has, and its "eval"


# ---- pieces of a page -----------------------------------------------------------------------------------------------


def picture(image):
    """A PIL image or a file -> HTML with the picture inside."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.open(image)).save(buffer, "png")
    return f'<img class="wide" alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def table(head, rows):
    """HTML table; cells may be strings or numbers, None is a dash."""

    def cell(value):
        return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = ["<tr>" + "".join(f"<th>{cell(value)}</th>" for value in head) + "</tr>"]
    lines += [
        "<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows
    ]
    return f"<table>{''.join(lines)}</table>"


def results_table(results):
    """The final table of results.json: all, the strata of need, the categories; one column per mode."""
    modes = results["modes"]

    def shown(part):
        if not part:
            return None
        low, high = part["ci95"]
        return f"{part['accuracy']:.3f} <small>[{low:.2f} {high:.2f}] calls {part['call_rate']:.0%}</small>"

    parts = [("all", list(modes.values()))]
    for group in ("by_need", "by_category"):
        names = list(
            dict.fromkeys(name for summary in modes.values() for name in summary.get(group, {}))
        )
        parts += [
            (name, [summary.get(group, {}).get(name) for summary in modes.values()])
            for name in names
        ]
    blind = {
        "guessing": results.get("chance"),
        "from the text alone": results.get("text_only_chance"),
    }
    said = ", ".join(f"{title} {value:.3f}" for title, value in blind.items() if value is not None)
    note = f"Accuracy, 95 % bootstrap interval over rooms, share of questions with a call. Chance: {said}."
    rows = [[escape(name), *map(shown, cells)] for name, cells in parts]
    return table(["", *modes], rows) + f"<p><small>{note}</small></p>"


def consistency_table(wm):
    """Pose and content of the simulators (of --bench wm's results.json, or that itself), and what stands beside."""
    groups = {
        "simulators": wm.get("simulators") or {"simulator": wm},
        "baselines": wm["baselines"],
        "oracles": wm["oracles"],
        "known error": wm.get("calibration", {}),
    }
    keys, rows = ("pose", "content", "f1", "order", "thirds", "mse"), []
    for title, group in groups.items():
        for name, scores in group.items():
            families = [scores.get(family, {}).get("pose") for family in ("moves", "turns")]
            rows.append([escape(name), *(scores.get(key) for key in keys), *families, title])
    return table(["", *keys, "pose, moves", "pose, turns", ""], rows)


# ---- figures --------------------------------------------------------------------------------------------------------


def figure(draw):
    """`draw(pyplot)` -> HTML of the figure it returns, or a sentence where matplotlib is missing."""
    image = figure_image(draw)
    return (
        picture(image)
        if image
        else "<p>No figure: matplotlib is not installed (<code>pip install matplotlib</code>).</p>"
    )


def workflow(results):
    """results.json -> draw(pyplot): accuracy per category and overall, one bar per mode with its interval.

    With direct, forced and agentic of one policy this is the paper's Figure 3.
    """

    def draw(pyplot):
        """One group of bars per category, and a last one for all questions."""
        modes = results["modes"]
        names = list(
            dict.fromkeys(
                name for summary in modes.values() for name in summary.get("by_category", {})
            )
        )
        fig, axes = pyplot.subplots(figsize=(max(9, 0.9 * len(names) + 2), 3))
        places, width = np.arange(len(names) + 1), 0.8 / len(modes)
        for m, (mode, summary) in enumerate(modes.items()):
            parts = [*(summary.get("by_category", {}).get(name) for name in names), summary]
            heights = np.array([part["accuracy"] if part else np.nan for part in parts])
            bounds = np.array([part["ci95"] if part else (np.nan, np.nan) for part in parts])
            spread = np.maximum(0, [heights - bounds[:, 0], bounds[:, 1] - heights])
            places_of_mode = places + (m - (len(modes) - 1) / 2) * width
            axes.bar(places_of_mode, heights, width, yerr=spread, error_kw={"lw": 0.8}, label=mode)
        if results.get("chance") is not None:
            axes.axhline(results["chance"], color="gray", lw=0.8, ls=":")
        axes.axvline(len(names) - 0.5, color="gray", lw=0.8)
        axes.set_xticks(
            places,
            [*names, "overall"],
            rotation=0 if len(names) < 8 else 30,
            ha="center" if len(names) < 8 else "right",
        )
        axes.set_ylim(0, 1)
        axes.set_ylabel("accuracy")
        axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return fig

    return draw


def curves_figure(title, path):
    """The curves of one log.jsonl: what of CURVES it has, and the held-out accuracy and calls of its "eval"."""
    rows, number = read_log(path), (int, float)
    curves = {
        key: [(row["step"], row[key]) for row in rows if isinstance(row.get(key), number)]
        for key in CURVES
    }
    for row in rows:
        for mode, held in (row.get("eval") or {}).items():
            for key in ("accuracy", "call_rate"):
                if isinstance(held, dict) and isinstance(held.get(key), number):
                    curves.setdefault(f"held out, {mode}: {key}", []).append(
                        (row["step"], held[key])
                    )
    curves = {key: points for key, points in curves.items() if points}
    if not curves:
        return ""

    def draw(pyplot):
        """A panel per curve, four to a line."""
        columns = min(4, len(curves))
        lines = -(-len(curves) // columns)
        fig, axes = pyplot.subplots(
            lines, columns, figsize=(2.6 * columns, 1.9 * lines), squeeze=False
        )
        fig.set_layout_engine("constrained")
        for axis, (key, points) in zip(axes.flat, curves.items()):
            axis.plot(*zip(*points), lw=1, marker="." if len(points) < 20 else None)
            axis.set_title(key, fontsize=8)
            axis.tick_params(labelsize=7)
        for axis in axes.flat[len(curves) :]:
            axis.axis("off")
        return fig

    return f"<h3>{escape(title)}</h3>" + figure(draw)


def dose_curves(dose):
    """{simulator: `calibration.dose_response`} -> draw(pyplot): commanded against recovered, a panel per kind.

    Medians and quartiles over rooms; filled where training showed that amount, hollow where it never did.
    """

    def draw(pyplot):
        """A panel per kind of motion, a line per simulator."""
        kinds = list(dict.fromkeys(kind for kinds in dose.values() for kind in kinds))
        fig, axes = pyplot.subplots(1, len(kinds), figsize=(2.7 * len(kinds), 3), squeeze=False)
        fig.set_layout_engine("constrained")
        for axis, kind in zip(axes[0], kinds):
            told = {name: kinds[kind] for name, kinds in dose.items() if kind in kinds}
            end = max(point["amount"] for response in told.values() for point in response["points"])
            axis.plot([0, end], [0, end], color="gray", lw=0.8, ls=":")
            for k, (name, response) in enumerate(told.items()):
                points, colour = response["points"], f"C{k}"
                x, y, low, high = (
                    np.array([p[key] for p in points])
                    for key in ("amount", "median", "low", "high")
                )
                axis.errorbar(
                    x,
                    y,
                    [y - low, high - y],
                    color=colour,
                    lw=0.8,
                    label=f"{Path(name).name}: slope {response['slope']:.2f}",
                )
                axis.scatter(
                    x,
                    y,
                    22,
                    [colour if p["trained"] else "white" for p in points],
                    edgecolors=colour,
                    zorder=3,
                )
            axis.set_title(f"{kind}, {'degrees' if 'turn' in kind else 'meters'}", fontsize=9)
            axis.set_xlabel("commanded (filled: trained on)", fontsize=8)
            axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2))
            axis.tick_params(labelsize=7)
        axes[0, 0].set_ylabel("recovered", fontsize=8)
        return fig

    return draw


def find_logs(root):
    """{stage: its log.jsonl} of the stages below `root`."""
    return {file.parent.name: file for file in sorted(Path(root).glob("*/log.jsonl"))}


def contact_sheet(rows, views):
    """Triples (rows of arrays) and {simulator: a view per row} -> a picture: context | motion | imagined … | true."""
    font, side, gap, words = ImageFont.load_default(12), 96, 6, 150
    left = [k * (side + gap) for k in range(len(rows[0]["context"]))]
    right = [left[-1] + side + gap + words + k * (side + gap) for k in range(len(views) + 1)]
    page = Image.new("RGB", (right[-1] + side, 20 + len(rows) * (side + gap)), "white")
    pen = ImageDraw.Draw(page)
    for x, title in [(left[0], "context"), *zip(right, [*views, "true"])]:
        pen.text((x, 2), Path(title).name, "gray", font)
    for r, row in enumerate(rows):
        top = 20 + r * (side + gap)
        shown = [
            *zip(left, row["context"]),
            *zip(right, [*(view[r] for view in views.values()), row["target"]]),
        ]
        for x, image in shown:
            page.paste(Image.fromarray(image).resize((side, side), Image.NEAREST), (x, top))
        motion = phrase(Motion(**row["motion"])).replace(" to the ", "\nto the ")
        words_at = (left[-1] + side + gap, top + side // 3)
        pen.multiline_text(words_at, f"Image-{row['reference']}:\n{motion}", "black", font)
    return page


# ---- why ------------------------------------------------------------------------------------------------------------


def diagnosis_table(diagnosis):
    """results["diagnosis"]: {mode: {simulator: counts}} -> how many answers stand in which case of extras/report/diagnosis.py."""
    runs = {
        f"{mode}, {name}": counts
        for mode, told in diagnosis.items()
        for name, counts in told.items()
    }
    rows = [
        [f"{case} <small>{meaning}</small>", *(counts["cases"][case] for counts in runs.values())]
        for case, meaning in CASES.items()
    ]
    for part, title in (("uses", ""), ("deviations", "wrong view: ")):
        names = sorted({name for counts in runs.values() for name in counts[part]})
        rows += [
            [title + name, *(counts[part].get(name, 0) for counts in runs.values())]
            for name in names
        ]
    return "<h2>Why answers are right or wrong</h2>" + table(
        ["questions", *map(escape, runs)], rows
    )


# ---- dialogues ------------------------------------------------------------------------------------------------------


class Pictures:
    """The pictures of a page, each once, as thumbnails; dialogues name them by number."""

    def __init__(self):
        self.uris, self.known = [], {}

    def add(self, key, read):
        """The number of the picture called `key`, None if unreadable; read() -> array or PIL image is asked once."""
        if key not in self.known:
            try:
                image = read()
                image = (
                    Image.fromarray(image)
                    if isinstance(image, np.ndarray)
                    else image.convert("RGB")
                )
            except (OSError, PictureError):
                self.known[key] = None
                return None
            small = max(image.size) <= 64  # of the tiny world: every pixel counts
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            buffer = io.BytesIO()
            image.save(buffer, *(("png",) if small else ("jpeg",)), quality=80)
            kind, data = "png" if small else "jpeg", base64.b64encode(buffer.getvalue()).decode()
            self.uris.append(f"data:image/{kind};base64,{data}")
            self.known[key] = len(self.uris) - 1
        return self.known[key]

    def tag(self, number, caption):
        """A figure whose picture the page fills in when it is opened."""
        image = (
            f'<img class="view" data-picture="{number}" alt="">'
            if number is not None
            else "(no picture)"
        )
        return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def dialogue(told, pictures, folder):
    """One question in one mode as <details>: its line, and in a <template> images, turns, views, verdict, reward.

    told     of pages.dialogue_rows;  folder: below which its views lie
    """
    question, given, folder = told["question"], len(told["question"]["images"]), Path(folder)
    parts, shown = (
        [],
        np.unique(np.linspace(1, given, min(given, SHOWN)).round().astype(int)) if given else [],
    )
    for number in map(int, shown):
        image = question["images"][number - 1]
        parts.append(
            pictures.tag(
                pictures.add(str(image), lambda: open_image(image, question["bench"])),
                f"Image-{number}",
            )
        )
    left_out = f"{len(shown)} of {given} images are shown." if len(shown) < given else ""
    words = [question["question"], *(question.get("options") or ()), left_out]
    parts.append("<p>" + "<br>".join(escape(line) for line in words if line) + "</p>")
    true = true_views(question, told["calls"])
    for turn, (reply, number) in zip(told["turns"], [*told["replies"], (None, None)]):
        parts.append(f'<div class="turn">{escape(turn)}</div>')
        if reply:
            parts.append(f'<div class="turn reply">{escape(reply)}</div>')
        if number:
            k = number - given - 1
            call, view = told["calls"][k], folder / told["views"][k]
            source = (
                f"Image-{number}: imagined from Image-{call['image']}, "
                f"{phrase(Motion(call['motion'], call['amount']))}"
            )
            parts.append(pictures.tag(pictures.add(str(view), lambda: Image.open(view)), source))
            if true:
                seen = true[k]
                parts.append(
                    pictures.tag(pictures.add(seen.tobytes(), lambda: seen), "the true view")
                )
    case = (told["diagnosis"] or {}).get("case", "")
    wrong = told.get("exact", told["correct"]) < 1
    verdict = told["error"] or ("no answer" if told["said"] is None else f"answered {told['said']}")
    verdict += "" if told["gold"] is None else f"; true answer {told['gold']}"
    because = "; ".join(part for part in (told["diagnosis"] or {}).values() if part)
    reward = ", ".join(f"{name} {value:.3g}" for name, value in told["reward"].items())
    parts.append(
        f"<p><b>{escape(verdict)}</b><br>reward: {escape(reward)}"
        f"{'<br>diagnosis: ' + escape(because) if because else ''}</p>"
    )
    flags = {
        "wrong": wrong,
        "tool": told["valid_calls"],
        "hurt": told["hurt"],
        "invalid": told["invalid_calls"],
    }
    data = " ".join(
        [
            *(f'data-{name}="{int(on > 0)}"' for name, on in flags.items()),
            f'data-run="{escape(told["run"])}" data-case="{escape(case)}"',
        ]
    )
    line = f"{told['key']}, {told['run']}: {question['question'][:100]}"
    mark = '<span class="wrong">✗</span>' if wrong else '<span class="right">✓</span>'
    return (
        f"<details {data}><summary>{mark} {escape(line)}</summary><template><div>{''.join(parts)}</div></template>"
        f"</details>"
    )


def dialogue_pages(dialogues, folder):
    """The filters, every dialogue, the pictures and the script."""
    pictures = Pictures()
    each = [dialogue(told, pictures, folder) for told in dialogues]
    boxes = [
        f'<label><input type="checkbox" name="{name}"> {title}</label>'
        for name, title in FILTERS.items()
    ]
    cases = [told["diagnosis"]["case"] for told in dialogues if told["diagnosis"]]
    for name, title, values in (
        ("run", "mode", [told["run"] for told in dialogues]),
        ("case", "diagnosis", cases),
    ):
        options = "".join(f"<option>{escape(value)}</option>" for value in dict.fromkeys(values))
        boxes.append(
            f'<label>{title} <select name="{name}"><option value="">all</option>{options}</select></label>'
        )
    return [
        "<h2>Dialogues</h2>",
        f'<p id="filters">{"".join(boxes)}<span id="count"></span></p>',
        *each,
        f'<script type="application/json" id="pictures">{json.dumps(pictures.uris)}</script>',
        f"<script>{SCRIPT}</script>",
    ]


def write(
    path, title, results=None, wm=None, logs=None, sheet=None, dose=None, dialogues=(), folder="."
):
    """Write report.html; what is not given is left out.

    results     as results.json of a bench of questions;  wm: as results.json of --bench wm
    logs        {title: log.jsonl};  sheet: `contact_sheet` or a file;  dose: `dose_curves` as a picture
    dialogues   of pages.dialogue_rows;  folder: below which their imagined views lie
    """
    body = [f"<h1>{escape(title)}</h1>"]
    if results:
        body += [results_table(results), figure(workflow(results))]
        body += [diagnosis_table(results["diagnosis"])] if results.get("diagnosis") else []
    if wm or sheet is not None:
        body.append("<h2>The simulator</h2>")
        body += ([consistency_table(wm)] if wm else []) + (
            [picture(sheet)] if sheet is not None else []
        )
        body += [picture(dose)] if dose else []
    if logs:
        body += ["<h2>Learning</h2>", *(curves_figure(name, log) for name, log in logs.items())]
    if dialogues:
        body += dialogue_pages(dialogues, folder)
    head = (
        f'<!doctype html><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    )
    write_text(path, "\n".join([head, *body]))
