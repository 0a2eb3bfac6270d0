"""
Writing many dialogues at once: one KV cache that lives across turns.

Row b of the cache is dialogue b: token i of the dialogue stands in slot i, nothing stands between. So dialogues of
different lengths can grow together, nothing is ever encoded twice, and one rule is the whole mask:

    a token in slot s sees the slots 0 .. s of its row

A batch is right-padded; what padding writes lies beyond the row's end, where nobody looks until the next token
overwrites it. The rows that are writing stand first, a finished row changes places with the last of them, so a step
works on a prefix of the cache and no cache is copied. The cache always lacks the last token of a dialogue: feeding it
gives the distribution of the next one.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lib.common import fail


class RowCache:
    """Keys and values of all rows and layers; what transformers' attention layers call `past_key_values`."""

    def __init__(self, rows):
        self.rows = rows
        self.layers = []  # per layer (2, rows, kv heads, capacity, head dim): keys and values
        self.slots = None  # (n, m) where the next forward pass writes, n <= rows
        self.seen = 0  # how many slots that pass attends to

    def aim(self, slots, device):
        """slots from the CPU, which then need not wait for a GPU to know their largest."""
        self.slots, self.seen = slots.to(device), int(slots.max()) + 1

    def update(self, keys, values, layer, *_, **__):
        """Write keys and values (n, kv heads, m, head dim) of one layer; return all those of the n rows so far."""
        n, heads, _, width = keys.shape
        if layer == len(self.layers):
            self.layers.append(keys.new_zeros(2, self.rows, heads, 0, width))
        store = self.layers[layer]
        if self.seen > store.shape[3]:  # room for 64 more tokens at a time
            room = keys.new_zeros(2, self.rows, heads, self.seen + 64 - store.shape[3], width)
            store = self.layers[layer] = torch.cat([store, room], 3)
        place = self.slots[:, None, :, None].expand_as(keys)
        store[0, :n].scatter_(2, place, keys)
        store[1, :n].scatter_(2, place, values)
        return store[0, :n, :, : self.seen], store[1, :n, :, : self.seen]

    def repeat(self, times):
        """Each row becomes `times` neighbouring rows: a question's prompt, shared by its group."""
        self.rows *= times
        self.layers = [store.repeat_interleave(times, 1) for store in self.layers]

    def swap(self, i, j):
        for store in self.layers:
            store[:, [i, j]] = store[:, [j, i]]


class Writer:
    """Samples turns for a fixed list of dialogues.

    dialogues   (Q * group_size) Trajectories, question-major; those of a group are equal so far
    The writer reads their `ids`, `positions` and `features`, and never changes them.
    """

    def __init__(self, policy, dialogues, group_size=1):
        self.policy, self.dialogues = policy, dialogues
        self.cache = RowCache(len(dialogues) // group_size)
        self.filled = [0] * len(dialogues)  # tokens of dialogue d in the cache
        self.images = [0] * len(dialogues)  # images of dialogue d in the cache
        self.order = list(
            range(0, len(dialogues), group_size)
        )  # which dialogue stands in which row
        self.feed(len(self.order))  # every prompt once
        self.cache.repeat(group_size)
        self.order = list(range(len(dialogues)))
        heads = [d - d % group_size for d in self.order]
        self.filled, self.images = [self.filled[h] for h in heads], [self.images[h] for h in heads]

    def forward(self, ids, slots, positions, features):
        """Write ids (n, m) at slots (n, m) and positions (3, n, m) of the first n rows into the cache."""
        device = self.policy.device
        ids, positions = ids.to(device), positions.to(device)
        self.cache.aim(slots, device)
        mask = (
            torch.arange(self.cache.seen, device=device) <= self.cache.slots[:, None, :, None]
        )  # (n, 1, m, seen)
        self.policy.hidden(ids, positions, mask, features, cache=self.cache)

    def step(self, tokens, slots, positions):
        """Feed one token to each of the first n rows: (n,) each -> logits (n, vocabulary) of what follows it.

        The decoder of transformers by hand, with its own modules: a step is many small operations, and the general
        code spends three times as many on images, masks and shapes that one written token never has.
        """
        text, device, n = self.policy.model.model.language_model, self.policy.device, len(tokens)
        tokens, positions = tokens.to(device), positions.to(device)
        self.cache.aim(slots[:, None], device)
        x = text.embed_tokens(tokens)  # (n, width)
        mask = (
            torch.arange(self.cache.seen, device=device) <= self.cache.slots[..., None, None]
        )  # (n, 1, 1, seen)
        mask = mask.to(x.dtype).log()  # 0 or -inf, as SDPA would make it per layer
        cos, sin = text.rotary_emb(
            x, positions.expand(3, 1, -1)
        )  # text: one number for time, row and column
        cos, sin = cos[0, :, None], sin[0, :, None]  # (n, 1, head dim)
        for number, layer in enumerate(text.layers):
            attention, y = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                project(y).view(n, -1, attention.head_dim)  # (n, heads, head dim)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = (z * cos + rotated(z) * sin for z in (attention.q_norm(q), attention.k_norm(k)))
            keys, values = self.cache.update(k[:, :, None], v[:, :, None], number)
            # query heads that share a key head stand as that many queries of it: no key is copied
            q = q.view(n, keys.shape[1], -1, attention.head_dim)
            y = F.scaled_dot_product_attention(q, keys, values, mask)
            x = x + attention.o_proj(y.reshape(n, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.policy.logits(text.norm(x))

    def feed(self, n):
        """Bring the cache of the first n rows up to date, to all tokens but the last."""
        new = [(d, self.dialogues[d], self.filled[d]) for d in self.order[:n]]
        longest = max(len(dialogue.ids) - 1 - start for _, dialogue, start in new)
        if longest <= 0:
            return
        ids = torch.full((n, longest), self.policy.tokenizer.pad_token_id)
        positions = torch.zeros(3, n, longest, dtype=torch.long)
        features = []
        for row, (d, dialogue, start) in enumerate(new):
            piece = dialogue.ids[start:-1]
            ids[row, : len(piece)] = torch.tensor(piece)
            positions[:, row, : len(piece)] = torch.tensor(dialogue.positions[start:-1]).T
            features += dialogue.features[self.images[d] :]
            self.filled[d], self.images[d] = start + len(piece), len(dialogue.features)
        slots = torch.tensor([start for *_, start in new])[:, None] + torch.arange(longest)
        self.forward(ids, slots, positions, torch.cat(features, 1) if features else None)

    def write(self, members, uniforms, temperature, limit):
        """Let some dialogues write one turn each.

        members    which dialogues; uniforms (dialogues, limit) in [0, 1), float64: what each row's sampling draws
        limit      tokens per turn
        returns    per member (ids, logprobs): the tokens as sampled, <|im_end|> last unless the limit cut the turn
        """
        self.bring_forward(members)
        self.feed(len(members))
        ids, logprobs = {d: [] for d in members}, {d: [] for d in members}
        last = {d: (self.dialogues[d].ids[-1], self.dialogues[d].positions[-1][0]) for d in members}
        stop, n = self.policy.tokenizer.eos_token_id, len(members)
        for step in range(limit):
            now = self.order[:n]
            tokens, places = torch.tensor([last[d] for d in now]).T  # (n,), (n,)
            slots = torch.tensor([self.filled[d] for d in now])
            logits = self.step(tokens, slots, places)
            sampled = [x.tolist() for x in sample(logits, uniforms[now, step], temperature)]
            if any(map(math.isnan, sampled[1])):
                fail(
                    "The policy's logits are not numbers: its weights are broken. Take an earlier checkpoint."
                )
            for row, (d, token, logprob) in reversed(list(enumerate(zip(now, *sampled)))):
                ids[d].append(token)
                logprobs[d].append(logprob)
                self.filled[d] += 1
                last[d] = (token, last[d][1] + 1)
                if token == stop:  # the row leaves the batch
                    n -= 1
                    self.swap(row, n)
            if n == 0:
                break
        return [(ids[d], logprobs[d]) for d in members]

    def bring_forward(self, members):
        """Let the rows of `members` stand first, in any order."""
        wanted, n = set(members), len(members)
        free = [row for row in range(n) if self.order[row] not in wanted]
        for row in range(n, len(self.order)):
            if self.order[row] in wanted:
                self.swap(free.pop(), row)

    def swap(self, i, j):
        if i != j:
            self.cache.swap(i, j)
            self.order[i], self.order[j] = self.order[j], self.order[i]


def rotated(z):
    """(..., head dim) with its halves turned by 90 degrees against each other: the other term of a rotary embedding."""
    first, second = z.chunk(2, -1)
    return torch.cat([-second, first], -1)


def sample(logits, uniforms, temperature):
    """Draw a token per row by inverting the cumulative distribution at a uniform number.

    logits (n, V) float32, uniforms (n,) in [0, 1); temperature 0 takes the most likely token
    returns tokens (n,) and their log-probabilities (n,) (of the distribution drawn from; temperature 1 if greedy)
    One uniform per token and stream per row: what a row samples does not depend on its neighbours in the batch.
    """
    logprobs = torch.log_softmax(logits / (temperature or 1.0), -1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        cumulative = logprobs.exp().double().cumsum(-1)
        aim = uniforms.to(cumulative.device) * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, aim[:, None], right=True)[
            :, 0
        ]  # right: never a token of mass zero
        tokens = tokens.clamp(max=logits.shape[1] - 1)  # of logits that are not numbers
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


# ---- dialogues that share their prompt -------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where the tokens of dialogues stand in the rows of one batch: [ prompt | branch | branch | ... ].

    Dialogues with the same prompt may share a row: the prompt is computed once, and each dialogue's rest is a branch
    that sees the prompt and itself. Three dialogues with a prompt of 4 (where the longest has 5), rests of up to 3:
        [ p p p p . | a a . | b b b | c . . ]
    Rows hold all tokens of a dialogue but the last, which predicts nothing. Where no row is shared, each dialogue is a
    row without branches.
    """

    rows: list[list[int]]  # per row, the numbers of its dialogues
    starts: list[int]  # per row, the tokens of its own prompt
    prompt: int  # columns of the longest prompt
    branches: int  # of the row with most dialogues
    rest: int  # columns of each branch: the longest rest; 0 where no row is shared

    @property
    def width(self) -> int:
        """Cells of a row."""
        return self.prompt + self.branches * self.rest

    def columns(self, row: int, branch: int, tokens: int) -> list[int]:
        """Where the first `tokens` tokens of a row's dialogue number `branch` stand."""
        start = self.starts[row]
        first = self.prompt + branch * self.rest
        return [*range(start), *range(first, first + tokens - start)]

    def mask(self) -> torch.Tensor:
        """What may be looked at, for `shared_attention`.

        Where no row is shared: (R, width), 1 = token. Else (R, branches, rest, prompt + rest) bool: each branch sees
        its row's own prompt, and of itself what came before.
        """
        starts = torch.tensor(self.starts)[:, None]
        own_prompt = torch.arange(self.prompt) < starts  # (R, prompt)
        if not self.rest:
            return own_prompt.long()
        causal = torch.ones(self.rest, self.rest, dtype=torch.bool).tril()
        shape = len(self.rows), self.branches, self.rest, -1
        return torch.cat([own_prompt[:, None, None].expand(shape), causal.expand(shape)], -1)


def layout_of(trajectories: list, share: bool) -> Layout:
    """The rows of a batch. share: dialogues with the same prompt make one row, neighbours or not."""
    rows = {}
    for number, trajectory in enumerate(trajectories):
        rows.setdefault(prompt_key(trajectory) if share else number, []).append(number)
    rows = list(rows.values())
    shared = len(rows) < len(trajectories)  # a dialogue alone is an ordinary row
    starts, rest = [], 0
    for numbers in rows:
        lengths = [len(trajectories[number].ids) - 1 for number in numbers]
        starts.append(trajectories[numbers[0]].loss_mask.index(1) if shared else lengths[0])
        rest = max(rest, max(lengths) - starts[-1])
    return Layout(rows, starts, max(starts), max(map(len, rows)), rest)


def cell_count(trajectories: list) -> int:
    """How many cells `policy.collate` takes for these dialogues where they may share rows."""
    layout = layout_of(trajectories, share=True)
    return len(layout.rows) * layout.width


def prompt_key(trajectory) -> tuple:
    """What dialogues of one prompt have in common: the tokens up to the first turn, and the very same images."""
    images = []
    for image, call in zip(trajectory.images, trajectory.provenance, strict=True):
        if call is None:
            images.append(id(image))
    return *trajectory.ids[: trajectory.loss_mask.index(1)], *images
