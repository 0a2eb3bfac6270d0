"""
What the published benches share: their files on the hub, records, pictures inside files, frames of videos, options.

A bench is one module (mindcube.py, mmsi.py, ...) that ends in its `Bench`; extras/benches/common.py knows them by name.

A record becomes a question: lib.records.Question and, beside it, "official" (what the bench's own code asks: the texts
before each image and after the last one; ours in words, theirs in meaning) and "cluster" (questions about the same
thing: they are not independent, so an interval draws them together).
An image is a path, or "<video>.mp4#3/32": frame 3 of 32 taken evenly; `open_image` opens both. Pictures that a file
holds inside are written once, into images/ beside it.

A missing image or video leaves no question out. MindCube's own code asks without the image (`missing_images` counts);
elsewhere opening it raises PictureError, and the caller counts the question as wrong.
"""

import hashlib
import json
import math
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lib.distributed import fail, say
from lib.images import check_file, decoding, read
from lib.protocol import check_kinds
from lib.records import Question, whole_file
from rewards import name_gold


class Source(NamedTuple):
    """Where a record comes from."""

    file: Path
    number: int  # of the record, from 1
    frames: int | None  # how many a question may show, all its clips together


def only_category(question: dict) -> list[str]:
    """The groups of a question where a bench has one level of them."""
    return [question["category"]]


class Bench(NamedTuple):
    """A published bench: its files, and what its official code does, as functions."""

    name: str  # as in --bench
    title: str
    repo: str  # on the Hugging Face hub
    downloads: tuple[str, ...]  # what is fetched of it
    files: tuple[str, ...]  # which one is read: the first that is there
    questions: Callable[[dict, Source], list[dict]]  # of one record
    read: Callable[[str, dict], str | float | None]  # (reply, question) -> its letter or number
    groups: Callable[[dict], list[str]] = only_category
    frames: int | None = None  # of the videos of a question
    max_pixels: float = math.inf  # an image's area in the official runs


def after_images(images: list[str], text: str) -> list[str]:
    """The texts of a prompt that shows all images before it says anything."""
    return [""] * len(images) + [text]


def require(condition: bool, problem: str) -> None:
    """Raise ValueError if a record is not what it should be."""
    if not condition:
        raise ValueError(problem)


# ---- finding and fetching -------------------------------------------------------------------------------------------


def fetch(bench: Bench) -> Path:
    """data/<bench>, downloaded and unpacked if it is not there; a download that was cut off goes on."""
    folder = Path("data") / bench.name
    if folder.exists():
        return folder
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    partial = folder.with_suffix(".partial")
    say(f"Fetching {', '.join(bench.downloads)} of {bench.repo} into {folder}")
    try:
        snapshot_download(
            bench.repo, repo_type="dataset", local_dir=partial, allow_patterns=bench.downloads
        )
        missing = [name for name in bench.downloads if not (partial / name).exists()]
        if missing:  # offline, the hub's client is content with nothing
            raise FileNotFoundError(f"no {missing[0]}")
        for name in bench.downloads:
            if name.endswith(".zip"):
                shutil.unpack_archive(partial / name, partial)
    except (OSError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        fail(f"{bench.name} could not be fetched ({reason}). {how_to_fetch(bench)}")
    return partial.replace(folder)


def how_to_fetch(bench: Bench) -> str:
    """The sentence that says what to fetch and where to put it."""
    folder = f"data/{bench.name}"
    archives = [name for name in bench.downloads if name.endswith(".zip")]
    sentence = (
        f"Where there is a network, type: hf download {bench.repo} {' '.join(bench.downloads)} --repo-type dataset "
        f"--local-dir {folder}"
    )
    if archives:
        sentence += f", unpack {' '.join(archives)} there"
    sentence += f", and give --data {folder}."
    if bench.name == "mindcube":
        sentence += " Or try it on rooms: `python -m extras.benches.mindcube` writes their questions that way."
    return sentence


def find_file(bench: Bench, place: Path) -> Path:
    """The file to read: `place` itself, or the first of the bench's files in it or in its folder data/."""
    paths = [place]
    if place.suffix not in (".parquet", ".json", ".jsonl"):
        paths = [folder / name for folder in (place, place / "data") for name in bench.files]
    for path in paths:
        if path.exists():
            return path
    fail(f"{paths[0]} does not exist. {how_to_fetch(bench)}")


# ---- records --------------------------------------------------------------------------------------------------------


def read_questions(bench: Bench, file: Path, frames: int | None) -> list[dict]:
    """The questions of all records of a file; one that is no record of the bench ends in a sentence."""
    questions = []
    for number, record in enumerate(records_of(file), 1):
        try:
            for question in bench.questions(record, Source(file, number, frames)):
                common = {"bench": bench.name, "kind": "mca", "needs_view": None}
                question = common | question
                check_kinds(question, Question)
                name_gold(question)
                questions.append(question)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            fail(f"{file}, record {number} is not one of {bench.title} ({reason}).")
        except OSError as error:
            fail(
                f"The images inside {file} cannot be written beside it ({error}). Give a copy in a folder of yours."
            )
    return questions


def records_of(file: Path) -> Iterable[dict]:
    """The records of a parquet, JSON or JSONL file."""
    if file.suffix == ".parquet":
        return parquet_rows(file)
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        fail(f"{file} is not JSON ({error}); it may be cut off: fetch it again.")


def parquet_rows(file: Path) -> Iterator[dict]:
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


def split_options(question: str, mark: str = r"\. ") -> tuple[str, list[str]]:
    """ "Which one? A. Crate B. Stool" -> ("Which one?", ["A. Crate", "B. Stool"]); the words stay as they are.

    mark   what stands between a letter and its words, as a regular expression
    The letters must follow one another up to the end; the last such list counts. No list: (question, []).
    """
    letters = list(re.finditer(rf"(?:(?<=\s)|^)\(?([A-F]){mark}", question))
    starts = [i for i, letter in enumerate(letters) if letter[1] == "A"]
    if not starts:
        return question, []
    letters = letters[starts[-1] :]
    in_order = "".join(letter[1] for letter in letters)
    if len(letters) < 2 or in_order != "ABCDEF"[: len(letters)]:
        return question, []
    ends = [letter.start() for letter in letters[1:]] + [len(question)]
    options = []
    for letter, end in zip(letters, ends, strict=True):
        options.append(f"{letter[1]}. {question[letter.end() : end].strip()}")
    return question[: letters[0].start()].rstrip(), options


# ---- pictures -------------------------------------------------------------------------------------------------------


def save_pictures(pictures: Iterable, folder: Path) -> list[str]:
    """Pictures of a record, bytes or {"bytes": …}, as files of `folder` named after their content -> their paths."""
    paths = []
    for picture in pictures:
        content = picture["bytes"] if isinstance(picture, dict) else picture
        suffix = ".png" if content[:4] == b"\x89PNG" else ".jpg"
        path = folder / (hashlib.sha1(content).hexdigest()[:20] + suffix)
        if not path.exists():
            with whole_file(path) as beside:
                beside.write_bytes(content)
        paths.append(str(path))
    return paths


def open_picture(path: str, max_pixels: float = math.inf) -> Image.Image:
    """A picture, or a frame of a video, in RGB and shrunk to an area of at most `max_pixels`. Raises PictureError."""
    frame = re.fullmatch(r"(.+\.mp4)#(\d+)/(\d+)", path)
    if frame:
        image = video_frames(frame[1], int(frame[3]))[int(frame[2]) - 1]
    else:
        image = Image.fromarray(read(path))
    if image.width * image.height > max_pixels:
        shrink = (max_pixels / (image.width * image.height)) ** 0.5
        size = max(1, int(image.width * shrink)), max(1, int(image.height * shrink))
        image = image.resize(size, Image.BICUBIC)
    return image


@lru_cache(maxsize=4)  # the frames of one question are opened one after another
def video_frames(path: str, count: int) -> list[Image.Image]:
    """`count` frames of a video, taken evenly from the first to the last; of a short one all, the last repeated."""
    with decoding(f"The video {path}"):
        check_file(path)
        import av  # an extra: vsi.py has said what to install

        with av.open(path) as video:  # packets are counted: what the file claims is not always true
            total = sum(packet.size > 0 for packet in video.demux(video=0))
        wanted = set(sample_frames([total], count)[0])
        with av.open(path) as video:
            numbered = enumerate(video.decode(video=0))
            frames = [frame.to_image() for number, frame in numbered if number in wanted]
        if not frames:
            raise ValueError("it holds no frames")
        return [frames[min(i, len(frames) - 1)] for i in range(count)]


def sample_frames(counts: list[int], cap: int) -> list[list[int]]:
    """MMSI-Video's official sampler: which frames of each clip to show.

    counts    frames of each clip
    cap       the most frames of all clips together
    returns   a list of indices per clip: all of them if they fit, else every step-th of the clips in a row, truncated,
              and frame 0 of a clip that got none (so there may be more than `cap`)
    """
    total = sum(counts)
    step = max(1, (total - 1) / max(1, cap - 1))
    chosen = [int(i * step) for i in range(min(total, cap))]
    clips, start = [], 0
    for count in counts:
        inside = [i - start for i in chosen if start <= i < start + count]
        clips.append(inside or [0])
        start += count
    return clips
