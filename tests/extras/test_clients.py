"""Simulators and policies behind a URL, against a local server that is slow, fails and talks nonsense on demand."""

import base64
import http.client
import json
import socket
import struct
import time

import numpy as np
import pytest
from fake_server import QUICK, Fake, dribble, refuses, reset, says, slow, title
from mirror import Mirror

from extras.remote.client import (
    ONE_CALL,
    UNREADABLE_HERE,
    RemotePolicy,
    RemoteSimulator,
    converse,
    png,
    prompt_messages,
    turn_text,
)
from extras.remote.endpoint import Endpoint, seconds_of, sentence_of
from extras.remote.serve import read_form
from lib.geometry import Motion, Query, select_context
from lib.images import PictureError, read
from lib.protocol import (
    CALL_FIRST,
    ENOUGH,
    NO_SIMULATOR,
    NO_TOOL,
    NOT_JSON,
    TOOL,
    parse_turn,
    prompt_text,
)
from lib.simulators import NO_VIEW, SimulatorError, imagine_each, read_instruction, renumbered
from lib.streams import stream_seed

KEY = "sk-do-not-tell-anyone-0123456789"


def picture(seed, height=8, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def query(seed, images=2):
    sentence = "Base on the viewpoint of Image-2, pitch up by 5 degrees."
    return Query([picture(10 * seed + i) for i in range(images)], 2, sentence, seed)


# ---- a served simulator ----------------------------------------------------------------------------------------------


def view_of(image):
    return 200, {"created": 1, "data": [{"b64_json": base64.b64encode(png(image)).decode()}]}


def simulator_at(fake, **patience):
    return RemoteSimulator(fake.url, **QUICK | patience)


def policy_at(fake, **patience):
    return RemotePolicy(fake.url, "gpt", **QUICK | patience)


def failed(results):
    """Where errors stand in a list of results."""
    return [k for k, result in enumerate(results) if isinstance(result, SimulatorError)]


def form_of(request):
    return read_form(request["body"], request["headers"]["Content-Type"])


def mirrored(request, handler):
    """A simulator: the last image, mirrored."""
    images = [value for name, value in form_of(request) if name == "image[]"]
    return view_of(read(images[-1])[:, ::-1].copy())


# ---- simulators -----------------------------------------------------------------------------------------------------


def test_a_remote_simulator_sends_the_query_and_keeps_the_order():
    def uneven(request, handler):
        time.sleep(0.005 * (int(dict(form_of(request))["seed"]) % 3))
        return mirrored(request, handler)

    queries = [query(seed, images=2 + seed % 2) for seed in range(9)]
    with Fake(uneven) as fake:
        views = simulator_at(fake, at_once=4).imagine(queries)
        (view,) = RemoteSimulator(fake.url + "/v1/", **QUICK).imagine(queries[:1])
        assert view.shape == (8, 8, 3)
        assert simulator_at(fake).imagine([]) == []
    assert all((view == q.images[1][:, ::-1]).all() for view, q in zip(views, queries, strict=True))
    assert {request["path"] for request in fake.requests} == {"/v1/images/edits"}
    forms = {dict(form)["seed"]: form for form in map(form_of, fake.requests[:9])}
    form = forms[b"5"]
    fields = ["prompt", "seed", "n", "response_format"]
    assert [name for name, _ in form] == [*fields, *["image[]"] * 3]
    assert dict(form)["prompt"].decode() == renumbered(queries[5].instruction, 3)
    assert (
        read(form[4][1]) == queries[5].images[2]
    ).all()  # lossless, and the reference comes last


GOOD = view_of(picture(1))
NO_MONEY = 429, {"error": {"message": "no money", "type": "insufficient_quota"}}
TRUNCATED = 200, {"data": [{"b64_json": base64.b64encode(png(picture(1))[:90]).decode()}]}


@pytest.mark.parametrize(
    "bad",
    [
        slow,
        dribble,
        reset,
        refuses("out of memory", 500),
        (503, b"<html>busy</html>"),
        (429, {"error": "slow down"}, {"Retry-After": "0"}),
        (408, {}),
        (200, b'{"data": [{"b64_json"'),
        (200, b""),
        (200, {"data": []}),
        (200, {"data": [{"url": "http://elsewhere/view.png"}]}),
        (200, [1]),
        (200, {"data": [{"b64_json": "no base64!"}]}),
        TRUNCATED,
        view_of(picture(1, 8, 40)),
    ],
    ids=title,
)
def test_a_passing_failure_is_tried_again(bad):
    with Fake(bad, GOOD) as fake:
        (view,) = simulator_at(fake, timeout=0.4).imagine([query(0)])
    assert (view == picture(1)).all() and len(fake.requests) == 2


@pytest.mark.parametrize(
    "bad, words, requests, down",
    [
        (slow, "could not be reached (timed out)", 3, True),
        (reset, "Connection reset", 3, True),
        (refuses("out of memory", 500), "answered 500: out of memory (tries: 3)", 3, True),
        (refuses("who are you?", 401), "answered 401: who are you?", 1, True),
        (NO_MONEY, "answered 429: no money", 1, True),
        ((302, b"", {"Location": "http://127.0.0.1:1/"}), "answered 302", 1, True),
        ((200, b"not JSON"), "cannot be read", 3, False),
        (TRUNCATED, "cannot be read", 3, False),
        (view_of(picture(1, 8, 40)), "a view of 40 x 8 pixels from an image of 8 x 8", 3, False),
        ((422, {"detail": [{"msg": "image is required"}]}), "image is required", 1, False),
    ],
    ids=title,
)
def test_what_fails_for_good_says_why(bad, words, requests, down):
    with Fake(GOOD, bad) as fake:
        simulator = simulator_at(fake, timeout=0.4)
        simulator.imagine([query(0)])  # so the address is known to be right
        with pytest.raises(SimulatorError) as error:
            simulator.imagine([query(1)])
    assert words in str(error.value) and fake.url in str(error.value)
    assert error.value.down is down and len(fake.requests) == 1 + requests


def test_a_server_that_is_not_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(SimulatorError, match="refused") as error:
        RemoteSimulator(url, **QUICK).imagine([query(seed) for seed in range(50)])
    assert error.value.down and len(error.value.results) == 50


def test_one_refused_view_costs_the_others_nothing():
    def picky(request, handler):
        refused = dict(form_of(request))["seed"] == b"2"
        return refuses("I do not draw this.") if refused else mirrored(request, handler)

    queries = [query(seed) for seed in range(5)]
    with Fake(picky) as fake:
        simulator = simulator_at(fake)
        with pytest.raises(SimulatorError, match="1 of 5 views failed.*I do not draw") as error:
            simulator.imagine(queries)
        views = imagine_each(simulator, queries)
    assert failed(error.value.results) == [2] and not error.value.down
    assert [k for k, view in enumerate(views) if view is None] == [2]
    assert (views[4] == queries[4].images[1][:, ::-1]).all()


def test_a_server_that_has_only_ever_refused_stops_the_run():
    """A wrong model name must not end in a table of dialogues without views."""
    with Fake(refuses("no such model")) as fake:
        with pytest.raises(SimulatorError, match="no such model") as error:
            imagine_each(simulator_at(fake), [query(0), query(1)])
    assert error.value.down


def test_a_field_that_a_server_does_not_know_is_left_out(capsys):
    with Fake(refuses("Unknown parameter: 'seed'."), GOOD) as fake:
        simulator_at(fake, at_once=1).imagine([query(0), query(1)])
    assert ["seed" in dict(form_of(request)) for request in fake.requests] == [True, False, False]
    assert "takes no seed" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["head", "body"])
def test_an_answer_has_one_deadline_however_it_drips(where):
    """Neither the headers nor a body without a length may go on for ever, a byte at a time."""

    def drip(request, handler):
        head = b"HTTP/1.0 200 OK\r\n"
        handler.wfile.write(head + (b"\r\n" if where == "body" else b"X-Pad: "))
        for _ in range(150):
            handler.wfile.write(b" ")
            time.sleep(0.02)

    def stop(*_):
        raise AssertionError("was read to its end")

    with Fake(drip) as fake, pytest.raises(SimulatorError, match="could not be reached .timed out"):
        Endpoint(fake.url, "/x", timeout=0.3, tries=1).ask({}, stop)


def test_a_view_as_a_data_uri_or_in_lines_is_read():
    whole = base64.b64encode(png(picture(1))).decode()
    lines = "\n".join(whole[k : k + 76] for k in range(0, len(whole), 76))
    for data in ("data:image/png;base64," + whole, lines):
        with Fake((200, {"data": [{"b64_json": data}]})) as fake:
            (view,) = simulator_at(fake, tries=1).imagine([query(0)])
        assert (view == picture(1)).all()


def test_a_rate_limit_pauses_every_request_for_as_long_as_it_says(capsys):
    def steady(request, handler):
        time.sleep(0.05)
        return GOOD

    with Fake((429, {"error": {"message": "slow down"}}, {"Retry-After": "0.3"}), steady) as fake:
        simulator = simulator_at(fake, at_once=2, longest_wait=60, tries=1)
        simulator.imagine([query(seed) for seed in range(6)])
    late = [moment - fake.times[0] for moment in fake.times]
    assert sum(moment < 0.29 for moment in late) <= 2  # the first, and one already on its way
    assert max(late) < 2
    assert capsys.readouterr().out.count("limits the rate") == 1


def test_a_long_retry_after_is_capped_and_a_rate_limit_without_end_is_an_error():
    with Fake((429, {}, {"Retry-After": "3600"})) as fake:
        with pytest.raises(SimulatorError, match="429") as error:
            simulator_at(fake, patience=0.5, tries=1).imagine([query(0)])
    assert error.value.down and len(fake.requests) >= 2  # a wait of an hour would end after one


def test_waits_double_and_vary(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    endpoint = Endpoint("http://127.0.0.1:1", "/x", tries=6, backoff=1.0, longest_wait=6.0)
    with pytest.raises(SimulatorError):
        endpoint.ask({}, lambda answer: answer)
    for wait, most in zip(waits, (1, 2, 4, 6, 6), strict=True):
        assert most / 2 <= wait <= most
    assert len(set(waits)) == 5


def test_headers_and_errors_of_every_kind_can_be_read():
    assert seconds_of("2.5") == 2.5 and seconds_of("-1") == 0
    assert seconds_of(None) is seconds_of("soon") is seconds_of("nan") is None
    for body, sentence in (
        (b'{"error": {"message": "a"}}', "a"),
        (b'[{"error": {"message": "b"}}]', "b"),
        (b'{"detail": "c"}', "c"),
        (b'{"error": "d"}', "d"),
        (b"<html>", "<html>"),
        (b"", "nothing"),
        (b"[]", "[]"),
        (b"3", "3"),
        (b'{"error": {}}', '{"error": {}}'),
    ):
        assert sentence_of(body) == sentence


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://host/v1",
        "http://",
        "http://me:secret@host/v1",
        "https://host/v1?key=secret",
        "http://host:port",
    ],
)
def test_a_url_that_is_none_or_holds_a_secret_is_refused(url):
    with pytest.raises(ValueError) as error:
        RemoteSimulator(url)
    assert "secret" not in str(error.value)


def test_a_bomb_is_not_unpacked():
    bomb = bytearray(png(np.zeros((1, 1, 3), np.uint8)))
    bomb[16:24] = struct.pack(">II", 20_000, 20_000)  # width and height of the header
    for data in (bytes(bomb), png(np.zeros((64, 65, 3), np.uint8)), b"GIF89a", b""):
        with pytest.raises(PictureError, match="picture"):
            read(data, max_pixels=64 * 64)


# ---- the key --------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_told_to_nobody(monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")  # as `export KEY=$(cat file)` may leave it
    refusal = refuses(f"Incorrect API key provided: {KEY}", 401)
    with Fake(says(f"<answer>A, says {KEY}</answer>"), refusal) as fake:
        policy = policy_at(fake)
        (dialogue,) = converse(policy, [question(1)], mode="direct")
        assert dialogue.answer == "A, says [key]"
        dialogue.save(tmp_path)
        with pytest.raises(SimulatorError, match=r"401: Incorrect.*provided: \[key\]") as error:
            converse(policy, [question(2)], mode="direct")
    for request in fake.requests:
        assert request["headers"]["Authorization"] == f"Bearer {KEY}"
    chain = [error.value, error.value.__cause__, error.value.__context__]
    texts = [
        *map(repr, chain),
        repr(policy),
        repr(vars(policy)),
        repr(vars(policy.endpoint)),
        *capfd.readouterr(),
        (tmp_path / "dialogue.json").read_text(),
        *(request["body"].decode() for request in fake.requests),
    ]
    assert len(fake.requests) == 2 and not any(KEY in text for text in texts)


def test_a_key_that_no_header_can_carry_is_not_printed_by_http(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\nHost: elsewhere")
    with (
        Fake(says("<answer>A</answer>")) as fake,
        pytest.raises(SimulatorError, match="OPENAI_API_KEY") as error,
    ):
        converse(policy_at(fake), [question(1)], mode="direct")
    assert KEY not in str(error.value) and not fake.requests


def test_the_key_travels_neither_unencrypted_nor_to_where_a_redirect_points(monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    answer = says("<answer>A</answer>")
    with Fake(answer) as other, Fake((307, b"", {"Location": other.url})) as fake:
        with pytest.raises(SimulatorError, match="answered 307"):
            converse(policy_at(fake), [question(1)], mode="direct")
    assert len(fake.requests) == 1 and not other.requests
    sent = []

    def request(connection, method, path, body, headers):
        sent.append((type(connection), headers.get("Authorization")))
        raise ConnectionError

    monkeypatch.setattr("http.client.HTTPConnection.request", request)
    for endpoint, header in (
        (RemotePolicy("https://example.org/v1", "gpt").endpoint, f"Bearer {KEY}"),
        (RemotePolicy("http://example.org/v1", "gpt").endpoint, None),
        (RemoteSimulator("https://example.org/v1").endpoint, None),  # its key is another
    ):
        with pytest.raises(ConnectionError):
            endpoint._send(b"", "text/plain")
        is_safe = issubclass(sent[-1][0], http.client.HTTPSConnection)
        assert sent[-1][1] == header and is_safe == endpoint.url.startswith("https")
    assert capsys.readouterr().out.count("unencrypted") == 1


# ---- policies -------------------------------------------------------------------------------------------------------


def question(number, **more):
    return {
        "id": f"q{number}",
        "question": f"Question {number}?",
        "options": ["A. red box", "B. blue ball"],
        "answer": "A",
        "images": [picture(10 * number), picture(10 * number + 1)],
        **more,
    }


LOOK = '{"reference_image": 2, "motion_type": "dangle", "value": -30}'
ANSWER = says("<think>red</think><answer>A</answer>")


def talk(*acts, mode="agentic", simulator=None, number=1, **flags):
    """One dialogue with a server that says these things -> (trajectory, what it was sent)."""
    with Fake(*acts) as fake:
        policy = policy_at(fake)
        (dialogue,) = converse(policy, [question(number)], simulator, mode, **flags)
    return dialogue, [json.loads(request["body"]) for request in fake.requests]


def test_a_dialogue_with_a_view():
    simulator = Mirror()
    call = says("I look left.", LOOK, extra_content={"google": {"thought_signature": "signed"}})
    dialogue, _ = talk(call, ANSWER, simulator=simulator, seed=3)
    assert dialogue.answer == "A" and dialogue.valid_calls == 1
    assert dialogue.well_formed and not dialogue.truncated
    tool_call = f'<tool_call>{{"name": "world_simulator_tool", "arguments": {LOOK}}}</tool_call>'
    assert dialogue.turns == [
        f"<think>I look left.</think>\n{tool_call}",
        "<think>red</think>\n<answer>A</answer>",
    ]
    assert dialogue.provenance == [
        None,
        None,
        {"reference_image": 2, "motion_type": "dangle", "value": -30.0},
    ]
    assert (dialogue.images[2] == dialogue.images[1][:, ::-1]).all()
    assert dialogue.replies == [("Imagined from Image-2, turn 30 degrees to the left. ", 3)]
    (order,) = simulator.batches[0]
    assert order.instruction == "Based on the last image, turn 30 degrees to the left."
    assert order.reference == 2


def test_what_a_server_is_sent_of_a_dialogue_with_a_view():
    call = says("I look left.", LOOK, extra_content={"google": {"thought_signature": "signed"}})
    dialogue, (first, second) = talk(call, ANSWER, simulator=Mirror(), seed=3)
    assert first["tools"] == [TOOL] and first["tool_choice"] == "auto" and first["temperature"] == 0
    prompt, own, tool, user = second["messages"]
    texts = [part["text"] for part in prompt["content"] if part["type"] == "text"]
    local = prompt_text(question(1), "agentic", 2)
    assert "".join(texts) in local.replace("<|vision_start|><|image_pad|><|vision_end|>", "")
    assert texts[:2] == ["Image-1: ", "Image-2: "]
    assert texts[2].startswith("Question 1?\nA. red box")
    parts = prompt["content"] + user["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    for url, image in zip(urls, dialogue.images, strict=True):
        assert (read(base64.b64decode(url.split(",")[1])) == image).all()
    assert own["tool_calls"][0]["id"] == "call_0" and "refusal" not in own
    assert own["extra_content"] == {"google": {"thought_signature": "signed"}}
    words = "Imagined from Image-2, turn 30 degrees to the left."
    assert tool == {"role": "tool", "tool_call_id": "call_0", "content": words}
    assert user["content"][0]["text"] == "Image-3: "


def test_words_that_spell_tokens_reach_a_server_as_they_are():
    words = "<|im_end|> <|vision_start|><|image_pad|><|vision_end|> </think>"
    (message,) = prompt_messages(question(1) | {"question": words}, "agentic", [picture(0)] * 2)
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    assert len(texts) == 3 and texts[2].startswith(f"{words}\nA. red box")
    json.dumps(message).encode()


def test_a_server_is_sent_what_a_world_model_would_be_shown():
    """The latest images and the reference as the last one, which the sentence names by its new number."""
    for count, reference in ((32, 1), (32, 31), (303, 303), (9, 5), (8, 8), (2, 1)):
        images = [np.full((8, 8, 3), k // 2, np.uint8) for k in range(count)]
        images = [image + np.array([0, 0, k % 2], np.uint8) for k, image in enumerate(images)]
        sentence = f"Base on the viewpoint of Image-{reference}, pitch up by 5 degrees."
        with Fake(view_of(picture(1))) as fake:
            simulator_at(fake).imagine([Query(images, reference, sentence, 0)])
        form = form_of(fake.requests[0])
        sent = [read(value) for name, value in form if name == "image[]"]
        number, motion = read_instruction(dict(form)["prompt"].decode())
        assert motion == Motion("dphi", 5.0) and number == len(sent) == min(count, 4)
        shown = [images[i] for i in select_context(count, reference, 4)]
        assert all((ours == theirs).all() for ours, theirs in zip(shown, sent, strict=True))


def test_views_come_from_the_seeds_of_the_local_rollout():
    simulator = Mirror()
    talk(says("", LOOK), ANSWER, simulator=simulator, seed=3)
    assert simulator.batches[0][0].seed == stream_seed("imagine", 3, "q1", 0, 0)


def number_of(request):
    """The number of the question that a request is about."""
    prompt = json.loads(request["body"])["messages"][0]["content"]
    return int(prompt[-1]["text"].split("?")[0].split()[1])


def has_called(request):
    return len(json.loads(request["body"])["messages"]) > 1


def test_all_views_of_a_round_are_one_batch_and_dialogues_keep_their_order():
    def act(request, handler):
        number = number_of(request)
        time.sleep(0.003 * (number % 3))
        if number < 5 and not has_called(request):
            return says("", LOOK)
        return says(f"<answer>{number}</answer>")

    simulator = Mirror()
    with Fake(act) as fake:
        questions = [question(n) for n in range(7)]
        dialogues = converse(policy_at(fake, at_once=3), questions, simulator)
    assert [dialogue.answer for dialogue in dialogues] == list("0123456")
    assert [len(batch) for batch in simulator.batches] == [5]


def test_forced_demands_a_call():
    dialogue, sent = talk(ANSWER, says("", LOOK), ANSWER, mode="forced", simulator=Mirror())
    assert [request["tool_choice"] for request in sent] == ["required", "required", "auto"]
    assert dialogue.replies[0][0] == CALL_FIRST.strip()
    assert dialogue.valid_calls == 1 and dialogue.answer == "A"
    words = {"type": "text", "text": CALL_FIRST.strip()}
    assert sent[1]["messages"][2] == {"role": "user", "content": [words]}


def test_direct_has_no_tool_and_without_a_simulator_there_is_no_view():
    dialogue, sent = talk(says("", LOOK), ANSWER, mode="direct")
    assert "tools" not in sent[0]
    assert dialogue.replies[0][0] == NO_TOOL and dialogue.invalid_calls == 1
    dialogue, _ = talk(says("", LOOK), ANSWER)
    assert dialogue.replies[0][0] == NO_SIMULATOR and dialogue.valid_calls == 1


@pytest.mark.parametrize(
    "message, reply, counts",
    [
        (says("", "{not json"), NOT_JSON, (1, 0)),
        (says("", ""), NOT_JSON, (1, 0)),
        (says("", LOOK.replace("2", "9")), "There is no such image.", (1, 0)),
        (says("", LOOK.replace("dangle", "fly")), "There is no such motion.", (1, 0)),
        (says("It is A."), UNREADABLE_HERE, (0, 1)),
        (says(None), UNREADABLE_HERE, (0, 1)),
        (says("<answer>A</answer> or <answer>B</answer>"), UNREADABLE_HERE, (0, 1)),
    ],
)
def test_a_turn_that_cannot_be_obeyed_is_told_so_and_costs_a_turn(message, reply, counts):
    dialogue, sent = talk(message, ANSWER, simulator=Mirror())
    assert dialogue.replies[0][0].startswith(reply)
    assert dialogue.answer == "A" and not dialogue.valid_calls
    assert (dialogue.invalid_calls, dialogue.unreadable) == counts and not dialogue.well_formed
    own, last = sent[1]["messages"][1:]
    assert own.get("content") or own["tool_calls"]  # an empty message would be refused
    assert last["role"] == ("tool" if "tool_calls" in own else "user")


def test_every_call_of_a_turn_gets_a_reply_but_only_the_first_a_view():
    dialogue, sent = talk(says("", LOOK, LOOK), ANSWER, simulator=Mirror())
    assert [m.get("content") for m in sent[1]["messages"] if m["role"] == "tool"][1] == ONE_CALL
    assert dialogue.valid_calls == 1 and len(dialogue.images) == 3


def test_rounds_and_turns_end():
    dialogue, sent = talk(says("", LOOK), simulator=Mirror())
    assert len(dialogue.turns) == len(sent) == 10 and dialogue.truncated and dialogue.answer is None
    assert dialogue.valid_calls == 3 and [text for text, _ in dialogue.replies[3:]] == [ENOUGH] * 6
    dialogue, _ = talk(says("Let me th", finish="length"))
    assert dialogue.truncated and dialogue.turns == ["Let me th"]


@pytest.mark.parametrize(
    "bad",
    [
        slow,
        reset,
        (500, {}),
        (429, {}, {"Retry-After": "0.01"}),
        (200, b"{"),
        (200, {}),
        (200, {"choices": []}),
        (200, {"choices": [{"message": None}]}),
        (200, {"choices": [{"message": {"tool_calls": [{"id": "x"}]}}]}),
        (200, {"choices": [{"message": {"content": 3}}]}),
    ],
    ids=title,
)
def test_a_dialogue_survives_a_passing_failure(bad):
    with Fake(says("", LOOK), bad, ANSWER) as fake:
        policy = policy_at(fake, timeout=0.4)
        (dialogue,) = converse(policy, [question(1)], Mirror())
    assert dialogue.answer == "A" and len(dialogue.images) == 3 and len(fake.requests) == 3


def test_parameters_that_a_model_does_not_take_are_left_out():
    refusal = "Unsupported value: 'temperature' does not support 0 with this model."
    dialogue, sent = talk(refuses(refusal), ANSWER)
    assert dialogue.answer == "A" and "temperature" in sent[0] and "temperature" not in sent[1]


def test_a_server_that_knows_the_token_limit_by_its_older_name_is_told_it_so():
    """Left out, the server's own limit would cut the replies. What it says of the value then is final."""
    unknown = {"loc": ["body", "max_completion_tokens"], "msg": "Extra inputs are not permitted"}
    dialogue, sent = talk((422, {"detail": [unknown]}), ANSWER)
    limits = [{k: v for k, v in fields.items() if "tokens" in k} for fields in sent]
    assert limits == [{"max_completion_tokens": 4096}, {"max_tokens": 4096}]
    assert dialogue.answer == "A"
    too_many = refuses("max_tokens is too large: 4096")
    with Fake((422, {"detail": [unknown]}), too_many) as fake:
        with pytest.raises(SimulatorError, match="max_tokens is too large"):
            converse(policy_at(fake), [question(0)])
    assert len(fake.requests) == 2


def test_a_refused_question_costs_the_others_nothing():
    def act(request, handler):
        return refuses("too long") if number_of(request) == 1 else ANSWER

    with Fake(act) as fake:
        first, refused, last = converse(policy_at(fake), [question(n) for n in range(3)])
    assert first.answer == last.answer == "A" and "too long" in str(refused) and not refused.down


def test_dialogues_that_can_go_on_when_a_server_is_down_do_and_are_handed_over():
    """Question 0 needs no view, 1 gets its view, 2 fails by its own server, 3 by the simulator's."""

    def act(request, handler):
        number = number_of(request)
        if number == 2:
            return 503, {}
        return ANSWER if number == 0 or has_called(request) else says("", LOOK)

    class Dying(Mirror):
        def imagine(self, queries):
            views = super().imagine(queries[:-1])
            results = [*views, SimulatorError("gone", True)]
            raise SimulatorError("The simulator is down.", True, results)

    with Fake(act) as fake, pytest.raises(SimulatorError, match="503") as error:
        converse(policy_at(fake, at_once=4), [question(n) for n in range(4)], Dying())
    first, second, *rest = error.value.results
    assert error.value.down and first.answer == second.answer == "A" and len(second.images) == 3
    assert failed(rest) == [0, 1] and all(result.down for result in rest)


def test_an_endpoint_that_has_only_ever_refused_stops_the_run():
    """Else a wrong model name would count as so many wrong answers."""
    with Fake(refuses("no such model")) as fake, pytest.raises(SimulatorError) as error:
        converse(policy_at(fake), [question(1), question(2)])
    assert error.value.down and all(result.down for result in error.value.results)


def test_a_view_that_is_refused_is_told_to_the_policy_and_the_dialogue_goes_on():
    class Picky:
        def imagine(self, queries):
            raise SimulatorError("1 of 1 views failed.", False, [SimulatorError("no")])

    dialogue, sent = talk(says("", LOOK), ANSWER, simulator=Picky())
    assert dialogue.replies == [(NO_VIEW, None)]
    assert dialogue.answer == "A" and len(dialogue.images) == 2
    assert sent[1]["messages"][-1] == {"role": "tool", "tool_call_id": "call_0", "content": NO_VIEW}


def test_turns_of_every_form_are_read_by_the_one_judge():
    def read_turn(content=None, **more):
        return parse_turn(turn_text({"content": content, **more}))

    function = {
        "name": "world_simulator_tool",
        "arguments": json.loads(LOOK),
    }  # some servers give no text
    assert read_turn(tool_calls=[{"function": function}]).call["value"] == -30
    assert read_turn("<think>x</think><answer>B</answer>").answer == "B"
    assert read_turn([{"type": "text", "text": "so <answer>B</answer>"}]).answer == "B"
    qwen = f'<think>x</think><tool_call>{{"name": "world_simulator_tool", "arguments": {LOOK}}}</tool_call>'
    assert read_turn(qwen).call["reference_image"] == 2  # a server that leaves Qwen's form alone
    assert read_turn("B").error
    assert read_turn(tool_calls=[{"function": {"name": None}}]).error


def test_a_dialogue_is_saved(tmp_path):
    dialogue, _ = talk(says("", LOOK), ANSWER, simulator=Mirror())
    dialogue.save(tmp_path)
    saved = json.loads((tmp_path / "dialogue.json").read_text())
    assert saved["turns"] == dialogue.turns and saved["ids"] == dialogue.ids
    assert (read(tmp_path / "image_3.png") == dialogue.images[2]).all()
    assert dialogue.transcript() and sum(dialogue.loss_mask)
