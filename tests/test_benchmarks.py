"""Records and verdicts of the published benchmarks, row by row of what their official code does."""

import json

import numpy as np
import pytest
from PIL import Image

import rewards
from lib.benchmarks import (load_mindcube, mindcube_extract, mindcube_image, mindcube_setting, open_image, score,
                            split_options)

OFFICIAL = [    # a reply, the letter that MindCube's code reads
    ("<answer>D. Mirror</answer>", "D"), ("B. Red stool is hidden; final: D", "B"), ("See the PC. It stands left", "C"),
    ("<Answer>The answer is B</Answer>", "B"), ("d) mirror", None), ("Option F. none", None), ("[D]", "D"),
    (r"\boxed{D}", "D"), ('"D"', "D"), ("**D** (the mirror)", "D"), ("A\nB\nC", "A"),
    # the table for all benches
    ("B. Red stool", "B"), ("(B)", "B"), ("B)", "B"), ("**B**", "B"), ("<Answer>B</Answer>", "B"),
    ("<answer>B</answer>", "B"), (r"\boxed{B}", "B"), ("Answer: B", "B"), ("b", None),
    ("the answer is B because it turns", "B"), ("Not A but B", "A"),
    # traps: a thought decides over the answer, a remark overrides it, articles and capitals are read as letters
    ("<think>It is not A. at all</think><answer>D</answer>", "A"), ("<answer>C</answer> or D.", "D"),
    ("The answer is Dark", "D"), ("A mirror stands there, so D it is", "A"), ("", None), ("   ", None),
    ("I cannot tell", None),
    # rule 2 looks inside the first <Answer> only, and the last hit of the first pattern counts
    ("<Answer>the answer is C, no, the answer is D</Answer> A", "D"), ("<Answer>A or B", "B"),
    ("<Answer>none</Answer> C", "C"),
    # rule 3 in its order: quotation marks before "Answer", "Answer" before "answer is"
    ('it says "B" but Answer: C', "B"), ("Answer C then my answer is D", "C"), ("my answer is E, he said", "E"),
]


@pytest.mark.parametrize("reply, letter", OFFICIAL)
def test_mindcube_reads_what_the_official_code_reads(reply, letter):
    assert score("mindcube", {"answer": "D"}, reply) == (letter, float(letter == "D"))


def test_line_breaks_matter_before_the_blanks_rule_only():
    assert mindcube_extract("A\nB\nC") == "C"                      # 3a eats the line break: A and C are found, not B
    assert mindcube_extract("first B\nthen C or A\nnothing") == "C"     # 4: the lowest line that has one, its first
    assert score("mindcube", {"answer": "A"}, "A\nB\nC") == ("A", 1.0)


def test_rooms_verdict_is_the_reward():
    for text in ("B", "b", " B ", "B.", "B. red box", "b) red box", "Bx", "red box", "", None, "BB", "C", "A. B."):
        question = {"answer": "B", "options": ["A. blue box", "B. red box"]}
        assert score("rooms", question, text)[1] == rewards.exact_match(text, question), text
    assert score("rooms", question, "c. blue box") == ("C", 0.0) and score("rooms", question, "red box") == ("B", 1.0)
    with pytest.raises(ValueError, match="no bench called"):
        score("nope", {"answer": "B"}, "B")


def test_setting_is_the_first_of_four_words_in_the_id():
    assert [mindcube_setting(i) for i in ("among_group901_q0_1_2", "aroundnew_group3_q1_2", "Among_turn_AROUND_1",
                                          "rotation_group902_q1_3", "translation_x", "rotation_among", "", "x")] == \
        ["among", "around", "around", "rotation", "translation", "rotation", "other", "other"]


def test_image_paths_follow_the_official_rule():
    root = "/data"
    for path, want in {"other_all_image/among/1.jpg": "/data/other_all_image/among/1.jpg",
                       "/data/other_all_image/1.jpg": "/data/other_all_image/1.jpg",
                       "/mnt/MindCube_image/around/1.jpg": "/data/around/1.jpg",
                       "/mnt/x/other_all_image/among/1.jpg": "/data/other_all_image/among/1.jpg",
                       "C:\\x\\1.jpg": "/data/1.jpg", "/mnt/x/1.jpg": "/data/1.jpg"}.items():
        assert mindcube_image(path, root) == want


def test_options_leave_the_question_without_changing_a_word():
    stem, options = split_options("From image 1, what is behind the lamp? A. Crate B. Stool C. Plant D. Bin")
    assert stem.endswith("the lamp?") and options == ["A. Crate", "B. Stool", "C. Plant", "D. Bin"]
    for plain in ("What is it?", "Is plan A. better than plan B?", "Who is C. Smith? B. me", ""):
        assert split_options(plain) == (plain, [])
    assert split_options("Vitamin A. is what? A. Tea B. Milk") == ("Vitamin A. is what?", ["A. Tea", "B. Milk"])


def fixture(folder):
    records = [
        {"id": "among_group901_q0_1_2", "category": ["perpendicular", "PP", "static", "self"], "type": "0_frame",
         "meta_info": [["lamp", "crate"], ["face", None]],
         "question": "What is behind the lamp? A. Crate B. Stool C. Plant",
         "images": ["other_all_image/among/group901/front_001.jpg", "other_all_image/among/group901/left_001.jpg"],
         "gt_answer": "C"},
        {"id": "rotation_group902_q1_3", "category": [], "type": "two_view_clockwise", "meta_info": [],
         "question": "What is on your right? A. Grey door B. Yellow sink",
         "images": ["other_all_image/rotation/group902/1.png"]}]
    (folder / "raw").mkdir(parents=True)
    (folder / "raw" / "MindCube_tinybench.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    picture = folder / records[0]["images"][0]
    picture.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((600, 800, 4), np.uint8), "RGBA").save(picture.with_suffix(".png"))
    picture.with_suffix(".png").rename(picture)
    return records


def test_mindcube_records_become_questions(tmp_path):
    records = fixture(tmp_path)
    first, second = load_mindcube(tmp_path)
    assert (first["category"], first["answer"], first["missing_images"], len(first["images"])) == ("among", "C", 1, 1)
    assert " ".join([first["question"], *first["options"]]) == records[0]["question"]
    assert (second["category"], second["answer"]) == ("rotation", None)
    assert (second["images"], second["missing_images"]) == ([], 1)
    image = open_image(first["images"][0], "mindcube")
    assert image.mode == "RGB" and image.width * image.height <= 480 * 480
    assert load_mindcube(tmp_path / "raw" / "MindCube_tinybench.jsonl") == [first, second]


def test_missing_or_broken_files_are_told_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="MLL-Lab/MindCube"):
        load_mindcube(tmp_path)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "MindCube_tinybench.jsonl").write_text('{"id": "among_1"}\n')
    with pytest.raises(SystemExit, match="line 1 is not a MindCube record"):
        load_mindcube(tmp_path)
