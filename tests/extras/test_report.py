"""The page after a run: whole in itself, safe from what models and data say, light; its filters find what they name."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

import train_rl
from data import room_questions
from evaluate import Condition, Rooms, prediction_of
from extras.report import curves, report
from extras.report.pages import dialogue_rows
from lib.dialogue import Trajectory
from lib.geometry import Motion
from lib.images import save_image
from lib.protocol import call_of, call_text, motion_in
from lib.scores import summarise
from lib.simulators import phrase
from policy import Policy

POLICY = Policy.tiny()
EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'


def held(question, mode, answer, calls, views):
    """A scripted dialogue: its calls, and what it is shown."""
    t = Trajectory.start(POLICY, question, question["images"], mode)
    for call, view in zip(calls, views, strict=False):
        t.add_turn(POLICY, f"<think>What is there?</think>{call_text(call)}")
        t.observe(POLICY, image=view if t.call else None)
    t.add_turn(POLICY, f"<think>I see {EVIL}</think><answer>{answer}</answer>")
    return t


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Twelve questions of rooms, direct and agentic; the first one's words are evil -> (folder, dialogues)."""
    out = tmp_path_factory.mktemp("report")
    rows = [row for seed in range(5_000_000, 5_000_006) for row in room_questions(seed, out)]
    rows = [{**row, "images": [str(out / path) for path in row["images"]]} for row in rows[:12]]
    rows[0] = {
        **rows[0],
        "question": EVIL,
        "id": EVIL,
        "images": [*rows[0]["images"][:3], str(out / "missing.png")],
    }
    records = {("direct", "none"): {}, ("agentic", "truth"): {}}
    for k, row in enumerate(rows):
        arrays = {**row, "images": [np.full((32, 32, 3), 20 * k, np.uint8)] * len(row["images"])}
        view, wrong = (
            np.full((32, 32, 3), (k, 90, 90), np.uint8),
            "BCDA"["ABCD".index(row["answer"])],
        )
        call = call_of(1, Motion("dangle", -45.0))
        calls = [call | {"reference_image": 9}, call] * (k % 2)
        asked = held(arrays, "agentic", wrong if k % 3 else row["answer"], calls, [view] * 2)
        for (mode, name), t in zip(
            records, (held(arrays, "direct", row["answer"], [], []), asked), strict=True
        ):
            column = Condition(mode, name, {"mode": mode})
            record = prediction_of(Rooms(), row["id"], arrays, t, column, 0.1, out)
            records[mode, name][row["id"]] = json.loads(json.dumps(record))
    summaries = {mode: summarise(list(told.values())) for (mode, _), told in records.items()}
    shown = dialogue_rows(records, rows)
    results = {"modes": summaries, "chance": 0.25}
    report.write(out / "report.html", f"rooms: {EVIL}", results, dialogues=shown, folder=out)
    return out, shown


def shown(record, folder):
    """The page of one dialogue alone."""
    report.write(folder / "one.html", "one", dialogues=[record], folder=folder)
    return (folder / "one.html").read_text()


def test_what_models_and_data_say_is_escaped(page):
    html = (page[0] / "report.html").read_text()
    assert EVIL not in html and "<img src=x" not in html and html.count("<script") == 2
    assert (
        html.count("&lt;script&gt;alert(&#34;x&#34;)") >= 2 + 24
    )  # title, heading, every dialogue


def test_every_question_is_there_in_every_mode_and_filters_know_it(page):
    html = (page[0] / "report.html").read_text()
    lines = re.findall(r"<details ([^>]*)>", html)
    assert len(lines) == len(page[1]) == 24
    told = [dict(re.findall(r'data-([a-z]+)="([^"]*)"', line)) for line in lines]
    agentic = [line for line in told if line["run"] == "agentic, truth"]
    for k, line in enumerate(agentic):  # direct is always right
        assert line["wrong"] == str(int(k % 3 > 0)) and line["tool"] == line["invalid"] == str(
            k % 2
        )
        assert line["hurt"] == str(int(k % 3 > 0 and k % 2)) and line["case"]
    assert all(
        line["wrong"] == line["tool"] == line["hurt"] == "0"
        for line in told
        if line["run"] == "direct"
    )
    names = set(re.findall(r'<(?:input type="checkbox"|select) name="([a-z]+)"', html))
    assert names == set(told[0]) == {"wrong", "example", "tool", "hurt", "invalid", "run", "case"}


def test_every_family_has_one_example_of_each_kind():
    question = {"id": "q", "question": "", "options": [], "answer": "A"}
    kinds = [(True, "resolved", 0.0), (True, "resolved", 1.0), (True, "trusted", 1.0)]
    kinds += [(False, "unaided", 1.0), (False, "unaided", 1.0), (True, "under_use", 0.0)]
    records = {("direct", "none"): {}, ("agentic", "truth"): {}}
    questions = []
    for number, (need, case, alone) in enumerate(kinds):
        name = str(number)
        row = {"category": "turning", "needs_view": need, "well_formed": True, "correct": alone}
        direct = {**row, "mode": "direct", "valid_calls": 0, "diagnosis": None}
        called = int(case != "under_use")
        asked = {**row, "mode": "agentic", "valid_calls": called, "diagnosis": {"case": case}}
        records["direct", "none"][name] = direct
        records["agentic", "truth"][name] = asked
        questions.append({**question, "id": name})
    examples = [row["example"] for row in dialogue_rows(records, questions)[1::2]]
    assert examples == ["won by looking", None, "lost by a wrong view", "needless", None, None]


def test_a_dialogue_shows_what_was_imagined_beside_the_truth_and_what_it_earned(page):
    html = shown(page[1][3], page[0])  # the second question, agentic
    call = page[1][3]["calls"][0]
    assert (
        f"Image-5: imagined from Image-{call['reference_image']}, {phrase(motion_in(call))}" in html
    )
    assert "the true view" in html and "There is no such image" in html and "What is there?" in html
    assert (
        "phase 2" in html and "gain -1" in html and "diagnosis: " in html and "true answer" in html
    )


def test_pictures_stand_in_the_page_once_and_dialogues_name_them(page):
    html = (page[0] / "report.html").read_text()
    stored = json.loads(re.search(r'id="pictures">(.*?)</script>', html)[1])
    named = set(map(int, re.findall(r'data-picture="(\d+)"', html)))
    assert named == set(range(len(stored))) and len(stored) < html.count("data-picture=") / 2
    assert (
        html.count('src="data:') == html.count('class="wide"') and "(no picture)" in html
    )  # the missing one


def test_the_page_can_be_handed_on(page, tmp_path, monkeypatch):
    """No absolute path, no picture from outside the data folder, no key, whatever rows and errors say."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    secret = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    save_image(tmp_path / "secret.png", secret)
    save_image(tmp_path / "data" / "given.png", 255 - secret)
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    names = ("given.png", "../secret.png", "link.png")
    images = [str(tmp_path / "data" / name) for name in names] + [str(tmp_path / "secret.png")]
    question = {**page[1][0]["question"], "images": images, "question": "a/b \ud800 </x> $x^{"}
    error = f"image: The image {images[3]} is read by sk-0123456789 of file://{images[0]}."
    record = {**page[1][0], "question": question, "error": error, "run": f"forced, {tmp_path}/wm"}
    report.write(tmp_path / "one.html", "one", dialogues=[record], data=tmp_path / "data")
    html = (tmp_path / "one.html").read_text()
    assert str(tmp_path.parent) not in html and "sk-" not in html and "a/b \\ud800" in html
    assert "image: The image …/secret.png is read by [key] of …/given.png." in html
    assert "forced, …/wm" in html and html.count("(no picture)") == 3
    assert len(json.loads(re.search(r'id="pictures">(.*?)</script>', html)[1])) == 1


def test_names_are_no_formulas():
    """Matplotlib would refuse "$x^{" as mathematics, and would leave "_y" out of a legend."""
    pytest.importorskip("matplotlib")
    summary = {"accuracy": 0.5, "ci95": (0.4, 0.6), "call_rate": 0.0}
    results = {"modes": {"direct": summary | {"by_category": {"$x^{": summary, "_y": summary}}}}
    assert report.figure_image(report.workflow(results)).width > 100
    point = {"amount": 1.0, "median": 1.0, "low": 1.0, "high": 1.0, "trained": True}
    dose = {f"out/{name}": {"+dangle": {"slope": 1.0, "points": [point]}} for name in ("_y", "$")}
    labels = []

    def draw(pyplot):
        figure = report.dose_curves(dose)(pyplot)
        labels.extend(text.get_text() for text in figure.axes[0].get_legend().get_texts())
        return figure

    assert report.figure_image(draw).width > 100
    assert labels == ["slope 1.00: _y", "slope 1.00: $"]


def test_a_thousand_dialogues_are_light(page, tmp_path):
    """A dialogue more is less than 4 kB more: its pictures stand in the page already."""
    sizes = []
    for count in (20, 40):
        report.write(tmp_path / "many.html", "many", dialogues=[page[1][3]] * count, folder=page[0])
        sizes.append((tmp_path / "many.html").stat().st_size)
    assert 0 < sizes[1] - sizes[0] < 20 * 4000


def test_large_pictures_become_thumbnails_and_videos_show_some_frames(page, tmp_path):
    save_image(
        tmp_path / "large.jpg", np.random.default_rng(0).integers(0, 255, (600, 900, 3), np.uint8)
    )
    question = {**page[1][0]["question"], "images": [str(tmp_path / "large.jpg")] * 50}
    told = {**page[1][0], "calls": [], "question": question}
    pictures = report.Pictures([tmp_path])
    report.dialogue_data(told, pictures, tmp_path)
    html = shown(told, tmp_path)
    assert "12 of 50 images are shown" in html and "Image-50" in html
    assert len(pictures.uris) == 1 and len(pictures.uris[0]) < 20_000


def test_curves_are_of_what_was_logged(tmp_path, monkeypatch):
    """A panel for each key that has values, however many there are."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    modes = [f"{mode} {key}" for mode in ("agentic", "direct") for key in train_rl.ROLLOUT_LOG]
    assert set(curves.CURVES) <= set(train_rl.LOG) | set(modes)
    numbers = {f"key{i}": i for i in range(9)}
    rows = [{"step": 0, **numbers, "eval": {"direct": {"match": 0.25}}}, {"step": 1, "key0": 5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(curves, "CURVES", ("gain", *numbers, "direct match"))
    figures = []
    monkeypatch.setattr(curves, "figure_image", lambda draw: figures.append(draw(pyplot)))
    curves.draw_curves(tmp_path)
    panels = figures[0].axes
    assert [axis.get_title() for axis in panels] == [*numbers, "direct match"]
    assert panels[0].lines[0].get_xydata().tolist() == [[0, 0], [1, 5]]
    assert panels[-1].lines[0].get_xydata().tolist() == [[0, 0.25]]
    pyplot.close(figures[0])


def test_a_long_dialogue_is_drawn_to_its_end(tmp_path):
    black = np.zeros((8, 8, 3), np.uint8)
    short, long = (
        Trajectory({"question": "?"}, "direct", turns=["a\n" * lines], images=[black])
        for lines in (1, 601)
    )
    heights = []
    for dialogue in (short, long):
        dialogue.draw(tmp_path / "dialogue.png")
        page = np.asarray(Image.open(tmp_path / "dialogue.png"))
        heights.append(len(page))
        assert (page[-24:] < 255).any()  # the last line is there
    assert heights[1] - heights[0] == 600 * 17


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser")
def test_a_browser_opens_and_filters_it(page, tmp_path):
    """In Chromium: open every dialogue, tick "wrong only", and look at what the page then holds."""
    html = (
        (page[0] / "report.html")
        .read_text()
        .replace(
            "filter();</script>",
            """filter();
document.getElementsByName('wrong')[0].click(); for (const d of all) d.open = true;</script>""",
        )
    )
    (tmp_path / "opened.html").write_text(html)
    done = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=5000",
            f"--user-data-dir={tmp_path}/browser",
            "--dump-dom",
            str(tmp_path / "opened.html"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    body = re.sub("<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    assert "8 of 24" in body and "<template" not in body and body.count("<details") == 24
    assert (
        body.count('src="data:image/png') > body.count("data-picture=") > 24
    )  # all are filled in, and a chart
