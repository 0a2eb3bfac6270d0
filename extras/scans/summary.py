"""What came of many scans, for a person to judge: counts with histograms, and a page of pictures."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from lib.geometry import Motion
from lib.images import contact_sheet, load_image

STEPS = {"degrees": 30, "meters": 0.5}  # of the histograms of amounts
SHEET_LINES = 12
TITLES = {
    "rejected": "pairs and candidates that fell out, by rule",
    "frames_skipped": "frames skipped by the reader",
    "motions": "kept, by motion",
    "notes": "notes",
}


class Summary:
    """Add the reports of scans (extras/scans/make.py) one by one, then read it as JSON or as text."""

    def __init__(self):
        self.tallies = defaultdict(Counter)
        self.broken = {}  # id of a scan -> why it could not be read
        self.cpu_seconds = 0.0

    def add(self, report: dict, split: str) -> None:
        """Count one scan of a split."""
        tallies = self.tallies
        tallies["splits"][split] += 1
        tallies["counts"].update(report["counts"])
        tallies["frames_skipped"].update(report["skipped"])
        if report["note"]:
            tallies["notes"][report["note"]] += 1
        for row in report["rows"]:
            motion = Motion(**row["motion"])
            step = STEPS[motion.unit]
            low = round(int(motion.amount / step + 1e-9) * step, 1)
            tallies["motions"][motion.kind] += 1
            tallies[motion.unit][low] += 1
        if report["error"]:
            self.broken[report["id"]] = report["error"]
        self.cpu_seconds += report["cpu_seconds"]

    def as_dict(self) -> dict:
        """{"scans", "frames", "candidates", "kept", "per_scan", "rejected" by rule, "motions", "amounts", …};
        an amount stands for itself and what lies above it, up to the next one."""
        tallies = self.tallies
        scans, rejected = tallies["splits"].total(), dict(tallies["counts"].most_common())
        totals = {key: rejected.pop(key, 0) for key in ("frames", "candidates", "kept")}
        return {
            "scans": scans,
            "splits": dict(tallies["splits"]),
            **totals,
            "per_scan": round(totals["kept"] / scans, 1),
            "rejected": rejected,
            "frames_skipped": dict(tallies["frames_skipped"].most_common()),
            "motions": dict(tallies["motions"].most_common()),
            "amounts": {unit: dict(sorted(tallies[unit].items())) for unit in STEPS},
            "notes": dict(tallies["notes"]),
            "broken": self.broken,
            "cpu_seconds": round(self.cpu_seconds, 1),
        }

    def text(self) -> str:
        """The same in lines to read, with a histogram of amounts."""
        facts = self.as_dict()
        splits = ", ".join(f"{count} {split}" for split, count in facts["splits"].items())
        lines = [
            f"{facts['scans']} scans ({splits}), {facts['frames']} frames looked at, {facts['candidates']} candidates, "
            f"{facts['kept']} triples kept: {facts['per_scan']} per scan (the paper keeps 48), "
            f"{facts['cpu_seconds'] / facts['scans']:.1f} CPU-seconds per scan"
        ]
        for key, title in TITLES.items():
            lines += [f"  {title}"] if facts[key] else []
            lines += [f"    {count:8}  {name}" for name, count in facts[key].items()]
        for unit, counts in facts["amounts"].items():
            lines += [f"  kept, by {unit} from"] if counts else []
            for low, count in counts.items():
                bar = "#" * round(40 * count / max(counts.values()))
                lines.append(f"    {low:8g} {count:6} {bar}")
        lines += [f"  broken: {id}: {error}" for id, error in self.broken.items()]
        return "\n".join(lines)


def sheet_of(out: Path, rows: list[dict]) -> Image.Image:
    """A page to judge by eye, of 12 rows at most: context (reference framed), words, target, warp, both in squares."""
    rows = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, SHEET_LINES).astype(int))]
    columns, lines = max(len(row["context"]) for row in rows), []
    for row in rows:
        context = [load_image(out / name) for name in row["context"]]
        context[row["reference"] - 1] = framed(context[row["reference"] - 1])
        target = load_image(out / row["target"])
        warped = np.array(Image.open(out / row["warp"]))  # RGBA
        empty = [np.full_like(target, 255)] * (columns - len(context))
        motion = row["motion"]
        words = (
            f"{row['scene']}\n{motion['kind']} {motion['amount']:g}\nfrom the framed view\n"
            f"coverage {row['coverage']:.2f}\nagreement {row['agreement']:.2f}"
        )
        pictures = [target, warped[..., :3], in_squares(target, warped)]
        lines.append([*context, *empty, words, *pictures])
    titles = ["context"] + [""] * columns + ["target", "warp", "in squares"]
    return contact_sheet(titles, lines, side=160)


def framed(pixels: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) with a red rim."""
    rim = max(1, len(pixels) // 40)
    whole = np.full_like(pixels, (255, 0, 0))
    whole[rim:-rim, rim:-rim] = pixels[rim:-rim, rim:-rim]
    return whole


def in_squares(target: np.ndarray, warped: np.ndarray) -> np.ndarray:
    """The target (H, W, 3) with every other of 8 x 8 squares from its warped context (H, W, 4), where that was seen."""
    height, width = target.shape[:2]
    row, column = np.arange(height) * 8 // height, np.arange(width) * 8 // width
    square = (row[:, None] + column) % 2 == 0
    return np.where((square & (warped[..., 3] > 0))[..., None], warped[..., :3], target)
