"""--bench wm in scans: what evaluate.py measures imagined views of real scenes with (extras/report/real_views.py)."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch

from extras.report import real_views
from lib.distributed import fail, say
from lib.simulators import needs_room


class Instruments(NamedTuple):
    """What measures views of scans."""

    match: Callable  # of real_views.recover_pose
    detect: Callable | None  # of real_views.detector; None: content is left out
    # (images, question) -> text of a vision-language model that lists categories
    ask: Callable | None


def instruments(
    args: argparse.Namespace, rows: list[dict], policy, device: torch.device
) -> Instruments:
    """Load them. Stops with a sentence where a pose cannot be found; says so where only content cannot.

    policy   a served one (--policy-url), or None
    """
    names = [name for name in args.simulator if needs_room(name)]
    if names:
        fail(f"--simulator {' '.join(names)} works in rooms only: these triples are of scans.")
    if not all("context_depth" in row for row in rows):
        fail(
            "These triples have no depth of their context views, by which poses are found: an older data.py "
            "made them. Make them again in an empty folder: python data.py triples --dataset ..."
        )
    try:
        match = real_views.matcher(args.matcher or real_views.MATCHER, device)
    except ValueError as error:
        fail(f"Poses in scans are found by a matcher. {error}")
    try:
        detect = real_views.detector(args.detector or real_views.DETECTOR, device)
    except ValueError as error:
        say(f"Content is left out. {error}")
        return Instruments(match, None, None)
    if policy:
        return Instruments(match, detect, asker(policy))
    say(
        f"No --policy-url lists the categories, so these are looked for: {', '.join(real_views.INDOOR)}."
    )
    return Instruments(match, detect, None)


def asker(policy) -> Callable:
    """A served policy as (images, question) -> text."""
    from extras.remote.client import image_part, message_text, text_part

    def ask(images: list, question: str) -> str:
        parts = [*map(image_part, images), text_part(question)]
        return message_text(policy.ask([{"role": "user", "content": parts}])[0])

    return ask


def measure_scans(
    args: argparse.Namespace, rows: list[dict], views: dict, tools: Instruments
) -> dict:
    """`real_views.compare_scans`, and by what it was measured."""
    return {
        **real_views.compare_scans(rows, views, *tools),
        "matcher": args.matcher or real_views.MATCHER,
        "detector": (args.detector or real_views.DETECTOR) if tools.detect else None,
        "categories": args.model if tools.ask else "indoor",
    }
