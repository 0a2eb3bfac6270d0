"""
Questions about rooms with exact answers, in the categories of the benchmarks.

A room is seen from a ring of four views. Half of the questions need a view that is not among them (`needs_view`): "Start
from Image-2 and turn 45 degrees to the left. Then which object looks largest?" The four views answer the others. What a view
shows is counted on its instance map (`facts`), and a question is asked only where the answer is clear.
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lib.geometry import Array, Motion, as_lists, move_camera
from lib.images import save_image
from lib.protocol import call_of, motion_in
from lib.rooms import SIZE, random_room, render, ring
from lib.simulators import phrase
from lib.streams import numpy_stream

REGIONS = ("left", "centre", "right")
ASKS = {
    "largest": "which object looks largest?",
    "leftmost": "which object is furthest to the left?",
    "rightmost": "which object is furthest to the right?",
    **{region: f"which object fills most of the {region} third?" for region in REGIONS},
}
CATEGORY = {
    "largest": "camera-object",
    "leftmost": "object-object",
    "rightmost": "object-object",
    **dict.fromkeys(REGIONS, "region"),
}
VISIBLE = 16  # pixels of 1,024: an object that counts as seen


def facts(ids: Array, things: int) -> dict:
    """What an instance map (H, W) shows, exactly: {ask: index of the object, None if ambiguous, -1 if there is none;
    "seen": the objects that are visible at all}.

    largest: at least 1.3 times the pixels of the next.  leftmost, rightmost: centroids at least 3 of 32 columns
    apart.  left, centre, right: most pixels of that third, at least 2 % of the view and 1.5 times the next.
    """
    width = ids.shape[1]
    scale = width**2 / 1024
    per_column = np.stack([(ids == i + 1).sum(0) for i in range(things)])  # (things, W)
    pixels = per_column.sum(1)
    visible = np.flatnonzero(pixels >= VISIBLE * scale)
    if len(visible) == 0:
        return {ask: -1 for ask in ASKS} | {"seen": []}

    def winner(scores, ratio=1.0, gap=0):
        """The visible object with the highest score; None if the next one's is nearer than that."""
        order = visible[np.argsort(-scores[visible], kind="stable")]
        first, *others = scores[order]
        if others and (first < ratio * others[0] or first - others[0] < gap):
            return None
        return int(order[0])

    centroid = (per_column * np.arange(width)).sum(1) / np.maximum(pixels, 1) * 32 / width
    answers = {
        "largest": winner(pixels, ratio=1.3),
        "leftmost": winner(-centroid, gap=3),
        "rightmost": winner(centroid, gap=3),
    }
    third = width // 3
    cuts = (0, third, width - third, width)
    for ask, low, high in zip(REGIONS, cuts[:-1], cuts[1:], strict=True):
        inside = per_column[:, low:high].sum(1)
        answers[ask] = winner(inside, ratio=1.5)
        if inside.max() < 6 * scale:
            answers[ask] = -1
        elif answers[ask] is not None and inside[answers[ask]] < 20 * scale:
            answers[ask] = None
    return answers | {"seen": visible.tolist()}


def _usable(view_facts, ask):
    """A question is asked where its answer is clear, and a comparison only where there is something to compare."""
    enough = CATEGORY[ask] == "region" or len(view_facts["seen"]) >= 2
    return enough and view_facts[ask] not in (None, -1)


def _in_colours(view_facts, room):
    """Facts with objects called by their colour: {ask: "red", "none", or None where it is unclear}."""
    colours = {i: thing.colour for i, thing in enumerate(room.things)} | {-1: "none", None: None}
    return {ask: colours[view_facts[ask]] for ask in ASKS}


# ---- questions -------------------------------------------------------------------------------------------------------

UNSEEN = [Motion("dangle", amount) for amount in (-45.0, -135.0, 45.0, 135.0)]
UNSEEN += [Motion("dx", -1.0), Motion("dx", 1.0), Motion("dy", 1.0)]
RING_TURNS = {  # and how many views further in the ring each leads
    Motion("dangle", -90.0): 1,
    Motion("dangle", 90.0): 3,
    Motion("dangle", -180.0): 2,
}
WALKS = {
    "it moved to the left": Motion("dx", -1.0),
    "it moved to the right": Motion("dx", 1.0),
    "it moved forward": Motion("dy", 1.0),
    "it moved backward": Motion("dy", -1.0),
}


def room_questions(seed: int, out: Path, per_kind: int = 2, rig: Callable = ring) -> list[dict]:
    """Questions (lib/records.Question) about one room: `per_kind` that need an unseen view, and as many that the given
    views answer. Pictures go to `out`/questions; `rig` gives the cameras, a ring of lib/rooms.

    Of the latter, one in six asks for the camera's way between two views at different places (camera-camera), one in six
    for a turn that ends at a given view (rotation), the others about one image. What only a room can know (`command`,
    `view`, `shows`) is for the cold start and for diagnosis, and never shown to a policy in a question.
    """
    rng = numpy_stream("questions of a room", seed)
    room = random_room(seed)
    poses = rig(rng)
    ring_ids = render(room, np.stack(poses), SIZE)["ids"]
    ring_facts = [facts(ids, len(room.things)) for ids in ring_ids]
    letters = rng.permutation(2 * per_kind) % 4  # each as often as any other, in every room
    rows = []
    for i, letter in enumerate(letters):
        form = "unseen"
        if i >= per_kind:
            form = rng.choice(["image", "rotation", "camera"], p=[4 / 6, 1 / 6, 1 / 6])
        draft = _camera_question(rng, poses) if form == "camera" else None
        draft = draft or _object_question(rng, room, poses, ring_facts, form)
        if draft is None:  # a bare room: nothing clear to ask
            continue
        cameras = draft.pop("cameras", poses)
        answer = draft.pop("answer")
        others = draft.pop("others")
        nothing = call_of(draft["shown_by"] or 1, Motion("dangle", -45.0))
        command = draft["motion"] or nothing
        target = move_camera(cameras[command["reference_image"] - 1], motion_in(command))
        truth = render(room, np.stack([*cameras, target]), SIZE)
        folder = f"questions/{seed:07d}"
        own = f"q{i}_" if form == "camera" else ""  # the four views of the ring are shared
        images = [f"{folder}/{own}{k}.png" for k in range(1, len(cameras) + 1)]
        view = f"{folder}/q{i}_view.png"
        for path, rgb in zip([*images, view], truth["rgb"], strict=True):
            save_image(out / path, rgb)
        shows = [_in_colours(facts(ids, len(room.things)), room) for ids in truth["ids"]]
        rows.append(
            {
                "id": f"room_{seed}_{i}",
                "bench": "rooms",
                "images": images,
                **draft,
                "kind": "mca",
                "options": choose(rng, letter, answer, others),
                "answer": "ABCD"[letter],
                "scene": {"room": seed, "poses": [as_lists(camera) for camera in cameras]},
                "command": command,
                "view": view,
                "shows": shows,
            }
        )
    return rows


def _object_question(rng, room, poses, ring_facts, form):
    """A question about objects: "unseen" (after a motion that leads to a view not given), "rotation" or "image"."""
    motions = {"unseen": UNSEEN, "rotation": list(RING_TURNS), "image": [None]}[form]
    for _ in range(40):
        k = int(rng.integers(4))
        ask = str(rng.choice(list(ASKS), p=[1 / 3, 1 / 6, 1 / 6, 1 / 9, 1 / 9, 1 / 9]))
        motion = motions[rng.integers(len(motions))]
        shown_by = None
        if form == "unseen":
            ids = render(room, move_camera(poses[k], motion), SIZE, supersample=1)["ids"][0]
            there = facts(ids, len(room.things))
            if ring_facts[k][ask] in (None, there[ask]):
                continue  # the image itself says nothing, or the same
        else:
            shown_by = 1 + (k + RING_TURNS.get(motion, 0)) % 4
            there = ring_facts[shown_by - 1]
        if not _usable(there, ask):
            continue
        start = f"In Image-{k + 1},"
        command = None
        if motion:
            start = f"Start from Image-{k + 1} and {phrase(motion)}. Then"
            command = call_of(k + 1, motion)
        return {
            "question": f"{start} {ASKS[ask]}",
            "category": "rotation" if form == "rotation" else CATEGORY[ask],
            "needs_view": form == "unseen",
            "ask": ask,
            "shown_by": shown_by,
            "motion": command,
            "answer": room.things[there[ask]].colour,
            "others": _distractors(rng, room, there, ask),
        }
    return None


def _camera_question(rng, poses):
    """Two views that look the same way from places 1 m apart: which way did the camera go?"""
    ways = list(WALKS)
    answer = ways.pop(rng.integers(4))
    start = poses[rng.integers(4)]
    return {
        "question": "How did the camera get from Image-1 to Image-2?",
        "category": "camera-camera",
        "needs_view": False,
        "ask": None,
        "shown_by": None,
        "motion": None,
        "answer": answer,
        "others": ways,
        "cameras": [start, move_camera(start, WALKS[answer])],
    }


def _distractors(rng, room, view_facts, ask):
    """Three other objects of the room: up to two that the asked view shows as well, then others. Called by their colour
    alone: the kind tells the size (a cabinet is more often the largest than a ball)."""
    others = [i for i in rng.permutation(len(room.things)).tolist() if i != view_facts[ask]]
    first = [i for i in others if i in view_facts["seen"]][:2]
    rest = [i for i in others if i not in first]
    return [room.things[i].colour for i in (first + rest)[:3]]


def choose(rng: np.random.Generator, letter: int, answer: str, others: list[str]) -> list[str]:
    """Four lettered options, the answer at `letter` (0 to 3), the others in random order."""
    options = [others[i] for i in rng.permutation(3)]
    options.insert(letter, answer)
    return [f"{name}. {option}" for name, option in zip("ABCD", options, strict=True)]


# ---- what a question's text gives away -------------------------------------------------------------------------------


def _text_features(question):
    """Features of each option: letter, words, rank, likeness; the same given the question without its numbers, or whole."""
    template = re.sub(r"\d+(\.\d+)?", "#", question["question"])
    texts = [option.split(". ", 1)[1] for option in question["options"]]
    ends = [(text.split()[0], text.split()[-1]) for text in texts]
    features = []
    for letter, text, words in zip("ABCDEF", texts, ends, strict=False):
        alike = [sum(word in other for other in ends) for word in words]
        alone = [letter, text, *words, f"alike {alike}", f"rank {sorted(texts).index(text)}"]
        features.append(list(alone))
        for condition in (template, question["question"]):
            features[-1] += [f"{condition} | {feature}" for feature in alone]
    return features


def text_only_chance(train: list[dict], test: list[dict], epochs: int = 12) -> float:
    """The best accuracy that the text alone allows, of several blind rules fitted on the training questions.

    The rules: the commonest letter; the commonest letter given the question; the option that was the answer most often
    when offered, given the question or its template; a linear model. Near 1 / options if nothing gives itself away.
    """
    train_rows = [_text_features(question) for question in train]
    test_rows = [_text_features(question) for question in test]
    train_gold = ["ABCDEF".index(question["answer"]) for question in train]
    test_gold = ["ABCDEF".index(question["answer"]) for question in test]

    offered = Counter()
    right = Counter()
    for options, gold in zip(train_rows, train_gold, strict=True):
        for option in options:
            offered.update(option)
        right.update(options[gold])

    # how often an option with a feature was the answer; 1/4 for one that was never offered
    share = {feature: (right[feature] + 1) / (offered[feature] + 4) for feature in offered}
    guesses = []
    width = len(train_rows[0][0]) // 3
    for position in (0, 1):  # the letter, the whole text
        for i in (position, position + width, position + 2 * width):  # alone, given the template,
            guesses.append(
                [np.argmax([share.get(row[i], 1 / 4) for row in rows]) for rows in test_rows]
            )
    guesses.append(_linear_guesses(train_rows, train_gold, test_rows, list(offered), epochs))
    return max(float(np.mean(np.array(guess) == test_gold)) for guess in guesses)


def _linear_guesses(train_rows, train_gold, test_rows, known, epochs):
    """Conditional logit over `known` features by stochastic gradient descent -> the option it takes, per test question."""
    index = {feature: i for i, feature in enumerate(known)}
    weights = np.zeros(len(index) + 1)  # the last one is every unknown feature: never learned

    def coded(options):
        return np.array([[index.get(feature, -1) for feature in option] for option in options])

    train_codes = [coded(options) for options in train_rows]  # (options, features) each
    for epoch in range(epochs):
        for q in numpy_stream("text guess", epoch).permutation(len(train_codes)):
            codes = train_codes[q]
            scores = weights[codes].sum(1)
            odds = np.exp(scores - scores.max())
            slope = (np.arange(len(codes)) == train_gold[q]) - odds / odds.sum()
            np.add.at(weights, codes, 0.05 / (1 + epoch) * slope[:, None])
            weights[-1] = 0
    return [int(weights[coded(options)].sum(1).argmax()) for options in test_rows]
