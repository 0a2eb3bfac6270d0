"""
What a context leaves behind for the noisy target: the keys and values of every layer, and which of them a branch sees.

BAGEL's guidance needs the velocity three times: behind everything, without the sentence, without the images. The first
two are one memory up to two lengths; nothing is copied, and the target of each branch has room of its own beside it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from lib.packing import HIDDEN, Tokens, attention


class Memory:
    """Keys and values of a context that R rows have read: a (R, kv_heads, capacity + 2 rooms, d) pair per layer.

      [ room of n + 2 | context, in the order it was read | room of n + 2 ]

    Both rooms are for the noisy target, which writes its own keys anew in every step. Behind the context it sees all of
    it; in front of it, it sees the first part: "no sentence" is the same memory up to another length, not a copy.
    positions   (R, length) RoPE position of every token read, on the CPU; HIDDEN where a row has no such token
    next        (R,) the position that follows, on the CPU
    """

    def __init__(self, c, rows, capacity, room, like):
        shape = (rows, c.kv_heads, capacity + 2 * room, c.width // c.heads)
        self.keys, self.values = (
            [like.new_empty(shape) for _ in range(c.layers)] for _ in range(2)
        )
        self.room, self.positions = room, torch.zeros(rows, 0, dtype=torch.long)
        self.next = torch.zeros(rows, dtype=torch.long)

    @property
    def length(self):
        return self.positions.shape[1]

    def extend(self, positions):
        """Read tokens at `positions` (R, N), CPU: per layer a function that stores keys and values and attends."""
        start, self.positions = self.room + self.length, torch.cat([self.positions, positions], 1)
        stop, like = self.room + self.length, self.keys[0]
        attend = attention(
            Tokens.plain(positions), Tokens.plain(self.positions), like.device, like.dtype
        )

        def reading(keys, values):
            def read(q, k, v):
                keys[:, :, start:stop], values[:, :, start:stop] = k, v
                return (
                    None
                    if q is None
                    else attend(q, keys[:, :, self.room : stop], values[:, :, self.room : stop])
                )

            return read

        return [reading(*pair) for pair in zip(self.keys, self.values)]

    def whole(self):
        """The Branch that sees everything read."""
        stop = self.room + self.length
        return self.branch(
            slice(self.room, stop + self.room),
            slice(stop, stop + self.room),
            self.positions,
            self.next,
        )

    def first(self, length, next):
        """The Branch that sees the first `length` tokens, and stands at position `next` (R,)."""
        return self.branch(
            slice(0, self.room + length), slice(0, self.room), self.positions[:, :length], next
        )

    def branch(self, seen, room, positions, next):
        """The Branch of slices `seen` and `room`; padding in `positions` is masked."""
        mask = None
        if (positions == HIDDEN).any():
            gap = torch.zeros(len(positions), self.room, dtype=torch.bool)
            parts = [positions == HIDDEN, gap] if room.start else [gap, positions == HIDDEN]
            mask = torch.zeros(len(positions), 1, 1, seen.stop - seen.start)
            mask = mask.masked_fill_(torch.cat(parts, 1)[:, None, None], -torch.inf).to(
                self.keys[0]
            )
        return Branch(self.keys, self.values, seen, room, mask, next)


class Branch(NamedTuple):
    """What one guidance branch of a noisy target sees of a Memory, and where in it the target keeps its own keys."""

    keys: list  # of the Memory
    values: list
    seen: slice  # context and own room
    room: slice
    mask: torch.Tensor  # (R, 1, 1, K) added to the scores, or None
    next: torch.Tensor  # (R,) the RoPE position of all tokens of the target, on the CPU

    def attend(self, layer, q, k, v):
        """Store the target's own k and v (R, kv_heads, N, d), then let q (R, heads, N, d) see all.

        The heads that share a key are laid behind one another as more queries of one head: nothing is repeated.
        """
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.room], values[:, :, self.room] = k, v
        rows, heads, n, d = q.shape
        y = F.scaled_dot_product_attention(
            q.reshape(rows, k.shape[1], -1, d),
            keys[:, :, self.seen],
            values[:, :, self.seen],
            self.mask,
        )
        return y.reshape(rows, heads, n, d)  # with a mask, some kernels lay y out in another order
