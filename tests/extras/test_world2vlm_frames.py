"""Frames that another program rendered, as World2VLM's questions: pytest tests/test_world2vlm_frames.py.  CPU, 5 s."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from extras.report import real_views
from extras.world2vlm import questions
from extras.world2vlm.frames import (
    MARGIN,
    claims_of,
    looks_mirrored,
    make_rendered,
    names_of_pictures,
    read_detections,
    read_rendered,
    rendered_folders,
    rendered_records,
)
from extras.world2vlm.objects import room_detections
from extras.world2vlm.questions import differ, records
from extras.world2vlm.transitions import end_pose, room_anchor, summed, transitions
from extras.world2vlm.words import action_of, is_on_grid, motion_of, read_actions
from lib.geometry import move_camera
from lib.images import load_image, save_image
from lib.records import SPLITS, load_jsonl
from lib.rooms import TrueRenderer, random_room, render
from lib.streams import numpy_stream


def write(folder, transition, **more):
    """A transition of a room in the layout: two frames and their boxes."""
    images = dict(zip(("0.png", "1.png"), (transition.source, transition.target), strict=True))
    for name, image in images.items():
        save_image(folder / name, image)
    found = {
        name: [detection._asdict() for detection in part]
        for name, part in zip(images, room_detections(transition), strict=True)
    }
    info = {
        "program": [{"kind": action_of(m), "amount": abs(m.amount)} for m in transition.program],
        "detections": found,
        **more,
    }
    (folder / "actions.json").write_text(json.dumps(info))
    return folder


def change(folder, **more):
    """Write some keys of actions.json anew; None takes one away."""
    file = folder / "actions.json"
    info = json.loads(file.read_text()) | more
    file.write_text(json.dumps({key: value for key, value in info.items() if value is not None}))
    return folder


def turned(folder, seed, kind, amount, shown=None):
    """A folder of a turn in a room; `shown` is what is really rendered, as HY's table has its turns mirrored."""
    anchor = room_anchor(seed)
    target = move_camera(anchor.pose, motion_of(shown or kind, amount))
    save_image(folder / "0.png", anchor.image)
    save_image(folder / "1.png", render(random_room(seed), target)["rgb"][0])
    program = [{"kind": kind, "amount": amount}]
    (folder / "actions.json").write_text(json.dumps({"program": program}))
    return folder


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    """(root, [(folder, transition straight from the renderer)]) of eight rooms."""
    root, pairs = tmp_path_factory.mktemp("rendered"), []
    for seed in range(8):
        found, _ = transitions(
            [room_anchor(seed)], TrueRenderer(), np.random.default_rng([19, seed])
        )
        pairs += [(write(root / f"room{seed}" / t.name, t), t) for t in found]
    return root, pairs


# ---- the same questions ---------------------------------------------------------------------------------------------


def test_rooms_in_the_layout_give_the_questions_of_the_renderer(rooms):
    root, pairs = rooms
    assert len(pairs) == 72 and rendered_folders(root) == sorted(folder for folder, _ in pairs)
    tasks = set()
    for folder, transition in pairs:
        name = folder.relative_to(root).as_posix()
        rng = numpy_stream("motion questions", name)
        straight = records(transition._replace(name=name), rng, None, room_detections)
        ((rows, fault),) = rendered_records(folder, root, root, {}, None)
        assert fault is None
        for a, b in zip(rows, straight, strict=True):
            assert all(a[key] == b[key] for key in b.keys() - {"images"})
            images = [load_image(root / path) for path in a["images"]]
            assert all(map(np.array_equal, images, b["images"])) and len(images) == len(b["images"])
            tasks.add(a["category"])
    assert len(tasks) == 7  # without a claim no A4


def test_the_command_writes_every_split_and_leaves_the_pictures_where_they_are(
    rooms, tmp_path, capsys
):
    root, _ = rooms
    command = ["--rendered", str(root), "--out", str(tmp_path / "out"), "--threads", "1"]
    assert questions.parse_args(["--rendered", "x"]).out == "out/rendered"
    questions.main(command)
    rows = {split: load_jsonl(tmp_path / f"out/questions_{split}.jsonl") for split in SPLITS}
    places = [{row["cluster"] for row in part} for part in rows.values()]
    assert sum(map(len, places)) == len(set.union(*places)) == 8  # an anchor is on one side only
    assert {row["category"] for row in rows["train"]} >= {"A1", "A2", "A3", "A4", "D1"}
    for row in rows["train"]:
        for path in row["images"]:
            assert str(root) in str((tmp_path / path).resolve())
            assert load_image(path).shape == (32, 32, 3)
    assert not list((tmp_path / "out").rglob("*.png"))
    assert "0 of 72 folders cannot be used" in capsys.readouterr().out
    make_rendered(tmp_path / "again", root, threads=2)
    files = [tmp_path / name / "questions_train.jsonl" for name in ("out", "again")]
    assert files[0].read_text() == files[1].read_text()
    with pytest.raises(SystemExit, match="no folder with an actions.json"):
        make_rendered(tmp_path / "x", tmp_path / "nowhere")
    for wrong in (["--rendered", "x", "--anchors", "y"], ["--detector", "x"]):
        with pytest.raises(SystemExit):
            questions.parse_args(wrong)


def test_without_boxes_only_motion_is_asked_and_a_detector_brings_the_others(
    rooms, tmp_path, capsys, monkeypatch
):
    root, pairs = rooms
    shutil.copytree(root, tmp_path / "bare")
    for folder in rendered_folders(tmp_path / "bare"):
        change(folder, detections=None)
    make_rendered(tmp_path / "motion", tmp_path / "bare", threads=1)
    said = {
        row["category"]
        for split in SPLITS
        for row in load_jsonl(tmp_path / "motion" / f"questions_{split}.jsonl")
    }
    assert said <= {"A1", "A2", "A3", "A4"} and "--detector" in capsys.readouterr().out
    looked = []

    def stub(model, device):
        """Finds a chair in the middle of every picture, half sure."""

        def detect(image, names):
            looked.append((model, "chair" in names))
            return [("chair", np.array([0.3, 0.3, 0.6, 0.7]), 0.5)]

        return detect

    monkeypatch.setattr(real_views, "detector", stub)
    questions.main(
        f"--rendered {tmp_path}/bare --out {tmp_path}/boxes --detector some/model".split()
    )
    rows = load_jsonl(tmp_path / "boxes" / "questions_train.jsonl")
    (one,) = {row["answer"] for row in rows if row["category"] == "D1"}
    assert {row["weight"] for row in rows if row["category"] == "D1"} == {0.25}  # both scores
    assert (
        one == "[300, 300, 600, 700]"
        and set(looked) == {("some/model", True)}
        and len(looked) == 144
    )


def test_false_claims_are_the_programs_of_others(rooms, tmp_path):
    """Each program is claimed at most once, so false claims say each thing as often as true ones."""
    root, pairs = rooms
    claims = claims_of(rendered_folders(root))
    programs = {folder: transition.program for folder, transition in pairs}
    for folder, (claim, how) in claims.items():
        assert how == "other" and differ(programs[folder], claim, MARGIN)
        assert len(claim) == len(programs[folder]) > 1 and claim in programs.values()
    several = [program for program in programs.values() if len(program) > 1]
    assert len(several) > len(claims) > 0.8 * len(several)
    claimed = Counter(map(str, (claim for claim, _ in claims.values())))
    assert claimed <= Counter(map(str, several))
    true = 0
    for folder in claims:
        ((rows, _),) = rendered_records(folder, root, root, claims, None)
        (row,) = [row for row in rows if row["category"] == "A4"]
        actions = [motion_of(*action) for action in read_actions(row["question"])]
        true += row["answer"] == "true"
        assert actions == (programs[folder] if row["answer"] == "true" else claims[folder][0])
    assert 0.2 < true / len(claims) < 0.8
    lonely = write(tmp_path / "one", next(t for _, t in pairs if len(t.program) == 2))
    assert claims_of([lonely]) == {}  # there is nothing to confuse it with


# ---- frames, boxes -------------------------------------------------------------------------------------------


def test_actions_are_summed_where_no_picture_shows_their_order(rooms, tmp_path):
    def way(*told):
        return [
            motion_of(kind, float(amount))
            for kind, amount in zip(told[::2], told[1::2], strict=True)
        ]

    sums = {
        ("move forward", 0.5, "move forward", 1.5): ("move forward", 2),
        ("move forward", 0.5, "move left", 1): ("move left", 1, "move forward", 0.5),
        ("move left", 1, "move forward", 0.5): ("move left", 1, "move forward", 0.5),
        ("turn right", 20, "turn left", 50, "move left", 1): ("turn left", 30, "move left", 1),
        ("move left", 1, "turn left", 20, "move left", 1): (
            "move left",
            1,
            "turn left",
            20,
            "move left",
            1,
        ),
        ("move right", 1, "move left", 1, "turn left", 20): ("turn left", 20),
    }
    for told, read in sums.items():
        assert summed(way(*told)) == way(*read)
        np.testing.assert_allclose(
            end_pose(np.eye(4), way(*told)), end_pose(np.eye(4), way(*read)), atol=1e-9
        )
    folder = change(
        write(tmp_path / "none", rooms[1][0][1]),
        program=[{"kind": "move left", "amount": 0.25}, {"kind": "move left", "amount": 0.75}],
    )
    assert read_rendered(folder).program == way("move left", 1)


def test_pictures_are_in_the_order_of_their_numbers(tmp_path):
    for k in (0, 1, 2, 9, 10, 11, 100):
        save_image(tmp_path / f"frame_{k}.png", np.zeros((4, 4, 3), np.uint8))
    assert names_of_pictures(tmp_path) == [f"frame_{k}.png" for k in (0, 1, 2, 9, 10, 11, 100)]


def test_boxes_without_tracks_are_tracked_where_the_label_occurs_once():
    box = [4, 4, 12, 12]
    rows = {
        "a": [
            {"label": "chair", "box": box},
            {"label": "lamp", "box": box, "confidence": 0.5},
            {"label": "lamp", "box": box},
        ],
        "b": [{"label": "chair", "box": box}],
    }
    first, last = read_detections(rows, "a", "b")
    assert [found.track for found in first] == ["chair", None, None] and last[0].track == "chair"
    rows["a"][1]["track"] = 7
    first, last = read_detections(rows, "a", "b")
    assert [found.track for found in (*first, *last)] == [None, 7, None, None] and first[
        1
    ].confidence == 0.5


# ---- what is broken -------------------------------------------------------------------------------------------------


def torn(folder):
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])


def gone(folder):
    change(folder, frames=["0.png", "1.png"])
    (folder / "1.png").unlink()


def flat(folder):
    save_image(folder / "1.png", np.full((32, 32, 3), 90, np.uint8))


def larger(folder):
    Image.open(folder / "1.png").resize((64, 48)).save(folder / "1.png")


BROKEN = {
    "1.png does not exist": gone,
    "no frame after the first": lambda f: change(f, frames=["0.png"]),
    "1.png cannot be read .*truncated": torn,
    "one flat colour": flat,
    "1.png has 64 x 48 pixels and the first frame 32 x 32": larger,
    "0.png does not exist": lambda f: (
        change(f, frames=["0.png", "1.png"]),
        (f / "0.png").unlink(),
    ),
    "no action 'jump'": lambda f: change(f, program=[{"kind": "jump", "amount": 1}]),
    "no action 'look up'": lambda f: change(f, program=[{"kind": "look up", "amount": 10}]),
    "0.25 meters to the left' is off the grid": lambda f: change(
        f, program=[{"kind": "move left", "amount": 0.25}]
    ),
    "turn 15 degrees to the left' is off the grid": lambda f: change(
        f, program=[{"kind": "turn left", "amount": 15}]
    ),
    "is -10 and should be a number above 0": lambda f: change(
        f, program=[{"kind": "turn left", "amount": -10}]
    ),
    "is 1000000000000000000000000000000000000000 and should be a number above 0, below a million": lambda f: (
        change(f, program=[{"kind": "move left", "amount": 10**400}])
    ),
    "its actions undo each other": lambda f: change(
        f, program=[{"kind": "turn left", "amount": 10}, {"kind": "turn right", "amount": 10}]
    ),
    "is '10' and should be a number": lambda f: change(
        f, program=[{"kind": "turn left", "amount": "10"}]
    ),
    "has 0 actions": lambda f: change(f, program=[]),
    "has 4 actions": lambda f: change(f, program=[{"kind": "move left", "amount": 1}] * 4),
    'no "program"': lambda f: change(f, program=None),
    "cannot be read .*Expecting": lambda f: (f / "actions.json").write_text("{"),
    "a list of file names": lambda f: change(f, frames=[1, 2]),
    "../0.png is not below": lambda f: change(f, frames=["../0.png", "1.png"]),
    "should have those of 0.png": lambda f: change(f, detections={"0.png": []}),
    "no label and no box": lambda f: change(f, detections={"0.png": [{"label": "x"}], "1.png": []}),
    "four numbers .*too large": lambda f: change(
        f, detections={"1.png": [], "0.png": [{"label": "x", "box": [1, 2, 3, 10**400]}]}
    ),
    "left, top, right, bottom": lambda f: change(
        f, detections={"0.png": [{"label": "x", "box": [1]}], "1.png": []}
    ),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_a_broken_folder_is_told_in_a_sentence(sentence, rooms, tmp_path):
    folder = write(tmp_path / "bad", rooms[1][0][1])
    read_rendered(folder)
    BROKEN[sentence](folder)
    with pytest.raises(ValueError, match=sentence) as told:
        read_rendered(folder)
    assert str(told.value).endswith(".")


def test_broken_folders_are_named_and_counted_and_the_rest_goes_on(rooms, tmp_path, capsys):
    shutil.copytree(rooms[0], tmp_path / "root")
    bad = rendered_folders(tmp_path / "root")[:3]
    torn(bad[0])
    change(bad[1], program=[{"kind": "jump", "amount": 1}])
    (bad[2] / "1.png").unlink()
    make_rendered(tmp_path / "out", tmp_path / "root", threads=1)
    said = capsys.readouterr().out
    assert "3 of 72 folders cannot be used:" in said and all(
        f"{folder}: " in said for folder in bad
    )
    ids = {
        row["id"].rsplit("_", 2)[0]
        for split in SPLITS
        for row in load_jsonl(tmp_path / "out" / f"questions_{split}.jsonl")
    }
    assert len(ids) > 40 and not any(
        str(folder.relative_to(tmp_path / "root")) in ids for folder in bad
    )


# ---- mirrored turns -------------------------------------------------------------------------------------------------


def test_true_turns_pass_and_mirrored_ones_are_seen():
    found = {True: [], False: []}
    for seed in range(100, 140):
        anchor = room_anchor(seed)
        for side in ("left", "right"):
            for amount in (10.0, 30.0, 60.0):
                target = move_camera(anchor.pose, motion_of(f"turn {side}", amount))
                image = render(random_room(seed), target)["rgb"][0]
                for told in ("left", "right"):
                    program = [motion_of(f"turn {told}", amount)]
                    mirrored = looks_mirrored(anchor.image, image, program)
                    found[told == side].append(mirrored)
    assert not any(found[True]) and np.mean(found[False]) > 0.9


def test_a_mirrored_renderer_is_named(tmp_path, capsys):
    for seed in range(6):
        turned(tmp_path / "right" / str(seed), seed, "turn right", 60.0)
        turned(tmp_path / "wrong" / str(seed), seed, "turn right", 60.0, shown="turn left")
    for folder in rendered_folders(tmp_path / "right"):
        assert read_rendered(folder).program == [motion_of("turn right", 60.0)]
    make_rendered(tmp_path / "out", tmp_path / "wrong", threads=1)
    said = capsys.readouterr().out
    assert "6 of 6 folders cannot be used" in said and "6 folders turn the other way" in said


def test_the_grid():
    assert all(is_on_grid("move left", round(0.1 * k, 1)) for k in range(1, 61))
    assert is_on_grid("turn left", 100.0)
    assert not is_on_grid("move left", 0.15) and not is_on_grid("turn left", 5.0)
    assert not is_on_grid("move left", 0.0)
