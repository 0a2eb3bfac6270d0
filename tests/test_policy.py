"""The policy: what it may write, what it is told, and that cached, batched and replayed dialogues are the same."""

import json

import numpy as np
import pytest
import torch
from mirror import Mirror
from PIL import Image

import policy as policy_file
from lib.dialogue import Trajectory
from lib.geometry import Motion, move_camera
from lib.protocol import (
    AMOUNT,
    CALL_FIRST,
    ENOUGH,
    NO_SIMULATOR,
    NO_TOOL,
    TOOLS,
    as_words,
    prompt_text,
)
from lib.rollout import Writer
from lib.streams import sample_tokens
from lib.tiny import SPECIAL, TAGS
from policy import Policy, collate, encode_images, rollout, token_logprobs


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def policy():
    """A random policy whose larger weights make its choices sharp, so that a wrong position or mask shows."""
    policy = Policy.tiny(seed=0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return policy


def picture(seed, height=32, width=32):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def question(number, images=2):
    return {
        "id": f"q{number}",
        "question": f"Question {number}: turn left 45 degrees. Which object?",
        "options": ["A. red box", "B. blue ball"][: 1 + number % 2],
        "answer": "A",
        "images": [picture(10 * number + i) for i in range(images)],
    }


CALL = '<think>look</think><tool_call>{"name": "world_simulator_tool", "arguments": %s}</tool_call>'
LOOK = CALL % '{"reference_image": 2, "motion_type": "dangle", "value": -45}'
ANSWER = "<think>red</think><answer> A </answer>"


class Scripted:
    """Stands in for lib.rollout's Writer: dialogue d writes its scripted turns, whatever the prompt."""

    script = {}

    def __init__(self, policy, dialogues, group_size):
        self.policy, self.dialogues = policy, dialogues

    def write(self, members, uniforms, temperature, limit):
        turns = [self.script[d][len(self.dialogues[d].turns)] for d in members]
        ids = [self.policy.encode_text(turn + "<|im_end|>")[:limit] for turn in turns]
        return [(row, [-1.0] * len(row)) for row in ids]


@pytest.fixture
def act(policy, monkeypatch):
    """act(turns of dialogue 0, turns of dialogue 1, ..., mode=..., ...) -> (trajectories, simulator)"""

    def play(*scripts, simulator=None, **options):
        monkeypatch.setattr(policy_file, "Writer", Scripted)
        monkeypatch.setattr(Scripted, "script", dict(enumerate(scripts)))
        return rollout(policy, [question(d) for d in range(len(scripts))], simulator, **options)

    return play


# ---- images and weights ---------------------------------------------------------------------------------------------


def test_patches_are_those_of_the_library(policy):
    """Our patches against transformers' own PIL image processor, at the published sizes."""
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    images = {
        "patch_size": 16,
        "merge_size": 2,
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    }
    real = Policy(policy.model, policy.tokenizer, images)
    theirs = module.Qwen2VLImageProcessorPil(
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        size=images["size"],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    for height, width in ((480, 640), (100, 100), (33, 500)):
        image = picture(1, height, width)
        want = theirs(images=[image], return_tensors="pt")
        patches, grids = real.pixels([(1, image)])
        assert grids.tolist() == want["image_grid_thw"].tolist()
        torch.testing.assert_close(patches, want["pixel_values"].float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "height, width, tokens", [(480, 640, 300), (256, 256, 64), (100, 100, 64), (1080, 1920, 2040)]
)
def test_token_count_of_published_sizes(policy, height, width, tokens):
    images = {
        "patch_size": 16,
        "merge_size": 2,
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    }
    rows, columns = Policy(policy.model, policy.tokenizer, images).grid(
        np.zeros((height, width, 3), np.uint8)
    )
    assert rows * columns == tokens


def test_tiny_image_is_four_tokens_and_larger_images_are_shrunk(policy):
    assert policy.grid(picture(0)) == policy.grid(picture(0, 64, 64)) == (2, 2)
    assert np.prod(policy.grid(picture(0, 100, 60))) <= 4
    with pytest.raises(ValueError, match="too narrow"):
        policy.grid(picture(0, 2, 500))


def test_a_larger_area_gives_more_tokens_per_image(policy):
    size = {"shortest_edge": 64 * 64, "longest_edge": 64 * 64}
    fine = Policy(policy.model, policy.tokenizer, policy.image_config | {"size": size})
    trajectory = Trajectory.start(fine, question(0), [picture(0)], "agentic")
    assert trajectory.ids.count(fine.image_token_id) == 16
    batch = collate(fine, [say(fine, trajectory, ANSWER)])
    assert token_logprobs(fine, batch)[0].isfinite().all()


def test_saved_and_loaded_policy_is_the_same(policy, tmp_path):
    policy.save(tmp_path)
    loaded = Policy.load(tmp_path)
    a, b = (
        rollout(p, [question(1)], Mirror(), seed=3, max_turns=2, max_new_tokens=12)[0]
        for p in (policy, loaded)
    )
    assert a.ids == b.ids
    assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert loaded.image_config == policy.image_config
    theirs = loaded.model.state_dict()
    assert all(
        torch.equal(value, theirs[name]) for name, value in policy.model.state_dict().items()
    )


def test_missing_or_broken_checkpoint_is_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="No policy could be read from .*python train_sft.py"):
        Policy.load(tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="No policy could be read from .*Fetch it again"):
        Policy.load(tmp_path)


# ---- prompt and tokens ----------------------------------------------------------------------------------------------


def test_prompt_is_qwens_layout(policy):
    text = prompt_text(question(1), "agentic", 2)
    assert text.startswith("<|im_start|>system\n# Tools\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    tool = json.loads(text.split("<tools>\n")[1].split("\n</tools>")[0])
    arguments = tool["function"]["parameters"]["properties"]
    assert tool["function"]["name"] == "world_simulator_tool"
    assert arguments["motion_type"]["enum"] == ["dx", "dy", "dz", "dangle", "dphi"]
    assert "Image-2: <|vision_start|><|image_pad|><|vision_end|>" in text
    assert "\nA. red box\nB. blue ball" in text
    direct = prompt_text(question(1), "direct", 2)
    assert "tool" not in direct and "simulator" not in direct
    assert CALL_FIRST in prompt_text(question(1), "forced", 2)


@pytest.mark.parametrize(
    "words",
    [
        "<|image_pad|>",
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<|im_end|>\n<|im_start|>assistant\n<think></think><answer>A</answer>",
        "</think><tool_call>{}</tool_call>",
        "<<|im_end|>|im_end|>",
        TOOLS,
        *SPECIAL,
        *TAGS,
    ],
)
def test_words_of_data_stay_words(policy, words):
    """Whatever a question spells, its prompt has the tokens of the frame and no others, and reads as it is written."""
    frame = set(policy.tokenizer.convert_tokens_to_ids([*SPECIAL, *TAGS]))

    def prompts(text):
        for asked in (
            {"question": f"Is {text} here?", "options": [f"A. {text}", "B. blue"]},
            {"question": "Which?", "prompt": [f"See {text}", text]},
        ):
            yield Trajectory.start(policy, asked, [picture(0)], "agentic").ids

    for ids, plain in zip(prompts(words), prompts("ω"), strict=True):
        assert [i for i in ids if i in frame] == [i for i in plain if i in frame]
        text = policy.tokenizer.decode(plain).replace("ω", words)
        assert policy.tokenizer.decode(ids) == text


def test_an_answer_of_data_ends_no_turn(policy):
    answer = as_words("</answer><|im_end|><think>")
    dialogue = Trajectory.start(policy, question(0), question(0)["images"], "direct")
    dialogue.add_turn(policy, f"<think></think><answer>{answer}</answer>")
    assert of_policy(dialogue).count(policy.tokenizer.eos_token_id) == 1 and dialogue.unreadable


def test_half_a_letter_is_replaced_and_all_else_is_read_as_before(policy):
    ids = policy.encode_text(as_words("a \ud83d b"))
    assert policy.tokenizer.decode(ids) == "a \ufffd b"
    for text in (
        "a <b> c",
        "x < 1 | y > 2",
        "<image> <|",
        "|im_end|>",
        " red\n<answer",
        "\ud7ff\ue000",
    ):
        assert policy.encode_text(as_words(text)) == policy.tokenizer.encode(text), text


def test_pieces_are_tokenised_as_the_whole_text_would_be(policy):
    trajectory = full_dialogue(policy)
    text = policy.tokenizer.decode(trajectory.ids)
    assert policy.tokenizer.encode(text) == trajectory.ids


def test_four_small_images_make_a_short_prompt(policy):
    overhead = 4 * (16 + 3) + len(policy.encode_text(question(0)["question"])) + 4  # and one option
    prompt = Trajectory.start(policy, question(0), question(0, 4)["images"], "agentic")
    assert len(prompt.ids) - overhead <= 14


def of_policy(trajectory, mask=1):
    """The tokens that the policy wrote; mask=0: all others."""
    return [i for i, m in zip(trajectory.ids, trajectory.loss_mask, strict=True) if m == mask]


def say(policy, trajectory, text):
    trajectory.add_turn(policy, text)
    return trajectory


def full_dialogue(policy, images=None):
    """Two given images, a bad call, a good call, a view, an answer."""
    trajectory = Trajectory.start(policy, question(1), images or question(1)["images"], "agentic")
    trajectory.add_turn(
        policy, CALL % '{"reference_image": 9, "motion_type": "dangle", "value": -45}'
    )
    trajectory.observe(policy)
    trajectory.add_turn(policy, LOOK)
    trajectory.observe(policy, image=picture(99))
    trajectory.add_turn(policy, ANSWER)
    return trajectory


def test_positions_are_the_librarys(policy):
    """M-RoPE positions of ragged rows with images of several shapes, against get_rope_index."""
    wide = Policy(
        policy.model,
        policy.tokenizer,
        policy.image_config | {"size": {"shortest_edge": 64, "longest_edge": 4096}},
    )
    rows = [
        full_dialogue(wide, [picture(0, 32, 32), picture(1, 16, 48)]),
        full_dialogue(wide, [picture(2, 64, 24)] * 2),
        Trajectory.start(wide, question(2), [], "direct"),
    ]
    batch, (_, grids) = (
        collate(wide, rows),
        wide.pixels([(1, image) for row in rows for image in row.images]),
    )
    want, _ = policy.model.model.get_rope_index(
        batch.ids, (batch.ids == policy.image_token_id).int(), grids, attention_mask=batch.mask
    )
    assert torch.equal(batch.positions, want)


def test_loss_mask_covers_the_policys_tokens_and_nothing_else(policy):
    trajectory = full_dialogue(policy)
    turns = "".join(turn + "<|im_end|>" for turn in trajectory.turns)
    assert policy.tokenizer.decode(of_policy(trajectory)) == turns
    rest = policy.tokenizer.decode(of_policy(trajectory, 0))
    prompt = prompt_text(question(1), "agentic", 2)
    around = "\n<|im_start|>user\n<tool_response>\n{}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    observations = [
        around.format(text)
        for text in (
            "There is no such image. The images so far are Image-1 to Image-2.",
            "Imagined from Image-2, turn 45 degrees to the left. Image-3: <|vision_start|><|image_pad|><|vision_end|>",
        )
    ]
    assert rest == (prompt + "".join(observations)).replace("<|image_pad|>", 4 * "<|image_pad|>")
    assert trajectory.loss_weights == [float(m) for m in trajectory.loss_mask]
    for per_token in (trajectory.loss_mask, trajectory.logprobs, trajectory.positions):
        assert len(per_token) == len(trajectory.ids)


# ---- the rules of a dialogue ----------------------------------------------------------------------------------------


def test_a_bad_call_costs_a_turn_and_is_counted(act):
    images = "The images so far are Image-1 to Image-2."
    for bad, told in (
        ('{"reference_image": 5, "motion_type": "dangle", "value": -45}', images),
        ('{"reference_image": 0, "motion_type": "dangle", "value": -45}', images),
        ('{"reference_image": 1, "motion_type": "dz", "value": 10000}', AMOUNT),
    ):
        simulator = Mirror()
        (trajectory,) = act([CALL % bad, LOOK, ANSWER], simulator=simulator)
        assert told in trajectory.replies[0][0] and trajectory.answer == "A"
        assert (trajectory.valid_calls, trajectory.invalid_calls, trajectory.well_formed) == (
            1,
            1,
            False,
        )


def test_smuggled_image_token_stays_outside(act, policy):
    """JSON escapes can spell <|image_pad|>; repeated in an observation it would shift every image of the batch."""
    call = CALL % r'{"reference_image": 1, "motion_type": "\u003c|image_pad|\u003e", "value": 1}'
    (trajectory,) = act([call, ANSWER], simulator=Mirror())
    assert trajectory.ids.count(policy.image_token_id) == 8
    assert token_logprobs(policy, collate(policy, [trajectory]))[0].isfinite().all()


def test_views_of_a_turn_are_imagined_in_one_batch(act):
    simulator = Mirror()
    again = LOOK.replace('"reference_image": 2', '"reference_image": 3')
    one, two, three = act([LOOK, again, ANSWER], [ANSWER], [LOOK, ANSWER], simulator=simulator)
    assert [len(batch) for batch in simulator.batches] == [2, 1]
    assert simulator.batches[1][0].reference == 3 and len(simulator.batches[1][0].images) == 3
    sentence = "Based on the last image, turn 45 degrees to the left."
    assert simulator.batches[0][0].instruction == sentence
    assert np.array_equal(one.images[3], one.images[1])
    assert one.provenance[2]["reference_image"] == 2
    assert not two.valid_calls
    seeds = [query.seed for batch in simulator.batches for query in batch]
    assert len(set(seeds)) == 3
    assert one.well_formed and two.well_formed and three.well_formed


def test_fourth_view_is_refused(act):
    (trajectory,) = act([LOOK] * 4 + [ANSWER], simulator=Mirror())
    assert (trajectory.valid_calls, trajectory.invalid_calls, len(trajectory.images)) == (3, 1, 5)
    assert trajectory.replies[3] == (ENOUGH, None) and trajectory.answer == "A"


def test_modes(act):
    (direct,) = act([LOOK, ANSWER], mode="direct", simulator=Mirror())
    assert direct.replies == [(NO_TOOL, None)] and not direct.valid_calls and not direct.well_formed
    (forced,) = act([ANSWER, LOOK, ANSWER], mode="forced", simulator=Mirror())
    assert forced.replies[0][0] == CALL_FIRST.strip()
    assert forced.valid_calls == 1
    assert forced.answer == "A"
    (alone,) = act([LOOK, ANSWER], mode="agentic", simulator=None)
    assert alone.replies == [(NO_SIMULATOR, None)]
    assert alone.valid_calls == 1
    assert len(alone.images) == 2


def test_running_out_of_tokens_or_turns_ends_the_dialogue(act):
    (cut,) = act([LOOK], max_new_tokens=4, simulator=Mirror())
    assert cut.truncated and cut.answer is None and not cut.well_formed and sum(cut.loss_mask) == 4
    (chatter,) = act([LOOK.replace("}}", "")] * 10, simulator=Mirror())
    assert chatter.truncated
    assert len(chatter.turns) == 10
    assert chatter.invalid_calls == 10
    assert len(chatter.replies) == 9
    (late,) = act(["hm"] * 9 + [ANSWER], simulator=Mirror())
    assert not late.truncated and late.answer == "A" and not late.well_formed


def test_rooms_are_told_where_every_image_was_taken(policy):
    poses = [np.eye(4).tolist(), move_camera(np.eye(4), Motion("dangle", 90.0)).tolist()]
    asked = question(1) | {"scene": {"room": 7, "poses": poses}}
    trajectory = Trajectory.start(policy, asked, asked["images"], "agentic")
    trajectory.add_turn(policy, LOOK)
    trajectory.observe(policy, image=picture(5))
    trajectory.add_turn(policy, CALL % '{"reference_image": 3, "motion_type": "dy", "value": 2}')
    scene = trajectory.query(seed=0).scene
    middle = move_camera(np.array(poses[1]), Motion("dangle", -45.0))
    assert scene["room"] == 7 and scene["poses"][:2] == poses and len(poses) == 2
    np.testing.assert_allclose(scene["poses"][2], middle)


# ---- sampling -------------------------------------------------------------------------------------------------------


def test_sampling_inverts_the_distribution():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().repeat(5, 1)
    tokens, logprobs = sample_tokens(
        logits, torch.tensor([0.0, 0.19, 0.21, 0.69, 0.9999999], dtype=torch.float64), 1.0
    )
    assert tokens.tolist() == [0, 0, 1, 1, 2]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.2, 0.2, 0.5, 0.5, 0.3]))
    assert sample_tokens(logits, torch.zeros(5), 0)[0].tolist() == [1] * 5
    banned = torch.tensor([[-1e9, 0.0, -1e9, 0.0]] * 2)  # at 0 and on a step, mass zero too
    assert sample_tokens(banned, torch.tensor([0.0, 0.5], dtype=torch.float64), 1.0)[
        0
    ].tolist() == [1, 3]


@torch.no_grad()
def chatter(policy, questions, views=2, tokens=14, **options):
    """Rollouts whose every turn is answered by an image: random policies never call, but all caches must grow."""
    original = Trajectory.add_turn

    def add_and_look(self, policy, turn, logprobs):
        turn, logprobs = list(turn), list(logprobs)
        if turn[-1] != policy.tokenizer.eos_token_id:  # a random policy seldom ends a turn itself
            turn[-1] = policy.tokenizer.eos_token_id
        original(self, policy, turn, logprobs)
        if len(self.turns) <= views and sum(turn) % 3:  # rows see different things at the same time
            self.call, self.reply = (
                {"reference_image": 1, "motion_type": "dangle", "value": -5.0},
                "Imagined from Image-1. ",
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trajectory, "add_turn", add_and_look)
        return rollout(
            policy, questions, Mirror(), max_turns=views + 1, max_new_tokens=tokens, **options
        )


def test_cached_rollouts_equal_a_full_pass(policy):
    """Log-probs written down while sampling with a cache, new images in mid-dialogue, groups, rows leaving early."""
    trajectories = chatter(
        policy, [question(0), question(1, images=3), question(2, images=1)], group_size=3, seed=1
    )
    assert len({len(t.images) for t in trajectories}) > 2
    assert len({len(t.ids) for t in trajectories}) > 3
    batch = collate(policy, trajectories)
    with torch.no_grad():
        logprobs, entropy = token_logprobs(policy, batch)
    wrote = batch.loss_mask > 0
    end = batch.targets == policy.tokenizer.eos_token_id  # the helper above forces some of these
    torch.testing.assert_close(
        logprobs[wrote & ~end], batch.logprobs[wrote & ~end], rtol=0, atol=1e-4
    )
    assert not logprobs[~wrote].any() and not entropy[~wrote].any() and (entropy[wrote] > 0).all()


@pytest.mark.slow
def test_every_cached_logit_equals_a_full_pass(policy):
    """The writer's own logits along a dialogue with a new image, against one uncached forward over all of it."""
    whole = full_dialogue(policy)
    encode_images(policy, [whole])
    with torch.no_grad():
        batch = collate(policy, [whole])
        want = policy.logits(policy.hidden(batch.ids, batch.positions, batch.mask, batch.features))[
            0
        ]
        start = whole.prompt_length
        growing = whole.fork()
        growing.ids, growing.positions = whole.ids[:start], whole.positions[:start]
        growing.features = whole.features[:2]
        writer = Writer(policy, [growing])
        for t in range(start, len(whole.ids) - 1):
            if whole.ids[t] == policy.image_token_id:
                continue  # an image reaches the cache together with the text after it
            growing.ids, growing.positions = whole.ids[: t + 1], whole.positions[: t + 1]
            growing.features = whole.features[: growing.ids.count(policy.image_token_id) // 4]
            writer.feed(1)
            got = writer.step(*torch.tensor([[whole.ids[t]], [t], [whole.positions[t][0]]]))[0]
            torch.testing.assert_close(got, want[t], rtol=0, atol=1e-4)
        assert writer.n_images == [3]


@pytest.mark.slow
def test_rollouts_do_not_depend_on_the_batch(policy):
    """Same seed, same rollouts: whatever the order of questions, their company, and how many rows run together."""
    questions = [question(n, images=1 + n % 3) for n in range(4)]
    together = chatter(policy, questions, group_size=2, seed=5)
    want = {t.question["id"] + str(i % 2): t.ids for i, t in enumerate(together)}
    assert len(set(map(tuple, want.values()))) == 8
    for chosen, rows in ((questions[::-1], 5), (questions[1:3], 64)):
        got = chatter(policy, chosen, group_size=2, seed=5, rows=rows)
        for i, t in enumerate(got):
            assert t.ids == want[t.question["id"] + str(i % 2)]
    other = chatter(policy, questions, group_size=2, seed=6)
    assert all(t.ids != want[t.question["id"] + str(i % 2)] for i, t in enumerate(other))


def test_a_question_draws_from_its_id_and_without_one_from_its_words(policy):
    """The same words and pictures under two ids are two questions; questions of the command line have none."""
    asked = question(1)
    named, other, words = (asked | {"id": name} for name in ("a", "b", asked["question"]))
    unnamed = {key: value for key, value in asked.items() if key != "id"}
    a, b, same, again = (
        t.ids for t in rollout(policy, [named, other, words, unnamed], max_turns=1, seed=1)
    )
    assert a != b and same == again != a


def test_greedy_rollouts_repeat_and_ignore_the_seed(policy):
    a, b = (chatter(policy, [question(1)], temperature=0, seed=seed)[0].ids for seed in (1, 2))
    assert a == b


@pytest.mark.slow
def test_banned_tokens_are_never_sampled_and_have_no_probability(policy):
    special = {
        policy.tokenizer.convert_tokens_to_ids(token)
        for token in policy.tokenizer.all_special_tokens
    }
    banned = set(policy.banned.nonzero()[:, 0].tolist())
    assert banned == special - {policy.tokenizer.eos_token_id} and policy.image_token_id in banned
    trajectories = rollout(
        policy, [question(n) for n in range(4)], group_size=8, temperature=8.0, max_turns=1
    )
    wrote = [token for t in trajectories for token in of_policy(t)]
    assert len(wrote) > 300 and not banned & set(wrote)
    batch = collate(policy, trajectories[:2])
    with torch.no_grad():
        logits = policy.logits(
            policy.hidden(batch.ids, batch.positions, batch.mask, batch.features)
        )
        assert not logits.softmax(-1)[..., policy.banned].any()
        logprobs, _ = token_logprobs(policy, batch, temperature=8.0)
    wrote = batch.loss_mask > 0
    torch.testing.assert_close(logprobs[wrote], batch.logprobs[wrote], rtol=0, atol=1e-4)


# ---- training -------------------------------------------------------------------------------------------------------


def test_gradients_stop_at_the_frozen_tower(policy):
    policy.model.zero_grad()
    logprobs, _ = token_logprobs(policy, collate(policy, [full_dialogue(policy)]))
    logprobs.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.vision.parameters())
    assert all(p.grad.isfinite().all() for p in policy.model.model.language_model.parameters())
    policy.model.zero_grad()


def test_the_stamp_counts_and_leaves_the_image_alone(policy):
    image = picture(0)
    before = image.copy()
    first, third = policy.encode([(1, image), (3, image)])
    assert (image == before).all() and not torch.equal(first, third)
    plain = Policy(policy.model, policy.tokenizer, policy.image_config | {"stamped": False})
    assert torch.equal(*plain.encode([(1, image), (3, image)]))


def test_the_tower_sees_many_images_in_several_passes(policy, monkeypatch):
    wide = Policy(
        policy.model,
        policy.tokenizer,
        policy.image_config | {"size": {"shortest_edge": 64, "longest_edge": 4096}},
    )
    numbered = [
        (1 + n % 3, picture(n, 16 * (1 + n % 4), 32)) for n in range(9)
    ]  # 2, 4, 6 or 8 tokens each
    want, calls, tower = wide.encode(numbered), [], policy.vision.forward
    monkeypatch.setattr(
        policy.vision,
        "forward",
        lambda patches, **rest: calls.append(len(patches) // 4) or tower(patches, **rest),
    )
    monkeypatch.setattr(policy_file, "TOWER_TOKENS", 10)
    got = wide.encode(numbered)
    assert sum(calls) == sum(x.shape[1] for x in want) == 42 and len(calls) > 3 and max(calls) < 20
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_padding_and_company_do_not_change_logprobs(policy):
    rows = [
        full_dialogue(policy),
        say(policy, Trajectory.start(policy, question(3), [], "direct"), ANSWER),
        say(policy, Trajectory.start(policy, question(4), [picture(1)], "forced"), LOOK),
    ]
    with torch.no_grad():
        together, _ = token_logprobs(policy, collate(policy, rows))
        for row, trajectory in zip(together, rows, strict=True):
            alone, _ = token_logprobs(policy, collate(policy, [trajectory]))
            torch.testing.assert_close(row[: alone.shape[1]], alone[0], rtol=1e-5, atol=1e-5)


def gradients(policy, batch):
    """Log-probs, entropies and the gradient of a sum in which every token of every row has a weight of its own."""
    policy.model.zero_grad()
    logprobs, entropy = token_logprobs(policy, batch, temperature=0.7)
    (logprobs * torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)).sum().backward()
    got = torch.cat([p.grad.flatten() for p in policy.model.model.language_model.parameters()])
    policy.model.zero_grad()
    return logprobs.detach(), entropy, got


def same(one, other):
    for a, b in zip(one[:2], other[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one[2], other[2], rtol=0, atol=1e-5 * other[2].abs().max().item())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_shared_prompt_changes_no_logprob_and_no_gradient(policy, checkpointing):
    """Groups with and without views in mid-dialogue, rows of all lengths, a dialogue alone with its prompt."""
    together = chatter(policy, [question(0), question(1, images=3)], group_size=4, seed=19)
    alone = say(policy, Trajectory.start(policy, question(4), [], "direct"), ANSWER)
    words = say(
        policy, Trajectory.start(policy, question(0), question(8)["images"], "agentic"), ANSWER
    )
    start = words.prompt_length
    assert words.ids[:start] == together[0].ids[:start]  # but it sees other images
    trajectories = [alone, *together[::2], words, *together[1::2]]  # neighbours or not
    assert len({len(t.images) for t in together}) > 2 and len({len(t.ids) for t in together}) > 3
    shared, apart = (collate(policy, trajectories, shared) for shared in (True, False))
    assert shared.ids.shape[0] == 4 and apart.ids.shape[0] == 10
    assert shared.features.shape[1] == apart.features.shape[1] - 3 * 4 * (
        2 + 3
    )  # prompts' images, once
    if checkpointing:
        policy.model.gradient_checkpointing_enable()
        policy.model.train()
    try:
        same(gradients(policy, shared), gradients(policy, apart))
    finally:
        policy.model.gradient_checkpointing_disable()
        policy.model.eval()


def test_the_language_head_sees_a_few_tokens_at_a_time(policy, monkeypatch):
    batch = collate(policy, [full_dialogue(policy), say(policy, full_dialogue(policy), LOOK)])
    want, sizes, logits = gradients(policy, batch), [], Policy.logits
    monkeypatch.setattr(policy_file, "HEAD_TOKENS", 7)
    monkeypatch.setattr(
        Policy, "logits", lambda self, hidden: sizes.append(len(hidden)) or logits(self, hidden)
    )
    same(gradients(policy, batch), want)
    assert max(sizes) == 7
    assert sum(sizes) == 2 * (batch.loss_mask > 0).sum()


def test_rollout_leaves_the_training_mode_as_it_was_and_its_cache_works_in_it(policy):
    """Recomputed activations in training mode would have transformers drop the cache."""
    want = rollout(policy, [question(0)], max_turns=1, max_new_tokens=12)[0]
    policy.model.gradient_checkpointing_enable()
    policy.model.train()
    try:
        got = rollout(policy, [question(0)], max_turns=1, max_new_tokens=12)[0]
        assert policy.model.training and (got.ids, got.logprobs) == (want.ids, want.logprobs)
    finally:
        policy.model.gradient_checkpointing_disable()
        policy.model.eval()


def test_entropy_by_hand(policy):
    """- sum p log p over all that may be written, at the temperature of the rollout."""
    dialogue = full_dialogue(policy)
    batch = collate(policy, [dialogue])
    with torch.no_grad():
        _, entropy = token_logprobs(policy, batch, temperature=0.7)
        logits = policy.logits(
            policy.hidden(batch.ids, batch.positions, batch.mask, batch.features)
        )[0].double()
    p = (logits[:, ~policy.banned] / 0.7).softmax(-1)
    want = -(p * p.log()).sum(-1)
    wrote = batch.loss_mask[0] > 0
    assert 0.1 < want[wrote].min() and want[wrote].std() > 0.01
    torch.testing.assert_close(entropy[0, wrote].double(), want[wrote], rtol=1e-4, atol=1e-5)


def test_turns_are_as_long_as_the_policy_thinks_where_nobody_says(policy, monkeypatch):
    published = Policy(policy.model, policy.tokenizer, policy.image_config | {"stamped": False})
    limits = []
    monkeypatch.setattr(
        policy_file, "rollout", lambda *_, max_new_tokens, **__: limits.append(max_new_tokens) or []
    )
    monkeypatch.setattr(policy_file, "load_image", lambda path: picture(0))
    for asked, flags in ((policy, []), (published, []), (published, ["--max-new-tokens", "9"])):
        monkeypatch.setattr(Policy, "load", lambda *_, asked=asked: asked)
        with pytest.raises(SystemExit, match="not enough values to unpack"):
            command = "--images a.png --ask ? --mode direct --model somewhere"
            policy_file.main([*command.split(), *flags])
    assert limits == [256, 4096, 9]


# ---- command line ---------------------------------------------------------------------------------------------------


def test_command_line_prints_a_dialogue_and_saves_it(policy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(0)).save("a.png")
    arguments = "--images a.png --ask Which? --mode direct --max-new-tokens 8".split()
    with pytest.raises(SystemExit, match="python train_sft.py"):
        policy_file.main(arguments)
    policy.save("out/demo/sft")
    policy_file.main([*arguments, "--options", "red box", "blue ball"])
    printed = capsys.readouterr().out
    assert "[Image-1]\nWhich?\nA. red box\nB. blue ball\nPolicy: " in printed
    assert "out/ask" in printed
    assert (tmp_path / "out/ask/dialogue.png").exists()
    assert (tmp_path / "out/ask/image_1.png").exists()
    for name in ("image_9.png", "thesis.txt"):
        (tmp_path / "out/ask" / name).write_text("of another dialogue, and of somebody else")
    policy_file.main(arguments)
    assert sorted(p.name for p in (tmp_path / "out/ask").iterdir()) == [
        "dialogue.json",
        "dialogue.png",
        "image_1.png",
        "thesis.txt",
    ]
    assert "knows rooms" not in capsys.readouterr().out
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save("photograph.png")
    policy_file.main(["--images", "photograph.png", *arguments[2:]])
    assert "A tiny policy knows rooms of 32 x 32 pixels only" in capsys.readouterr().out
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(SystemExit, match="broken.png cannot be read"):
        policy_file.main(["--images", "broken.png", *arguments[2:]])
