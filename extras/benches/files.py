"""
The published files of the benchmarks, as our questions.

  bench        on the Hugging Face hub    what is read, in the folder given with --data (or the file itself)
  mindcube     MLL-Lab/MindCube           raw/MindCube_tinybench.jsonl (1,050) or raw/MindCube.jsonl (21,154); images
                                          below other_all_image/
  mmsi         RunsenXu/MMSI-Bench        MMSI_Bench.parquet (1,000), or MMSI_bench.tsv; images inside
  mmsi_video   rbler/MMSI-Video-Bench     mmsivideo.json (1,106), frames/, ref_images/; meta_data/ of the official code
                                          repository beside it names the sub-benches
  sat          array/SAT                  SAT_test.parquet (150 photographs), or SAT_val.parquet (4,001); images inside
  vsi          nyu-visionx/VSI-Bench      test-00000-of-00001.parquet or test.jsonl (5,130); <dataset>/<scene>.mp4, or a
                                          folder <dataset>/<scene>/ with frames of it as pictures

A question is {"id", "bench", "images", "question", "options": ["A. …"], "answer", "category", "kind", "needs_view"}
and, beside it, "text" (the record's own words, for the official prompt) and "cluster" (questions about the same thing:
they are not independent, so an interval draws them together). An image is a path, or "<video>.mp4#3/32": frame 3 of 32
taken evenly; `open_image` opens both. Images that a file holds inside are written once, into images/ beside it.

A missing image or video leaves no question out. MindCube's own code asks without the image (`missing_images` counts);
elsewhere opening it raises OSError, and the caller counts the question as wrong.
"""

import base64
import csv
import hashlib
import importlib.util
import json
import os
import re
import zipfile
from functools import lru_cache
from pathlib import Path

from PIL import Image

from lib.common import fail, say

HUB = {
    "mindcube": ("MLL-Lab/MindCube", ("data.zip",)),
    "mmsi": ("RunsenXu/MMSI-Bench", ("MMSI_Bench.parquet",)),
    "mmsi_video": ("rbler/MMSI-Video-Bench", ("mmsivideo.json", "frames.zip", "ref_images.zip")),
    "sat": ("array/SAT", ("SAT_test.parquet",)),
    "vsi": (
        "nyu-visionx/VSI-Bench",
        ("test-00000-of-00001.parquet", "arkitscenes.zip", "scannet.zip", "scannetpp.zip"),
    ),
}
MAX_PIXELS = {
    "mindcube": 480 * 480,
    "mmsi_video": 360 * 420,
}  # an image's area in the official runs
FRAMES = {
    "mmsi_video": 50,
    "vsi": 32,
}  # MMSI-Video: 50 is Uniform-50, 300 is Sufficient-Coverage; VSI: most models

SETTINGS = (
    "around",
    "rotation",
    "translation",
    "among",
)  # MindCube: looked for in the id in this order
POSITIONS = ("Cam.–Cam.", "Obj.–Obj.", "Reg.–Reg.", "Cam.–Obj.", "Obj.–Reg.", "Cam.–Reg.")
MMSI_TYPES = (
    *(f"Positional Relationship ({pair})" for pair in POSITIONS),
    "Attribute (Meas.)",
    "Attribute (Appr.)",
    "Motion (Cam.)",
    "Motion (Obj.)",
    "MSR",
)
RELATIONS = (
    "Instance-Instance",
    "Instance-Scene",
    "Scene-Scene",
    "Camera-Instance",
    "Camera-Scene",
)
VIDEO_TYPES = (
    *(f"(Spatial Construction) {pair} Spatial Relationship" for pair in RELATIONS),
    "(Spatial Construction) Instance/Scene Attribute",
    "(Motion Understanding) Camera Motion",
    "(Motion Understanding) Instance Motion",
    "(Motion Understanding) Interactive Motion",
    "Planning",
    "Prediction",
    "(Cross-Video) Memoery Update",
    "(Cross-Video) Multi-View Integration",
)  # their spelling
SAT_ORDER = "Image 1 is the start and image 2 the end of a video. "  # begins the official prompt of ego_movement
SAT_GROUPS = {
    "ego_movement": "EgoM",
    "action_sequence": "EgoM",
    "obj_movement": "ObjM",
    "action_conseq": "EgoAct",
    "action_consequence": "EgoAct",
    "goal_aim": "GoalAim",
    "perspective": "Pers",
}
VSI_LETTER = (
    "object_rel_direction_easy",
    "object_rel_direction_medium",
    "object_rel_direction_hard",
    "object_rel_distance",
    "route_planning",
    "obj_appearance_order",
)
VSI_NUMBER = (
    "object_counting",
    "object_abs_distance",
    "object_size_estimation",
    "room_size_estimation",
)


# ---- finding and fetching -------------------------------------------------------------------------------------------


def load(bench, place=None, frames=None):
    """The questions of a published bench, in the order of its file.

    place    its folder or file; None: data/<bench>, fetched from the hub if it is not there
    frames   the most frames a question shows, all its clips together (default FRAMES; video benches only)
    Stops with a sentence where nothing can be read; raises ValueError for a bench that is not published.
    """
    if bench not in HUB:
        raise ValueError(f"no published bench is called {bench!r}; there are: {', '.join(HUB)}")
    place = fetched(bench) if place is None else Path(place)
    if bench in FRAMES:
        return {"mmsi_video": load_mmsi_video, "vsi": load_vsi}[bench](
            place, frames or FRAMES[bench]
        )
    return {"mindcube": load_mindcube, "mmsi": load_mmsi, "sat": load_sat}[bench](place)


def fetched(bench):
    """data/<bench>, downloaded and unpacked if it is not there; a download that was cut off goes on."""
    folder = Path("data") / bench
    begun, (repo, files) = folder / ".fetching", HUB[bench]
    if folder.exists() and not begun.exists():
        return folder
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    folder.mkdir(parents=True, exist_ok=True)
    begun.touch()
    say(f"Fetching {', '.join(files)} of {repo} into {folder}")
    try:
        snapshot_download(repo, repo_type="dataset", local_dir=folder, allow_patterns=files)
        for name in files:
            if not (
                folder / name
            ).exists():  # offline, the hub's client is content with what there is
                raise FileNotFoundError(f"no {name}")
            if name.endswith(".zip"):
                with zipfile.ZipFile(folder / name) as archive:
                    archive.extractall(folder)
    except (OSError, zipfile.BadZipFile) as error:
        if [*folder.iterdir()] == [begun]:
            begun.unlink()
            folder.rmdir()
        reason = str(error).partition("\n")[0]
        fail(f"{bench} could not be fetched ({reason}). {how_to_fetch(bench)}")
    begun.unlink()
    return folder


def how_to_fetch(bench):
    """The sentence that says what to fetch and where to put it."""
    repo, files = HUB[bench]
    archives = " ".join(name for name in files if name.endswith(".zip"))
    unpack = f", unpack {archives} there" if archives else ""
    rooms = f" Or try it on rooms: `python data.py {bench}` writes their questions that way." * (
        bench in ("mindcube", "mmsi_video")
    )
    return (
        f"Where there is a network, type: hf download {repo} {' '.join(files)} --repo-type dataset --local-dir "
        f"data/{bench}{unpack}, and give --data data/{bench}.{rooms}"
    )


def found(bench, place, *names):
    """The file to read: `place` itself, or the first of `names` in it or in its folder data/ (as MindCube unpacks)."""
    places = (
        [place]
        if place.suffix in (".parquet", ".tsv", ".json", ".jsonl")
        else [folder / name for folder in (place, place / "data") for name in names]
    )
    return next((path for path in places if path.exists()), None) or fail(
        f"{places[0]} does not exist. {how_to_fetch(bench)}"
    )


def questions_of(title, file, rows, build):
    """Every question of `build(row, number)` over the rows; a row that is not a record ends in a sentence."""
    questions = []
    for number, row in enumerate(rows, 1):
        try:
            questions += build(row, number)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            fail(
                f"{file}, record {number} is not one of {title} ({type(error).__name__}: {error})."
            )
        except OSError as error:
            fail(
                f"The images inside {file} cannot be written beside it ({error}). Give a copy in a folder of yours."
            )
    return questions


def rows_of(file):
    """The records of a parquet, TSV, JSON or JSONL file, one at a time."""
    if file.suffix == ".parquet":
        return parquet_rows(file)
    if file.suffix == ".tsv":
        return tsv_rows(file)
    try:
        text = file.read_text(encoding="utf-8")
        lines = (
            [text]
            if file.suffix == ".json"
            else [line for line in text.split("\n") if line.strip()]
        )
        rows = [json.loads(line) for line in lines]
        return rows[0] if file.suffix == ".json" else rows
    except ValueError as error:
        fail(f"{file} is not JSON ({error}); it may be cut off: fetch it again.")


def parquet_rows(file):
    """Rows as dicts, a few in memory at a time: the images lie inside."""
    try:
        import pyarrow.parquet
    except ImportError:
        fail(f"{file} is a parquet file, which takes pyarrow to read. Type: pip install pyarrow")
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=16):
            yield from batch.to_pylist()
    except (ValueError, OSError) as error:
        fail(f"{file} is not a parquet file ({error}); it may be cut off: fetch it again.")


def tsv_rows(file):
    """Rows as dicts; a cell may hold many images in base64, so there is no limit to its length."""
    csv.field_size_limit(2**31 - 1)
    with open(file, newline="", encoding="utf-8") as lines:
        yield from csv.DictReader(lines, delimiter="\t")


# ---- images ---------------------------------------------------------------------------------------------------------


def kept(images, folder):
    """Images of a record, bytes or {"bytes": …}, as files of `folder` named after their content -> their paths."""
    paths = []
    for image in images:
        content = image["bytes"] if isinstance(image, dict) else image
        path = folder / (
            hashlib.sha1(content).hexdigest()[:20]
            + (".png" if content[:4] == b"\x89PNG" else ".jpg")
        )
        if not path.exists():
            beside = path.with_suffix(f".{os.getpid()}.partial")
            folder.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(content)
            beside.replace(path)
        paths.append(str(path))
    return paths


def open_image(path, bench):
    """An image as (H, W, 3) RGB, shrunk to the area that the bench's official prompt allows. Raises OSError."""
    video = re.fullmatch(r"(.+\.mp4)#(\d+)/(\d+)", str(path))
    if video:
        image = video_frames(video[1], int(video[3]))[int(video[2]) - 1]
    else:
        with Image.open(path) as image:
            image = image.convert("RGB")
    limit = MAX_PIXELS.get(bench, float("inf"))
    if image.width * image.height > limit:
        shrink = (limit / (image.width * image.height)) ** 0.5
        image = image.resize((int(image.width * shrink), int(image.height * shrink)), Image.BICUBIC)
    return image


@lru_cache(maxsize=4)  # the frames of one question are opened one after another
def video_frames(path, count):
    """`count` frames of a video, taken evenly from the first to the last; of a short one all, the last repeated."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist")
    import av  # an extra: `load_vsi` has said what to install

    try:
        with av.open(path) as video:  # packets are counted: what the file claims is not always true
            total = sum(packet.size > 0 for packet in video.demux(video=0))
        wanted = set(sample_frames([total], count)[0])
        with av.open(path) as video:
            frames = [
                frame.to_image() for i, frame in enumerate(video.decode(video=0)) if i in wanted
            ]
    except av.FFmpegError as error:
        raise OSError(f"{path}: {error}") from error
    if not frames:
        raise OSError(f"{path} holds no frames")
    return [frames[min(i, len(frames) - 1)] for i in range(count)]


def sample_frames(counts, cap):
    """MMSI-Video's official sampler: which frames of each clip to show.

    counts    frames of each clip
    cap       the most frames of all clips together
    returns   a list of indices per clip: all of them if they fit, else every step-th of the clips in a row, truncated,
              and frame 0 of a clip that got none (so there may be more than `cap`)
    """
    total = sum(counts)
    step = (total - 1) / max(1, cap - 1)
    chosen = range(total) if total <= cap else [int(i * step) for i in range(cap)]
    starts = [sum(counts[:clip]) for clip in range(len(counts))]
    return [
        [i - start for i in chosen if start <= i < start + count] or [0]
        for start, count in zip(starts, counts)
    ]


# ---- MindCube -------------------------------------------------------------------------------------------------------


def load_mindcube(place):
    """MindCube: `place` is the unzipped `data` folder (its tinybench is read), or one of the JSONL files of its raw/.

    "category" is the setting. As in the official code an image that is missing is left out and the question still asked
    (`missing_images` counts them); "answer" is None where the record has no gt_answer: it leaves every total.
    """
    file = found("mindcube", Path(place), "raw/MindCube_tinybench.jsonl")

    def build(record, _):
        """The question of a record, its images that are there."""
        images = [mindcube_image(path, file.parent.parent) for path in record["images"]]
        present = [path for path in images if Path(path).exists()]
        stem, options = split_options(record["question"])
        name = record.get("id", "")
        return [
            {
                "id": name,
                "bench": "mindcube",
                "images": present,
                "question": stem,
                "options": options,
                "answer": record.get("gt_answer"),
                "category": mindcube_setting(name),
                "kind": "mca",
                "needs_view": None,
                "text": record["question"],
                "cluster": re.split("_q|_gen", name)[0],
                "missing_images": len(images) - len(present),
            }
        ]

    return questions_of("MindCube", file, rows_of(file), build)


def mindcube_setting(identity):
    """The setting of a record, told by its id: the first of SETTINGS that occurs anywhere in it, else "other"."""
    return next((setting for setting in SETTINGS if setting in identity.lower()), "other")


def mindcube_image(path, root):
    """Where an image of a record lies, by the official rule; `root` is the folder that holds other_all_image/."""
    root = str(root)
    if path.startswith(root):
        return path
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        path = path.replace("\\", "/")
        if "MindCube_image/" in path:
            path = path.split("MindCube_image/", 1)[1]
        elif "other_all_image/" in path:
            path = path[path.index("other_all_image/") :]
        else:
            path = path.rsplit("/", 1)[-1]
    return str(Path(root) / path)


def split_options(question, mark=r"\. "):
    """ "Which one? A. Crate B. Stool" -> ("Which one?", ["A. Crate", "B. Stool"]); the words stay as they are.

    mark   what stands between a letter and its words, as a regular expression
    The letters must follow one another up to the end; the last such list counts. No list: (question, []).
    """
    marks = list(re.finditer(rf"(?:(?<=\s)|^)\(?([A-F]){mark}", question))
    starts = [i for i, match in enumerate(marks) if match[1] == "A"]
    if not starts:
        return question, []
    run = marks[starts[-1] :]
    if len(run) < 2 or "".join(match[1] for match in run) != "ABCDEF"[: len(run)]:
        return question, []
    ends = [match.start() for match in run[1:]] + [len(question)]
    options = [
        f"{match[1]}. {question[match.end() : end].strip()}" for match, end in zip(run, ends)
    ]
    return question[: run[0].start()].rstrip(), options


# ---- MMSI-Bench -----------------------------------------------------------------------------------------------------


def load_mmsi(place):
    """MMSI-Bench, parquet or TSV; "category" is the type.

    Options stand in the question, as "Options: A: …, B: …"; the annotator's `thought` is never read. The circular TSV
    is refused: its score asks for all four orders of the options, is not computed here, and is not what tables print.
    """
    file = found("mmsi", Path(place), "MMSI_Bench.parquet", "MMSI_bench.tsv")

    def build(record, _):
        """The question of a record, its images written beside the file."""
        if file.suffix == ".tsv":
            cell = record["image"].strip()
            images = [
                base64.b64decode(part, validate=True)
                for part in (json.loads(cell) if cell.startswith("[") else [cell])
            ]
            name, category = record["index"], record["category"]
            check(
                int(name) < 1_000_000,
                "its options are rotated: the circular score is not computed here; give "
                "MMSI_bench.tsv",
            )
        else:
            images, name, category = record["images"], record["id"], record["question_type"]
        category = category.replace("-", "–")  # some copies have a hyphen for the en dash
        stem, options = split_options(record["question"], ": ")
        check(category in MMSI_TYPES, f"there is no type {category!r}")
        check(record["answer"] in tuple("ABCD"), f"the answer is {record['answer']!r}")
        return [
            {
                "id": str(name),
                "bench": "mmsi",
                "images": kept(images, file.parent / "images"),
                "question": stem.removesuffix("Options:").rstrip(),
                "options": [o.rstrip(", ") for o in options],
                "answer": record["answer"],
                "category": category,
                "kind": "mca",
                "needs_view": None,
                "text": record["question"],
                "cluster": str(name),
            }
        ]

    return questions_of("MMSI-Bench", file, rows_of(file), build)


def check(holds, problem):
    """Raise ValueError if a record is not what it should be."""
    if not holds:
        raise ValueError(problem)


# ---- MMSI-Video-Bench -----------------------------------------------------------------------------------------------


def load_mmsi_video(place, frames=FRAMES["mmsi_video"]):
    """MMSI-Video-Bench; "category" is the type, one of VIDEO_TYPES.

    frames   50 (Uniform-50) or 300 (Sufficient-Coverage)
    Beside the usual: "parts" (the four prompts of the record), "clips" (frames shown of each), "domains" ({sub-bench:
    sub-type}, from meta_data/ if it is there), "input_fps" (for a model that reads the mp4 itself). "images" are in the
    order of the marks <video> and <image> of the prompt; options are read from the prompt where they can be.
    """
    file = found("mmsi_video", Path(place), "mmsivideo.json")
    root, domains = file.parent, {}
    for meta in sorted((root / "meta_data").glob("*_bench.json")):
        for kind, names in rows_of(meta).items():
            for name in names:
                domains.setdefault(name, {})[meta.stem.removesuffix("_bench")] = kind

    def build(record, _):
        """The question of a record, `frames` of its frames."""
        parts = {
            key: record[key]
            for key in ("system_prompt", "task_prompt", "user_prompt", "format_prompt")
        }
        marks = re.findall("<video>|<image>", parts["user_prompt"])
        for mark, things in (("<video>", record["frames_list"]), ("<image>", record["ref_images"])):
            check(
                marks.count(mark) == len(things),
                f"user_prompt has {marks.count(mark)} {mark} for {len(things)}",
            )
        check(all(record["frames_list"]), "a clip has no frames")
        check(record["type"] in VIDEO_TYPES, f"there is no type {record['type']!r}")
        check(
            record["ground_truth"] in tuple("ABCDEF"), f"ground_truth is {record['ground_truth']!r}"
        )
        chosen = sample_frames([len(clip) for clip in record["frames_list"]], frames)
        clips = iter(
            [str(root / "frames" / clip[i]) for i in indices]
            for clip, indices in zip(record["frames_list"], chosen)
        )
        pictures = iter(str(root / "ref_images" / path) for path in record["ref_images"])
        images = [
            path
            for mark in marks
            for path in (next(clips) if mark == "<video>" else [next(pictures)])
        ]
        options = split_options(parts["user_prompt"], r"[.:)]\s*")[1]
        seconds = sum(clip["end"] - clip["start"] for clip in record["video_list"])
        fps = record["video_list"][0]["base_fps"]
        return [
            {
                "id": record["id"],
                "bench": "mmsi_video",
                "images": images,
                "question": record["ori_question"],
                "options": options
                if record["ground_truth"] in [option[0] for option in options]
                else [],
                "answer": record["ground_truth"],
                "category": record["type"],
                "kind": "mca",
                "needs_view": None,
                "cluster": record["video_list"][0]["path"],
                "parts": parts,
                "clips": [len(i) for i in chosen],
                "domains": domains.get(record["id"], {}),
                "input_fps": min(fps, frames / seconds) if seconds else fps,
            }
        ]

    return questions_of("MMSI-Video-Bench", file, rows_of(file), build)


# ---- SAT ------------------------------------------------------------------------------------------------------------


def load_sat(place):
    """SAT, every row asked in both orders of its options: the right text comes first in all published rows.

    A row gives two questions, "…/kept" and "…/reversed"; "category" is the group, "type" the record's own type. The
    question of an ego_movement begins with SAT_ORDER, without which it cannot be answered.
    "in the first frame" leaves options and answer alike: the official loader forgets the answer, which then cannot be
    reached.
    """
    file = found("sat", Path(place), "SAT_test.parquet")

    def build(record, number):
        """Two questions of a record, its images written beside the file."""
        images = kept(record["image_bytes"], file.parent / "images")
        texts = [text.replace("in the first frame", "").strip() for text in record["answers"]]
        gold, kind = (
            record["correct_answer"].replace("in the first frame", "").strip(),
            record["question_type"],
        )
        check(gold in texts, f"the answer {gold!r} is not among the options {texts}")
        check(kind in SAT_GROUPS, f"there is no type {kind!r}")
        question = SAT_ORDER * (kind == "ego_movement") + record["question"]
        return [
            {
                "id": f"{file.stem}_{number:05}/{order}",
                "bench": "sat",
                "images": images,
                "question": question,
                "options": [f"{'ABCDEF'[i]}. {text}" for i, text in enumerate(shown)],
                "answer": "ABCDEF"[shown.index(gold)],
                "category": SAT_GROUPS[kind],
                "kind": "mca",
                "needs_view": None,
                "text": record["question"],
                "type": kind,
                "cluster": str(number),
            }
            for order, shown in (("kept", texts), ("reversed", texts[::-1]))
        ]

    return questions_of("SAT", file, rows_of(file), build)


# ---- VSI-Bench ------------------------------------------------------------------------------------------------------


def load_vsi(place, frames=FRAMES["vsi"]):
    """VSI-Bench; "category" is the type, "kind" is "na" where the answer is a number ("answer" is its text).

    frames   frames of the video, taken evenly (most published numbers: 32). A folder of pictures saves decoding the
             whole video for each question
    """
    file = found("vsi", Path(place), "test-00000-of-00001.parquet", "test.jsonl")

    def build(record, _):
        """The question of a record, `frames` frames of its scene."""
        kind, number = record["question_type"], record["options"] is None
        check(
            kind in (VSI_NUMBER if number else VSI_LETTER),
            f"there is no type {kind!r} with{'out' * number} options",
        )
        if number:
            check(float(record["ground_truth"]) > 0, f"ground_truth is {record['ground_truth']!r}")
        scene = file.parent / record["dataset"] / record["scene_name"]
        return [
            {
                "id": str(record["id"]),
                "bench": "vsi",
                "images": vsi_frames(scene, frames),
                "question": record["question"],
                "options": record["options"] or [],
                "answer": record["ground_truth"],
                "category": kind,
                "kind": "na" if number else "mca",
                "needs_view": None,
                "text": record["question"],
                "cluster": f"{record['dataset']}/{record['scene_name']}",
            }
        ]

    return questions_of("VSI-Bench", file, rows_of(file), build)


@lru_cache(maxsize=None)  # many questions ask about one scene
def vsi_frames(scene, count):
    """Frames of a scene, evenly: pictures of its folder if there is one, else of its mp4, which takes PyAV."""
    pictures = sorted(path for path in scene.glob("*") if path.suffix in (".jpg", ".png"))
    if pictures:
        return [str(pictures[i]) for i in sample_frames([len(pictures)], count)[0]]
    video = scene.with_name(scene.name + ".mp4")
    if video.exists() and importlib.util.find_spec("av") is None:
        fail(
            f"{video} is a video, which takes PyAV to read. Type: pip install av    Or put frames of it, as pictures "
            f"whose names sort in time, into {scene}/."
        )
    return [f"{video}#{i + 1}/{count}" for i in range(count)]
