"""
Objects in the two pictures of a transition: what World2VLM's questions D1 to D4 are about.

A Detection is a label, a box and a track. In rooms all are known exactly; elsewhere a detector finds them, and only
objects that cannot be confused are known to be the same in both pictures.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np

from extras.report import real_views
from extras.report.real_views import Detection
from extras.world2vlm.transitions import Transition
from lib.rooms import random_room, render

MIN_CONFIDENCE = 0.3  # paper: score of a detection that is believed
MIN_AREA, MAX_AREA = 0.01, 0.6  # paper: share of the picture
MIN_GAP = 0.01  # paper: from the edges, in sides of the picture


def room_detections(transition: Transition) -> tuple[list, list]:
    """(objects of the source, of the target), exactly. The label is the kind of furniture: a colour would name one."""
    room, size = random_room(transition.room), len(transition.source)
    views = render(room, np.stack(transition.poses), size, supersample=1)["ids"]
    pair = ([], [])
    for detections, ids in zip(pair, views, strict=True):
        for track, thing in enumerate(room.things):
            rows, columns = np.nonzero(ids == track + 1)
            if len(rows):
                box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                detections.append(Detection(thing.kind, np.array(box) / size, 1.0, track))
    return pair


def load_detector(model: str, device: str) -> Callable:
    """Like `room_detections`, for any pictures, by a GroundingDINO (folder or hub id). Raises ValueError.

    Who is who cannot be told by overlapping boxes when the camera goes far: see `tracked_by_label`.
    """
    find = real_views.detector(model, device)

    def detect(transition):
        images = (transition.source, transition.target)
        return tracked_by_label([find(image, real_views.INDOOR) for image in images])

    return detect


def tracked_by_label(pair) -> tuple[list, list]:
    """(objects of the source, of the target), tracked where the label occurs once in the first and at most once in the
    second. D4 needs two of a label: for it, give tracks of your own."""
    first, last = (Counter(detection.label for detection in detections) for detections in pair)
    tracks = {label: label for label in first if first[label] == 1 >= last[label]}
    return tuple([d._replace(track=tracks.get(d.label)) for d in detections] for detections in pair)


def area(detection: Detection) -> float:
    """The share of the picture that a box fills."""
    x1, y1, x2, y2 = detection.box
    return max(x2 - x1, 0) * max(y2 - y1, 0)


def is_clear(detection: Detection) -> bool:
    """The paper's filter: sure enough, neither small nor large, and away from the picture's edges."""
    x1, y1, x2, y2 = detection.box
    if min(x1, y1) < MIN_GAP or max(x2, y2) > 1 - MIN_GAP:
        return False
    return detection.score >= MIN_CONFIDENCE and MIN_AREA <= area(detection) <= MAX_AREA


def most_confident(candidates: list[tuple], rng) -> tuple:
    """The tuple of Detections with the largest sum of scores; drawn among equals."""
    sums = [sum(detection.score for detection in each) for each in candidates]
    equal = [each for each, total in zip(candidates, sums, strict=True) if total == max(sums)]
    return equal[rng.integers(len(equal))]
