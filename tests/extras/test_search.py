"""Search and gate, baselines that imagine without training: their rules by hand, their scores against a slow way."""

import base64
import json

import numpy as np
import pytest
from fake_server import QUICK, Fake, says

import data
import evaluate
from extras.remote.client import RemotePolicy, png
from extras.report import search
from extras.report.search import (
    Run,
    Tree,
    best,
    elect,
    expand,
    first_image_named,
    gate,
    path_words,
    read_plan,
    read_scores,
    waypoints,
)
from extras.world2vlm.transitions import end_pose
from lib.geometry import Motion
from lib.images import load_image
from lib.protocol import call_of
from lib.records import read_log
from lib.rooms import TrueRenderer, random_room, render
from lib.simulators import SimulatorError, read_instruction
from policy import Policy

REMOTE = RemotePolicy("http://127.0.0.1:1", "vlm")  # for dialogues that nobody answers
F, L, R = ("dy", 1), ("dangle", -1), ("dangle", 1)  # kind and sign


def motion(way, amount):
    kind, sign = way
    return Motion(kind, sign * float(amount))


def path(start, *steps):
    return (start, *(motion(way, amount) for way, amount in steps))


def question(number, **more):
    rng = np.random.default_rng(number)
    return {
        "id": f"q{number}",
        "bench": "rooms",
        "images": [rng.integers(0, 256, (32, 32, 3), np.uint8)] * 2,
        "question": "Start from Image-2 and turn 45 degrees to the left. Then which object looks largest?",
        "options": ["A. red", "B. blue", "C. pink", "D. cyan"],
        "answer": "B",
        "kind": "mca",
        "category": "region",
        "needs_view": True,
        **more,
    }


class Noise:
    """A simulator whose views are noise from the seeds alone; it remembers its orders."""

    def __init__(self, fails=()):
        self.queries, self.fails = [], fails

    def imagine(self, queries):
        self.queries += queries
        views = [
            SimulatorError("this view is refused")
            if any(word in query.instruction for word in self.fails)
            else np.random.default_rng(query.seed).integers(0, 256, (32, 32, 3), np.uint8)
            for query in queries
        ]
        if any(isinstance(view, SimulatorError) for view in views):
            raise SimulatorError("some views are refused", False, views)
        return views


# ---- paths ----------------------------------------------------------------------------------------------------------


def test_a_step_adds_each_primitive_at_every_interval():
    ways = expand((1,))
    assert ways == [
        path(1, (way, amount))
        for way, amounts in ((F, (0.25, 0.5, 0.75)), (L, (9, 18, 27)), (R, (9, 18, 27)))
        for amount in amounts
    ]
    assert expand(path(1, (F, 0.5)))[3] == path(1, (F, 0.5), (L, 9))


def test_a_step_does_not_turn_straight_back_and_repeats_up_to_a_bound():
    ways = expand(path(1, (L, 27)))  # 27 + 27 <= 60 degrees
    assert ways[3:] == [
        path(1, (L, 36)),
        path(1, (L, 45)),
        path(1, (L, 54)),
    ]  # one motion, and no turn right
    assert {way[-1].way for way in expand(path(1, (L, 36)))} == {"+dy"}  # 36 + 27 > 60
    assert path(1, (F, 1.5)) in expand(path(1, (F, 0.75)))  # 0.75 + 0.75 <= 1.5 m
    assert {way[-1].way for way in expand(path(1, (F, 1.0)))} == {"-dangle", "+dangle"}
    assert "+dangle" in {
        way[-1].way for way in expand(path(1, (L, 27), (F, 0.25)))
    }  # not directly after


def test_beams_and_evidence_pass_the_threshold_best_first():
    scores = {"a": 8, "b": 7.9, "c": 9, "d": 8, "e": 9}
    assert (
        best(scores, 2) == ["c", "e"]
        and best(scores, 18) == ["c", "e", "a", "d"]
        and best({}, 2) == []
    )


def test_the_search_starts_from_the_image_that_the_words_name():
    asked = ["Start from Image-2 and …", "In image 4, …", "From Image-9 …", "What is behind me?"]
    assert [first_image_named({"question": words}, 4) for words in asked] == [2, 4, 1, 1]


def test_a_path_is_told_with_all_its_motions():
    assert (
        path_words(path(3, (L, 27), (F, 0.5)))
        == "from Image-3: turn 27 degrees to the left, and then "
        "move forward by 0.5 meters parallel to the ground"
    )


# ---- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, scores",
    [
        ("Well.\nOutput: 9, 0, 8", [9, 0, 8]),
        ("**Output:** [1,2,3].", [1, 2, 3]),
        ("Output: 1, 1, 1\nOutput: 2,2,2", [2, 2, 2]),
        ("Output: 9, 0", None),
        ("9, 0, 8", None),
        ("Output: 9, 10, 8", None),
        ("Output: 9, -1, 8", None),
        (None, None),
        ("Output: 9 0 8", None),
        ("Output:", None),
        ("Output: nine, 0, 8", None),
        ("Output: ９, 0, 8", None),
    ],
)
def test_scores_are_read_strictly(text, scores):
    assert read_scores(text, 3) == scores


@pytest.mark.parametrize(
    "text, plan",
    [
        (
            'Too little. {"decision": "call_wm", "actions": [{"type": "turn-left", "value": 30}, {"type": "move-forward", '
            '"value": 0.5}], "reason": "x"} Done.',
            path(2, (L, 30), (F, 0.5)),
        ),
        ('{"decision": "skip"}', ()),
        ('{"decision": "skip", "actions": []} {not json}', ()),
        ('{"decision": "call_wm", "actions": []}', None),
        ('{"decision": "call_wm"}', None),
        ("skip", None),
        (None, None),
        ('{"decision": "call_wm", "actions": [{"type": "fly", "value": 1}]}', None),
        (
            '{"decision": "call_wm", "actions": [{"type": "move-left", "value": 1}]}',
            None,
        ),  # not on offer
        ('{"decision": "call_wm", "actions": [{"type": "turn-left", "value": -30}]}', None),
        ('{"decision": "call_wm", "actions": [{"type": "turn-left", "value": true}]}', None),
        ('{"decision": "call_wm", "actions": [{"type": "turn-left", "value": NaN}]}', None),
        ('{"decision": "call_wm", "actions": [{"type": "turn-left", "value": 1e9}]}', None),
        ('{"decision": "call_wm", "actions": ["turn-left"]}', None),
        ('{"decision": "call_wm", "actions": 3}', None),
        ('{"decision": "maybe", "actions": [{"type": "turn-left", "value": 30}]}', None),
        ("{" * 20_000, None),
    ],
)
def test_plans_are_read_or_dropped(text, plan):
    assert read_plan(text, (2,)) == plan


def test_the_gate_opens_with_a_strict_majority_of_what_can_be_read():
    a, b = path(1, (L, 27)), path(1, (R, 27))
    assert elect([a, (), b, b, ()]) == [b, a]  # most votes first
    assert elect([a, (), None, None, None]) == [] == elect([None] * 5) == elect([(), (), a, a, ()])
    assert elect([a, None, None, None, None]) == [a]
    assert len(elect([path(1, (L, k)) for k in range(1, 8)])) == search.PLANS


def test_plans_are_cut_into_atoms():
    ways = waypoints((1,), [motion(L, 20), motion(F, 0.75)])
    assert ways == [
        path(1, (L, 9)),
        path(1, (L, 18)),
        path(1, (L, 20)),
        path(1, (L, 20), (F, 0.25)),
        path(1, (L, 20), (F, 0.5)),
        path(1, (L, 20), (F, 0.75)),
    ]


# ---- what is imagined -----------------------------------------------------------------------------------------------


def test_every_view_is_the_one_at_the_end_of_its_whole_path_from_the_original_image(tmp_path):
    row = data.room_questions(5_000_000, tmp_path)[0]
    row["images"] = [tmp_path / name for name in row["images"]]
    tree, spy = Tree(REMOTE, row), Noise()
    ways = [
        path(2, (L, 45)),
        path(2, (L, 90)),
        path(2, (L, 45), (F, 0.5)),
        path(2, (L, 45), (F, 1.0)),
    ]
    search.imagine(Run(REMOTE, TrueRenderer(), 0), {tree: ways})
    start, room = np.array(row["scene"]["poses"][1]), random_room(row["scene"]["room"])
    for way in ways:
        true = render(room, end_pose(start, way[1:]), 32)["rgb"][0]
        assert (tree.nodes[way].images[-1] == true).all()
    assert tree.cost["rendered"] == 4

    again = Tree(REMOTE, row)
    search.imagine(Run(REMOTE, spy, 0), {again: ways})
    orders = []
    for query in spy.queries:
        _, motion_told = read_instruction(query.instruction)
        orders.append(((query.reference, motion_told), len(query.images)))
    assert orders == [((2, way[1]), 4) for way in ways[:2]] + [((5, way[2]), 5) for way in ways[2:]]
    given = [load_image(image) for image in row["images"]]
    assert all(
        (a == b).all() for query in spy.queries for a, b in zip(query.images, given, strict=False)
    )


def test_an_answer_shows_views_by_kind_and_magnitude_and_what_leads_to_them():
    tree, ways = (
        Tree(REMOTE, question(0)),
        [path(2, (L, 45), (F, 0.5)), path(2, (L, 90)), path(2, (F, 1.0))],
    )
    search.imagine(Run(REMOTE, Noise(), 0), {tree: [path(2, (L, 45)), *ways]})
    dialogue = tree.dialogue(REMOTE, ways)
    calls = [tuple(call.values()) for call in dialogue.provenance if call]
    assert calls == [
        (2, "dy", 1.0),
        (2, "dangle", -45.0),
        (4, "dy", 0.5),
        (2, "dangle", -90.0),
    ]  # Image-4 is the turn by 45 degrees
    shown = [path(2, (F, 1.0)), path(2, (L, 45)), *ways[:2]]
    assert all(
        image is tree.nodes[way].images[-1]
        for image, way in zip(dialogue.images[2:], shown, strict=True)
    )
    words = search.with_views(tree, dialogue)["question"]
    assert (
        "Image-5 is imagined from Image-2: turn 45 degrees to the left, and then move forward by 0.5 meters parallel to "
        "the ground.\n" in words
    )
    own = search.with_views(Tree(REMOTE, question(0, prompt=["a", "b", "c"])), dialogue)
    assert len(own["prompt"]) == 1 + len(own["images"]) and own["prompt"][-1] == "c"


def test_a_view_has_noise_of_its_own_by_the_seed():
    seeds = []
    for seed in (5, 6, 5):
        noise = Noise()
        search.imagine(Run(REMOTE, noise, seed), {Tree(REMOTE, question(0)): [path(1, (L, 45))]})
        seeds.append(noise.queries[0].seed)
    assert seeds[0] == seeds[2] != seeds[1]


def test_a_view_that_is_refused_costs_no_answer_and_a_simulator_that_is_down_does(monkeypatch):
    with Fake(judging) as fake:
        policy = RemotePolicy(fake.url, "vlm", **QUICK)
        (found,) = search.search(policy, [question(0)], Noise(fails=("to the left",)), 0)
    assert found.answer == "B" and found.cost["rendered"] == 6
    assert not any(call["value"] < 0 for call in found.provenance if call)

    class Down:
        def imagine(self, queries):
            raise SimulatorError("nobody there", True)

    voting(monkeypatch, *[motion(L, 45)] * 5)
    for method in (search.search, gate):
        with pytest.raises(SimulatorError, match="nobody there") as error:
            method(REMOTE, [question(0)], Down(), 0)
        assert [result.down for result in error.value.results] == [True]


# ---- the gate -------------------------------------------------------------------------------------------------------


def voting(monkeypatch, *plans):
    """Let the policy vote for these plans: motions, () to skip, or None for nonsense."""
    plans = [(1, plan) if isinstance(plan, Motion) else plan for plan in plans]
    monkeypatch.setattr(search, "sampled_plans", lambda run, trees: [plans for _ in trees])


def test_of_several_plans_the_one_that_scores_best_is_shown(monkeypatch):
    voting(monkeypatch, motion(L, 45), motion(F, 1), motion(R, 90), (), ())
    rated = []
    monkeypatch.setattr(
        search, "rate", lambda run, sheets, counts: rated.append(counts) or [[0, 9, 0]]
    )
    with Fake(judging) as fake:
        (found,) = gate(RemotePolicy(fake.url, "vlm", **QUICK), [question(0)], Noise(), 0)
    assert {call["motion_type"] for call in found.provenance if call} == {"dy"} and rated == [[3]]
    assert found.cost["rendered"] == 5 + 4 + 6  # every 9 degrees or 0.25 m, six at most


# ---- a policy behind a URL ------------------------------------------------------------------------------------------


def texts_of(request):
    return [
        part["text"]
        for part in json.loads(request["body"])["messages"][0]["content"]
        if part["type"] == "text"
    ]


def judging(request, handler):
    """A chat model: a turn by 18 degrees to the left explores best, a turn by 9 to the right helps; JSON for plans."""
    said = "".join(texts_of(request))
    views = [line for line in said.splitlines() if line.startswith("Imagined from")]
    if "call_wm" in said:
        return says(
            'A view is missing. {"decision": "call_wm", "actions": [{"type": "turn-right", "value": 20}]}'
        )
    if "Output:" in said:
        wanted = "turn 18 degrees to the left"
        if "explore further" not in said:
            wanted = "turn 9 degrees to the right"
        return says("Output: " + ", ".join("9" if view.endswith(wanted) else "7" for view in views))
    return says("<think>seen</think><answer>B</answer>")


def test_a_remote_policy_searches_by_two_scoring_calls_a_step():
    simulator = Noise()
    with Fake(judging) as fake:
        policy = RemotePolicy(fake.url, "vlm", **QUICK)
        (found,) = search.search(policy, [question(0)], simulator, 0)
    assert found.answer == "B" and found.mode == "search"
    (call,) = (call for call in found.provenance if call)
    assert call == call_of(2, motion(R, 9))
    # step 1: 9 views, the turn by 18 becomes the beam; step 2: 3 forward and 3 further left (27 is known), none passes
    assert (
        found.cost["rendered"] == 14
        and found.cost["shown"] == 1
        and found.cost["policy_calls"] == 5
    )
    assert len(simulator.queries) == 14 and len(fake.requests) == 5
    asked = texts_of(fake.requests[-1])[-1]
    assert (
        "Image-3 is imagined from Image-2: turn 9 degrees to the right.\nStart from" in asked
        and "A. red" in asked
    )
    scoring = json.loads(fake.requests[0]["body"])["messages"][0]["content"]
    assert sum(part["type"] == "image_url" for part in scoring) == 2 + 9
    assert (
        f"data:image/png;base64,{base64.b64encode(png(question(0)['images'][0])).decode()}"
        == next(part["image_url"]["url"] for part in scoring if part["type"] == "image_url")
    )


def test_scores_that_cannot_be_read_are_asked_for_again_and_then_nothing_passes():
    def babbles(request, handler):
        scoring = "Output:" in "".join(texts_of(request))
        return says("All are nice." if scoring else "<think>x</think><answer>B</answer>")

    with Fake(babbles) as fake:
        policy = RemotePolicy(fake.url, "vlm", **QUICK)
        (found,) = search.search(policy, [question(0)], Noise(), 0)
        sent_in_all = len(fake.requests)
        (nothing,) = search.search(policy, [question(0)], None, 0)
    assert nothing.answer == "B" and nothing.cost == {"policy_calls": 1, "shown": 0}
    del fake.requests[sent_in_all:]
    sent = [json.loads(request["body"])["temperature"] for request in fake.requests]
    assert (
        sent == ([0] + [1] * search.RETRIES) * 2 + [0]
        and found.valid_calls == 0
        and found.answer == "B"
    )


def test_a_remote_policy_gates_by_votes():
    with Fake(judging) as fake:
        (found,) = gate(RemotePolicy(fake.url, "vlm", **QUICK), [question(0)], Noise(), 0)
    assert [call["value"] for call in found.provenance if call] == [
        9,
        18,
        20,
    ] and found.answer == "B"
    assert [json.loads(request["body"])["temperature"] for request in fake.requests] == [1] * 5 + [
        0
    ]


def test_several_plans_of_a_remote_policy_are_verified():
    amounts = iter([9, 9, 18, 18, 18])

    def plans(request, handler):
        said = "".join(texts_of(request))
        if "call_wm" in said:
            return says(
                f'{{"decision": "call_wm", "actions": [{{"type": "turn-left", "value": {next(amounts)}}}]}}'
            )
        return (
            says("Output: 2, 8")
            if "these plans" in said
            else says("<think>x</think><answer>A</answer>")
        )

    with Fake(plans) as fake:
        (found,) = gate(
            RemotePolicy(fake.url, "vlm", at_once=1, **QUICK), [question(0)], Noise(), 0
        )
    (verified,) = [
        text for request in fake.requests for text in texts_of(request) if "these plans" in text
    ]
    assert (
        "from Image-2: turn 18 degrees to the left; from Image-2: turn 9 degrees to the left?"
        in verified
    )
    assert [call["value"] for call in found.provenance if call] == [-9]  # the second one scored 8


def test_one_refusal_costs_one_question_and_a_server_that_is_down_costs_no_finished_one():
    def refuses(request, handler):
        said = "".join(texts_of(request))
        if "Question 1" in said and "Output:" in said:
            return 400, {"error": {"message": "too long"}}
        return judging(request, handler)

    asked = [question(0), question(1, question="Question 1?"), question(2)]
    with Fake(refuses) as fake:
        found = search.search(RemotePolicy(fake.url, "vlm", **QUICK), asked, Noise(), 0)
    assert [isinstance(result, SimulatorError) for result in found] == [
        False,
        True,
        False,
    ] and not found[1].down

    def goes(request, handler):
        down = "Output:" not in "".join(texts_of(request)) and len(done) >= 1
        done.extend([1] * ("Output:" not in "".join(texts_of(request))))
        return (401, {"error": {"message": "no money"}}) if down else judging(request, handler)

    done = []
    with Fake(goes) as fake, pytest.raises(SimulatorError, match="no money") as error:
        search.search(RemotePolicy(fake.url, "vlm", at_once=1, **QUICK), asked, Noise(), 0)
    assert [isinstance(result, SimulatorError) for result in error.value.results] == [
        False,
        True,
        True,
    ]


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("search")
    data.save_jsonl(
        root / "data" / "questions_test.jsonl", data.room_questions(5_000_000, root / "data")
    )
    Policy.tiny().save(root / "policy")
    return root


def command(root, mode, *more):
    return [
        "--bench",
        "rooms",
        "--data",
        str(root / "data"),
        "--simulator",
        "truth",
        "--mode",
        mode,
        "--limit",
        "3",
        "--out",
        str(root / mode),
        "--max-new-tokens",
        "16",
        *more,
    ]


@pytest.mark.parametrize("mode", ["search", "gate"])
def test_a_tiny_policy_is_refused_in_a_sentence(place, mode):
    with pytest.raises(SystemExit, match="ask a served policy"):
        evaluate.main(command(place, mode, "--policy", str(place / "policy")))


def test_a_remote_policy_from_end_to_end_and_a_server_that_goes_down(place, monkeypatch):
    with Fake(judging) as fake:
        own = command(
            place,
            "search",
            "--policy-url",
            fake.url,
            "--model",
            "vlm",
        )
        own[own.index("--out") + 1] = str(place / "remote")
        evaluate.main([*own, "--no-report"])
    results = json.loads((place / "remote" / "results.json").read_text())
    assert "tokens" not in results["modes"]["search"]["cost"]
    assert (
        results["modes"]["search"]["cost"]["shown"] == 1
        and results["modes"]["search"]["call_rate"] == 1
    )
    own[own.index("--out") + 1] = str(place / "down")
    with Fake((401, {"error": {"message": "who are you?"}})) as fake:
        own[own.index("--policy-url") + 1] = fake.url
        with pytest.raises(SimulatorError, match="who are you"):
            evaluate.main([*own, "--no-report"])
    assert not read_log(place / "down" / "predictions.jsonl")
