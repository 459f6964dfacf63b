"""How an adapter starts. B is zero, so that the first forward pass is the base's; A differs.

Each layer draws from a generator seeded by its own name, so a layer starts the same whatever else is adapted, and the
global random state does not move.
"""

import math
import zlib
from typing import Literal

import torch
from torch import nn

from qlora_kit.lora.layer import Adapter

Init = Literal["default", "gaussian"]


@torch.no_grad()
def init_adapter(adapter: Adapter, layer_name: str, init: Init, seed: int) -> None:
    """Fill A and B.

    Args:
        adapter: its A is overwritten, its B set to zero.
        layer_name: dotted name of its layer.
        init: `default` draws A uniformly within 1 / sqrt(in) (LoRA Without Regret; PEFT's bound is the same number),
            `gaussian` from N(0, 1 / rank) (the LoRA paper's random Gaussian, with PEFT's spread).
        seed: of the run.
    """
    # One checksum of both: the CPU generator looks at the low 32 bits of its seed only.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {layer_name}".encode()))
    rank, width = adapter.a_RI.shape[-2:]
    values = torch.empty(adapter.a_RI.shape, dtype=torch.float32)
    if init == "default":
        bound = 1 / math.sqrt(width)
        values.uniform_(-bound, bound, generator=generator)
    else:
        values.normal_(0, 1 / rank, generator=generator)
    adapter.a_RI.copy_(values)
    nn.init.zeros_(adapter.b_OR)
