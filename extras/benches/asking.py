"""How evaluate.py asks a published bench, and judges what a policy answers: what `evaluate.Rooms` is to rooms."""

import argparse
from pathlib import Path

import numpy as np

from extras.benches import common
from lib.dialogue import Trajectory
from lib.distributed import is_main, say, wait_for_all


class Published:
    """One of common.BENCHES, by its name."""

    def __init__(self, name: str):
        self.bench = common.bench_called(name)

    def load(self, args: argparse.Namespace) -> tuple[list[dict], None]:
        """The questions of --data, of data/<bench>, or of rooms in its layout; sets args.frames to its default."""
        name = self.bench.name
        args.frames = (args.frames or self.bench.frames) if self.bench.frames else None
        folder = args.data
        for root in ("data", "out/data", "out/demo/data"):
            if folder is None and Path(root, name).exists():
                folder = f"{root}/{name}"
        if not is_main():
            wait_for_all()  # the first process fetches what is missing
        questions = common.load(name, folder, args.frames)
        if is_main():
            wait_for_all()
        say(f"{name}: {len(questions)} questions of {folder or f'data/{name}'}")
        return questions, None

    def images(self, question: dict) -> list[np.ndarray]:
        """Its images, (H, W, 3) uint8 each. Raises PictureError if one is missing or broken."""
        name = self.bench.name
        return [np.asarray(common.open_image(image, name)) for image in question["images"]]

    def prompt(self, question: dict, mode: str) -> list[str] | None:
        """What the bench's own code asks, or None where the policy is asked in its own words (lib/dialogue.py).

        MMSI-Video-Bench is always asked word for word, and a mode with a tool adds the tool's schema alone. The others
        are asked so in mode official: "reply with the answer only" goes together neither with a call nor with thoughts.
        """
        if mode == "official" or self.bench.name == "mmsi_video":
            return question["official"]
        return None

    def groups(self, question: dict) -> list[str]:
        """Which rows of the table a question counts in."""
        return common.groups(question)

    def judge(self, question: dict, dialogue: Trajectory, mode: str) -> dict:
        """-> {"answer": what was read, "correct", "lenient"} by the bench's rules.

        Except in mode official, a dialogue without an accepted answer (no call in mode forced, cut off in its thoughts)
        has said nothing, and SAT, whose own rule knows no letters, is read leniently, since our words show them.
        """
        name = self.bench.name
        accepted = mode == "official" or dialogue.answer is not None
        text = dialogue.turns[-1] if accepted and dialogue.turns else ""
        answer, lenient = common.lenient(question, text)
        correct = lenient
        if name != "sat" or mode == "official":
            answer, correct = common.score(name, question, common.reply(name, text))
        return {"answer": answer, "correct": correct, "lenient": lenient}

    def diagnose(self, question: dict, dialogue: Trajectory) -> None:
        """Only in rooms it is known what every view shows."""
