"""
Many dialogues at once: the cache in which they are written, and the rows in which they are learned from.

While dialogues are written, row b of one KV cache is dialogue b: its token i stands in slot i, nothing between. So
dialogues of different lengths grow together, nothing is encoded twice, and one rule is the whole mask: a token in slot
s sees the slots 0 .. s of its row. A batch is right-padded; what padding writes lies beyond the row's end, where nobody
looks until the next token overwrites it. The rows that are writing stand first, a finished one changes places with the
last of them: a step works on a prefix of the cache, and no cache is copied. The cache always lacks the last token of a
dialogue: feeding it gives the distribution of the next one.

While they are learned from, dialogues with the same prompt share a row: `Layout` alone knows where their tokens stand.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

from lib.distributed import fail
from lib.packing import compiled_once, padded
from lib.streams import sample_tokens

# ---- writing ---------------------------------------------------------------------------------------------------------


class RowCache:
    """Keys and values of all rows and layers; what transformers' attention layers call `past_key_values`."""

    def __init__(self, rows: int):
        self.rows = rows
        self.layers = []  # per layer (2, rows, kv heads, capacity, head dim): keys and values
        self.slots = None  # (n, m) where the next forward pass writes, n <= rows
        self.seen = 0  # how many slots that pass attends to

    def aim(self, slots: torch.Tensor, device) -> torch.Tensor:
        """Where the next pass writes, (n, m) on the CPU -> what it may look at, (n, 1, m, seen) bool on `device`."""
        self.slots, self.seen = slots.to(device), int(slots.max()) + 1
        return torch.arange(self.seen, device=device) <= self.slots[:, None, :, None]

    def update(self, keys, values, layer: int, *_, **__):
        """Write keys and values (n, kv heads, m, head dim) of one layer; return all those of the n rows so far."""
        n, heads, _, width = keys.shape
        if layer == len(self.layers):
            self.layers.append(keys.new_zeros(2, self.rows, heads, 0, width))
        store = self.layers[layer]
        if self.seen > store.shape[3]:  # room for 64 more tokens at a time
            room = keys.new_zeros(2, self.rows, heads, self.seen + 64 - store.shape[3], width)
            store = self.layers[layer] = torch.cat([store, room], 3)
        slots = self.slots[:, None, :, None].expand_as(keys)
        store[0, :n].scatter_(2, slots, keys)
        store[1, :n].scatter_(2, slots, values)
        return store[0, :n, :, : self.seen], store[1, :n, :, : self.seen]

    def repeat(self, times: int) -> None:
        """Each row becomes `times` neighbouring rows: a question's prompt, shared by its group."""
        self.rows *= times
        self.layers = [store.repeat_interleave(times, 1) for store in self.layers]


class Writer:
    """Samples turns for a fixed list of dialogues.

    dialogues   (Q * group_size) Trajectories, question-major; those of a group are equal so far
    The writer reads their `ids`, `positions` and `features`, and never changes them.
    """

    def __init__(self, policy, dialogues: list, group_size: int = 1):
        self.policy, self.dialogues = policy, dialogues
        self.cache = RowCache(len(dialogues) // group_size)
        self.filled = [0] * len(dialogues)  # tokens of dialogue d in the cache
        self.n_images = [0] * len(dialogues)  # images of dialogue d in the cache
        self.order = list(range(0, len(dialogues), group_size))  # which dialogue is in which row
        self.feed(len(self.order))  # every prompt once
        self.cache.repeat(group_size)
        self.order = list(range(len(dialogues)))
        self.filled = [len(dialogue.ids) - 1 for dialogue in dialogues]
        self.n_images = [len(dialogue.features) for dialogue in dialogues]

    def write(self, members: list[int], uniforms: torch.Tensor, temperature: float, limit: int):
        """Let some dialogues write one turn each, of `limit` tokens at most.

        members    which dialogues; uniforms (dialogues, limit) in [0, 1), float64: what each row's sampling draws
        returns    per member (ids, logprobs): the tokens as sampled, <|im_end|> last unless the limit cut the turn
        """
        n = len(members)
        eos = self.policy.tokenizer.eos_token_id
        # they stand first, in any order: a row that is swapped is copied in every layer
        others = [row for row in range(n) if self.order[row] not in members]
        for row in range(n, len(self.order)):
            if self.order[row] in members:
                self.swap(others.pop(), row)
        self.feed(n)
        turns = {d: ([], []) for d in members}  # ids, logprobs
        token = {d: self.dialogues[d].ids[-1] for d in members}  # to feed next
        position = {d: self.dialogues[d].positions[-1][0] for d in members}
        for k in range(limit):
            writing = self.order[:n]
            rows = [[token[d], self.filled[d] + k, position[d] + k] for d in writing]
            logits = self.step(*torch.tensor(rows).T)  # tokens, slots, positions (n,)
            tokens, logprobs = sample_tokens(logits, uniforms[writing, k], temperature)
            if logprobs.isnan().any():
                fail("The policy's logits are no numbers. Take an earlier checkpoint.")
            tokens, logprobs = tokens.tolist(), logprobs.tolist()
            for row in reversed(range(len(writing))):
                d = writing[row]
                turns[d][0].append(tokens[row])
                turns[d][1].append(logprobs[row])
                token[d] = tokens[row]
                if token[d] == eos:  # the row leaves the batch
                    n -= 1
                    self.swap(row, n)
            if n == 0:
                break
        for d in members:
            self.filled[d] += len(turns[d][0])
        return [turns[d] for d in members]

    def feed(self, n: int) -> None:
        """Bring the cache of the first n rows up to date, to all tokens but the last."""
        ids, positions, features, starts = [], [], [], []
        for d in self.order[:n]:
            dialogue, start = self.dialogues[d], self.filled[d]
            ids.append(torch.tensor(dialogue.ids[start:-1], dtype=torch.long))
            positions.append(torch.tensor(dialogue.positions[start:-1]))
            features += dialogue.features[self.n_images[d] :]
            starts.append(start)
            self.filled[d] += len(ids[-1])
            self.n_images[d] = len(dialogue.features)
        ids = padded(ids, self.policy.tokenizer.pad_token_id)  # (n, m)
        if not ids.numel():
            return
        positions = padded(positions).movedim(-1, 0)  # (3, n, m)
        device = self.policy.device
        slots = torch.tensor(starts)[:, None] + torch.arange(ids.shape[1])
        mask = self.cache.aim(slots, device)
        features = torch.cat(features, 1) if features else None
        self.policy.hidden(ids.to(device), positions.to(device), mask, features, self.cache)

    def step(self, tokens, slots, positions) -> torch.Tensor:
        """Feed one token to each of the first n rows: (n,) each -> logits (n, vocabulary) of what follows it.

        The decoder of transformers by hand, with its own modules: the general code takes three times the operations.
        """
        text, device, n = self.policy.model.model.language_model, self.policy.device, len(tokens)
        tokens, positions = tokens.to(device), positions.to(device)
        x = text.embed_tokens(tokens)  # (n, width)
        mask = self.cache.aim(slots[:, None], device)  # (n, 1, 1, seen)
        mask = mask.to(x.dtype).log()  # 0 or -inf, as SDPA would make it per layer
        cos, sin = text.rotary_emb(x, positions.expand(3, 1, -1))  # time = row = column
        before, after = before_attention, after_attention
        # one token is so little work that starting kernels takes longer
        if x.is_cuda:
            before, after = compiled_once(before), compiled_once(after)
        for number, layer in enumerate(text.layers):
            q, k, v = before(layer, x, cos[0], sin[0])
            keys, values = self.cache.update(k[:, :, None], v[:, :, None], number)
            # query heads that share a key head stand as that many queries of it: no key is copied
            q = q.view(n, keys.shape[1], -1, q.shape[-1])
            y = F.scaled_dot_product_attention(q, keys, values, mask)
            x = after(layer, x, y.reshape(n, -1))
        return self.policy.logits(text.norm(x))

    def swap(self, i: int, j: int) -> None:
        """Let two rows change places."""
        if i != j:
            for store in self.cache.layers:
                store[:, [i, j]] = store[:, [j, i]]
            self.order[i], self.order[j] = self.order[j], self.order[i]


def before_attention(layer, x, cos, sin):
    """x (n, width) -> a layer's queries (n, heads, head dim), keys and values (n, kv heads, head dim)."""
    attention, y = layer.self_attn, layer.input_layernorm(x)
    heads = (len(x), -1, attention.head_dim)
    q = attention.q_norm(attention.q_proj(y).view(heads))
    k = attention.k_norm(attention.k_proj(y).view(heads))
    return *apply_rotary_pos_emb(q, k, cos, sin), attention.v_proj(y).view(heads)


def after_attention(layer, x, y):
    """The rest of the layer: x (n, width), y (n, heads * head dim) of the attention -> (n, width)."""
    x = x + layer.self_attn.o_proj(y)
    return x + layer.mlp(layer.post_attention_layernorm(x))


# ---- learning: dialogues that share their prompt ---------------------------------------------------------------------


class Layout(NamedTuple):
    """Where the tokens of dialogues stand in the rows of one batch: [ prompt | rest | rest | ... ].

    Each dialogue's rest sees the prompt, and of itself what came before. Three dialogues with a prompt
    of 4 tokens (the longest has 5) and rests of up to 3:    [ p p p p . | a a . | b b b | c . . ]
    Rows hold all tokens of a dialogue but the last, which predicts nothing. Where none is shared, they are all prompt.
    """

    rows: list[list[int]]  # per row, the numbers of its dialogues
    prompt_lengths: list[int]  # per row, the tokens of its own prompt
    prompt_width: int  # columns of the longest prompt
    n_rests: int  # of the row with most dialogues
    rest_width: int  # columns of each: those of the longest; 0 where no row is shared

    @classmethod
    def of(cls, trajectories: list, share_prompts: bool) -> "Layout":
        """The rows of a batch. share_prompts: dialogues with the same prompt make one row, neighbours or not."""
        by_prompt = {}
        for number, trajectory in enumerate(trajectories):
            key = trajectory.prompt_key if share_prompts else number
            by_prompt.setdefault(key, []).append(number)
        rows = list(by_prompt.values())
        lengths = [len(trajectory.ids) - 1 for trajectory in trajectories]
        if len(rows) == len(trajectories):  # each alone: ordinary rows, all prompt
            return cls(rows, lengths, max(lengths), 1, 0)
        prompts = [trajectory.prompt_length for trajectory in trajectories]
        rests = [length - prompt for length, prompt in zip(lengths, prompts, strict=True)]
        prompt_lengths = [prompts[numbers[0]] for numbers in rows]
        return cls(rows, prompt_lengths, max(prompts), max(map(len, rows)), max(rests))

    @property
    def width(self) -> int:
        """Cells of a row."""
        return self.prompt_width + self.n_rests * self.rest_width

    def columns(self, row: int, member: int, count: int) -> list[int]:
        """Where the first `count` tokens of dialogue number `member` of a row stand."""
        length = self.prompt_lengths[row]
        first = self.prompt_width + member * self.rest_width
        return [*range(length), *range(first, first + count - length)]

    def mask(self) -> torch.Tensor:
        """(R, width), 1 = token; of shared rows (R, rests, width of a rest, prompt + that) bool, for `shared_attention`."""
        lengths = torch.tensor(self.prompt_lengths)[:, None]
        own_prompt = torch.arange(self.prompt_width) < lengths  # (R, prompt)
        if not self.rest_width:
            return own_prompt.long()
        causal = torch.ones(self.rest_width, self.rest_width, dtype=torch.bool).tril()
        shape = len(self.rows), self.n_rests, self.rest_width, -1
        return torch.cat([own_prompt[:, None, None].expand(shape), causal.expand(shape)], -1)


def shared_attention(module, query, key, value, mask, scaling=None, **options):
    """What transformers' attention layers call: SDPA, of ordinary rows or of those of a Layout that share a prompt.

    query (R, heads, C, head dim), key and value (R, kv heads, C, head dim)
    mask   of `Layout.mask`, or one as long as the query, or none: the ordinary case
    The prompt sees itself causally. The arithmetic is that of separate rows.
    """
    attend = partial(sdpa_attention_forward, module, scaling=scaling, **options)
    # a Layout's mask has `rest` rows, fewer than the query's cells (prompt and rests)
    if mask is None or mask.shape[2] == query.shape[2]:
        return attend(query, key, value, mask)  # (R, C, heads, head dim), None
    rows, n_rests, width, seen = mask.shape
    prompt = seen - width

    def of_rests(x):  # (R, heads, C, head dim) -> (R, rests, heads, width, head dim)
        return x[:, :, prompt:].unflatten(2, (n_rests, width)).transpose(1, 2)

    def with_prompt(x):  # -> (R * rests, heads, prompt + width, head dim)
        again = x[:, None, :, :prompt].expand(-1, n_rests, -1, -1, -1)
        return torch.cat([again, of_rests(x)], 3).flatten(0, 1)

    # (R, prompt, heads, head dim); without a mask it is causal
    own = attend(query[:, :, :prompt], key[:, :, :prompt], value[:, :, :prompt], None)[0]
    queries = of_rests(query).flatten(0, 1)  # (R * rests, heads, width, head dim)
    mask = mask.flatten(0, 1)[:, None]  # (R * rests, 1, width, prompt + width)
    rests = attend(queries, with_prompt(key), with_prompt(value), mask)[0]
    # (R, rests * width, heads, head dim)
    rests = rests.unflatten(0, (rows, n_rests)).flatten(1, 2)
    return torch.cat([own, rests], 1), None


AttentionInterface.register("shared_attention", shared_attention)
AttentionMaskInterface.register("shared_attention", sdpa_mask)  # of ordinary masks (B, L)
