"""
Search and gate: two ways to imagine at test time without training, baselines of a policy that has learned to call.

  search   MindJourney: a beam search over imagined trajectories, whose views the policy scores
  gate     AVIC (arXiv 2602.08236): the policy votes first on whether the images suffice, then on how much to imagine

Both grow a tree of paths per question. A path is (image, Motion, ...): where it starts and what the camera does;
neighbouring motions of one kind are one. Every view is imagined from the original image along its whole path. A
simulator takes one motion per call, so longer paths are chained; seeds belong to paths, so the views on the way are the
same every time and are not imagined again. A node is the dialogue in which the policy calls for exactly this path.

The policy is a served one (extras/remote/client.py): it writes scores and plans, so it has to follow instructions. The
prompts are our own words.

Departures. No question is skipped: with more than two images too, it is searched from the image that its words name
first ("Start from Image-2 ..."), else from Image-1. Images keep their size (there: short side 512). Scores that cannot
be read are asked for again at temperature 1 (greedily they would be the same), and no view is scored twice. Views on
the way to a chained one are shown with it. The answer is read by the rules of the bench, not by substring. Both ask in
our own words on every bench but MMSI-Video-Bench, as modes direct and agentic do.
"""

import copy
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from extras.remote.client import RemotePolicy, converse
from lib.dialogue import Trajectory
from lib.distributed import fail
from lib.geometry import KINDS, UNITS, Motion
from lib.images import load_image
from lib.protocol import LIMITS, call_of, call_text, motion_in
from lib.simulators import SimulatorError, imagine_each, phrase
from lib.streams import numpy_stream, stream_seed

# MindJourney's code with Stable Virtual Camera
STEPS = 3
BEAMS = 2
THRESHOLD = 8  # of 9: from here on a view becomes a beam, or evidence
EVIDENCE = 18  # views that a step may add
PRIMITIVES = (Motion("dy", 0.75), Motion("dangle", -27.0), Motion("dangle", 27.0))
INTERVAL = {"meters": 0.25, "degrees": 9.0}  # between the views of a primitive; an atom of a plan
MOST = {"meters": 1.5, "degrees": 60.0}  # what repeating a motion may add up to
TYPES = {
    "move-forward": ("dy", 1),
    "turn-left": ("dangle", -1),
    "turn-right": ("dangle", 1),
}  # AVIC's words
RETRIES = 5  # of scores that cannot be read; then random 0 to 5, so that nothing passes
# AVIC, as published
SAMPLES = 5  # votes
PLANS = 5  # distinct ones
ATOMS = 6  # views of a plan

Path = tuple  # (image number, Motion, Motion, ...)


# ---- paths ---------------------------------------------------------------------------------------------------------


def extend(path: Path, motion: Motion) -> Path:
    """One more motion; where the last one goes the same way, it grows."""
    last = path[-1]
    if isinstance(last, Motion) and last.way == motion.way:
        return (*path[:-1], Motion(motion.kind, round(last.amount + motion.amount, 6)))
    return (*path, motion)


def waypoints(path: Path, program: list[Motion]) -> list[Path]:
    """Where a program of motions leads from `path`: a path per INTERVAL, the rest of a motion last."""
    paths = []
    for motion in program:
        sign = np.sign(motion.amount)
        left = abs(motion.amount)
        while left > 1e-6:
            amount = min(INTERVAL[motion.unit], left)
            left = round(left - amount, 6)
            path = extend(path, Motion(motion.kind, float(sign * amount)))
            paths.append(path)
    return paths


def expand(path: Path) -> list[Path]:
    """The candidates of one step from `path`: not straight back, and no repetition beyond MOST."""
    last, paths = path[-1], []
    for motion in PRIMITIVES:
        if isinstance(last, Motion) and last.kind == motion.kind:
            if last.way != motion.way:
                continue
            if abs(last.amount + motion.amount) > MOST[motion.unit] + 1e-6:
                continue
        paths += waypoints(path, [motion])
    return paths


def path_words(path: Path) -> str:
    """A path in words: "from Image-1: turn 27 degrees to the left, and then …"."""
    return f"from Image-{path[0]}: {', and then '.join(map(phrase, path[1:]))}"


def display_order(path: Path):
    """Sort key: views are shown by kind, way and magnitude, and the beginning of a path before the path."""
    order = path[:1]
    for motion in path[1:]:
        order += (KINDS.index(motion.kind), motion.amount > 0, abs(motion.amount))
    return order


def best(scores: dict[Path, float], most: int) -> list[Path]:
    """At most `most` paths with at least THRESHOLD, best first; of equals the earlier one."""
    good = [path for path, score in scores.items() if score >= THRESHOLD]
    return sorted(good, key=scores.get, reverse=True)[:most]


def first_image_named(question: dict, images: int) -> int:
    """The number of the image that a question's words name first; 1 if they name none that there is."""
    match = re.search(r"image[- ]?(\d+)", question["question"], re.IGNORECASE)
    number = int(match[1]) if match else 1
    return number if 1 <= number <= images else 1


# ---- a question's tree ---------------------------------------------------------------------------------------------


@dataclass
class Imagined(Trajectory):
    """A dialogue whose calls were made for the policy; `cost` is one account, shared by all forks."""

    cost: Counter = field(default_factory=Counter)


class Run(NamedTuple):
    """What all questions have in common: the arguments of `search` and `gate`."""

    policy: RemotePolicy
    simulator: object
    seed: int


class Tree:
    """What was imagined for one question, {path: the dialogue that ends with its view}, and the error that ended it."""

    def __init__(self, policy, question: dict):
        images = [load_image(image) for image in question["images"]]
        self.question = question
        self.name = question.get("id", question["question"])
        self.error = None
        self.root = Imagined.start(policy, question, images, "agentic")
        self.root.max_rounds = 10**6
        self.cost = self.root.cost
        self.start = (first_image_named(question, len(images)),)
        self.nodes = {(number,): self.root for number in range(1, len(images) + 1)}

    def view(self, path: Path) -> np.ndarray:
        """(H, W, 3) uint8 at the end of a path."""
        return self.nodes[path].images[-1]

    def dialogue(self, policy, paths: list[Path]) -> Imagined:
        """The dialogue in which the policy has asked for all these views, and for what they begin with."""
        prefixes = {path[:n] for path in paths for n in range(2, len(path) + 1)}
        dialogue = self.root.fork()
        numbers = {(number,): number for number in range(1, len(self.root.images) + 1)}
        for path in sorted(prefixes, key=display_order):
            dialogue.add_turn(policy, call_turn(numbers[path[:-1]], path[-1]))
            dialogue.observe(policy, image=self.view(path))
            numbers[path] = len(dialogue.images)
        return dialogue


def call_turn(image: int, motion: Motion) -> str:
    """The policy's turn that calls for a motion, token by token as train_sft.py teaches it."""
    return f"<think>I need to see it.</think>{call_text(call_of(image, motion))}"


def imagine(run: Run, wanted: dict[Tree, list[Path]]) -> None:
    """Add nodes to trees; what is refused stays out. All views of one depth are one batch."""
    longest = max((len(path) for paths in wanted.values() for path in paths), default=0)
    for length in range(2, longest + 1):
        level = []
        for tree, paths in wanted.items():
            for path in dict.fromkeys(paths):
                due = len(path) == length and path not in tree.nodes and not tree.error
                if due and path[:-1] in tree.nodes:
                    level.append((tree, path))
        imagine_level(run, level)


def imagine_level(run: Run, level: list[tuple[Tree, Path]]) -> None:
    """One batch of views, each one motion beyond a node of its tree."""
    dialogues, queries = [], []
    for tree, path in level:
        dialogue = tree.nodes[path[:-1]].fork()
        start = path[0] if len(path) == 2 else len(dialogue.images)
        dialogue.add_turn(run.policy, call_turn(start, path[-1]))
        seed = stream_seed("imagine", run.seed, tree.name, path_words(path))
        queries.append(dialogue.query(seed))
        dialogues.append(dialogue)
    try:
        views = imagine_each(run.simulator, queries) if run.simulator else [None] * len(level)
    except SimulatorError as error:  # the simulator is down
        views = error.results or [error] * len(level)
    for (tree, path), dialogue, view in zip(level, dialogues, views, strict=True):
        if isinstance(view, SimulatorError):
            tree.error = view if view.down else tree.error
        elif view is not None:
            dialogue.observe(run.policy, image=view)
            tree.nodes[path] = dialogue
            tree.cost["rendered"] += 1


# ---- what the policy says ------------------------------------------------------------------------------------------


def check_policy(policy) -> None:
    """End with a sentence where a policy is not a served one."""
    if not isinstance(policy, RemotePolicy):
        fail(
            "Modes search and gate ask a served policy for scores and plans in words: give --policy-url and --model."
        )


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


def sheet(tree: Tree, paths: list[Path], name: str, task: str) -> dict:
    """A row for `converse`: the question of a tree with the views of some paths, and a task of this name."""
    images = [*tree.root.images, *(tree.view(path) for path in paths)]
    texts = ["A question about a scene. Its images:\n"]
    texts += ["\n"] * (len(tree.root.images) - 1)
    texts += [f"\nImagined {path_words(path)}\n" for path in paths]
    words = "\n".join([tree.question["question"], *(tree.question.get("options") or ())])
    prompt = [*texts[: len(images)], f"\n\n{words}\n\n{task}"]  # before each image, and at the end
    id = f"{tree.name}, {name}"
    return {"id": id, "tree": tree, "question": name, "prompt": prompt, "images": images}


def ask(run: Run, sheets: list[dict], temperature: float = 0.0) -> list[str | None]:
    """A reply to each sheet, None where there is none: its tree then holds the error."""
    policy = copy.copy(run.policy)
    policy.temperature = temperature
    replies = converse_or_errors(policy, sheets)
    texts = []
    for one, reply in zip(sheets, replies, strict=True):
        if isinstance(reply, SimulatorError):
            one["tree"].error = reply
            texts.append(None)
        else:
            one["tree"].cost["policy_calls"] += len(reply.turns)
            texts.append(reply.turns[-1])
    return texts


def converse_or_errors(policy: RemotePolicy, rows: list[dict]) -> list:
    """`converse` without a tool; if the server is down, its errors stand in the list."""
    try:
        return converse(policy, rows, mode="direct")
    except SimulatorError as error:
        return error.results


def read_scores(text: str | None, count: int) -> list[int] | None:
    """The `count` integers from 0 to 9 behind the last "Output:", or None."""
    _, marker, numbers = (text or "").rpartition("Output:")
    numbers = numbers.strip(" \n*[].`").split(",") if marker else []
    scores = [int(number) for number in numbers if re.fullmatch(r"\s*[0-9]\s*", number)]
    return scores if len(scores) == len(numbers) == count else None


def rate(run: Run, sheets: list[dict], counts: list[int]) -> list[list[int]]:
    """Ask for counts[k] scores on each sheet until they can be read; random ones from 0 to 5 in the end."""
    scores = [None] * len(sheets)
    for attempt in range(1 + RETRIES):
        left = [k for k, one in enumerate(sheets) if scores[k] is None and not one["tree"].error]
        if not left:
            break
        texts = ask(run, [sheets[k] for k in left], float(attempt > 0))
        for k, text in zip(left, texts, strict=True):
            scores[k] = read_scores(text, counts[k])
    for k, one in enumerate(sheets):
        if scores[k] is None:
            rng = numpy_stream("scores", run.seed, one["id"])
            scores[k] = rng.integers(0, 6, counts[k]).tolist()
    return scores


def rate_views(run: Run, views: dict[Tree, list[Path]], name: str, step: int) -> dict[Tree, dict]:
    """{tree: {path: score}} of one task of a step, "explore" or "help"."""
    counts = [len(paths) for paths in views.values()]
    sheets = []
    for tree, paths in views.items():
        task = f"{TASKS[name]} {SCORE.format(thing='view', count=len(paths))}"
        sheets.append(sheet(tree, paths, f"{name}, step {step}", task))
    scores = rate(run, sheets, counts)
    return {
        tree: dict(zip(views[tree], own, strict=True))
        for tree, own in zip(views, scores, strict=True)
    }


# ---- the answer ----------------------------------------------------------------------------------------------------


def answer_all(run: Run, evidence: dict[Tree, list[Path]], mode: str) -> list:
    """Answer every question from its images and the views of its paths, all in one message -> the result of `search`."""
    dialogues = {}
    for tree, paths in evidence.items():
        if not tree.error:
            dialogues[tree] = tree.dialogue(run.policy, paths)
            tree.cost["shown"] += dialogues[tree].valid_calls
    rows = [with_views(tree, dialogue) for tree, dialogue in dialogues.items()]
    replies = converse_or_errors(run.policy, rows)
    for (tree, dialogue), reply in zip(dialogues.items(), replies, strict=True):
        if isinstance(reply, SimulatorError):
            tree.error = reply
            continue
        tree.cost["policy_calls"] += len(reply.turns)
        dialogue.mode = mode
        dialogue.turns += reply.turns
        dialogue.replies += reply.replies
        dialogue.invalid_calls += reply.invalid_calls
        dialogue.unreadable += reply.unreadable
        dialogue.answer = reply.answer
        dialogue.truncated = reply.truncated
    results = [tree.error or dialogues[tree] for tree in evidence]
    for tree in evidence:
        if tree.error and tree.error.down:
            raise SimulatorError(str(tree.error), True, results)
    return results


def with_views(tree: Tree, dialogue: Imagined) -> dict:
    """The question with all views of a dialogue among its images, told where they come from."""
    question, count = tree.question, len(tree.root.images)
    numbers = range(count + 1, len(dialogue.images) + 1)
    ways = [path_words(path_of(dialogue, number)) for number in numbers]
    row = {**question, "images": dialogue.images}
    if question.get("prompt"):  # a bench's own words
        *before, last = question["prompt"]
        return row | {"prompt": [*before, *(f"\nImagined {way}\n" for way in ways), last]}
    views = ""
    for number, way in zip(numbers, ways, strict=True):
        views += f"Image-{number} is imagined {way}.\n"
    return row | {"question": f"{views}{question['question']}"}


def path_of(dialogue: Imagined, number: int) -> Path:
    """How a view of a dialogue was come by, back to a given image."""
    program = []
    while call := dialogue.provenance[number - 1]:
        program.insert(0, motion_in(call))
        number = call["reference_image"]
    return (number, *program)


# ---- the two methods -----------------------------------------------------------------------------------------------


def search(policy: RemotePolicy, questions: list[dict], simulator, seed: int = 0) -> list:
    """MindJourney: imagine around the current view in STEPS steps, show what helps, answer.

    questions   rows with "images" as paths or arrays;  simulator: anything with imagine(queries), or None
    returns     an Imagined per question, of mode "search": its calls are the views that were shown
    raises      SimulatorError if a server is down, its `results` the list so far. What one request alone was refused
                for stands in the list as a SimulatorError
    """
    run = Run(policy, simulator, seed)
    helps = {Tree(policy, question): {} for question in questions}  # {tree: {path: score}}
    beams = {tree: [tree.start] for tree in helps}
    for step in range(1, 1 + STEPS):
        fresh = {}
        for tree, own in beams.items():
            paths = [path for beam in own for path in expand(beam)]
            fresh[tree] = [path for path in dict.fromkeys(paths) if path not in tree.nodes]
        imagine(run, fresh)
        views = {}
        for tree, paths in fresh.items():
            paths = [path for path in paths if path in tree.nodes]
            if paths and not tree.error:
                views[tree] = paths
        explore = rate_views(run, views, "explore", step)
        help_ = rate_views(run, views, "help", step)
        beams = {}
        for tree in views:
            beams[tree] = best(explore[tree], BEAMS)
            helps[tree] |= {path: help_[tree][path] for path in best(help_[tree], EVIDENCE)}
    evidence = {tree: best(own, STEPS * EVIDENCE) for tree, own in helps.items()}
    return answer_all(run, evidence, "search")


def gate(policy: RemotePolicy, questions: list[dict], simulator, seed: int = 0) -> list:
    """AVIC without training: vote on whether to imagine, and along which plan. As `search`; the mode is "gate"."""
    run = Run(policy, simulator, seed)
    trees = [Tree(policy, question) for question in questions]
    plans = {}  # {tree: plans, each the paths of its views}
    for tree, votes in zip(trees, sampled_plans(run, trees), strict=True):
        ways = [tuple(waypoints(plan[:1], plan[1:])[:ATOMS]) for plan in elect(votes)]
        plans[tree] = list(dict.fromkeys(ways))
    imagine(run, {tree: [path for plan in own for path in plan] for tree, own in plans.items()})
    for tree, own in plans.items():  # without what was refused
        there = [[path for path in plan if path in tree.nodes] for plan in own]
        plans[tree] = [plan for plan in there if plan]
    several = {tree: own for tree, own in plans.items() if len(own) > 1 and not tree.error}
    for tree, scores in zip(several, verify(run, several), strict=True):
        plans[tree] = [plans[tree][int(np.argmax(scores))]]
    return answer_all(run, {tree: own[0] if own else [] for tree, own in plans.items()}, "gate")


def sampled_plans(run: Run, trees: list[Tree]) -> list[list[Path | None]]:
    """SAMPLES replies to the gate's prompt per question: plans as paths, () to skip, None if it cannot be read."""
    types = ", ".join(TYPES)
    sheets = []
    for tree in trees:
        task = TASKS["gate"].format(image=tree.start[0], types=types)
        sheets += [sheet(tree, [], f"vote {k}", task) for k in range(SAMPLES)]
    texts = ask(run, sheets, 1.0)
    plans = [read_plan(text, one["tree"].start) for text, one in zip(texts, sheets, strict=True)]
    return [plans[k : k + SAMPLES] for k in range(0, len(plans), SAMPLES)]


def read_plan(text: str | None, start: Path) -> Path | None:
    """The last JSON with a decision in a reply -> the path that it plans, () to skip, None if it cannot be read."""
    decision = {}
    for brace in re.finditer(r'{(?=\s*")', text or ""):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, brace.start())
        except (ValueError, RecursionError):
            continue
        decision = value if "decision" in value else decision
    if decision.get("decision") == "skip":
        return ()
    try:
        motions = []
        for action in decision["actions"]:
            if type(action["value"]) not in (int, float):
                return None
            kind, sign = TYPES[action["type"]]
            if not 0 < action["value"] <= LIMITS[UNITS[kind]]:
                return None
            motions.append(Motion(kind, sign * float(action["value"])))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        return None
    return (*start, *motions) if decision.get("decision") == "call_wm" and motions else None


def elect(votes: list[Path | None]) -> list[Path]:
    """Votes (plans, () to skip, None) -> the distinct plans, most votes first; [] without a strict majority."""
    calls = Counter(vote for vote in votes if vote)
    return [plan for plan, _ in calls.most_common(PLANS)] if calls.total() > votes.count(()) else []


def verify(run: Run, several: dict[Tree, list[list[Path]]]) -> list[list[int]]:
    """{tree: plans, each its views} -> a score per plan."""
    sheets = []
    for tree, plans in several.items():
        task = TASKS["verify"].format(plans="; ".join(path_words(plan[-1]) for plan in plans))
        task = f"{task} {SCORE.format(thing='plan', count=len(plans))}"
        views = dict.fromkeys(path for plan in plans for path in plan)
        sheets.append(sheet(tree, list(views), "verify", task))
    return rate(run, sheets, [len(plans) for plans in several.values()])


METHODS = {"search": search, "gate": gate}


def hold_served_dialogues(
    policy: RemotePolicy, questions: list[dict], simulator, mode: str, seed: int
) -> tuple[list, SimulatorError | None]:
    """-> a Trajectory or a SimulatorError per question, and the error by which a server stopped, or None."""
    try:
        if mode in METHODS:
            return METHODS[mode](policy, questions, simulator, seed), None
        return converse(policy, questions, simulator, mode, seed), None
    except SimulatorError as error:
        return error.results, error  # what is complete is kept
