"""
Questions about rooms with exact answers, in the categories of the benchmarks.

A room is seen from a ring of four views. Half of the questions need a view that was not given (`needs_view`): "Start
from Image-2 and turn left 45 degrees. Then which object looks largest?" The given views answer the others. What a view
shows is counted on its instance map (`facts`), and a question is asked only where the answer is clear.
"""

import re
from collections import Counter

import numpy as np

from lib.geometry import Motion, as_lists, move_camera, phrase
from lib.images import save_image
from lib.rooms import SIZE, random_room, render, ring
from lib.streams import numpy_stream

# ---- questions ------------------------------------------------------------------------------------------------

ASKS = {
    "largest": "which object looks largest?",
    "leftmost": "which object is furthest to the left?",
    "rightmost": "which object is furthest to the right?",
    "left": "which object fills most of the left third?",
    "centre": "which object fills most of the centre third?",
    "right": "which object fills most of the right third?",
}
CATEGORY = {
    "largest": "camera-object",
    "leftmost": "object-object",
    "rightmost": "object-object",
    "left": "region",
    "centre": "region",
    "right": "region",
}
UNSEEN = [
    Motion(f"turn {side}", amount) for side in ("left", "right") for amount in (45.0, 135.0)
] + [Motion(f"move {way}", 1.0) for way in ("left", "right", "forward")]
RING_TURNS = [Motion("turn left", 90.0), Motion("turn right", 90.0), Motion("turn left", 180.0)]
WALKS = ("left", "right", "forward", "backward")
VISIBLE = 16  # pixels of 1,024: an object that counts as seen


def facts(ids, things):
    """What an instance map (H, W) shows, exactly: {ask: index of the object, None if ambiguous, -1 if there is none}.

    largest: at least 1.3 times the pixels of the next.  leftmost, rightmost: centroids at least 3 of 32 columns
    apart.  left, centre, right: most pixels of that third, at least 2 % of the view and 1.5 times the next.
    """
    width = ids.shape[1]
    per_column = np.stack([(ids == i + 1).sum(0) for i in range(things)])  # (things, W)
    scale = width**2 / 1024
    pixels = per_column.sum(1)
    seen = np.flatnonzero(pixels >= VISIBLE * scale)
    if len(seen) == 0:
        return {ask: -1 for ask in ASKS} | {"seen": []}

    def winner(scores, margin):
        order = seen[np.argsort(-scores[seen], kind="stable")]
        return (
            int(order[0]) if len(order) == 1 or margin(scores[order[0]], scores[order[1]]) else None
        )

    column = (per_column * np.arange(width)).sum(1) / np.maximum(pixels, 1) * 32 / width
    found = {
        "largest": winner(pixels, lambda a, b: a >= 1.3 * b),
        "leftmost": winner(-column, lambda a, b: a - b >= 3),
        "rightmost": winner(column, lambda a, b: a - b >= 3),
    }
    cuts = [0, width // 3, width - width // 3, width]
    for k, third in enumerate(("left", "centre", "right")):
        inside = per_column[:, cuts[k] : cuts[k + 1]].sum(1)
        best = winner(inside, lambda a, b: a >= 1.5 * b)
        found[third] = (
            -1
            if inside.max() < 6 * scale
            else best
            if best is None or inside[best] >= 20 * scale
            else None
        )
    return found | {"seen": seen.tolist()}


def choose(rng, letter, answer, others):
    """Four lettered options, the answer at `letter` (0 to 3), the others in random order."""
    options = [others[i] for i in rng.permutation(3)]
    options.insert(letter, answer)
    return [f"{name}. {option}" for name, option in zip("ABCD", options)]


def distractors(rng, room, found, ask):
    """Three other objects of the room: up to two that the asked view shows as well, then others.

    Objects are called by their colour alone: the kind tells the size (a cabinet is more often the largest than a
    ball), and the question would be half answered by its text.
    """
    others = [i for i in rng.permutation(len(room.things)).tolist() if i != found[ask]]
    visible = [i for i in others if i in found["seen"]][:2]
    return [room.things[i].colour for i in (visible + [i for i in others if i not in visible])[:3]]


def room_questions(seed, out, per_kind=2):
    """Questions about one room: `per_kind` that need an unseen view, and as many that the given views answer.

    Of the latter, one in six asks for the camera's way between two views at different places (camera-camera), one
    in six for a turn that ends at a given view (rotation), the others about one image. Beside the published fields a
    row holds what only a room can know, for the cold start and for diagnosis, never shown to a policy in a question:
    `view`, the true view that `command` leads to, and `shows`, the facts of every image and last of that view.
    """
    rng = numpy_stream("questions of a room", seed)
    room, poses = random_room(seed), ring(rng)
    views = render(room, np.stack(poses), SIZE)
    given = [facts(ids, len(room.things)) for ids in views["ids"]]
    rows, letters = (
        [],
        rng.permutation(2 * per_kind) % 4,
    )  # each letter as often as any other, in every room
    for i in range(2 * per_kind):
        form = (
            "unseen"
            if i < per_kind
            else rng.choice(["image", "rotation", "camera"], p=[4 / 6, 1 / 6, 1 / 6])
        )
        draft = (
            camera_question(rng, poses)
            if form == "camera"
            else object_question(rng, room, poses, given, form)
        )
        if draft is None:  # a bare room: nothing clear to ask
            continue
        motion, cameras = draft["motion"], draft.pop("cameras", poses)
        command = motion or {"image": draft["shown_by"] or 1, "kind": "turn left", "amount": 45.0}
        target = move_camera(
            cameras[command["image"] - 1], Motion(command["kind"], command["amount"])
        )
        truth = render(room, np.stack([*cameras, target]), SIZE)
        own = (
            f"q{i}_" if form == "camera" else ""
        )  # the four views of the ring are shared by its questions
        images = [f"questions/{seed:07d}/{own}{k + 1}.png" for k in range(len(cameras))]
        view = f"questions/{seed:07d}/q{i}_view.png"
        for path, rgb in zip([*images, view], truth["rgb"]):
            save_image(out / path, rgb)
        answer, others = draft.pop("answer"), draft.pop("others")
        rows.append(
            {
                "id": f"room_{seed}_{i}",
                "bench": "rooms",
                "images": images,
                **draft,
                "kind": "mca",
                "options": choose(rng, letters[i], answer, others),
                "answer": "ABCD"[letters[i]],
                "scene": {"room": seed, "poses": [as_lists(camera) for camera in cameras]},
                "command": command,
                "view": view,
                "shows": [named(facts(ids, len(room.things)), room) for ids in truth["ids"]],
            }
        )
    return rows


def object_question(rng, room, poses, given, form):
    """A question about objects: "unseen" (after a motion that leads to a view not given), "rotation" or "image"."""
    for _ in range(40):
        k, ask = int(rng.integers(4)), draw_ask(rng)
        motion = {"unseen": UNSEEN, "rotation": RING_TURNS, "image": [None]}[form]
        motion, shown = motion[rng.integers(len(motion))], None
        if form == "unseen":  # clear, and other than the reference image itself would say
            there = facts(
                render(room, move_camera(poses[k], motion), SIZE, supersample=1)["ids"][0],
                len(room.things),
            )
            if given[k][ask] is None or there[ask] == given[k][ask]:
                continue
        else:
            turns = (
                0
                if form == "image"
                else int(motion.amount) // 90 * (1 if motion.kind == "turn left" else -1)
            )
            shown = (k + turns) % 4
            there = given[shown]
        if usable(there, ask):
            start = (
                f"Start from Image-{k + 1} and {phrase(motion)}. Then"
                if motion
                else f"In Image-{k + 1},"
            )
            return {
                "question": f"{start} {ASKS[ask]}",
                "category": "rotation" if form == "rotation" else CATEGORY[ask],
                "needs_view": form == "unseen",
                "ask": ask,
                "shown_by": None if shown is None else shown + 1,
                "motion": motion and {"image": k + 1, "kind": motion.kind, "amount": motion.amount},
                "answer": room.things[there[ask]].colour,
                "others": distractors(rng, room, there, ask),
            }


def camera_question(rng, poses):
    """Two views that look the same way from places 1 m apart: which way did the camera go?"""
    way, k = WALKS[rng.integers(4)], int(rng.integers(4))
    say = {w: f"it moved {'to the ' if w in ('left', 'right') else ''}{w}" for w in WALKS}
    return {
        "question": "How did the camera get from Image-1 to Image-2?",
        "category": "camera-camera",
        "needs_view": False,
        "ask": None,
        "shown_by": None,
        "motion": None,
        "answer": say[way],
        "others": [say[w] for w in WALKS if w != way],
        "cameras": [poses[k], move_camera(poses[k], Motion(f"move {way}", 1.0))],
    }


def named(found, room):
    """Facts with objects called by their colour: {ask: "red", "none", or None where it is unclear}."""
    colours = {i: thing.colour for i, thing in enumerate(room.things)} | {-1: "none", None: None}
    return {ask: colours[found[ask]] for ask in ASKS}


def draw_ask(rng):
    """A third each for camera-object, object-object and region."""
    return str(rng.choice(list(ASKS), p=[1 / 3, 1 / 6, 1 / 6, 1 / 9, 1 / 9, 1 / 9]))


def usable(found, ask):
    """A question is asked where its answer is clear, and a comparison only where there is something to compare."""
    return (
        found[ask] is not None
        and found[ask] >= 0
        and (CATEGORY[ask] == "region" or len(found["seen"]) >= 2)
    )


# ---- what a question's text gives away -------------------------------------------------------------------------------


def text_features(question):
    """What the text tells of each option, a list of strings per option: letter, words, and these given the question."""
    template = re.sub(r"\d+(\.\d+)?", "#", question["question"])
    texts = [option.split(". ", 1)[1] for option in question["options"]]
    words = [(text.split()[0], text.split()[-1]) for text in texts]  # in rooms: colour and kind
    rows = []
    for place, (text, own) in enumerate(zip(texts, words)):
        alike = [sum(word in other for other in words) for word in own]
        facts = ["ABCDEF"[place], text, *own, f"alike {alike}", f"rank {sorted(texts).index(text)}"]
        rows.append(
            facts
            + [f"{given} | {fact}" for given in (template, question["question"]) for fact in facts]
        )
    return rows


def text_only_chance(questions_train, questions_test, epochs=12):
    """The best accuracy that the text alone allows, of several blind rules fitted on the training questions.

    The rules: the commonest letter; the commonest letter given the question; the option that was the answer most often
    when offered, given the question or its template; a linear model of all `text_features`. Near 1 / number of options
    if no question gives itself away (the best of several is a little above).
    """
    train, test = (
        ([text_features(q) for q in part], ["ABCDEF".index(q["answer"]) for q in part])
        for part in (questions_train, questions_test)
    )
    offered, right = Counter(), Counter()
    for rows, gold in zip(*train):
        for place, row in enumerate(rows):
            offered.update(row)
            right.update(row if place == gold else ())

    def share(feature):  # how often an option with this feature was the answer
        return (right[feature] + 1) / (offered[feature] + 4)

    width = len(train[0][0][0]) // 3  # features alone, given the template, given the question
    rules = [
        lambda row, k=k: share(row[k]) for k in (0, width, 2 * width, 1, width + 1, 2 * width + 1)
    ]
    index = {feature: i for i, feature in enumerate(offered)}
    weights = np.zeros(len(index) + 1)  # the last one is every unknown feature: never learned
    coded = [
        [
            np.array([[index.get(feature, -1) for feature in row] for row in rows])
            for rows in part[0]
        ]
        for part in (train, test)
    ]  # (options, features) per question
    for epoch in range(epochs):  # conditional logit by stochastic gradient descent
        for q in numpy_stream("text guess", epoch).permutation(len(coded[0])):
            rows = coded[0][q]
            odds = np.exp(weights[rows].sum(1) - weights[rows].sum(1).max())
            slope = (np.arange(len(rows)) == train[1][q]) - odds / odds.sum()
            np.add.at(weights, rows, 0.05 / (1 + epoch) * slope[:, None])
            weights[-1] = 0
    guesses = [[int(np.argmax([rule(row) for row in rows])) for rows in test[0]] for rule in rules]
    guesses.append([int(weights[rows].sum(1).argmax()) for rows in coded[1]])
    return max(float(np.mean(np.array(guess) == test[1])) for guess in guesses)
