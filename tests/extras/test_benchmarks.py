"""Records and verdicts of the published benchmarks, row by row of what their official code does."""

import importlib.util
import io
import json
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from evaluate import Rooms
from extras.benches.common import (
    BENCHES,
    Published,
    group_weights,
    lenient,
    load,
    official_score,
    open_image,
    reply,
    weights,
)
from extras.benches.files import sample_frames, split_options
from extras.benches.mindcube import main as write_rooms
from extras.benches.mindcube import mindcube_image, mindcube_setting
from extras.benches.mmsi import MMSI_TYPES
from extras.benches.mmsi_video import VIDEO_TYPES, level
from extras.benches.sat import SAT_GROUPS
from extras.benches.vsi import VSI_LETTER, VSI_NUMBER, task
from lib.dialogue import Trajectory
from lib.images import PictureError, save_image
from lib.records import save_jsonl
from rewards import exact_match, option_letter

OFFICIAL = [  # a reply, the letter that MindCube's code reads
    ("<answer>D. Mirror</answer>", "D"),
    ("B. Red stool is hidden; final: D", "B"),
    ("See the PC. It stands left", "C"),
    ("<Answer>The answer is B</Answer>", "B"),
    ("d) mirror", None),
    ("Option F. none", None),
    ("[D]", "D"),
    (r"\boxed{D}", "D"),
    ('"D"', "D"),
    ("**D** (the mirror)", "D"),
    # a line break is a blank by then: the first line decides, the lowest does not
    ("A\nB\nC", "A"),
    ("first B\nthen C or A\nnothing", "B"),
    # the table for all benches
    ("B. Red stool", "B"),
    ("(B)", "B"),
    ("B)", "B"),
    ("**B**", "B"),
    ("<Answer>B</Answer>", "B"),
    ("<answer>B</answer>", "B"),
    (r"\boxed{B}", "B"),
    ("Answer: B", "B"),
    ("b", None),
    ("the answer is B because it turns", "B"),
    ("Not A but B", "A"),
    # traps: a thought decides over the answer, a remark overrides it, articles and capitals are read as letters
    ("<think>It is not A. at all</think><answer>D</answer>", "A"),
    ("<answer>C</answer> or D.", "D"),
    ("The answer is Dark", "D"),
    ("A mirror stands there, so D it is", "A"),
    ("", None),
    ("   ", None),
    ("I cannot tell", None),
    # rule 2 looks inside the first <Answer> only, and the last hit of the first pattern counts
    ("<Answer>the answer is C, no, the answer is D</Answer> A", "D"),
    ("<Answer>A or B", "B"),
    ("<Answer>none</Answer> C", "C"),
    # rule 3 in its order: quotation marks before "Answer", "Answer" before "answer is"
    ('it says "B" but Answer: C', "B"),
    ("Answer C then my answer is D", "C"),
    ("my answer is E, he said", "E"),
]
MMSI = [
    ("``B``", "B"),
    ("Answer: B", "B"),
    ("(B) because", "B"),
    ('{"final": "B"}', "B"),
    ("``B: To the east``", "B"),
    ("I choose B since the door moves", None),
    ("Neither A nor B; it must be D.", "B"),
    ("b", None),
    ("[2B]", None),
    ("B_1", None),
    ("``the second one``", None),
    ("{}B", None),
    ("B\nThe door moves", None),
    ("A, B or C", "A"),
    ("the word `stool` stands there, so B", None),
    ("```B```", "B"),
    ("``it is `` then `C`", None),
    ("B 2", "B"),
    ("", None),
    ("{B} or ``C``", "C"),
    ("C {{or B} A", "B"),
    ("{" * 1_000_000 + "B", "B"),
    ("E", None),
]
VIDEO = [  # gold C
    ("C", "C"),
    ("C. turned right", "C"),
    ("<answer>C</answer>", "C"),
    (r"\boxed{ C }", "C"),
    ("Final answer: C, since it turns", "C"),
    ('{"answer":"C","why":"x"}', "C"),
    ('{"answer":"C"}', None),
    ("(C)", None),
    ("C) turned", None),
    ("c", None),
    ("I think C", None),
    ("Answer: **C**", None),
    ("The answer is C since it turns", None),
    ("Answer: C\nDone", None),
    ("The answer is B. Answer: C.", "B"),
    ("there is no answer. Answer: C", None),
    (r"\boxed{C} or \boxed{D}", "C"),
    (r"\boxed{C or \boxed{D}", None),
    ("Answer: A. no, Answer: C", "C"),
    ("'C'", "C"),
    ("", None),
    ("G", None),
    ("<Answer>C</Answer>", None),
]
ALL = [  # the fact sheet's table, gold B: MindCube, MMSI, MMSI-Video, VSI
    ("B. Red stool", "1111"),
    ("(B)", "1100"),
    ("B)", "1100"),
    ("**B**", "1100"),
    ("<Answer>B</Answer>", "1100"),
    ("<answer>B</answer>", "1110"),
    (r"\boxed{B}", "1110"),
    ("Answer: B", "1110"),
    ("b", "0001"),
    ("the answer is B because it turns", "1000"),
    ("Not A but B", "0100"),
]


def groups(question):
    return Published(question["bench"]).groups(question)


# ---- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bench, gold, text, letter",
    [
        *(("mindcube", "D", *row) for row in OFFICIAL),
        *(("mmsi", "B", *row) for row in MMSI),
        *(("mmsi_video", "C", *row) for row in VIDEO),
    ],
)
def test_letters_are_read_as_the_official_code_reads_them(bench, gold, text, letter):
    assert official_score(bench, {"answer": gold}, text) == (letter, float(letter == gold))


@pytest.mark.parametrize("text, verdicts", ALL)
def test_the_benches_disagree_on_one_text_as_the_fact_sheet_says(text, verdicts):
    question = {"answer": "B", "kind": "mca", "options": []}
    for bench, right in zip(("mindcube", "mmsi", "mmsi_video", "vsi"), verdicts, strict=True):
        assert official_score(bench, question, text)[1] == int(right), bench


def test_rooms_verdict_is_the_reward():
    options = ["A. blue box", "B. red box"]
    question = {"bench": "rooms", "kind": "mca", "answer": "B", "options": options}
    words = ("B", "b", " B ", "B.", "B. red box", "b) red box", "Bx", "red box", "", None, "BB")
    for text in (*words, "C", "A. B."):
        verdict = Rooms().judge(question, Trajectory(question, "direct", answer=text), "direct")
        assert verdict["correct"] == exact_match(text, question), text
    assert official_score("mmsi", question, "``B``") == ("B", 1)


def test_an_option_without_a_letter_is_named_by_its_text():
    options = ["A. red box", "Blue box", "C."]
    for text, name in (("blue box", "Blue box"), ("Red box", "A"), ("b", "B"), ("c.", "C.")):
        assert option_letter(text, options) == name


def test_a_letter_a_whole_option_and_its_words_name_an_option():
    """Words that are a letter themselves do not catch the letter."""
    for options, answers in (
        (["A. front", "B. left of it"], {"A": "A", "A. front": "A", "Left of it": "B", "b)": "B"}),
        (["A. B", "B. A", "C. x"], {"A": "A", "b": "B", "A. B": "A", "B. A": "B", "X": "C"}),
        (["A. x", "B. C. elegans"], {"C. elegans": "B", "A. whatever": "A", "B. C. elegans": "B"}),
    ):
        for text, letter in answers.items():
            assert option_letter(text, options) == letter, text


def test_sat_reads_the_words_of_an_option_and_nothing_else():
    def read(text, *options):
        options = [f"{letter}. {words}" for letter, words in zip("AB", options, strict=True)]
        return official_score("sat", {"answer": "A", "kind": "mca", "options": options}, text)

    for text, letter in [
        ("moved right", "A"),
        ("moved right.", None),
        ("B", None),
        ("A", None),
        ("Moved left", "B"),
        ("Answer: moved right", None),
        ("moved right### and on", "A"),
        ("1. moved right", "A"),
        ("moved right (highlighted by red)", "A"),
        ("", None),
        (" moved right\n", "A"),
    ]:
        assert read(text, "moved right", "moved left") == (letter, float(letter == "A")), text
    words = ("right", "Answer: right", "ight", "it is located right of it", "answer: right it is")
    for text in words:
        assert read(text, "right", "left")[1] == 1, text
    assert read("night stand", "night stand", "sofa") == (None, 0)  # becomes "nnight stand"
    assert read("ight stand", "night stand", "sofa")[1] == 1
    assert read("left (north)", "left (north)", "right")[1] == 0
    assert read("left north", "left (north)", "right")[1] == 1


@pytest.mark.parametrize(
    "text, right",
    [
        ("C", 1),
        ("c.", 1),
        ("C. sofa", 1),
        ("C\n", 1),
        ("C) sofa", 0),
        ("[C]", 0),
        ("C, sofa", 0),
        ("It is C", 0),
        ("C.sofa", 0),
        ("C.\n", 0),
        (" C", 0),
        ("C...", 1),
        ("", 0),
    ],
)
def test_vsi_reads_a_letter_before_the_first_blank(text, right):
    assert official_score("vsi", {"kind": "mca", "answer": "C"}, text)[1] == right


def test_vsi_gives_relative_accuracy_for_numbers():
    def accuracy(text, gold):
        return official_score("vsi", {"kind": "na", "answer": gold}, text)[1]

    for text, want in [
        ("12", 0.6),
        ("12.", 0.6),
        ("12 m", 0.6),
        ("12m", 0),
        ("~12", 0),
        ("twelve", 0),
        ("nan", 0),
        ("1e1", 1),
        ("inf", 0),
        ("", 0),
        (" 10", 0),
        ("-10", 0),
    ]:
        assert accuracy(text, "10") == pytest.approx(want), text
    for text, gold, want in [
        ("2.2", "2", 0.9),
        ("1.7", "2", 0.8),
        ("3", "4", 0.6),
        ("2", "3", 0.4),
        ("3", "2", 0.1),
        ("0.45", "0.5", 0.9),
        ("1,000", "1000", 0),
        ("4.9", "10", 0),
        ("15.2", "10", 0),
    ]:
        assert accuracy(text, gold) == pytest.approx(want), (text, gold)
    assert official_score("vsi", {"kind": "na", "answer": "10"}, "12 m")[0] == 12.0


@pytest.mark.parametrize(
    "bench, part, right",
    [
        ("mindcube", "<think>no answer: not A. at all</think><answer>B</answer>", 0),
        ("mmsi", "<answer>B</answer>", 1),
        ("mmsi_video", "<answer>B</answer>", 1),
        ("vsi", "B", 1),
        ("sat", "B", 0),
    ],
)
def test_our_protocol_is_taken_off_where_the_bench_knows_no_thoughts(bench, part, right):
    turn = "<think>no answer: not A. at all</think><answer>B</answer>"
    assert reply(bench, turn) == part
    question = {"answer": "B", "kind": "mca", "options": ["A. left", "B. right"]}
    assert official_score(bench, question, part)[1] == right
    assert reply(bench, "") == "" and reply(bench, "C. sofa") == "C. sofa"


@pytest.mark.parametrize(
    "text, letter",
    [
        ("<answer>d) mirror</answer>", "D"),
        ("<answer> green box </answer>", "A"),
        ("<ANSWER>\nB, then</ANSWER>", "B"),
        ("so B</think>nothing", None),
        ("**D**", "D"),
        ("It must be the red ball.", "B"),
        ("B or C", None),
        ("", None),
        ("<think>Not A.\n</think>Well, C!", "C"),
        ("I think C", "C"),
        ("Neither A nor C\nhm", None),
        ("</answer><answer>No<Answer>B</ANSWER>C", "B"),
        ("<answer>" * 100_000 + "</answer>B", None),
    ],
)
def test_the_lenient_letter(text, letter):
    options = ["A. green box", "B. red ball", "C. lamp", "D. mirror"]
    question = {"bench": "mmsi", "kind": "mca", "answer": "B", "options": options}
    assert lenient(question, text) == (letter, float(letter == "B"))


def test_lenient_numbers():
    question = {"bench": "vsi", "kind": "na", "answer": "10"}
    for text, number in (
        ("<answer>12 m</answer> or 9", 12),
        ("<think>3</think>from 4 to about 12m", 12),
        ("~1.2e1", 12),
        ("none", None),
        (None, None),
    ):
        assert lenient(question, text)[0] == number, text
    assert lenient(question, "12m")[1] == pytest.approx(0.6)


def test_lenient_words_of_sat():
    question = {"bench": "sat", "kind": "mca", "answer": "B", "options": ["A. left", "B. right"]}
    for text, letter in (
        ("B", "B"),
        ("<think>left</think><answer>B. right</answer>", "B"),
        ("It is right.", "B"),
        ("left or right", None),
        ("right", "B"),
        ("", None),
    ):
        assert lenient(question, text)[0] == letter, text


# ---- MindCube -------------------------------------------------------------------------------------------------------


def test_setting_is_the_first_of_four_words_in_the_id():
    for identity, setting in {
        "among_group901_q0_1_2": "among",
        "aroundnew_group3_q1_2": "around",
        "Among_turn_AROUND_1": "around",
        "rotation_group902_q1_3": "rotation",
        "translation_x": "translation",
        "rotation_among": "rotation",
        "": "other",
        "x": "other",
    }.items():
        assert mindcube_setting(identity) == setting, identity


def test_image_paths_follow_the_official_rule():
    root = "/data"
    for path, want in {
        "other_all_image/among/1.jpg": "/data/other_all_image/among/1.jpg",
        "/data/other_all_image/1.jpg": "/data/other_all_image/1.jpg",
        "/mnt/MindCube_image/around/1.jpg": "/data/around/1.jpg",
        "/mnt/x/other_all_image/among/1.jpg": "/data/other_all_image/among/1.jpg",
        "C:\\x\\1.jpg": "/data/1.jpg",
        "/mnt/x/1.jpg": "/data/1.jpg",
    }.items():
        assert mindcube_image(path, root) == want


def test_options_leave_the_question_without_changing_a_word():
    stem, options = split_options(
        "From image 1, what is behind the lamp? A. Crate B. Stool C. Plant D. Bin"
    )
    assert stem.endswith("the lamp?") and options == ["A. Crate", "B. Stool", "C. Plant", "D. Bin"]
    for plain in ("What is it?", "Is plan A. better than plan B?", "Who is C. Smith? B. me", ""):
        assert split_options(plain) == (plain, [])
    assert split_options("Vitamin A. is what? A. Tea B. Milk") == (
        "Vitamin A. is what?",
        ["A. Tea", "B. Milk"],
    )
    assert split_options("Which?\n(A) Tea\n(B) Milk\n", r"[.:)]\s*")[1] == ["A. Tea", "B. Milk"]


def mindcube_records(count, rng):
    """MindCube's JSONL records with two to four options."""
    for i in range(count):
        options = int(rng.integers(2, 5))
        setting = ("among", "around", "rotation", "translation")[i % 4]
        yield {
            "id": f"{setting}_group{i}_q0_1",
            "category": ["perpendicular", "PP", "static", "self"],
            "type": "0_frame",
            "meta_info": [["lamp", "crate"], ["face", None]],
            "question": "What is it? "
            + " ".join(f"{letter}. Thing {letter}" for letter in "ABCD"[:options]),
            "images": ["other_all_image/1.png"],
            "gt_answer": "ABCD"[rng.integers(options)],
        }


def write_mindcube(folder, records):
    (folder / "raw").mkdir(parents=True)
    (folder / "raw" / "MindCube_tinybench.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )
    return folder


def test_mindcube_records_become_questions(tmp_path):
    records = [
        {
            "id": "among_group901_q0_1_2",
            "category": ["perpendicular", "PP", "static", "self"],
            "type": "0_frame",
            "meta_info": [["lamp", "crate"], ["face", None]],
            "question": "What is behind the lamp? A. Crate B. Stool C. Plant",
            "images": [
                "other_all_image/among/group901/front_001.jpg",
                "other_all_image/among/group901/left_001.jpg",
            ],
            "gt_answer": "C",
        },
        {
            "id": "rotation_group902_q1_3",
            "category": [],
            "type": "two_view_clockwise",
            "meta_info": [],
            "question": "What is on your right? A. Grey door B. Yellow sink",
            "images": ["other_all_image/rotation/group902/1.png"],
        },
    ]
    write_mindcube(tmp_path / "data", records)
    picture = tmp_path / "data" / records[0]["images"][0]
    picture.parent.mkdir(parents=True)
    picture.write_bytes(png(800, 600, "RGBA"))
    first, second = load("mindcube", tmp_path / "data")
    assert (first["category"], first["answer"]) == ("among", "C")
    assert (first["missing_images"], len(first["images"])) == (1, 1)
    assert " ".join([first["question"], *first["options"]]) == records[0]["question"]
    assert (second["category"], second["answer"]) == ("rotation", None)
    assert (second["images"], second["missing_images"]) == ([], 1)
    assert [q["cluster"] for q in (first, second)] == ["among_group901", "rotation_group902"]
    image = open_image(first["images"][0], "mindcube")
    assert image.mode == "RGB" and image.width * image.height <= 480 * 480
    assert load("mindcube", tmp_path / "data" / "raw" / "MindCube_tinybench.jsonl") == [
        first,
        second,
    ]
    assert load("mindcube", tmp_path) == [first, second]  # where the zip was unpacked
    before, text = first["official"]
    assert before == "" and "<answer>" in text
    assert text.endswith("[Question]\n" + records[0]["question"])


def test_questions_of_rooms_in_mindcube_s_files_are_read_back(tmp_path):
    rows = []
    for number, category in enumerate(("turning", "walking")):
        save_image(tmp_path / f"{number}.png", np.full((8, 8, 3), 40 * number, np.uint8))
        options = ["A. red box", "B. blue ball"]
        row = {"id": f"room_{number}", "category": category, "images": [f"{number}.png"] * 2}
        rows.append(row | {"question": "What is there?", "options": options, "answer": "B"})
    save_jsonl(tmp_path / "questions_test.jsonl", rows)
    write_rooms(
        ["--out", str(tmp_path / "out"), "--questions", str(tmp_path / "questions_test.jsonl")]
    )
    questions = load("mindcube", tmp_path / "out")
    for number, (question, row) in enumerate(zip(questions, rows, strict=True)):
        name = (f"rotation_room_{number}", "rotation")
        assert (question["id"], question["category"]) == name
        words = " ".join([row["question"], *row["options"]])
        assert question["official"][-1].endswith("[Question]\n" + words)
        assert (question["options"], question["answer"]) == (row["options"], "B")
    for path in questions[1]["images"]:
        assert np.asarray(open_image(path, "mindcube")).max() == 40


# ---- MMSI-Bench -----------------------------------------------------------------------------------------------------


def png(width=6, height=4, mode="RGB", value=0):
    stream = io.BytesIO()
    Image.new(mode, (width, height), (value,) * len(mode)).save(stream, "png")
    return stream.getvalue()


def mmsi_records(count, rng):
    for i in range(count):
        yield {
            "id": 9000 + i,
            "images": [png(value=i % 200), png(value=i % 200 + 1)],
            "question_type": MMSI_TYPES[i % len(MMSI_TYPES)],
            "answer": "ABCD"[rng.integers(4)],
            "question": "Where is it?\nOptions: A: Front left, B: Rear, left, C: Far, D: Here",
            "thought": "secret",
        }


def write_parquet(file, records):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files need pyarrow")
    pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), file)
    return file


def test_mmsi_records_become_questions(tmp_path):
    records = list(mmsi_records(11, np.random.default_rng(0)))
    records[1]["question_type"] = records[1]["question_type"].replace("–", "-")
    write_parquet(tmp_path / "MMSI_Bench.parquet", records)
    questions = load("mmsi", tmp_path)
    assert [len(q["images"]) for q in questions] == 11 * [2]
    assert tuple(q["category"] for q in questions) == MMSI_TYPES and questions[0]["id"] == "9000"
    assert questions[0]["question"] == "Where is it?"
    assert questions[0]["options"] == ["A. Front left", "B. Rear, left", "C. Far", "D. Here"]
    assert groups(questions[0]) == [
        "Positional Relationship",
        "Positional Relationship (Cam.–Cam.)",
    ]
    assert [groups(q) for q in questions[-2:]] == [["Motion", "Motion (Obj.)"], ["MSR"]]
    assert np.asarray(open_image(questions[3]["images"][1], "mmsi"))[0, 0, 0] == 4
    pieces = questions[1]["official"]
    assert len(pieces) == 3 and "``" in pieces[2]
    assert pieces[2].startswith(records[1]["question"] + "\n")
    assert "secret" not in json.dumps(questions)


def test_mmsi_images_are_written_once(tmp_path):
    def written():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}

    records = list(mmsi_records(5, np.random.default_rng(0)))
    plain = load("mmsi", write_parquet(tmp_path / "MMSI_Bench.parquet", records))
    before = written()
    for record in records:
        record["images"] = [{"bytes": image, "path": None} for image in record["images"]]
    assert load("mmsi", write_parquet(tmp_path / "other.parquet", records)) == plain
    assert written() == before


# ---- MMSI-Video-Bench -----------------------------------------------------------------------------------------------


def test_frames_are_sampled_as_the_official_code_does():
    (clip,) = sample_frames([75], 50)
    assert len(clip) == 50 and clip[:5] == [0, 1, 3, 4, 6] and clip[-3:] == [70, 72, 74]
    first, second = sample_frames([70, 6], 50)
    assert (len(first), first[-1], second) == (46, 68, [0, 1, 3, 5])
    assert sample_frames([99], 50)[0][-3:] == [94, 96, 98]
    first, second = sample_frames([90, 1], 50)
    assert (len(first), first[-1], second) == (49, 88, [0])
    # 0, 66, 133, 200, and frame 0 of the clip that got none: one more
    assert sample_frames([100, 1, 100], 4) == [[0, 66], [0], [32, 99]]
    for cap in (5, 300):
        assert sample_frames([3, 2], cap) == [[0, 1, 2], [0, 1]]
    assert sample_frames([9], 1) == [[0]]
    assert len(sample_frames([1000], 300)[0]) == 300


def video_records(count, rng, clips=1):
    """MMSI-Video's records with three to six options."""
    for i in range(count):
        letters = "ABCDEF"[: int(rng.integers(3, 7))]
        options = "\n".join(f"{letter}. Thing" for letter in letters)
        videos, frames = [], []
        for c in range(clips):
            videos.append({"path": f"toy/{c}.mp4", "start": 2.0, "end": 77.0, "base_fps": 1.0})
            frames.append([f"toy/{c}/00:{n:02}.00_frame_1.00_{n}.jpg" for n in range(75)])
        yield {
            "id": f"question_{i:04}",
            "type": VIDEO_TYPES[i % len(VIDEO_TYPES)],
            "ref_images": ["toy/r.jpg"],
            "video_list": videos,
            "frames_list": frames,
            "system_prompt": "Frames follow.",
            "task_prompt": "Judge. ",
            "user_prompt": f"{'<video> ' * clips}What of <image>?\n{options}",
            "format_prompt": "\nGive one letter.",
            "ground_truth": letters[rng.integers(len(letters))],
            "ori_question": "What of <image>?",
        }


def write_video(folder, records):
    folder.mkdir(exist_ok=True)
    (folder / "mmsivideo.json").write_text(json.dumps(list(records)))
    return folder


def test_video_prompt_is_the_record_word_for_word(tmp_path):
    (record,) = video_records(1, np.random.default_rng(0), clips=2)
    (question,) = load("mmsi_video", write_video(tmp_path, [record]))
    assert (question["clips"], len(question["images"])) == ([25, 25], 51)
    assert question["images"][0].endswith("frames/toy/0/00:00.00_frame_1.00_0.jpg")
    assert question["images"][-1] == str(tmp_path / "ref_images/toy/r.jpg")
    pieces = question["official"]
    assert len(pieces) == 52 and pieces[0] == "Frames follow.\nJudge. " and pieces[25] == " "
    words = f"Frames follow.\nJudge. {record['user_prompt']}\nGive one letter."
    assert "".join(pieces) == words.replace("<video>", "").replace("<image>", "")
    assert question["question"] == "What of <image>?" and question["options"][0] == "A. Thing"
    (full,) = load("mmsi_video", tmp_path, frames=300)
    assert (full["clips"], len(full["official"])) == ([75, 75], 152)
    with pytest.raises(PictureError):  # a missing frame is not left out: the caller counts
        open_image(question["images"][0], "mmsi_video")


def test_video_types_have_levels():
    levels = [*9 * ["Perception"], "Planning", "Prediction", *2 * ["Cross-Video"]]
    assert [level(t) for t in VIDEO_TYPES] == levels


def test_video_groups_are_level_type_and_sub_benches(tmp_path):
    robot = {"Manipulation": ["question_0000"], "Navigation": ["question_0009"]}
    hard = {"level_1": ["question_0000"]}
    (tmp_path / "meta_data").mkdir()
    (tmp_path / "meta_data" / "robot_bench.json").write_text(json.dumps(robot))
    (tmp_path / "meta_data" / "easy2hard_bench.json").write_text(json.dumps(hard))
    records = video_records(13, np.random.default_rng(0))
    questions = load("mmsi_video", write_video(tmp_path, records))
    sub_benches = ["easy2hard: level_1", "robot", "robot: Manipulation"]
    assert groups(questions[0]) == ["Perception", VIDEO_TYPES[0], *sub_benches]
    assert groups(questions[9]) == ["Planning", "robot", "robot: Navigation"]
    assert groups(questions[11]) == ["Cross-Video", "(Cross-Video) Memoery Update"]


# ---- SAT ------------------------------------------------------------------------------------------------------------


def sat_records(count, rng=None):
    kinds = list(SAT_GROUPS)
    for i in range(count):
        yield {
            "image_bytes": [png(value=i % 200)],
            "question": "Which way?",
            "answers": ["turn left", "turn right"],
            "question_type": kinds[i % len(kinds)],
            "correct_answer": "turn left",
        }


def test_sat_asks_in_both_orders(tmp_path):
    records = list(sat_records(2))
    records[1] |= {
        "answers": ["near in the first frame", "far"],
        "correct_answer": "near in the first frame",
        "question_type": "goal_aim",
    }
    questions = load("sat", write_parquet(tmp_path / "SAT_test.parquet", records).parent)
    names = ("00001/kept", "00001/reversed", "00002/kept", "00002/reversed")
    assert [q["id"] for q in questions] == [f"SAT_test_{name}" for name in names]
    assert [q["answer"] for q in questions] == ["A", "B", "A", "B"]
    assert questions[1]["options"] == ["A. turn right", "B. turn left"]
    assert questions[2]["options"][0] == "A. near"
    assert [q["category"] for q in questions] == ["EgoM", "EgoM", "GoalAim", "GoalAim"]
    assert '"turn right" or "turn left"' in questions[1]["official"][-1]
    for texts in ([q["official"][-1] for q in questions], [q["question"] for q in questions]):
        assert [text.count("Image 1 is the start") for text in texts] == [1, 1, 0, 0]
    always_first = [official_score("sat", q, q["options"][0][3:])[1] for q in questions]
    assert weights("sat", [q["category"] for q in questions]) @ always_first == 0.5


# ---- VSI-Bench ------------------------------------------------------------------------------------------------------


def vsi_records(count, rng):
    for i in range(count):
        kind = (*VSI_LETTER, *VSI_NUMBER)[i % 10]
        options = [f"{letter}. thing {letter}" for letter in "ABCD"] if kind in VSI_LETTER else None
        yield {
            "id": i,
            "dataset": "scannet",
            "scene_name": "scene9001_00",
            "question_type": kind,
            "question": "Which?",
            "ground_truth": "ABCD"[rng.integers(4)] if options else "1.8",
            "options": options,
        }


def write_vsi(folder, records):
    folder.mkdir(exist_ok=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_vsi_records_become_questions(tmp_path):
    records = list(vsi_records(10, np.random.default_rng(0)))
    questions = load("vsi", write_vsi(tmp_path, records), frames=4)
    letter, number = questions[0], questions[9]
    assert (letter["kind"], letter["options"]) == ("mca", records[0]["options"])
    assert (number["kind"], number["options"], number["answer"]) == ("na", [], "1.8")
    assert groups(letter) == ["object_rel_direction", VSI_LETTER[0]]
    assert (
        "Options:\nA. thing A" in letter["official"][-1] and "Options" not in number["official"][-1]
    )
    file = write_parquet(tmp_path / "test-00000-of-00001.parquet", records)
    assert load("vsi", file, frames=4) == questions


def test_vsi_frames_come_from_a_folder_of_pictures_or_the_video(tmp_path, monkeypatch):
    write_vsi(tmp_path, vsi_records(1, np.random.default_rng(0)))
    scene = tmp_path / "scannet" / "scene9001_00"
    (question,) = load("vsi", tmp_path, frames=4)
    assert question["images"] == [f"{scene}.mp4#{i}/4" for i in (1, 2, 3, 4)]
    with pytest.raises(PictureError):  # no video: the caller counts the question as wrong
        open_image(question["images"][0], "vsi")

    scene.mkdir(parents=True)
    for i in range(7):
        (scene / f"{i:03}.png").write_bytes(png(value=i))
    images = load("vsi", tmp_path, frames=4)[0]["images"]
    assert [np.asarray(open_image(path, "vsi"))[0, 0, 0] for path in images] == [0, 2, 4, 6]

    for picture in scene.iterdir():
        picture.unlink()
    scene.with_name("scene9001_00.mp4").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install av"):
        load("vsi", tmp_path)


def test_frames_of_a_true_video(tmp_path):
    av = pytest.importorskip("av", reason="videos need PyAV")
    with av.open(str(tmp_path / "a.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=5)
        stream.width, stream.height = 64, 64
        for i in range(10):
            grey = Image.new("RGB", (64, 64), (25 * i,) * 3)
            for packet in stream.encode(av.VideoFrame.from_image(grey)):
                video.mux(packet)
        for packet in stream.encode():
            video.mux(packet)
    greys = [np.asarray(open_image(f"{tmp_path}/a.mp4#{i}/4", "vsi")).mean() for i in (1, 2, 3, 4)]
    np.testing.assert_allclose(greys, [0, 75, 150, 225], atol=6)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(PictureError):
        open_image(f"{tmp_path}/b.mp4#1/4", "vsi")


# ---- averages and chance --------------------------------------------------------------------------------------------


def test_official_averages():
    settings = ["among", "translation", "other", "around"]
    assert weights("mindcube", settings) @ [1, 1, 0, 0] == pytest.approx(1 / 3)
    assert weights("mmsi", ["MSR", "MSR", "MSR", "Motion (Cam.)"]) @ [1, 1, 1, 0] == 0.75  # micro
    directions = [f"object_rel_direction_{hard}" for hard in ("easy", "medium", "hard", "hard")]
    categories, scores = [*directions, "route_planning", "object_counting"], [1, 0, 1, 0, 0.5, 0.6]
    assert weights("vsi", categories) @ scores == pytest.approx(((1 + 0 + 0.5) / 3 + 0.5 + 0.6) / 3)
    assert group_weights(["EgoM", "EgoM", "Pers"]) @ [1, 0, 1] == 0.75  # SAT's other table
    assert weights("mindcube", ["translation"] * 4) @ [1, 0, 0, 0] == 0.25  # alone, it is listed
    for bench in ("mmsi", "vsi"):
        assert weights(bench, categories).sum() == pytest.approx(1)
    assert len({task(kind) for kind in (*VSI_LETTER, *VSI_NUMBER)}) == 8


def official_reply(question, answer):
    """A reply that gives an answer in the form that the bench asks for."""
    if question["kind"] == "na":
        return answer
    words = next(option[3:] for option in question["options"] if option[0] == answer)
    return {
        "mindcube": f"<answer>{answer}. {words}</answer>",
        "mmsi": f"``{answer}``",
        "mmsi_video": answer,
        "sat": words,
        "vsi": answer,
    }[question["bench"]]


def write_bench(bench, folder, rng):
    """Many records of a bench -> what `load` takes."""
    if bench == "mindcube":
        return write_mindcube(folder, mindcube_records(600, rng))
    if bench == "mmsi":
        return write_parquet(folder / "MMSI_Bench.parquet", mmsi_records(500, rng))
    if bench == "mmsi_video":
        return write_video(folder, video_records(1106, rng))
    if bench == "sat":
        return write_parquet(folder / "SAT_test.parquet", sat_records(150))
    if bench == "vsi":
        return write_vsi(folder, vsi_records(1000, rng))
    raise KeyError(bench)


@pytest.mark.parametrize("bench", list(BENCHES))
def test_an_oracle_scores_100(bench, tmp_path):
    questions = load(bench, write_bench(bench, tmp_path, np.random.default_rng(len(bench))))
    scores = []
    for question in questions:
        text = official_reply(question, question["answer"])
        scores.append(official_score(bench, question, text)[1])
        assert lenient(question, f"<answer>{text.strip('`')}</answer>")[1] == 1
    assert weights(bench, [q["category"] for q in questions]) @ scores == pytest.approx(1)
    if bench == "mmsi_video":
        assert len(questions) == 1106  # every one is in the denominator


@pytest.mark.parametrize("bench", list(BENCHES))
def test_random_letters_score_chance(bench, tmp_path):
    rng = np.random.default_rng(len(bench))
    questions = [q for q in load(bench, write_bench(bench, tmp_path, rng)) if q["options"]]
    scores, chances = [], []
    for question in questions:
        options = question["options"]
        guess = options[rng.integers(len(options))][0]
        scores.append(official_score(bench, question, official_reply(question, guess))[1])
        chances.append(1 / len(options))
    share, chances = weights(bench, [q["category"] for q in questions]), np.array(chances)
    deviation = (share**2 * chances * (1 - chances)).sum() ** 0.5
    assert abs(share @ scores - share @ chances) < 3 * deviation
    if bench in ("mmsi", "sat"):
        assert share @ chances == pytest.approx({"mmsi": 0.25, "sat": 0.5}[bench])  # as published


# ---- what is missing or broken --------------------------------------------------------------------------------------


def test_missing_files_are_told_with_what_to_fetch_and_where_to_put_it(tmp_path):
    for bench, source in BENCHES.items():
        with pytest.raises(
            SystemExit,
            match=f"hf download {source.repo} {source.downloads[0]}.*--local-dir data/{bench}",
        ):
            load(bench, tmp_path)


def test_fetching_unpacks_goes_on_and_leaves_no_half_folder(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    calls = []

    def offline(repo, **options):
        calls.append(options)
        raise OSError("no network")

    def from_cache(repo, **options):
        """Offline the hub's client is content with what there is: nothing."""

    def online(repo, local_dir, **options):
        local_dir.mkdir(parents=True, exist_ok=True)
        write_video(local_dir, video_records(2, np.random.default_rng(0)))
        for name in ("frames", "ref_images"):
            with zipfile.ZipFile(local_dir / f"{name}.zip", "w") as archive:
                archive.writestr(f"{name}/toy.jpg", b"")

    for client, reason in ((offline, "no network"), (from_cache, "no MMSI_Bench.parquet")):
        monkeypatch.setattr(hub, "snapshot_download", client)
        with pytest.raises(SystemExit, match=f"could not be fetched .{reason}.*hf download Runsen"):
            load("mmsi")
        assert not (tmp_path / "data" / "mmsi").exists()
    assert calls[0]["repo_type"] == "dataset"
    (tmp_path / "data" / "mmsi_video.partial").mkdir(parents=True)  # a download that was cut off
    monkeypatch.setattr(hub, "snapshot_download", online)
    assert len(load("mmsi_video")) == 2 and (tmp_path / "data/mmsi_video/frames/toy.jpg").exists()
    monkeypatch.setattr(hub, "snapshot_download", offline)
    assert len(load("mmsi_video")) == 2  # not fetched again


def test_broken_records_are_told_in_a_sentence(tmp_path):
    write_mindcube(tmp_path, [{"id": "among_1"}])
    with pytest.raises(SystemExit, match="record 1 is not one of MindCube .KeyError: 'images'"):
        load("mindcube", tmp_path)
    (good,) = video_records(1, np.random.default_rng(0))
    for wrong in (
        {"type": "Cooking"},
        {"ref_images": []},
        {"ground_truth": "AB"},
        {"frames_list": [[]]},
        {"video_list": []},
        {"user_prompt": "no marks"},
    ):
        with pytest.raises(SystemExit, match="record 2 is not one of MMSI-Video-Bench"):
            load("mmsi_video", write_video(tmp_path, [good, {**good, **wrong}]))
    (fair,) = mmsi_records(1, np.random.default_rng(0))
    for wrong in ({"question_type": "Cooking"}, {"answer": "E"}):
        with pytest.raises(SystemExit, match="not one of MMSI-Bench"):
            load("mmsi", write_parquet(tmp_path / "MMSI_Bench.parquet", [{**fair, **wrong}]))
    room = {
        **next(vsi_records(1, np.random.default_rng(0))),
        "question_type": "room_size_estimation",
        "options": None,
    }
    for wrong in ({"ground_truth": "0"}, {"ground_truth": "big"}, {"options": ["A. 1", "B. 2"]}):
        with pytest.raises(SystemExit, match="not one of VSI-Bench"):
            load("vsi", write_vsi(tmp_path, [{**room, **wrong}]))
    (tmp_path / "test.jsonl").write_text('{"id": 1')
    with pytest.raises(SystemExit, match="is not JSON"):
        load("vsi", tmp_path)


def test_broken_or_unreadable_parquet_is_told_in_a_sentence(tmp_path, monkeypatch):
    (good,) = sat_records(1)
    for wrong in (
        {"correct_answer": "up"},
        {"question_type": "cooking"},
        {"image_bytes": ["text"]},
    ):
        with pytest.raises(SystemExit, match="record 1 is not one of SAT"):
            load("sat", write_parquet(tmp_path / "SAT_test.parquet", [{**good, **wrong}]))
    (tmp_path / "SAT_test.parquet").write_bytes(b"half")
    with pytest.raises(SystemExit, match="is not a parquet file"):
        load("sat", tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(SystemExit, match="pip install pyarrow"):
        load("sat", tmp_path)
