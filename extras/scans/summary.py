"""What came of many scans, for a person to judge: counts with histograms, and a page of pictures."""

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from extras.scans.frames import evenly
from lib.geometry import Motion
from lib.images import contact_sheet, load_image, read_warp
from lib.simulators import phrase

SHEET_LINES = 40
TOTALS = ("frames", "candidates", "kept")
TITLES = {
    "rejected": "pairs and candidates that fell out, by rule",
    "frames_skipped": "frames skipped by the reader",
    "motions": "kept, by motion",
    "gravity": "gravity",
    "notes": "notes",
}


class Summary:
    """Add the reports of scans (extras/scans/make.py) one by one; `facts` is summary.json."""

    def __init__(self):
        self.facts = {"scans": 0, "splits": Counter(), **dict.fromkeys(TOTALS, 0), "per_scan": 0.0}
        self.facts |= {key: Counter() for key in TITLES}
        # broken: id of a scan -> why it could not be read
        self.facts |= {"broken": {}, "cpu_seconds": 0.0}

    def add(self, report: dict, split: str) -> None:
        """Count one scan of a split."""
        facts = self.facts
        facts["scans"] += 1
        facts["splits"][split] += 1
        for key, count in report["counts"].items():
            tally = facts if key in TOTALS else facts["rejected"]
            tally[key] += count
        facts["frames_skipped"].update(report["skipped"])
        facts["motions"].update(row["motion"]["kind"] for row in report["rows"])
        for key, sentence in (("gravity", report["gravity"]), ("notes", report["note"])):
            if sentence:
                facts[key][sentence] += 1
        if report["error"]:
            facts["broken"][report["id"]] = report["error"]
        facts["cpu_seconds"] += report["cpu_seconds"]
        facts["per_scan"] = round(facts["kept"] / facts["scans"], 1)

    def text(self) -> str:
        """The same in lines to read."""
        facts = self.facts
        splits = ", ".join(f"{count} {split}" for split, count in facts["splits"].items())
        lines = [
            f"{facts['scans']} scans ({splits}), {facts['frames']} frames looked at, {facts['candidates']} candidates, "
            f"{facts['kept']} triples kept: {facts['per_scan']} per scan (the paper keeps 48), "
            f"{facts['cpu_seconds'] / facts['scans']:.1f} CPU-seconds per scan"
        ]
        for key, title in TITLES.items():
            lines += [f"  {title}"] if facts[key] else []
            lines += [f"    {count:8}  {name}" for name, count in facts[key].most_common()]
        lines += [f"  broken: {id}: {error}" for id, error in facts["broken"].items()]
        return "\n".join(lines)


def sheet_of(out: Path, rows: list[dict]) -> Image.Image:
    """A page to judge by eye, of SHEET_LINES rows at most: context, words, target, warp, target and warp in squares."""
    rows = evenly(rows, SHEET_LINES)
    columns = max(len(row["context"]) for row in rows)
    lines = []
    for row in rows:
        context = [load_image(out / name) for name in row["context"]]
        target = load_image(out / row["target"])
        warped = read_warp(out / row["warp"])
        empty = [np.full_like(target, 255)] * (columns - len(context))
        words = (
            f"{row['scene']}\n{phrase(Motion(**row['motion']))}\nfrom Image-{row['reference']}\n"
            f"coverage {row['coverage']:.2f}\nagreement {row['agreement']:.2f}"
        )
        mixed = in_squares(target, warped)
        lines.append([*context, *empty, words, target, warped[..., :3], mixed])
    titles = [f"Image-{k + 1}" for k in range(columns)] + ["", "target", "warp", "in squares"]
    return contact_sheet(titles, lines, side=160)


def in_squares(target, warped):
    """The target (H, W, 3) with every other square from its warped context (H, W, 4), where that was seen."""
    side = max(1, len(target) // 8)
    row, column = np.indices(target.shape[:2]) // side
    mask = ((row + column) % 2 == 0) & (warped[..., 3] > 0)
    return np.where(mask[..., None], warped[..., :3], target)
