"""Published corpora as question rows, and hard mining."""

import json

import numpy as np
import pytest
from PIL import Image

from extras.scans import mining
from extras.scans.corpora import make_corpus, read_question
from lib.records import load_jsonl, save_jsonl
from policy import Policy


def exchange(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.mark.parametrize(
    "question, answer, expected",
    [
        (
            "<image>\nWhich is nearer?\nA. the chair\nB. the table",
            "B",
            ("Which is nearer?", ["A. the chair", "B. the table"], "B"),
        ),
        (
            "<image><image>Where? (A) left (B) right (C) behind",
            "(C) behind",
            ("Where?", ["A. left", "B. right", "C. behind"], "C"),
        ),
        (
            "Image-1: <image>\nWhich way? A: left B: right",
            "<think>hm, B?</think><answer>A</answer>",
            ("Which way?", ["A. left", "B. right"], "A"),
        ),
        ("<image>\nWhich? A. red B. blue", "Blue.", ("Which?", ["A. red", "B. blue"], "B")),
        (
            "<image>\nWhich?\nA. red\n (B) blue\nAnswer with the option's letter from the given choices directly.",
            "blue",
            (
                "Which? Answer with the option's letter from the given choices directly.",
                ["A. red", "B. blue"],
                "B",
            ),
        ),
        (
            "<image>\nA. red\nB. blue\n\nWhich of them\nis nearer?",
            "A",
            ("Which of them is nearer?", ["A. red", "B. blue"], "A"),
        ),
        (
            "Which?\nA. red B. blue\nor C. green",
            "C",
            ("Which?", ["A. red", "B. blue or", "C. green"], "C"),
        ),
    ],
)
def test_lettered_questions_are_read(question, answer, expected):
    row, reason = read_question(exchange(question, answer))
    assert reason is None
    assert (row["question"], row["options"], row["answer"]) == expected
    assert row["kind"] == "mca"


def test_what_cannot_be_verified_is_left_out_with_the_reason():
    assert read_question(exchange("<image> How many chairs?", "3"))[0] == {
        "question": "How many chairs?",
        "options": [],
        "answer": "3",
        "kind": "na",
    }
    assert read_question(exchange("<image> Describe it.", "A room with a table and chairs."))[
        1
    ].startswith("an answer")
    assert (
        read_question(exchange("Which? A. red B. blue", "D"))[1]
        == "the answer is none of the options"
    )
    halved = exchange("Which \ud800?", "A")
    for odd in (
        exchange("Which?", "A") * 2,
        exchange(5, "A"),
        halved,
        [{}, {}],
        ["Q", "A"],
        5,
        None,
    ):
        assert read_question(odd)[1] == "not one question with one answer", odd
    blank = exchange("\n" * 100_000 + "Image-1: How many?", "<answer>" * 10_000 + "2</answer>")
    assert read_question(blank)[0]["question"] == "How many?"


def picture(path, level=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((32, 32, 3), level, np.uint8)).save(path)
    return path


def test_sensenova_records_become_questions_that_training_reads(tmp_path, capsys):
    root = tmp_path / "SenseNova-SI-800K"
    picture(root / "scannet" / "0.png")
    records = [
        {
            "id": 7,
            "image": ["scannet/0.png"],
            "conversations": exchange("<image> Which? A. red B. blue", "A"),
        },
        {
            "id": 8,
            "image": "scannet/gone.png",
            "conversations": exchange("<image> Which? A. red B. blue", "A"),
        },
        {"id": 9, "image": [], "conversations": exchange("How many?", "2")},
    ]
    (root / "SenseNova-SI-800K.jsonl").write_text("\n".join([*map(json.dumps, records), "{torn"]))
    make_corpus("sensenova", root, tmp_path / "out")
    (row,) = load_jsonl(tmp_path / "out" / "questions_train.jsonl")
    assert row["id"] == "sensenova/7" and Image.open(row["images"][0]).size == (32, 32)
    said = capsys.readouterr().out
    assert all(
        f"1  left out: {reason}" in said
        for reason in ("an image is missing", "no image", "not one question")
    )
    with pytest.raises(SystemExit, match="Fetch sensenova"):
        make_corpus("sensenova", tmp_path / "nowhere", tmp_path / "out")


def vst_record(folder, levels, answer):
    encoded = [picture(folder / f"{level}.png", level).read_bytes() for level in levels]
    return {
        "images": [{"bytes": image} for image in encoded],
        "conversations": exchange("<image><image> Which way? A. left B. right", answer),
    }


def vst_questions(folder, records):
    """The questions of VST-500K, one task with one parquet file."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="parquet needs pyarrow, an extra")
    from pyarrow import Table

    (folder / "VST-500K" / "mi_camera_motion").mkdir(parents=True)
    file = folder / "VST-500K" / "mi_camera_motion" / "0.parquet"
    parquet.write_table(Table.from_pylist(records), file)
    make_corpus("vst", folder / "VST-500K", folder / "out")
    return load_jsonl(folder / "out" / "questions_train.jsonl")


def test_vst_pictures_come_out_of_parquet(tmp_path):
    (row,) = vst_questions(tmp_path, [{"id": "a"} | vst_record(tmp_path, (50, 200), "B")])
    assert row["id"] == "vst/mi_camera_motion/a"
    assert row["category"] == "mi_camera_motion"
    assert row["answer"] == "B"
    assert [np.array(Image.open(path))[0, 0, 0] for path in row["images"]] == [50, 200]


def test_records_without_an_id_get_different_ones_and_a_torn_file_ends_in_a_sentence(tmp_path):
    records = [vst_record(tmp_path, (50,), answer) for answer in "AB"]
    assert [row["id"] for row in vst_questions(tmp_path, records)] == [
        "vst/mi_camera_motion/0",
        "vst/mi_camera_motion/0#2",
    ]
    file = tmp_path / "VST-500K" / "mi_camera_motion" / "0.parquet"
    whole = file.read_bytes()
    for torn in (
        whole[: len(whole) // 2],
        whole[:4] + bytes(100) + whole[104:],
    ):  # no end, a broken middle
        file.write_bytes(torn)
        with pytest.raises(
            SystemExit, match="(?s)0.parquet is not a parquet file .*fetch it again"
        ):
            make_corpus("vst", tmp_path / "VST-500K", tmp_path / "out")


# ---- mining ---------------------------------------------------------------------------------------------------------


def test_a_guessers_share_by_hand():
    assert mining.guessers_share(4, 5, 1) == pytest.approx(0.75**5 + 5 * 0.25 * 0.75**4)
    assert mining.guessers_share(2, 5, 5) == pytest.approx(1)
    assert mining.guessers_share(0, 5, 1) == 1


def test_mining_keeps_what_is_seldom_right_and_goes_on_where_it_stopped(
    tmp_path, capsys, monkeypatch
):
    picture(tmp_path / "in" / "0.png")
    questions = [
        {
            "id": f"q{i}",
            "bench": "rooms",
            "images": ["0.png"],
            "question": "Which?",
            "kind": "mca",
            "answer": "A",
            "options": ["A. red", "B. blue"],
            "category": "",
            "needs_view": None,
        }
        for i in range(40)
    ]
    source = tmp_path / "in" / "questions_train.jsonl"
    source.write_text("".join(json.dumps(question) + "\n" for question in questions))
    Policy.tiny().save(tmp_path / "policy")
    asked = []

    def answers(policy, part, simulator, mode, group_size, temperature, seed, max_new_tokens, rows):
        """Question i is answered right i % 4 times."""
        assert mode == "direct"
        assert simulator is None
        assert (temperature, max_new_tokens) == (1, policy.turn_limit)
        asked.extend(question["id"] for question in part)
        return [
            type(
                "T",
                (),
                {"answer": "A" if k < int(question["id"][1:]) % 4 else "B", "truncated": False},
            )
            for question in part
            for k in range(group_size)
        ]

    monkeypatch.setattr(mining, "rollout", answers)
    mining.mine(source, tmp_path / "out", tmp_path / "policy")
    kept = [
        row
        for split in ("train", "val")
        for row in load_jsonl(tmp_path / "out" / f"questions_{split}.jsonl")
    ]
    assert sorted(int(row["id"][1:]) for row in kept) == [i for i in range(40) if i % 4 < 2]
    assert kept[0]["mined"]["of"] == 5 and Image.open(kept[0]["images"][0]).size == (32, 32)
    assert "20 of 40 questions kept (50.0%)" in capsys.readouterr().out and len(asked) == 40
    log = tmp_path / "out" / "answers.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:30]))
    mining.mine(source, tmp_path / "out", tmp_path / "policy")
    assert asked[40:] == [f"q{i}" for i in range(30, 40)]  # only what was not yet answered
    with pytest.raises(SystemExit, match="is not for training"):
        mining.mine(tmp_path / "in" / "questions_test.jsonl", tmp_path / "out", tmp_path / "policy")


def test_mining_does_not_drop_another_corpus(tmp_path, monkeypatch):
    def mine(corpus, out):
        rows = [
            {"id": f"{corpus}/{i}", "images": [], "options": ["A. red", "B. blue"]}
            for i in range(40)
        ]
        save_jsonl(tmp_path / corpus / "questions_train.jsonl", rows)
        mining.mine(tmp_path / corpus / "questions_train.jsonl", tmp_path / out, "policy")

    def mined(out):
        return [
            row["id"]
            for split in ("train", "val")
            for row in load_jsonl(tmp_path / out / f"questions_{split}.jsonl")
        ]

    monkeypatch.setattr(
        mining, "ask_often", lambda questions, *_: {question["id"]: 0 for question in questions}
    )
    mine("vst", "mined")
    with pytest.raises(SystemExit, match="holds questions of something else, .* --out of its own"):
        mine("sensenova", "mined")
    mine("sensenova", "other")
    mine("vst", "mined")  # the same again may be made anew
    assert {id.split("/")[0] for id in mined("mined")} == {"vst"}
    assert len(mined("mined")) == len(mined("other")) == 40


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--at-most", "9", "--samples", "2"], "--at-most 9 of --samples 2: must be"),
        (["--at-most", "-1"], "--at-most -1 of"),
        (["--at-most", "5"], "none or all questions are kept"),
    ],
)
def test_mining_that_keeps_all_or_none_is_refused(words, sentence, capsys):
    with pytest.raises(SystemExit):
        mining.parse_args(["--questions", "q", "--policy", "p", *words])
    assert sentence in capsys.readouterr().err
    assert mining.parse_args(["--questions", "q", "--policy", "p", "--at-most", "4"]).at_most == 4
