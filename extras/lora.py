"""
LoRA by hand (arXiv 2106.09685): the weights stay as they are, and small matrices beside them learn a correction.

  y = W x + b + (alpha / r) B A x        A (r, in) random, B (out, r) zero at first; W (out, in), b frozen, of any type
                                         alpha = 2 r; in training x of the last term may go through dropout

For one or two GPUs: gradients, AdamW's moments and the EMA then exist for about one weight in a hundred. The names
of W and b stay those of the checkpoint, and `merged` gives the weights back in that layout.

  adapters = add_lora(network, LANGUAGE_LAYERS, rank=16, seed=0, device=world.device)
  shard(network, network.blocks, world, ignored=adapters)      # A and B are whole on every rank
  loss.backward(); sum_gradients(adapters)                            # so their gradients are summed by hand
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.distributed import full
from lib.streams import torch_stream

# of BAGEL: queries, keys, values, outputs and the MLP, of both experts
LANGUAGE_LAYERS = r"language_model\.model\.layers\..*\.(q|k|v|o|gate|up|down)_proj(_moe_gen)?"
# the same of Qwen3-VL, whose tower has other names
QWEN_LAYERS = r"model\.language_model\.layers\..*\.(q|k|v|o|gate|up|down)_proj"


SCALE = 2  # alpha / r


class LoraLinear(nn.Linear):
    """A frozen nn.Linear with a low-rank correction that is trained in fp32 and computed in the type of x."""

    def __init__(self, linear, rank, stream, device, dropout):
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.dropout = dropout
        a = (2 * torch.rand(rank, self.in_features, generator=stream) - 1) * self.in_features**-0.5
        self.lora_a = nn.Parameter(a.to(device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, device=device))

    def forward(self, x):
        dropped = F.dropout(x, self.dropout, self.training)  # (..., in)
        low = F.linear(dropped, self.lora_a.to(x.dtype))  # (..., r)
        return super().forward(x) + SCALE * F.linear(low, self.lora_b.to(x.dtype))

    def merged_weight(self, weight):
        """W + (alpha / r) B A of the whole W: added in fp32, in W's type."""
        return (weight.float() + SCALE * self.lora_b @ self.lora_a).to(weight.dtype)


def add_lora(
    network: nn.Module,
    names: str,
    rank: int,
    seed: int,
    device: torch.device,
    dropout: float = 0.0,
) -> list[nn.Parameter]:
    """Freeze the network and give the Linear modules whose name matches the regular expression `names` an A and a B.

    The network may still be on the meta device (lib/bagel_files.load_network fills it later); A and B are made on
    `device`, the same on every rank. Dropout, if any, draws from torch's own generator: seed it before each step.
    Returns the list of the new parameters, all that is trained.
    Raises ValueError if no module has such a name.
    """
    network.requires_grad_(False)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and re.fullmatch(names, name):
            stream = torch_stream("adapters", seed, name)
            adapted = LoraLinear(module, rank, stream, device, dropout)
            network.set_submodule(name, adapted)
    adapters = [p for p in network.parameters() if p.requires_grad]
    if not adapters:
        raise ValueError(
            f"LoRA has nothing to learn: no Linear of the network has a name like {names}"
        )
    return adapters


@torch.no_grad()
def merged(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the network as if it had no LoRA, one by one: original names, corrections added to the weights.

    On every rank: a sharded weight is gathered to be corrected. The network itself does not change.
    """
    for name, tensor in network.state_dict().items():
        owner, _, kind = name.rpartition(".")
        if kind in ("lora_a", "lora_b"):
            continue
        module = network.get_submodule(owner)
        if kind == "weight" and isinstance(module, LoraLinear):
            tensor = module.merged_weight(full(tensor))
        yield name, tensor
