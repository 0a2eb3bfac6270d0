"""
What only tiny models have: a tokenizer of their own, sizes, and images that carry their number.

Real checkpoints bring their own tokenizer. A tiny model learns in minutes only if the few facts of a sentence are few
tokens, so every word and fixed phrase of the templates is one token ("move forward by", " 45", " red"), and the longest
match wins. Whatever is not in WORDS falls back to its UTF-8 bytes: any text can be read, and decoding gives it back
exactly. Special tokens and their roles are Qwen's, so the code around the tiny and the real models is the same.

    tokenizer = tiny_tokenizer()
    tokenizer.encode("turn 45 degrees to the left")        # 4 tokens
"""

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig

from lib.geometry import KINDS

# ---- the tokenizer ---------------------------------------------------------------------------------------------------

# Skipped by decode(skip_special_tokens=True). A policy may write none of them but <|im_end|>.
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

TAGS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<answer>",
    "</answer>",
)

# The motion grid: 5-degree and 0.1-metre steps, and the numbers of images.
NUMBERS = {f"{n:g}" for n in [*range(1, 10), *range(5, 185, 5), *(m / 10 for m in range(1, 31))]}

WORDS = (
    # chat layout
    *("system\n", "user\n", "assistant\n", "<tool_response>\n", "\n</tool_response>"),
    # images and motions
    *(form.format(n) for form in ("Image-{}", " Image-{}", "Image-{}: ") for n in range(1, 10)),
    *("Based on the last image", "Base on the viewpoint of", ", ", ". ", "turn", "move"),
    *(f"move {way} by" for way in ("forward", "backward", "up", "down")),
    *("pitch up by", "pitch down by", " meters", " degrees", " to the left", " to the right"),
    " parallel to the ground",
    *(f" {sign}{n}" for sign in ("", "-") for n in sorted(NUMBERS)),
    # tool call
    *('{"name": "world_simulator_tool", "arguments": {"reference_image":', "}}"),
    *(', "motion_type": "', *KINDS, '", "value":'),
    # what rooms contain and where
    *(" red", " green", " blue", " yellow", " purple", " orange", " cyan", " white", " pink"),
    *(" black", " none", " box", " barrel", " ball", " table", " cabinet", " lamp"),
    *(" left", " right", " centre"),
    # questions (lib/questions.py), options, and the thoughts that the cold start teaches (train_sft.py)
    *("Start from", " and ", ". Then ", "In", "Turn until the", " object is", " is in"),
    *(" straight ahead", " behind you", " on your left", " on your right"),
    "which object looks largest?",
    "which object is furthest to the left?",
    "which object is furthest to the right?",
    *(f"which object fills most of the {third} third?" for third in ("left", "centre", "right")),
    *(" A", " B", " C", " D", "A.", "B.", "C.", "D.", "\nA.", "\nB.", "\nC.", "\nD."),
    *("I need to see it.", " the new view:"),
    *(f" Image-{n}:" for n in range(1, 10)),
    *("largest in", "furthest left in", "furthest right in"),
    *("left third of", "centre third of", "right third of"),
)

# What questions about motions (extras/world2vlm) say beside objects, boxes and actions: of a tiny policy's vocabulary,
# which all its weights are drawn from. A prompt takes 64 to 276 tokens in letters and 1 to 47 in these phrases.
_ACTIONS = ("turn left", "turn right", "move left", "move right", "move forward", "move backward")
_ALLOWED = (
    "Write the full action sequence using ';' as a separator. Allowed actions:\n"
    "- move forward/backward/left/right X meters\n- turn left/right X degrees"
)
MOTION_PHRASES = (
    *_ACTIONS,
    "How many meters did the camera move to get the second image? "
    "Answer as: move forward/backward/left/right X meters.",
    "How many degrees did the camera turn to get the second image? "
    "Answer as: turn left/right X degrees.",
    "To move from the first image to the second image, the camera used 2 or 3 actions in order. "
    + _ALLOWED,
    'True or false: the camera did "',
    '" to get the second image.',
    "In the first image, the",
    " is at bbox ",
    '. Bboxes use normalized integer coordinates in [0,1000]. After the camera does "',
    '", give the bbox of the same',
    " in the second image. Answer with bbox [x1, y1, x2, y2] only.",
    "In the image, the",
    '. After the camera does "',
    '", does this',
    " disappear from view? Answer: yes or no.",
    "The",
    " in the first image (bbox ",
    ") and the",
    " in the second image (bbox ",
    ") are the same physical object. The camera used 1 or 2 actions in order. " + _ALLOWED,
    '", the second image shows a',
    " at bbox ",
    ". Are these the same physical object instance? Answer: yes or no.",
    "; ",
    "yes",
    "no",
    "true",
    "false",
)


def tiny_tokenizer(phrases: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Build the tokenizer. `phrases`: further fixed sentences that become one token each (a policy's prompt template).

    The same WORDS and phrases give the same ids. `save_pretrained` writes it, `AutoTokenizer.from_pretrained` reads it.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 printable stand-ins for the bytes
    bytes_only = models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    tokenizer = Tokenizer(bytes_only)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    for word in dict.fromkeys((*SPECIAL, *TAGS, *WORDS, *phrases)):
        tokenizer.add_tokens([AddedToken(word, special=word in SPECIAL, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
        clean_up_tokenization_spaces=False,
    )


# ---- the tiny policy -------------------------------------------------------------------------------------------------


def tiny_policy_config(tokenizer: PreTrainedTokenizerFast) -> tuple[Qwen3VLConfig, dict]:
    """Sizes of a policy of 1.9 M parameters -> its network's, and its images' (preprocessor_config.json).

    An image of 32 x 32 pixels becomes 2 x 2 tokens of 2 x 2 patches each.
    """
    width, patch, side = 128, 8, 32
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=width**-0.5,  # keeps a vector's length; the usual 0.02 is for wide models
        rope_parameters=dict(
            rope_type="default",
            rope_theta=5e6,
            mrope_interleaved=True,
            mrope_section=[8, 4, 4],  # time, row, column
        ),
    )
    vision = dict(
        depth=2,
        hidden_size=width,
        intermediate_size=384,
        num_heads=4,
        patch_size=patch,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=width,
        num_position_embeddings=(side // patch) ** 2,
        deepstack_visual_indexes=[0],
    )
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    area = side * side
    size = {"shortest_edge": area, "longest_edge": area}
    return config, {"patch_size": patch, "merge_size": 2, "stamped": True, "size": size}


def stamp(image: np.ndarray, number: int) -> np.ndarray:
    """Mark an image (H, W, 3) with its number: that many black squares along the upper edge, as on a contact sheet.

    A departure of the tiny policy ("stamped" in preprocessor_config.json): to bind the words "Image-3" to the picture
    behind them takes a two-step look-up that a small transformer does not learn in minutes (measured: facts of one
    image among four stayed at .3 for 60 CPU-s without, and reached .55 within 30 with it). Published checkpoints know
    how to, and see their images as they are. The simulator never sees the mark.
    """
    image = image.copy()
    side = max(1, image.shape[0] // 16)
    for k in range(number):
        left = 3 * side * k // 2
        image[:side, left : left + side] = 0
    return image


# ---- the tiny world model ------------------------------------------------------------------------------------------


def tiny_bagel_files(size: int, vocabulary: int) -> dict[str, dict]:
    """What the json files of the tiny world model hold, by their names: 2 M parameters for size x size pictures."""
    llm = {
        "model_type": "qwen2",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 352,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    vit = {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 16,
        "image_size": size,
    }
    astra = {  # fields of lib.bagel.Settings
        "prediction": "x0",
        "rays": True,
        "words": False,
        "max_context": 5,
        "learned_places": True,
        "latent": "pixels",
        "vae_limits": (size, size, 8),
        "vit_limits": (size, size, 16),
        "steps": 4,
        "shift": 1.0,
        "text_scale": 1.0,
        "image_scale": 1.0,
    }
    return {"llm_config": llm, "vit_config": vit, "config": {"astra": astra}}
