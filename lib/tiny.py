"""
The tokenizer of both tiny models: single bytes, and whole words of our small language.

Real checkpoints bring their own tokenizer. A tiny model learns in minutes only if the few facts of a sentence are few
tokens, so every word and fixed phrase of the templates is one token ("turn left", " 45", " red"), and the longest
match wins. Whatever is not in WORDS falls back to its UTF-8 bytes: any text can be read, and decoding gives it back
exactly. Special tokens and their roles are Qwen's, so the code around the tiny and the real models is the same.

    tokenizer = tiny_tokenizer()
    tokenizer.encode("turn left 45 degrees")        # 3 tokens
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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
    "system\n",
    "user\n",
    "assistant\n",
    "<tool_response>\n",
    "\n</tool_response>",
    # images and motions
    *(form.format(n) for form in ("Image-{}", " Image-{}", "Image-{}: ") for n in range(1, 10)),
    "Base on the viewpoint of",
    ", ",
    ". ",
    "turn left",
    "turn right",
    "look up",
    "look down",
    "move",
    "move left",
    "move right",
    "move up",
    "move down",
    "move forward",
    "move backward",
    " meters",
    " degrees",
    " to the left",
    " to the right",
    " forward",
    " backward",
    " up",
    " down",
    *sorted(f" {n}" for n in NUMBERS),
    # tool call
    '{"name": "imagine", "arguments": {"image":',
    ', "motion": "',
    '", "amount":',
    "}}",
    # what rooms contain and where
    " red",
    " green",
    " blue",
    " yellow",
    " purple",
    " orange",
    " cyan",
    " white",
    " pink",
    " black",
    " none",
    " box",
    " barrel",
    " ball",
    " table",
    " cabinet",
    " lamp",
    " left",
    " right",
    " centre",
    # questions (lib/questions.py), options, and the thoughts that the cold start teaches (train_sft.py)
    "Start from",
    " and ",
    ". Then ",
    "In",
    "How did the camera get from Image-1 to Image-2?",
    "which object looks largest?",
    "which object is furthest to the left?",
    "which object is furthest to the right?",
    *(f"which object fills most of the {third} third?" for third in ("left", "centre", "right")),
    *(f" it moved {way}" for way in ("to the left", "to the right", "forward", "backward")),
    " A",
    " B",
    " C",
    " D",
    "A.",
    "B.",
    "C.",
    "D.",
    "\nA.",
    "\nB.",
    "\nC.",
    "\nD.",
    "I need to see it.",
    "The camera:",
    " the new view:",
    *(f" Image-{n}:" for n in range(1, 10)),
    "largest in",
    "furthest left in",
    "furthest right in",
    "left third of",
    "centre third of",
    "right third of",
)


def tiny_tokenizer(phrases=()):
    """Build the tokenizer. `phrases`: further fixed sentences that become one token each (a policy's prompt template).

    The same WORDS and phrases give the same ids. `save_pretrained` writes it, `AutoTokenizer.from_pretrained` reads it.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 printable stand-ins for the bytes
    bytes_only = models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    tokenizer = Tokenizer(bytes_only)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(word, special=word in SPECIAL, normalized=False)
            for word in dict.fromkeys((*SPECIAL, *TAGS, *WORDS, *phrases))
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
        clean_up_tokenization_spaces=False,
    )


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
        "motion_to_target": True,
        "reference_first": True,
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
