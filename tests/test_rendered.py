"""Frames that another program rendered, as World2VLM's questions: pytest tests/test_rendered.py.  CPU, 15 s."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import data
from extras.report import real_views
from extras.world2vlm.frames import (
    MARGIN,
    detections_of,
    done_by,
    looks_mirrored,
    merged,
    pictures_of,
    read_rendered,
    rendered_folders,
    rendered_questions,
    space_of,
    turns_of,
)
from extras.world2vlm.questions import records, room_detections
from extras.world2vlm.transitions import ROOMS, end_pose, kinds_of, room_anchor, transitions
from extras.world2vlm.words import on_grid, read_actions
from lib.geometry import Motion, move_camera
from lib.images import load_image, save_image
from lib.records import SPLITS
from lib.rooms import TrueRenderer, random_room, render

K = np.array([[16, 0, 16], [0, 16, 16], [0, 0, 1.0]])


def write(folder, transition, **more):
    """A transition of a room in the layout: two frames and their boxes."""
    images = dict(zip(("0.png", "1.png"), (transition.source, transition.target)))
    for name, image in images.items():
        save_image(folder / name, image)
    found = {
        name: [detection._asdict() for detection in part]
        for name, part in zip(images, room_detections(transition))
    }
    info = {
        "program": [{"kind": m.kind, "amount": m.amount} for m in transition.program],
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


def walk(folder, seed, program, frames_each, spoil=1):
    """A folder with every frame of a walk through a room; spoil=-1 renders turns the wrong way, as HY's table does."""
    anchor = room_anchor(seed)
    c2w, steps = np.array(anchor.scene["poses"][anchor.reference - 1]), []
    for motion in program:
        steps += [Motion(motion.kind, motion.amount / frames_each)] * frames_each
    poses = [c2w]
    for step in steps:
        side = (
            {"turn left": "turn right", "turn right": "turn left"}.get(step.kind)
            if spoil < 0
            else None
        )
        poses.append(move_camera(poses[-1], Motion(side or step.kind, step.amount)))
    for k, image in enumerate(render(random_room(seed), np.stack(poses))["rgb"]):
        save_image(folder / f"{k}.png", image)
    (folder / "actions.json").write_text(
        json.dumps(
            {
                "program": [{"kind": m.kind, "amount": m.amount} for m in program],
                "frames": [f"{k}.png" for k in range(len(poses))],
                "steps": [{"kind": m.kind, "amount": round(m.amount, 5)} for m in steps],
            }
        )
    )
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
    for number, (folder, transition) in enumerate(pairs):
        straight = records(transition, np.random.default_rng(number), ROOMS, room_detections)
        read, fault = rendered_questions(folder, root, ROOMS, np.random.default_rng(number))
        assert fault is None and len(read) == len(straight)
        for a, b in zip(read, straight):
            for key in b.keys() - {"id", "images"}:
                assert a[key] == b[key], (folder, key)
            assert a["id"] == b["id"].replace(
                transition.name, f"{folder.parent.name}/{transition.name}"
            )
            assert all(
                (load_image(path) == image).all()
                for path, image in zip(a["images"], b["images"], strict=True)
            )
            tasks.add(a["task"])
    assert len(tasks) == 8


def test_the_command_writes_every_split_and_leaves_the_pictures_where_they_are(
    rooms, tmp_path, capsys
):
    root, pairs = rooms
    args = data.parse_args(
        ["world2vlm", "--rendered", str(root), "--out", str(tmp_path / "out"), "--threads", "1"]
    )
    assert (
        args.rendered == str(root)
        and data.parse_args(["world2vlm", "--rendered", "x"]).out == "out/rendered"
    )
    data.main(
        ["world2vlm", "--rendered", str(root), "--out", str(tmp_path / "out"), "--threads", "1"]
    )
    rows = {
        split: data.load_jsonl(tmp_path / "out" / f"questions_{split}.jsonl") for split in SPLITS
    }
    places = [{row["cluster"] for row in part} for part in rows.values()]
    assert (
        sum(map(len, places)) == len(set.union(*places)) == 8
    )  # a picture of an anchor is on one side only
    assert {row["category"] for row in rows["train"]} >= {"A1", "A2", "A3", "D1"}
    assert all(
        str(root) in str((tmp_path / path).resolve()) and load_image(path).shape == (32, 32, 3)
        for row in rows["train"]
        for path in row["images"]
    ) and not list((tmp_path / "out").rglob("*.png"))
    assert "0 of 72 folders cannot be used" in capsys.readouterr().out
    data.make_rendered(tmp_path / "again", root, threads=2)
    first, second = (
        (tmp_path / name / "questions_train.jsonl").read_text() for name in ("out", "again")
    )
    assert first == second
    with pytest.raises(SystemExit, match="no folder with an actions.json"):
        data.make_rendered(tmp_path / "x", tmp_path / "nowhere")
    for wrong in (["triples", "--rendered", "x"], ["world2vlm", "--detector", "x"]):
        with pytest.raises(SystemExit):
            data.parse_args(wrong)


def test_without_boxes_only_motion_is_asked_and_a_detector_brings_the_others(
    rooms, tmp_path, capsys, monkeypatch
):
    root, pairs = rooms
    shutil.copytree(root, tmp_path / "bare")
    for folder in rendered_folders(tmp_path / "bare"):
        change(folder, detections=None)
    data.make_rendered(tmp_path / "motion", tmp_path / "bare", threads=1)
    said = {
        row["category"]
        for split in SPLITS
        for row in data.load_jsonl(tmp_path / "motion" / f"questions_{split}.jsonl")
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
    data.make_rendered(tmp_path / "boxes", tmp_path / "bare", "some/model")
    rows = data.load_jsonl(tmp_path / "boxes" / "questions_train.jsonl")
    (one,) = {row["answer"] for row in rows if row["category"] == "D1"}
    assert {row["weight"] for row in rows if row["category"] == "D1"} == {0.25}  # both scores
    assert (
        one == "[300, 300, 600, 700]"
        and set(looked) == {("some/model", True)}
        and len(looked) == 144
    )


def test_false_claims_come_from_the_programs_that_occur(rooms, tmp_path):
    root, pairs = rooms
    space = space_of(rendered_folders(root))
    assert space.margin == MARGIN and set(space.single) == set(ROOMS.single)
    sequences = {tuple(kind for kind, _ in sequence): sequence for sequence in space.sequences}
    several = [t.program for _, t in pairs if len(t.program) > 1]
    assert set(sequences) == set(map(kinds_of, several))
    for kinds, sequence in sequences.items():
        for place, (_, amounts) in enumerate(sequence):  # those that occur, and none between them
            seen = Counter(
                program[place].amount for program in several if kinds_of(program) == kinds
            )
            assert amounts == sorted(seen) and space.often[kinds][place] == seen
    asked = Counter()
    for folder, transition in pairs:
        rows, _ = rendered_questions(folder, root, space, np.random.default_rng(0))
        asked.update(row["task"] for row in rows)
        for row in rows:
            if row["task"] == "A4":  # balanced by what it claims
                claim = read_actions(row["prompt"])
                assert (
                    row["cell"] == [kind for kind, _ in claim] and tuple(row["cell"]) in sequences
                )
                assert all(
                    amount in amounts
                    for (_, amount), (_, amounts) in zip(claim, sequences[tuple(row["cell"])])
                )
    assert asked["A3"] == len(several) and asked["A4"] > len(several) / 2
    lonely = space_of([write(tmp_path / "one", next(t for _, t in pairs if len(t.program) == 2))])
    rows, _ = rendered_questions(tmp_path / "one", tmp_path, lonely, np.random.default_rng(0))
    tasks = {row["task"] for row in rows}
    assert "A3" in tasks and "A4" not in tasks  # there is nothing to confuse it with


# ---- frames, steps, boxes -------------------------------------------------------------------------------------------


def test_actions_are_summed_where_no_picture_shows_their_order(rooms, tmp_path):
    def way(*told):
        return [Motion(kind, float(amount)) for kind, amount in zip(told[::2], told[1::2])]

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
        assert merged(way(*told)) == way(*read)
        np.testing.assert_allclose(
            end_pose(np.eye(4), way(*told)), end_pose(np.eye(4), way(*read)), atol=1e-9
        )
    folder = walk(
        tmp_path / "steps", 3, way("move forward", 0.6, "move backward", 0.2, "turn left", 30), 6
    )
    assert read_rendered(folder).program == way("move forward", 0.4, "turn left", 30)
    folder = change(
        write(tmp_path / "none", rooms[1][0][1]),
        program=[{"kind": "move left", "amount": 0.25}, {"kind": "move left", "amount": 0.75}],
    )
    assert read_rendered(folder).program == way("move left", 1)


def test_the_target_is_the_last_frame_that_exists_and_the_program_what_was_done_till_then(tmp_path):
    program = [Motion("move forward", 0.6), Motion("turn left", 60.0)]
    folder = walk(tmp_path / "walk", 3, program, 6)
    whole = read_rendered(folder)
    assert whole.program == program and (whole.target == load_image(folder / "12.png")).all()
    (folder / "12.png").unlink()
    part = read_rendered(folder)
    assert (
        part.program == [program[0], Motion("turn left", 50.0)] and part.files[1].name == "11.png"
    )
    assert space_of([folder]).sequences == ((("move forward", [0.6]), ("turn left", [50.0])),)
    anchor = room_anchor(3)
    start = np.array(anchor.scene["poses"][anchor.reference - 1])
    assert (
        np.abs(
            part.target.astype(int)
            - render(random_room(3), end_pose(start, part.program))["rgb"][0]
        ).max()
        <= 1
    )
    (folder / "4.png").unlink()  # neither the first nor the last
    assert read_rendered(folder).program == part.program
    for k in range(7, 12):
        (folder / f"{k}.png").unlink()
    assert read_rendered(folder).program == program[:1]
    change(folder, steps=None)
    with pytest.raises(ValueError, match="7.png and what follows is missing, and without"):
        read_rendered(folder)


def test_steps_that_were_rounded_still_make_the_whole_amount():
    program = [Motion("move left", 0.1), Motion("turn right", 20.0)]
    steps = [Motion("move left", round(0.1 / 7, 4))] * 7 + [
        Motion("turn right", round(20 / 7, 3))
    ] * 7
    assert done_by(program, steps) == program and done_by(program, steps[:7]) == program[:1]
    for wrong in (steps[7:], steps[:3] + steps[7:], [*steps, steps[-1]], steps[:7] * 2):
        with pytest.raises(ValueError, match="do not add up"):
            done_by(program, wrong)


def test_pictures_are_in_the_order_of_their_numbers(tmp_path):
    for k in (0, 1, 2, 9, 10, 11, 100):
        save_image(tmp_path / f"frame_{k}.png", np.zeros((4, 4, 3), np.uint8))
    assert pictures_of(tmp_path) == [f"frame_{k}.png" for k in (0, 1, 2, 9, 10, 11, 100)]


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
    first, last = detections_of(rows, "a", "b")
    assert [found.track for found in first] == ["chair", None, None] and last[0].track == "chair"
    rows["a"][1]["track"] = 7
    first, last = detections_of(rows, "a", "b")
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
    "no frame after the first": gone,
    "1.png cannot be read .*truncated": torn,
    "one flat colour": flat,
    "1.png has 64 x 48 pixels and the first frame 32 x 32": larger,
    "first frame, 0.png, is missing": lambda f: (
        change(f, frames=["0.png", "1.png"]),
        (f / "0.png").unlink(),
    ),
    "no action 'jump'": lambda f: change(f, program=[{"kind": "jump", "amount": 1}]),
    "no action 'look up'": lambda f: change(f, program=[{"kind": "look up", "amount": 10}]),
    "0.25 meters to the left' is off the grid": lambda f: change(
        f, program=[{"kind": "move left", "amount": 0.25}]
    ),
    "turn left 15 degrees' is off the grid": lambda f: change(
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
    "2 frames and 3 steps": lambda f: change(f, steps=[{"kind": "move left", "amount": 0.1}] * 3),
    "cannot be read .*Expecting": lambda f: (f / "actions.json").write_text("{"),
    "3 rows of 3": lambda f: change(f, intrinsics=[[1, 2], [3, 4]]),
    "last row 0, 0, 1": lambda f: change(f, intrinsics=[[1, 0, 0], [0, 1, 0], [0, 0, 0]]),
    "a list of file names": lambda f: change(f, frames=[1, 2]),
    '"steps" a list': lambda f: change(f, steps=3),
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
    data.make_rendered(tmp_path / "out", tmp_path / "root", threads=1)
    said = capsys.readouterr().out
    assert "3 of 72 folders cannot be used:" in said and all(
        f"{folder}: " in said for folder in bad
    )
    ids = {
        row["id"].rsplit("_", 2)[0]
        for split in SPLITS
        for row in data.load_jsonl(tmp_path / "out" / f"questions_{split}.jsonl")
    }
    assert len(ids) > 40 and not any(
        str(folder.relative_to(tmp_path / "root")) in ids for folder in bad
    )


# ---- mirrored turns -------------------------------------------------------------------------------------------------


def test_true_turns_pass_and_mirrored_ones_are_seen():
    seen = {True: [], False: []}
    for seed in range(100, 140):
        anchor = room_anchor(seed)
        start = np.array(anchor.scene["poses"][anchor.reference - 1])
        for side, other in (("left", "right"), ("right", "left")):
            for amount in (10.0, 30.0, 60.0):
                true = render(
                    random_room(seed), move_camera(start, Motion(f"turn {side}", amount))
                )["rgb"][0]
                for told in (side, other):
                    seen[told == side].append(
                        looks_mirrored(
                            anchor.images[anchor.reference - 1],
                            true,
                            Motion(f"turn {told}", amount),
                            K,
                        )
                    )
    assert not any(seen[True]) and np.mean(seen[False]) > 0.9


def test_a_mirrored_renderer_is_named_and_steps_show_it_within_longer_programs(tmp_path, capsys):
    program = [Motion("move forward", 0.6), Motion("turn right", 60.0)]
    for seed in range(6):
        walk(tmp_path / "right" / str(seed), seed, program, 6)
        walk(tmp_path / "wrong" / str(seed), seed, program, 6, spoil=-1)
    assert all(
        read_rendered(folder).program == program for folder in rendered_folders(tmp_path / "right")
    )
    data.make_rendered(tmp_path / "out", tmp_path / "wrong", threads=1)
    said = capsys.readouterr().out
    assert "6 of 6 folders cannot be used" in said and "6 folders turn the other way" in said
    change(tmp_path / "wrong" / "0", steps=None)
    assert (
        read_rendered(tmp_path / "wrong" / "0").program == program
    )  # nothing tells it without steps


def test_a_frame_between_of_another_size_is_told(tmp_path):
    folder = walk(tmp_path, 0, [Motion("move forward", 0.6), Motion("turn right", 60.0)], 6)
    Image.open(folder / "6.png").resize((16, 16)).save(folder / "6.png")  # from where it turns
    with pytest.raises(ValueError, match="6.png has 16 x 16 pixels"):
        read_rendered(folder)


def test_which_frames_are_compared():
    turn, move = Motion("turn left", 10.0), Motion("move left", 0.1)
    assert turns_of([Motion("turn left", 60.0)], None, [0, 5]) == [
        (0, 5, Motion("turn left", 60.0))
    ]
    assert (
        turns_of([Motion("turn left", 70.0)], None, [0, 5])
        == turns_of([move, turn], None, [0, 5])
        == []
    )
    steps = [move, turn, turn, turn, move] + [turn] * 8
    assert turns_of([], steps, range(14)) == [
        (1, 4, Motion("turn left", 30.0)),
        (5, 11, Motion("turn left", 60.0)),
    ]
    assert turns_of([], steps, [0, 1, 2, 6]) == [(1, 2, turn)]


def test_the_grid():
    assert all(on_grid(Motion("move left", round(0.1 * k, 1))) for k in range(1, 61))
    assert on_grid(Motion("turn left", 100.0))
    assert not on_grid(Motion("move left", 0.15)) and not on_grid(Motion("turn left", 5.0))
