"""
Clips of rooms in MMSI-Video-Bench's own files, so that `evaluate.py --bench mmsi_video` runs without a download.

A clip is a walk of 0.8 m near the middle of a room while the camera turns, eight frames of it. Eight kinds of questions
stand for seven of the bench's 13 types, on all of its levels; rooms have no names for places and nothing moves in them:

  motion     how did the camera go and turn            (Motion Understanding) Camera Motion
  order      what came into view first                 the same: the bench has no type of its own for it
  nearest    which object stands nearest to another    (Spatial Construction) Instance-Instance …
  where      where is an object, at the end            (Spatial Construction) Camera-Instance …
  look       how to turn to look at an object          Planning
  next       what will be seen after a motion          Prediction
  both       which object do both clips show           (Cross-Video) Multi-View Integration: two clips
  gone       which object was taken away               (Cross-Video) Memoery Update: two clips (their spelling)

The renderer knows the answers. The words alone tell nothing: fixed answers and letters take turns from room to room,
and objects are called by their colour.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from data import FIRST_ROOM, build, choose
from lib.geometry import Motion, camera_pose, move_camera
from lib.images import save_image
from lib.questions import facts
from lib.rooms import EYE, SIZE, random_room, render
from lib.simulators import phrase
from lib.stage import say, write_json
from lib.streams import numpy_stream

FRAMES, FPS, WALK = 8, 2.0, 0.8  # of a clip; frames per second; metres
TRIES = 60  # clips that are drawn for a question; bare rooms do without it
HEADINGS = {
    "forward": 0,
    "right": 90,
    "backward": 180,
    "left": 270,
}  # degrees to the right of the first view
SIDES = {"left": -1, "right": 1}
WHERE = {
    "in front of it": 0,
    "to its right": 90,
    "behind it": 180,
    "to its left": -90,
}  # bearing in degrees
LOOKS = {
    f"turn {side} {amount} degrees": SIDES[side] * amount for side in SIDES for amount in (45, 135)
}
NEXT = [Motion("dangle", amount) for amount in (-45.0, -90.0, 45.0, 90.0)]
SPACE = "(Spatial Construction) {} Spatial Relationship"
TYPES = {
    "motion": "(Motion Understanding) Camera Motion",
    "order": "(Motion Understanding) Camera Motion",
    "nearest": SPACE.format("Instance-Instance"),
    "where": SPACE.format("Camera-Instance"),
    "look": "Planning",
    "next": "Prediction",
    "both": "(Cross-Video) Multi-View Integration",
    "gone": "(Cross-Video) Memoery Update",
}
PROMPT = {
    "system_prompt": "The pictures are frames of videos, in order.",
    "task_prompt": "Look at them. ",
    "format_prompt": "\nAnswer with the letter of the right option alone.",
}


# ---- a clip ---------------------------------------------------------------------------------------------------------


def walk(rng, turn, heading=None):
    """The poses of a clip: a straight way of WALK metres past the middle of a room, on which the camera turns.

    turn      degrees in all, to the right
    heading   degrees from the first view to where it goes; None: anywhere
    """
    (x, z), yaw = rng.uniform(-0.3, 0.3, 2), rng.uniform(0, 360)
    way = np.radians(yaw + (rng.uniform(0, 360) if heading is None else heading))
    return [
        camera_pose(
            x + WALK * (t - 0.5) * np.sin(way),
            -EYE,
            z + WALK * (t - 0.5) * np.cos(way),
            yaw + turn * t,
        )
        for t in np.linspace(0, 1, FRAMES)
    ]


def seen_in(room, poses):
    """Which objects a clip shows: {index: number of the first frame that shows it}."""
    first = {}
    for k, ids in enumerate(render(room, np.stack(poses), SIZE, supersample=1)["ids"]):
        for i in facts(ids, len(room.things))["angle"]:
            first.setdefault(i, k)
    return first


def bearing(c2w, thing):
    """Degrees to the right of a camera's view at which a thing stands, in (-180, 180]."""
    x, _, z, _ = np.linalg.inv(c2w) @ (thing.x, -EYE, thing.z, 1)
    return float(np.degrees(np.arctan2(x, z)))


def off(a, b):
    """Degrees between two directions."""
    return abs((a - b + 180) % 360 - 180)


def round_walk(rng, low=120, high=240):
    """A walk on which the camera turns far, to either side."""
    return walk(rng, rng.choice([-1, 1]) * rng.uniform(low, high))


# ---- the eight kinds ------------------------------------------------------------------------------------------------
# Each draws a clip -> {"question", "answer", "others": three, "clips": [(room, poses)]}, or None if nothing clear can
# be asked about it. wanted: 0 to 3, which of its four answers (or motions) is to be true, where those are always the
# same four: clips are drawn until it is, or the answers that come about more easily would be the commoner ones.


def motion(rng, room, wanted):
    """Four options: there or back, turning left or right."""
    ways = [("forward", "backward"), ("left", "right")][rng.integers(2)]
    options = [(way, side) for way in ways for side in SIDES]
    told = [
        f"it went {'to the ' if way in SIDES else ''}{way} and turned {side}"
        for way, side in options
    ]
    way, side = options[wanted]
    poses = walk(rng, SIDES[side] * rng.uniform(60, 120), HEADINGS[way])
    return {
        "question": "Seen from the first frame of the video, how did the camera move?",
        "answer": told.pop(wanted),
        "others": told,
        "clips": [(room, poses)],
    }


def order(rng, room, wanted):
    """Three objects that come into view one after another."""
    poses = round_walk(rng)
    first = seen_in(room, poses)
    three = rng.permutation(list(first))[:3].tolist()
    if len({first[i] for i in three}) < 3:
        return None
    right = sorted(three, key=first.get)
    wrong = [
        [three[i] for i in p]
        for p in rng.permutation([(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
    ]

    def name(those):
        return ", ".join(room.things[i].colour for i in those)

    return {
        "question": "In which order do these objects come into view?",
        "answer": name(right),
        "others": [name(those) for those in wrong if those != right][:3],
        "clips": [(room, poses)],
    }


def nearest(rng, room, wanted):
    """The neighbour of an object among those that the clip shows."""
    poses = round_walk(rng)
    shown = rng.permutation(list(seen_in(room, poses))).tolist()
    if len(shown) < 5:
        return None
    one, *others = shown
    spots = {i: np.array([room.things[i].x, room.things[i].z]) for i in shown}
    gaps = {i: np.linalg.norm(spots[i] - spots[one]) for i in others[:4]}
    first, second = sorted(gaps, key=gaps.get)[:2]
    if gaps[second] < 1.3 * gaps[first]:
        return None
    return {
        "question": f"Which of these objects stands nearest to the {room.things[one].colour} one?",
        "answer": room.things[first].colour,
        "others": [room.things[i].colour for i in gaps if i != first],
        "clips": [(room, poses)],
    }


def towards(rng, room, wanted, options, question, slack):
    """A direction among `options`, at the end of a clip, to an object that the clip shows."""
    poses, right = round_walk(rng), list(options)[wanted]
    there = [
        i
        for i in seen_in(room, poses)
        if off(bearing(poses[-1], room.things[i]), options[right]) <= slack
    ]
    if not there:
        return None
    return {
        "question": question.format(room.things[there[rng.integers(len(there))]].colour),
        "answer": right,
        "others": [option for option in options if option != right],
        "clips": [(room, poses)],
    }


def upcoming(rng, room, wanted):
    """What stands in the middle after a turn that goes on from the last frame: an object that the clip has shown."""
    poses, way = round_walk(rng), NEXT[wanted]
    views = render(room, np.stack([poses[-1], move_camera(poses[-1], way)]), SIZE, supersample=1)[
        "ids"
    ]
    now, then = (facts(ids, len(room.things)) for ids in views)
    shown = list(seen_in(room, poses))
    if (
        then["centre"] is None
        or then["centre"] < 0
        or then["centre"] == now["centre"]
        or then["centre"] not in shown
    ):
        return None
    others = [i for i in rng.permutation(shown).tolist() if i != then["centre"]][:3]
    if len(others) < 3:
        return None
    return {
        "question": f"After the last frame the camera will {phrase(way)}. Which object will then fill most of the "
        f"centre third of its view?",
        "answer": room.things[then["centre"]].colour,
        "others": [room.things[i].colour for i in others],
        "clips": [(room, poses)],
    }


def both(rng, room, wanted):
    """Two clips that have one object in common; the three others stand in one of them."""
    clips = [round_walk(rng, 30, 60) for _ in range(2)]
    one, other = (set(seen_in(room, poses)) for poses in clips)
    if len(one & other) != 1 or len(one ^ other) < 3:
        return None
    return {
        "question": "Which object do both videos show?",
        "answer": room.things[(one & other).pop()].colour,
        "others": [room.things[i].colour for i in rng.permutation(sorted(one ^ other))[:3]],
        "clips": [(room, poses) for poses in clips],
    }


def gone(rng, room, wanted):
    """Two clips: before and after an object was taken away. The four options are shown by the first, three by both."""
    clips, missing = (
        [round_walk(rng, 180, 240) for _ in range(2)],
        int(rng.integers(len(room.things))),
    )
    emptied = replace(room, things=room.things[:missing] + room.things[missing + 1 :])
    before, again = (
        set(seen_in(room, poses)) for poses in clips
    )  # `again`: had it not been taken away
    stay = {i + (i >= missing) for i in seen_in(emptied, clips[1])}
    if missing not in before & again or len(before & stay) < 3:
        return None
    return {
        "question": "The second video was taken later. Which object had been taken away by then?",
        "answer": room.things[missing].colour,
        "others": [room.things[i].colour for i in rng.permutation(sorted(before & stay))[:3]],
        "clips": [(room, clips[0]), (emptied, clips[1])],
    }


KINDS = {
    "motion": motion,
    "order": order,
    "nearest": nearest,
    "where": partial(
        towards,
        options=WHERE,
        slack=30,
        question="At the end of the video, where does the {} object stand, seen from the camera?",
    ),
    "look": partial(
        towards,
        options=LOOKS,
        slack=12,
        question="After the last frame, how must the camera turn to look straight at the {} object?",
    ),
    "next": upcoming,
    "both": both,
    "gone": gone,
}


# ---- files ----------------------------------------------------------------------------------------------------------


def clip_questions(seed, out):
    """One question of each kind about a room -> records of mmsivideo.json without their ids; frames go to out/frames/.

    The recording of all clips of a room has one name, so that an interval draws its questions together.
    """
    room, records = random_room(seed), []
    for number, (kind, draw) in enumerate(KINDS.items()):
        rng, letter = numpy_stream("clips of a room", seed, number), (seed // 4 + number) % 4
        draft = next(
            (draft for draft in (draw(rng, room, seed % 4) for _ in range(TRIES)) if draft), None
        )
        if draft is None:
            continue
        frames = []
        for c, (where, poses) in enumerate(draft["clips"]):
            folder, names = f"rooms/{seed}/{kind}_{c + 1}", []
            for k, rgb in enumerate(render(where, np.stack(poses), SIZE)["rgb"]):
                names.append(f"{folder}/00:{k / FPS:05.2f}_frame_{1 / FPS:.2f}_{k}.png")
                save_image(out / "frames" / names[-1], rgb)
            frames.append(names)
        options = choose(rng, letter, draft["answer"], draft["others"])
        videos = (
            "\n".join(f"Video {c + 1}: <video>" for c in range(len(frames)))
            if len(frames) > 1
            else "<video>"
        )
        start = 100.0 * number
        records.append(
            {
                "type": TYPES[kind],
                "ref_images": [],
                "ori_question": draft["question"],
                "video_list": [
                    {
                        "path": f"rooms/{seed}.mp4",
                        "start": start + 10 * c,
                        "end": start + 10 * c + FRAMES / FPS,
                        "base_fps": FPS,
                    }
                    for c in range(len(frames))
                ],
                "frames_list": frames,
                **PROMPT,
                "ground_truth": "ABCD"[letter],
                "user_prompt": "\n".join([videos, draft["question"], "Options:", *options]),
            }
        )
    return records


def make_mmsi_video(out, rooms=40, threads=2):
    """Clips of test rooms in the files that MMSI-Video-Bench publishes: mmsivideo.json and frames/ (tests/clips.py)."""
    out, first = Path(out), FIRST_ROOM["test"]
    records = build("mmsi_video", clip_questions, range(first, first + rooms), out, threads)
    write_json(
        out / "mmsivideo.json",
        [{"id": f"question_{i:04}", **record} for i, record in enumerate(records)],
    )
    two = sum(len(record["frames_list"]) == 2 for record in records)
    say(
        f"{out}/mmsivideo.json: {len(records)} questions in MMSI-Video-Bench's layout, {two} about two clips"
    )
