"""
Search and gate: two ways to imagine at test time without training, baselines of a policy that has learned to call.

  search   MindJourney: a beam search over imagined trajectories, whose views the policy scores
  gate     AVIC (arXiv 2602.08236): the policy votes first on whether the images suffice, then on how much to imagine

Both grow a tree of paths per question. A path is (image, Motion, …): where it starts and what the camera does;
neighbouring motions of one kind are one. Every view is imagined from the original image along its whole path. A
simulator takes one motion per call, so longer paths are chained; seeds belong to paths, so the views on the way are the
same every time and are kept. A node is the dialogue in which the policy calls for exactly this path.

How a policy judges (`way_of`):
  words        a model that follows instructions writes scores and plans. The prompts are in our own words
  confidence   the tiny policy cannot. A view's score is 9 times the probability of the turn in which the policy then
               answers (0 if that names no option), for both of MindJourney's scores. The gate takes what the first
               turn of an ordinary dialogue does: a call is a plan, an answer a skip

Departures. No question is skipped: with more than two images too, it is searched from the image that its words name
first ("Start from Image-2 …"), else from Image-1. Images keep their size (there: short side 512). Scores that cannot
be read are asked for again at temperature 1 (greedily they would be the same), and no view is scored twice. Views on
the way to a chained one are shown with it. The answer is read by the rules of the bench, not by substring. A call of
the tiny policy is one atom: its simulator was trained on it; and it was taught dialogues with one imagined view, so it
is shown the most helpful one of all steps (of several it reads the first: 54 of 56 answers). Primitives for the tiny
simulator: SPACES["rooms"]. Both methods ask in our own words on every bench but MMSI-Video-Bench, as modes direct and
agentic do.
"""

import copy
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from extras.remote.client import RemotePolicy, converse
from extras.world2vlm.transitions import cut
from lib.answers import option_letter
from lib.dialogue import Trajectory
from lib.geometry import KINDS, Motion, phrase
from lib.images import load_image
from lib.protocol import LIMITS
from lib.simulators import SimulatorError, imagine_each
from lib.streams import numpy_stream, stream_seed
from policy import encode_images, rollout, write_turns

STEPS, BEAMS = 3, 2  # MindJourney's code with Stable Virtual Camera; so are the next three
EXPLORE = HELP = 8  # of 9: from here on a view becomes a beam, or evidence
RETRIES = 5  # of scores that cannot be read; then random 0 to 5, so that nothing passes
SAMPLES, PLANS, ATOMS = 5, 5, 6  # AVIC, as published: votes, distinct plans, views of a plan
TURNS = 10  # until an answer, as in policy.rollout
OPPOSITE = {
    "turn left": "turn right",
    "turn right": "turn left",
    "move left": "move right",
    "move right": "move left",
}


class Space(NamedTuple):
    """What a step may add to a path."""

    primitives: tuple  # of Motion
    every: dict  # unit -> interval between the views of a primitive; an atom of a plan
    most: dict  # unit -> the sum that repeating a kind may reach
    evidence: int  # views that a step may add


SPACES = {
    "mindjourney": Space(
        (Motion("move forward", 0.75), Motion("turn left", 27.0), Motion("turn right", 27.0)),
        {"meters": 0.25, "degrees": 9.0},
        {"meters": 1.5, "degrees": 60.0},
        18,
    ),
    # The tiny simulator was trained on turns by 45, 90, 135 degrees and moves by 0.5 and 1 m, sideways too
    # (data.MOTIONS): each is a view of one primitive. Evidence: three in all, and the views on the way to them.
    "rooms": Space(
        (
            *(Motion(f"move {way}", 1.0) for way in ("forward", "left", "right")),
            Motion("turn left", 135.0),
            Motion("turn right", 135.0),
        ),
        {"meters": 0.5, "degrees": 45.0},
        {"meters": 1.0, "degrees": 135.0},
        1,
    ),
}


# ---- paths ----------------------------------------------------------------------------------------------------------


def along(path, program, every=None):
    """Where a program of Motions leads from `path`: a path per interval (None: per motion)."""
    found = []
    for piece in cut(program, every):
        last = path[-1]
        if isinstance(last, Motion) and last.kind == piece.kind:
            path, piece = path[:-1], Motion(piece.kind, round(last.amount + piece.amount, 6))
        path = (*path, piece)
        found.append(path)
    return found


def expand(path, space):
    """The candidates of one step from `path`: not straight back, and no repetition beyond the bound."""
    last, found = path[-1], []
    for motion in space.primitives:
        repeats = isinstance(last, Motion) and last.kind == motion.kind
        back = isinstance(last, Motion) and last.kind == OPPOSITE.get(motion.kind)
        if not back and not (
            repeats and last.amount + motion.amount > space.most[motion.unit] + 1e-6
        ):
            found += along(path, [motion], space.every)
    return found


def told(path):
    """A path in words: "from Image-1: turn left 27 degrees, and then move 0.5 meters forward"."""
    return f"from Image-{path[0]}: {', and then '.join(map(phrase, path[1:]))}"


def order(path):
    """Views are shown by kind and magnitude, and the beginning of a path before the path."""
    return path[0], [(KINDS.index(motion.kind), motion.amount) for motion in path[1:]]


def best(scores, threshold, most):
    """Of {path: score} at most `most` paths with at least `threshold`, best first; of equals the earlier one."""
    return sorted(
        (path for path in scores if scores[path] >= threshold), key=lambda path: -scores[path]
    )[:most]


def standpoint(question, images):
    """The number of the image that a question's words name first; 1 if they name none that there is."""
    named = re.search(r"image[- ]?(\d+)", question["question"], re.IGNORECASE)
    return int(named[1]) if named and 1 <= int(named[1]) <= images else 1


# ---- a question's tree ----------------------------------------------------------------------------------------------


@dataclass
class Imagined(Trajectory):
    """A dialogue whose calls were made for the policy; `cost` is one account, shared by all forks."""

    cost: Counter = field(default_factory=Counter)


class Run(NamedTuple):
    """What all questions have in common: the arguments of `search` and `gate`."""

    policy: object
    simulator: object
    seed: int
    space: Space
    limit: int
    rows: int


class Tree:
    """What was imagined for one question, {path: the dialogue that ends with its view}, and the error that ended it."""

    def __init__(self, policy, question):
        images = [load_image(image) for image in question["images"]]
        self.question, self.name, self.error = (
            question,
            question.get("id", question["question"]),
            None,
        )
        self.root = Imagined.start(policy, question, images, "agentic", max_rounds=10**6)
        self.nodes = {(number,): self.root for number in range(1, len(images) + 1)}
        self.start, self.cost = (standpoint(question, len(images)),), self.root.cost

    def charge(self, dialogue):
        """Book what the policy said and read in a dialogue of its own."""
        self.cost.update(policy_calls=len(dialogue.turns), tokens=len(dialogue.ids))

    def dialogue(self, policy, paths):
        """The dialogue in which the policy has asked for all these views, and for what they begin with."""
        dialogue, numbers = (
            self.root.fork(),
            {(number,): number for number in range(1, len(self.root.images) + 1)},
        )
        for path in sorted(
            {path[:n] for path in paths for n in range(2, len(path) + 1)}, key=order
        ):
            dialogue.say(policy, call_turn(numbers[path[:-1]], path[-1]))
            dialogue.observe(policy, image=self.nodes[path].images[-1])
            numbers[path] = len(dialogue.images)
        return dialogue


def call_turn(image, motion):
    """The policy's turn that calls for a motion, token by token as train_sft.py teaches it."""
    return (
        f'<think>I need to see it.</think><tool_call>{{"name": "imagine", "arguments": {{"image": {image}, '
        f'"motion": "{motion.kind}", "amount": {motion.amount:g}}}}}</tool_call>'
    )


def imagine(run, wanted):
    """Add nodes to trees, {tree: paths}; what is refused stays out. All views of one depth are one batch."""
    for length in sorted({len(path) for paths in wanted.values() for path in paths}):
        level = [
            (tree, path)
            for tree, paths in wanted.items()
            for path in dict.fromkeys(paths)
            if len(path) == length
            and path[:-1] in tree.nodes
            and path not in tree.nodes
            and not tree.error
        ]
        dialogues = [tree.nodes[path[:-1]].fork() for tree, path in level]
        for (_, path), dialogue in zip(level, dialogues):
            dialogue.say(
                run.policy, call_turn(path[0] if length == 2 else len(dialogue.images), path[-1])
            )
        queries = [
            dialogue.query(stream_seed("imagine", run.seed, tree.name, told(path)))
            for (tree, path), dialogue in zip(level, dialogues)
        ]
        try:
            views = imagine_each(run.simulator, queries) if run.simulator else [None] * len(level)
        except SimulatorError as error:  # the simulator is down
            views = error.results or [error] * len(level)
        for (tree, path), dialogue, view in zip(level, dialogues, views):
            if isinstance(view, SimulatorError):
                tree.error = view if view.down else tree.error
            elif view is not None:
                dialogue.observe(run.policy, image=view)
                tree.nodes[path] = dialogue
                tree.cost["rendered"] += 1


# ---- what the policy says -------------------------------------------------------------------------------------------


def way_of(policy):
    """How this policy judges: "confidence" if it is a tiny one (`lib.tiny.stamp`), else "words"."""
    return (
        "confidence"
        if not isinstance(policy, RemotePolicy) and policy.images.get("stamped")
        else "words"
    )


def write(run, dialogues, turns):
    """Let a local policy go on with dialogues, greedily, `turns` turns at most; nothing more is imagined."""
    for start in range(0, len(dialogues), run.rows):
        part = dialogues[start : start + run.rows]
        encode_images(run.policy, part)
        before = [len(dialogue.turns) for dialogue in part]
        write_turns(run.policy, part, torch.zeros(len(part), turns, run.limit, dtype=torch.float64))
        for dialogue, made in zip(part, before):
            dialogue.cost.update(policy_calls=len(dialogue.turns) - made, tokens=len(dialogue.ids))


def confidence(run, dialogues):
    """9 times the probability of each dialogue's next turn, if that answers with an option; else 0."""
    forks, scores = [dialogue.fork() for dialogue in dialogues], []
    write(run, forks, 1)
    for dialogue, fork in zip(dialogues, forks):
        options = fork.question.get("options") or ()
        letters = [option[0] for option in options]
        named = fork.answer is not None and (
            not options or option_letter(fork.answer, options) in letters
        )
        scores.append(9.0 * named * float(np.exp(sum(fork.logprobs[len(dialogue.ids) :]))))
    return scores


def ask(run, trees, sheets, temperature=0.0, seed=0):
    """A reply to each `sheet` (about trees[k] each), None where there is none: the tree then holds the error."""
    rows = [
        {"id": f"{tree.name}, {name}", "question": name, "prompt": texts, "images": images}
        for tree, (name, texts, images) in zip(trees, sheets)
    ]
    if isinstance(run.policy, RemotePolicy):
        policy = copy.copy(run.policy)
        policy.temperature = temperature or policy.temperature
        replies = held(policy, rows, seed)
    else:
        replies = rollout(
            run.policy,
            rows,
            None,
            "direct",
            temperature=temperature,
            seed=seed,
            max_turns=1,
            max_new_tokens=run.limit,
            rows=run.rows,
        )
    for tree, answer in zip(trees, replies):
        if isinstance(answer, SimulatorError):
            tree.error = answer
        else:
            tree.charge(answer)
    return [None if isinstance(answer, SimulatorError) else answer.turns[-1] for answer in replies]


def held(policy, rows, seed):
    """`converse` without a tool; if the server is down, SimulatorErrors stand in the list."""
    try:
        return converse(policy, rows, None, "direct", seed)
    except SimulatorError as error:
        return error.results


SCORE = (
    "Give each {thing} a whole number from 0 (not at all) to 9 (very much), in this order. End with one line: "
    "Output: and the {count} numbers, separated by commas."
)
TASKS = {
    "explore": "How suitable is each imagined view to explore further from, in order to answer the question?",
    "help": "How useful is each imagined view for answering the question? Excluding a wrong answer is useful too. A "
    "view of poor quality is less so.",
    "verify": "How good is each of these plans: {plans}? Their views should be sharp, agree with each other and show "
    "what the given images do not; what is known already is of no use.",
    "gate": "Before you answer you may have views imagined along a way of the camera that starts at Image-{image}. "
    "Decide first whether the given images suffice: a needless view costs time and may mislead. Say in one "
    "sentence of at most 25 words what is missing. Then write JSON: "
    '{{"decision": "skip", "actions": []}} or '
    '{{"decision": "call_wm", "actions": [{{"type": "turn-left", "value": 30}}, ...]}}. '
    "The types are {types}; values are meters (move) or degrees (turn).",
}


def sheet(tree, paths, name, task):
    """A question with the views of some paths, and a task -> (name, texts before each image and at the end, images)."""
    images = [*tree.root.images, *(tree.nodes[path].images[-1] for path in paths)]
    texts = [
        "A question about a scene. Its images:\n",
        *["\n"] * (len(tree.root.images) - 1),
        *(f"\nImagined {told(path)}\n" for path in paths),
    ]
    asked = "\n".join([tree.question["question"], *(tree.question.get("options") or ())])
    return name, [*texts[: len(images)], f"\n\n{asked}\n\n{task}"], images


def read_scores(text, count):
    """The `count` integers from 0 to 9 behind the last "Output:", or None."""
    _, marker, numbers = (text or "").rpartition("Output:")
    numbers = numbers.strip(" \n*[].`").split(",") if marker else []
    scores = [int(number) for number in numbers if re.fullmatch(r"\s*[0-9]\s*", number)]
    return scores if len(scores) == len(numbers) == count else None


def rate(run, trees, sheets, counts):
    """Ask for counts[k] scores on each sheet until they can be read; random ones from 0 to 5 in the end."""
    scores = [None] * len(sheets)
    for attempt in range(1 + RETRIES):
        left = [k for k, tree in enumerate(trees) if scores[k] is None and not tree.error]
        texts = (
            ask(
                run,
                [trees[k] for k in left],
                [sheets[k] for k in left],
                float(attempt > 0),
                stream_seed("scores", run.seed, attempt),
            )
            if left
            else []
        )
        for k, text in zip(left, texts):
            scores[k] = read_scores(text, counts[k])
    return [
        numpy_stream("scores", run.seed, tree.name, name).integers(0, 6, count).tolist()
        if found is None
        else found
        for tree, (name, *_), count, found in zip(trees, sheets, counts, scores)
    ]


def judge(run, fresh, step):
    """{tree: paths} -> per tree ({path: explore}, {path: help})."""
    if way_of(run.policy) == "confidence":
        scores = iter(
            confidence(run, [tree.nodes[path] for tree, paths in fresh.items() for path in paths])
        )
        return [
            (own, own)
            for own in [{path: next(scores) for path in paths} for paths in fresh.values()]
        ]
    both = []
    for task in ("explore", "help"):
        sheets = [
            sheet(
                tree,
                paths,
                f"{task}, step {step}",
                f"{TASKS[task]} {SCORE.format(thing='view', count=len(paths))}",
            )
            for tree, paths in fresh.items()
        ]
        scores = rate(run, list(fresh), sheets, list(map(len, fresh.values())))
        both.append([dict(zip(paths, own)) for paths, own in zip(fresh.values(), scores)])
    return list(zip(*both))


# ---- the answer -----------------------------------------------------------------------------------------------------


def answers(run, evidence, mode):
    """Answer every question from its images and the views of {tree: paths} -> the result of `search`."""
    dialogues = {
        tree: tree.dialogue(run.policy, paths) for tree, paths in evidence.items() if not tree.error
    }
    for tree, dialogue in dialogues.items():
        tree.cost["shown"] += dialogue.valid_calls
        dialogue.max_rounds = dialogue.valid_calls  # a further call is refused
        if not dialogue.valid_calls and not isinstance(
            run.policy, RemotePolicy
        ):  # nothing to say about a tool
            dialogues[tree] = Imagined.start(run.policy, tree.question, tree.root.images, "direct")
            dialogues[tree].cost = tree.cost
    if isinstance(run.policy, RemotePolicy):
        replies = held(
            run.policy,
            [shown_at_once(tree, dialogue) for tree, dialogue in dialogues.items()],
            run.seed,
        )
        for (tree, dialogue), answer in zip(dialogues.items(), replies):
            if isinstance(answer, SimulatorError):
                tree.error = answer
                continue
            tree.charge(answer)
            for name in ("turns", "replies", "invalid_calls", "unreadable"):
                setattr(dialogue, name, getattr(dialogue, name) + getattr(answer, name))
            dialogue.answer, dialogue.truncated = answer.answer, answer.truncated
    else:
        write(run, list(dialogues.values()), TURNS)
    for dialogue in dialogues.values():
        dialogue.mode = mode
    results = [tree.error or dialogues[tree] for tree in evidence]
    down = next((tree.error for tree in evidence if tree.error and tree.error.down), None)
    if down:
        raise SimulatorError(str(down), True, results)
    return results


def shown_at_once(tree, dialogue):
    """The question for a remote policy, which is shown all views in one message and told where they come from."""
    question, given, ways = tree.question, len(tree.root.images), []
    for number in range(given + 1, len(dialogue.images) + 1):
        program = []
        while call := dialogue.provenance[number - 1]:
            program, number = [Motion(call["motion"], call["amount"]), *program], call["image"]
        ways.append(told((number, *program)))
    row = {**question, "images": dialogue.images}
    if question.get("prompt"):  # a bench's own words
        return row | {
            "prompt": [
                *question["prompt"][:-1],
                *(f"\nImagined {way}\n" for way in ways),
                question["prompt"][-1],
            ]
        }
    views = "".join(
        f"Image-{number} is imagined {way}.\n" for number, way in enumerate(ways, given + 1)
    )
    return row | {"question": f"{views}{question['question']}"}


# ---- the two methods ------------------------------------------------------------------------------------------------


def search(
    policy, questions, simulator, seed=0, space=SPACES["mindjourney"], max_new_tokens=256, rows=64
):
    """MindJourney: imagine around the current view in STEPS steps, show what helps, answer.

    questions   rows with "images" as paths or arrays;  simulator: anything with imagine(queries), or None
    space       of SPACES;  rows: dialogues written together, memory and speed only
    returns     an Imagined per question, of mode "search": its calls are the views that were shown
    raises      SimulatorError if a server is down, its `results` the list so far. What one request alone was refused for
                stands in the list as a SimulatorError
    """
    run = Run(policy, simulator, seed, space, max_new_tokens, rows)
    evidence = {Tree(policy, question): {} for question in questions}  # {path: help}
    beams = {tree: [tree.start] for tree in evidence}
    for step in range(1, 1 + STEPS):
        fresh = {
            tree: [
                path
                for beam in beams[tree]
                for path in expand(beam, space)
                if path not in tree.nodes
            ]
            for tree in beams
        }
        imagine(run, fresh)
        fresh = {
            tree: [path for path in dict.fromkeys(paths) if path in tree.nodes]
            for tree, paths in fresh.items()
        }
        fresh = {tree: paths for tree, paths in fresh.items() if paths and not tree.error}
        beams = {}
        for (tree, _), (explore, helps) in zip(fresh.items(), judge(run, fresh, step)):
            beams[tree] = best(explore, EXPLORE, BEAMS)
            evidence[tree] |= {path: helps[path] for path in best(helps, HELP, space.evidence)}
    shown = 1 if way_of(policy) == "confidence" else STEPS * space.evidence
    return answers(
        run, {tree: best(helps, HELP, shown) for tree, helps in evidence.items()}, "search"
    )


def gate(
    policy, questions, simulator, seed=0, space=SPACES["mindjourney"], max_new_tokens=256, rows=64
):
    """AVIC without training: vote on whether to imagine, and along which plan. As `search`; the mode is "gate"."""
    run = Run(policy, simulator, seed, space, max_new_tokens, rows)
    trees, tiny = [Tree(policy, question) for question in questions], way_of(policy) == "confidence"
    votes = sampled_turns(run, trees) if tiny else sampled_plans(run, trees)
    plans = {
        tree: list(
            map(
                list,
                dict.fromkeys(
                    tuple(along(plan[:1], plan[1:], None if tiny else space.every)[:ATOMS])
                    for plan in elect(own)
                ),
            )
        )
        for tree, own in zip(trees, votes)
    }
    imagine(run, {tree: sum(own, []) for tree, own in plans.items()})
    plans = {
        tree: [[path for path in plan if path in tree.nodes] for plan in own]
        for tree, own in plans.items()
    }
    plans = {
        tree: [plan for plan in own if plan] for tree, own in plans.items()
    }  # without what was refused
    several = {tree: own for tree, own in plans.items() if len(own) > 1 and not tree.error}
    for tree, scores in zip(several, verify(run, several)):
        plans[tree] = [plans[tree][int(np.argmax(scores))]]
    return answers(run, {tree: own[0] if own else [] for tree, own in plans.items()}, "gate")


def sampled_turns(run, trees):
    """What SAMPLES first turns of ordinary dialogues do: plans as paths, () to skip, None if neither."""
    turns = rollout(
        run.policy,
        [tree.question for tree in trees],
        None,
        "agentic",
        SAMPLES,
        1.0,
        run.seed,
        max_turns=1,
        max_new_tokens=run.limit,
        rows=run.rows,
    )
    votes = [[] for _ in trees]
    for place, turn in enumerate(turns):
        trees[place // SAMPLES].charge(turn)
        plan = turn.call and (turn.call["image"], Motion(turn.call["motion"], turn.call["amount"]))
        votes[place // SAMPLES].append(plan or (() if turn.answer is not None else None))
    return votes


def sampled_plans(run, trees):
    """SAMPLES replies to the gate's prompt, as `sampled_turns`."""
    kinds = dict.fromkeys(motion.kind for motion in run.space.primitives)
    types = ", ".join(kind.replace(" ", "-") for kind in kinds)
    asked = [tree for tree in trees for _ in range(SAMPLES)]
    sheets = [
        sheet(
            tree, [], f"vote {k % SAMPLES}", TASKS["gate"].format(image=tree.start[0], types=types)
        )
        for k, tree in enumerate(asked)
    ]
    plans = [
        read_plan(text, tree.start, kinds)
        for tree, text in zip(asked, ask(run, asked, sheets, 1.0, run.seed))
    ]
    return [plans[k : k + SAMPLES] for k in range(0, len(plans), SAMPLES)]


def read_plan(text, start, kinds):
    """The last JSON with a decision in a reply -> the path that it plans, () to skip, None if it cannot be read.

    kinds   of motions that may be planned
    """
    found = {}
    for brace in re.finditer("{", text or ""):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, brace.start())
        except (ValueError, RecursionError):
            continue
        found = value if "decision" in value else found
    if found.get("decision") == "skip":
        return ()
    try:
        steps = [(action["type"].replace("-", " "), action["value"]) for action in found["actions"]]
        plan = [Motion(kind, float(value)) for kind, value in steps if type(value) in (int, float)]
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        return None
    fits = found.get("decision") == "call_wm" and len(plan) == len(steps) and plan
    return (
        (*start, *plan)
        if fits
        and all(motion.kind in kinds and motion.amount <= LIMITS[motion.unit] for motion in plan)
        else None
    )


def elect(votes):
    """Votes (plans, () to skip, None) -> the distinct plans, most votes first; [] without a strict majority."""
    calls = Counter(vote for vote in votes if vote)
    return [plan for plan, _ in calls.most_common(PLANS)] if calls.total() > votes.count(()) else []


def verify(run, several):
    """{tree: plans, each its views} -> a score per plan."""
    if way_of(run.policy) == "confidence":
        ends = [tree.dialogue(run.policy, plan) for tree, own in several.items() for plan in own]
        scores = iter(confidence(run, ends))
        return [[next(scores) for _ in own] for own in several.values()]
    sheets = []
    for tree, own in several.items():
        task = TASKS["verify"].format(plans="; ".join(told(plan[-1]) for plan in own))
        sheets.append(
            sheet(
                tree,
                list(dict.fromkeys(sum(own, []))),
                "verify",
                f"{task} {SCORE.format(thing='plan', count=len(own))}",
            )
        )
    return rate(run, list(several), sheets, list(map(len, several.values())))


METHODS = {"search": search, "gate": gate}
