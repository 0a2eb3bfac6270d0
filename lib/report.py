"""
One page to look at after a run: report.html, whole in itself (pictures inside, nothing fetched).

  table       accuracy, interval and calls: every part of the questions, every mode
  figures     accuracy by category and mode, and the curves of the stages' log.jsonl (a sentence without matplotlib)
  simulator   pose and content beside the trivial baselines and the oracles; a sheet context | motion | imagined | true;
              commanded against recovered motion
  dialogues   what the policy asked for, what it was shown, what it would have seen in the room itself
"""

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lib.common import read_log, write_text
from lib.geometry import Motion, move_camera, phrase
from lib.rooms import random_room, render

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1040px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}small{color:#888}figure{display:inline-block;margin:4px 10px 4px 0}
figcaption{font-size:12px;color:#666}img.view{width:112px;image-rendering:pixelated}img.wide{max-width:100%}
.turn{font-family:ui-monospace,monospace;font-size:13px;white-space:pre-wrap}.reply{color:#777}
article{border-left:3px solid #ddd;padding-left:1em;margin:2em 0}"""
CURVES = ("reward", "match", "call_rate_needs_view", "call_rate_answerable", "invalid_calls", "gain", "entropy", "loss",
          "loss_flow", "pose", "mse", "facts")    # of these a log shows the ones it has, and its "eval"


# ---- pieces of a page -----------------------------------------------------------------------------------------------

def picture(image, kind="view", caption=""):
    """An array (H, W, 3), a PIL image or a file -> HTML with the picture inside."""
    if isinstance(image, (str, Path)):
        data = Path(image).read_bytes()
    else:
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        buffer = io.BytesIO()
        image.save(buffer, "png")
        data = buffer.getvalue()
    tag = f'<img class="{kind}" alt="{escape(caption)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
    return f"<figure>{tag}<figcaption>{escape(caption)}</figcaption></figure>" if caption else tag


def table(head, rows):
    """HTML table; cells may be strings or numbers, None is a dash."""
    def cell(value):
        return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
    lines = ["<tr>" + "".join(f"<th>{cell(value)}</th>" for value in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows]
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
        names = list(dict.fromkeys(name for summary in modes.values() for name in summary.get(group, {})))
        parts += [(name, [summary.get(group, {}).get(name) for summary in modes.values()]) for name in names]
    blind = {"guessing": results.get("chance"), "from the text alone": results.get("text_only_chance")}
    said = ", ".join(f"{title} {value:.3f}" for title, value in blind.items() if value is not None)
    note = f"Accuracy, 95 % bootstrap interval over rooms, share of questions with a call. Chance: {said}."
    rows = [[escape(name), *map(shown, cells)] for name, cells in parts]
    return table(["", *modes], rows) + f"<p><small>{note}</small></p>"


def consistency_table(wm):
    """Pose and content of the simulators (of --bench wm's results.json, or that itself), baselines and oracles."""
    groups = {"simulators": wm.get("simulators") or {"simulator": wm}, "baselines": wm["baselines"],
              "oracles": wm["oracles"]}
    keys, rows = ("pose", "content", "f1", "order", "thirds", "mse"), []
    for title, group in groups.items():
        for name, scores in group.items():
            families = [scores.get(family, {}).get("pose") for family in ("moves", "turns")]
            rows.append([escape(name), *(scores.get(key) for key in keys), *families, title])
    return table(["", *keys, "pose, moves", "pose, turns", ""], rows)


# ---- figures --------------------------------------------------------------------------------------------------------

def drawn(draw):
    """`draw(pyplot)` -> the figure it returns, as a PIL image; None where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    made, buffer = draw(pyplot), io.BytesIO()
    made.savefig(buffer, dpi=110, bbox_inches="tight")
    pyplot.close(made)
    return Image.open(buffer)


def figure(draw):
    """`draw(pyplot)` -> HTML of the figure it returns, or a sentence where matplotlib is missing."""
    image = drawn(draw)
    return picture(image, "wide") if image else \
        "<p>No figure: matplotlib is not installed (<code>pip install matplotlib</code>).</p>"


def categories_figure(results):
    """Accuracy by category and mode as bars with their intervals."""
    def draw(pyplot):
        modes = results["modes"]
        names = list(dict.fromkeys(name for summary in modes.values() for name in summary.get("by_category", {})))
        fig, axes = pyplot.subplots(figsize=(9, 3))
        places, width = np.arange(len(names)), 0.8 / len(modes)
        for m, (mode, summary) in enumerate(modes.items()):
            parts = [summary.get("by_category", {}).get(name) for name in names]
            heights = np.array([part["accuracy"] if part else np.nan for part in parts])
            bounds = np.array([part["ci95"] if part else (np.nan, np.nan) for part in parts]).reshape(-1, 2)
            spread = np.maximum(0, [heights - bounds[:, 0], bounds[:, 1] - heights])
            places_of_mode = places + (m - (len(modes) - 1) / 2) * width
            axes.bar(places_of_mode, heights, width, yerr=spread, error_kw={"lw": 0.8}, label=mode)
        if results.get("chance") is not None:
            axes.axhline(results["chance"], color="gray", lw=0.8, ls=":")
        axes.set_xticks(places, names)
        axes.set_ylim(0, 1)
        axes.set_ylabel("accuracy")
        axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return fig
    return figure(draw)


def curves_figure(title, path):
    """The curves of one log.jsonl: what of CURVES it has, and the held-out accuracy and calls of its "eval"."""
    rows, number = read_log(path), (int, float)
    curves = {key: [(row["step"], row[key]) for row in rows if isinstance(row.get(key), number)] for key in CURVES}
    for row in rows:
        for mode, held in (row.get("eval") or {}).items():
            for key in ("accuracy", "call_rate"):
                if isinstance(held, dict) and isinstance(held.get(key), number):
                    curves.setdefault(f"held out, {mode}: {key}", []).append((row["step"], held[key]))
    curves = {key: points for key, points in curves.items() if points}
    if not curves:
        return ""

    def draw(pyplot):
        columns = min(4, len(curves))
        lines = -(-len(curves) // columns)
        fig, axes = pyplot.subplots(lines, columns, figsize=(2.6 * columns, 1.9 * lines), squeeze=False)
        fig.set_layout_engine("constrained")
        for axis, (key, points) in zip(axes.flat, curves.items()):
            axis.plot(*zip(*points), lw=1, marker="." if len(points) < 20 else None)
            axis.set_title(key, fontsize=8)
            axis.tick_params(labelsize=7)
        for axis in axes.flat[len(curves):]:
            axis.axis("off")
        return fig
    return f"<h3>{escape(title)}</h3>" + figure(draw)


def dose_curves(dose):
    """{simulator: `consistency.dose_response`} -> draw(pyplot): commanded against recovered, a panel per kind.

    Medians and quartiles over rooms; filled where training showed that amount, hollow where it never did.
    """
    def draw(pyplot):
        kinds = list(dict.fromkeys(kind for kinds in dose.values() for kind in kinds))
        fig, axes = pyplot.subplots(1, len(kinds), figsize=(2.7 * len(kinds), 3), squeeze=False)
        fig.set_layout_engine("constrained")
        for axis, kind in zip(axes[0], kinds):
            told = {name: kinds[kind] for name, kinds in dose.items() if kind in kinds}
            end = max(point["amount"] for response in told.values() for point in response["points"])
            axis.plot([0, end], [0, end], color="gray", lw=0.8, ls=":")
            for k, (name, response) in enumerate(told.items()):
                points, colour = response["points"], f"C{k}"
                x, y, low, high = (np.array([p[key] for p in points]) for key in ("amount", "median", "low", "high"))
                axis.errorbar(x, y, [y - low, high - y], color=colour, lw=0.8,
                              label=f"{Path(name).name}: slope {response['slope']:.2f}")
                axis.scatter(x, y, 22, [colour if p["trained"] else "white" for p in points], edgecolors=colour,
                             zorder=3)
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


def contact_sheet(rows, views, side=96):
    """Triples (rows of arrays) and {simulator: a view per row} -> a picture: context | motion | imagined … | true."""
    font, gap, words = ImageFont.load_default(12), 6, 150
    left = [k * (side + gap) for k in range(len(rows[0]["context"]))]
    right = [left[-1] + side + gap + words + k * (side + gap) for k in range(len(views) + 1)]
    page = Image.new("RGB", (right[-1] + side, 20 + len(rows) * (side + gap)), "white")
    pen = ImageDraw.Draw(page)
    for x, title in [(left[0], "context"), *zip(right, [*views, "true"])]:
        pen.text((x, 2), Path(title).name, "gray", font)
    for r, row in enumerate(rows):
        top = 20 + r * (side + gap)
        shown = [*zip(left, row["context"]), *zip(right, [*(view[r] for view in views.values()), row["target"]])]
        for x, image in shown:
            page.paste(Image.fromarray(image).resize((side, side), Image.NEAREST), (x, top))
        motion = phrase(Motion(**row["motion"])).replace(" to the ", "\nto the ")
        words_at = (left[-1] + side + gap, top + side // 3)
        pen.multiline_text(words_at, f"Image-{row['reference']}:\n{motion}", "black", font)
    return page


# ---- dialogues ------------------------------------------------------------------------------------------------------

def true_views(trajectory):
    """What the camera would really see at every imagined image: {image number: (H, W, 3)}; {} if no room is known."""
    scene, views = trajectory.question.get("scene"), {}
    if not scene:
        return views
    poses, room = [np.array(pose) for pose in scene["poses"]], random_room(scene["room"])
    for number, (image, call) in enumerate(zip(trajectory.images, trajectory.provenance), 1):
        if call is not None:
            poses.append(move_camera(poses[call["image"] - 1], Motion(call["motion"], call["amount"])))
            views[number] = render(room, poses[-1], image.shape[0])["rgb"][0]
    return views


def dialogue(title, trajectory):
    """A Trajectory as HTML: context, question, turns, each imagined view beside the true one."""
    question, true = trajectory.question, true_views(trajectory)
    given = [n for n, call in enumerate(trajectory.provenance, 1) if call is None]
    parts = [f"<h3>{escape(title)}</h3>", *(picture(trajectory.images[n - 1], caption=f"Image-{n}") for n in given),
             "<p>" + "<br>".join(map(escape, [question["question"], *(question.get("options") or ())])) + "</p>"]
    for turn, (reply, number) in zip(trajectory.turns, [*trajectory.replies, (None, None)]):
        parts.append(f'<div class="turn">{escape(turn)}</div>')
        if reply is not None:
            parts.append(f'<div class="turn reply">{escape(reply)}</div>')
        if number:
            parts.append(picture(trajectory.images[number - 1], caption=f"Image-{number}, imagined"))
            parts += [picture(true[number], caption="the true view")] if number in true else []
    verdict = "no answer" if trajectory.answer is None else f"answered {trajectory.answer}"
    gold = f"; true answer {question['answer']}" if question.get("answer") else ""
    return f"<article>{''.join(parts)}<p><b>{escape(verdict + gold)}</b></p></article>"


def write(path, title, results=None, wm=None, logs=None, sheet=None, dose=None, dialogues=()):
    """Write report.html; what is not given is left out.

    results    as results.json of a bench of questions;  wm: as results.json of --bench wm
    logs       {title: log.jsonl};  sheet: `contact_sheet`, an array or a file;  dialogues: (title, Trajectory) pairs
    dose       `dose_curves` as a picture
    """
    body = [f"<h1>{escape(title)}</h1>"]
    if results:
        body += [results_table(results), categories_figure(results)]
    if wm or sheet is not None:
        body.append("<h2>The simulator</h2>")
        body += ([consistency_table(wm)] if wm else []) + ([picture(sheet, "wide")] if sheet is not None else [])
        body += [picture(dose, "wide")] if dose else []
    if logs:
        body += ["<h2>Learning</h2>", *(curves_figure(name, log) for name, log in logs.items())]
    if dialogues:
        body += ["<h2>Dialogues</h2>", *(dialogue(name, trajectory) for name, trajectory in dialogues)]
    head = f'<!doctype html><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    write_text(path, "\n".join([head, *body]))
