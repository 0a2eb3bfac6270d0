"""Triples and questions: pytest tests/test_data.py"""

import json

import pytest

import old_data as data

ROOMS = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    data.make_triples(out, rooms=6, held_out=2, threads=1)
    data.make_questions(out, rooms=ROOMS, held_out=(2, 2), threads=2)
    return out


def test_mindcube_layout(made, tmp_path):
    data.make_mindcube(tmp_path, made / "questions_test.jsonl")
    rows = [
        json.loads(line)
        for line in (tmp_path / "raw" / "MindCube_tinybench.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 8 and all(
        (tmp_path / image).exists() for row in rows for image in row["images"]
    )
    assert all(
        row["id"].startswith(("rotation_", "around_"))
        and f" {row['gt_answer']}. " in row["question"]
        for row in rows
    )
