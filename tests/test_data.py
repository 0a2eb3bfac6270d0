"""Triples and questions: pytest tests/test_data.py"""

import json
from collections import Counter

import numpy as np
import pytest

import data
from lib.geometry import Motion, dominant_motion, instruction, move_camera
from lib.pictures import load_image
from lib.rooms import random_room, render

ROOMS = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    data.make_triples(out, rooms=6, held_out=2, threads=1)
    data.make_questions(out, rooms=ROOMS, held_out=(2, 2), threads=2)
    return out


def test_every_file_shows_what_its_row_says(made):
    """Triples and questions of a held-out room stand at different spots: neither may overwrite the other's pictures."""
    for name, images, poses in (("triples_test", "context", lambda row: row["context_c2w"]),
                                ("questions_test", "images", lambda row: row["scene"]["poses"])):
        for row in data.load_jsonl(made / f"{name}.jsonl"):
            room = random_room(row["room"] if "room" in row else row["scene"]["room"])
            for path, view in zip(row[images], render(room, np.array(poses(row)))["rgb"]):
                assert np.abs(load_image(path).astype(int) - view).max() <= 1


def test_a_triple_is_what_its_words_say(made):
    rows = data.load_jsonl(made / "triples_train.jsonl")
    assert len(rows) > 20
    for row in rows[:12]:
        context, target = [np.array(p) for p in row["context_c2w"]], np.array(row["target_c2w"])
        motion = Motion(**row["motion"])
        assert dominant_motion(context[row["reference"] - 1], target) == motion and row["coverage"] >= 0.85
        assert row["instruction"] == instruction(motion, row["reference"])
        assert np.abs(load_image(row["target"]).astype(int) - render(random_room(row["room"]), target)["rgb"][0]).max() <= 1


def test_the_warp_shows_the_target_where_the_context_sees_it(made):
    from PIL import Image
    row = data.load_jsonl(made / "triples_train.jsonl")[0]
    warped = np.array(Image.open(row["warp"]))
    seen = warped[..., 3] > 127
    assert seen.mean() >= 0.8
    error = np.abs(warped[..., :3].astype(int) - load_image(row["target"])).mean(-1)[seen]
    assert np.median(error) < 8


def test_same_seed_same_files_whatever_the_number_of_processes(made, tmp_path):
    data.make_questions(tmp_path, rooms=ROOMS, held_out=(2, 2), threads=1)
    assert (tmp_path / "questions_train.jsonl").read_bytes() == (made / "questions_train.jsonl").read_bytes()


def test_rooms_of_the_four_sets_are_disjoint(made):
    def rooms(name):
        rows = map(json.loads, (made / f"{name}.jsonl").read_text().splitlines())
        return {row["scene"]["room"] if "question" in row else row["room"] for row in rows}

    sets = [rooms(name) for name in ("triples_train", "questions_train", "questions_val", "questions_test")]
    assert all(sets) and sum(map(len, sets)) == len(set.union(*sets))
    assert rooms("triples_val") == rooms("questions_val") and rooms("triples_test") == rooms("questions_test")


def true_facts(row, camera):
    room = random_room(row["scene"]["room"])
    return room, data.facts(render(room, camera)["ids"][0], len(room.things))


def test_answers_are_true_and_an_unseen_view_is_needed(made):
    """Look through the commanded camera: the answer is what stands there, and the reference image says otherwise."""
    rows, counts = data.load_jsonl(made / "questions_train.jsonl"), Counter()
    for row in rows:
        answer = row["options"]["ABCD".index(row["answer"])].split(". ")[1]
        poses = [np.array(p) for p in row["scene"]["poses"]]
        counts[row["category"], row["needs_view"]] += 1
        if row["category"] == "camera-camera":
            assert dominant_motion(*poses).kind == "move " + answer.split()[-1]
            continue
        camera = poses[row["shown_by"] - 1] if row["shown_by"] else \
            move_camera(poses[row["motion"]["image"] - 1], Motion(row["motion"]["kind"], row["motion"]["amount"]))
        room, found = true_facts(row, camera)
        assert room.things[found[row["ask"]]].colour == answer
        if row["needs_view"]:
            assert found[row["ask"]] != true_facts(row, poses[row["motion"]["image"] - 1])[1][row["ask"]]
        if row["category"] == "rotation":                    # the turn ends exactly where the given image stands
            turned = move_camera(poses[row["motion"]["image"] - 1], Motion(row["motion"]["kind"], row["motion"]["amount"]))
            np.testing.assert_allclose(turned, camera, atol=1e-5)
    assert set(c for c, _ in counts) == {"camera-object", "object-object", "region", "camera-camera", "rotation"}
    need = sum(n for (_, needs), n in counts.items() if needs)
    assert abs(need / len(rows) - 0.5) < 0.05


def test_letters_are_balanced_and_options_differ(made):
    rows = data.load_jsonl(made / "questions_train.jsonl")
    letters = Counter(row["answer"] for row in rows)
    assert max(letters.values()) - min(letters.values()) <= 2 and len(letters) == 4
    assert all(len({option[3:] for option in row["options"]}) == 4 for row in rows)


def test_facts_of_a_picture_drawn_by_hand():
    """Thing 1: a 10 x 10 square at the left; thing 2: 5 x 5 at the right; the centre is empty."""
    ids = np.zeros((32, 32), int)
    ids[10:20, 0:10], ids[10:15, 26:31] = 1, 2
    found = data.facts(ids, 3)
    assert found == {"largest": 0, "leftmost": 0, "rightmost": 1, "left": 0, "centre": -1, "right": 1, "seen": [0, 1]}
    ids[10:20, 20:30] = 3                                    # as large as thing 1, two columns left of thing 2
    assert data.facts(ids, 3)["largest"] is None
    assert data.facts(np.zeros((32, 32), int), 3)["largest"] == -1


def test_mindcube_layout(made, tmp_path):
    data.make_mindcube(tmp_path, made / "questions_test.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "raw" / "MindCube_tinybench.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all((tmp_path / image).exists() for row in rows for image in row["images"])
    assert all(row["id"].startswith(("rotation_", "around_")) and f" {row['gt_answer']}. " in row["question"] for row in rows)


def test_bad_files_stop_with_a_sentence(made, tmp_path):
    broken = tmp_path / "broken.png"
    source = next((made / "questions").rglob("1.png"))
    broken.write_bytes(source.read_bytes()[:200])
    with pytest.raises(SystemExit, match="truncated"):
        load_image(broken)
    with pytest.raises(SystemExit, match="python data.py questions"):
        data.load_jsonl(tmp_path / "questions_train.jsonl")
    (tmp_path / "questions_train.jsonl").write_text('{"id": 1}\n{"id"')
    with pytest.raises(SystemExit, match="line 2"):
        data.load_jsonl(tmp_path / "questions_train.jsonl")
