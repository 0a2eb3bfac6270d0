"""On its way out: what others still take from data.py by name."""

import re
from pathlib import Path

from data import LAYOUTS, make_questions, make_triples
from lib.distributed import say
from lib.images import load_image, save_image
from lib.records import load_jsonl, save_jsonl
from lib.rooms import SIZE


def layout_of(folder):
    """The (layout, size) of a folder named by `folder_of`; ("ring", SIZE) for any other name."""
    named = re.fullmatch(rf"data(?:-({'|'.join(LAYOUTS)}))?(?:-(\d+))?", Path(folder).name)
    layout, size = named.groups() if named else (None, None)
    return layout or "ring", int(size or SIZE)


def make_mindcube(out, source):
    """Test questions in the files that MindCube publishes: raw/MindCube_tinybench.jsonl and other_all_image/.

    The setting is part of the id (MindCube's own rule): one spot is `rotation`, two places are `around`.
    """
    out, rows = Path(out), []
    for row in load_jsonl(source):
        setting = "around" if row["category"] == "camera-camera" else "rotation"
        images = [
            f"other_all_image/{setting}/{row['id']}/{k}.png"
            for k in range(1, len(row["images"]) + 1)
        ]
        for image, path in zip(images, row["images"]):
            save_image(out / image, load_image(path))
        rows.append(
            {
                "id": f"{setting}_{row['id']}",
                "category": [row["category"]],
                "type": setting,
                "meta_info": [],
                "question": " ".join([row["question"], *row["options"]]),
                "images": images,
                "gt_answer": row["answer"],
            }
        )
    save_jsonl(out / "raw" / "MindCube_tinybench.jsonl", rows)
    say(f"{out}/raw/MindCube_tinybench.jsonl: {len(rows)} questions in MindCube's layout")


# ---- command line ---------------------------------------------------------------------------------------------


def ensure(folder, what=("triples", "questions", "mindcube"), threads=2, **rooms):
    """Make what is missing of `what` in `folder`, and return the folder as a Path. **rooms may be rooms=how many."""
    folder, (layout, size) = Path(folder), layout_of(folder)
    if "triples" in what and not (folder / "triples_test.jsonl").exists():
        make_triples(folder, threads=threads, layout=layout, size=size, **rooms)
    if "questions" in what and not (folder / "questions_test.jsonl").exists():
        make_questions(folder, threads=threads, **rooms)
    if (
        "mindcube" in what
        and not (folder / "mindcube" / "raw" / "MindCube_tinybench.jsonl").exists()
    ):
        make_mindcube(folder / "mindcube", folder / "questions_test.jsonl")
    return folder
