"""
8-bit weights by hand: BAGEL in 14.7 GB instead of 29.2, for a card of 24 GB.

  W_ij = s_i q_ij           q_ij a whole number from -127 to 127, one scale s_i = max_j |W_ij| / 127 per row
  y_i = s_i (q x)_i + b_i   multiplied in x's own type: bf16 holds every q exactly

It spares memory, not time: a weight becomes bf16 again each time it is used. The rest (embeddings, norms, what stands
between pixels and layers) stays as it is. Such a network imagines; it cannot be trained or saved. One view of
1024 x 1024 from two others takes 19 GB, counted: beside the weights 0.3 for the autoencoder, 1 for the context's keys
and values, then 1.5 for a layer's activations or 3.2 for those of the decoder.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.bagel import Bagel


class Int8Linear(nn.Module):
    """What an nn.Linear computes, nearly: x (..., in) -> (..., out)."""

    def __init__(self, linear: nn.Linear, device: torch.device | str):
        super().__init__()
        weight = linear.weight.detach().to(device)  # (out, in)
        scale = weight.abs().amax(1, keepdim=True) / 127
        scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)  # a row of zeros
        levels = (weight.float() / scale.float()).round().clamp(-127, 127)
        self.levels = nn.Buffer(levels.to(torch.int8))  # (out, in)
        # (out,) in the weight's type, by which the levels were found
        self.scale = nn.Buffer(scale[:, 0])
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.levels.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def quantise_bagel(network: Bagel, device: torch.device | str) -> None:
    """Its layers in 8 bits, the rest as it is, all on `device`; without the head that a simulator never writes with."""
    quantise(network.blocks, device)
    del network.language_model["lm_head"]
    network.to(device)


@torch.no_grad()
def quantise(blocks: Iterable[nn.Module], device: torch.device | str) -> None:
    """Put an Int8Linear on `device` in the place of every nn.Linear in some blocks, such as a Bagel's.

    They may be the map of a file on the CPU (lib/bagel_files.load_network): each weight is read when its turn comes, so
    that neither host nor card holds more than one beside what is finished.
    """
    for block in blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                block.set_submodule(name, Int8Linear(module, device))
