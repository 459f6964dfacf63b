"""Operations of a training step of one matrix, and of a model, counted as they are dispatched.

    python benchmarks/regret/flops.py       write benchmarks/regret/flops.jsonl

LoRA Without Regret: for an N x N matrix full fine-tuning takes 3 N^2 multiplications and additions a token, LoRA of
rank R takes 2 N^2 + 6 N R, so 2/3 + 2 R / N of it.
"""

import torch
from common import experiment, record
from torch.utils.flop_counter import FlopCounterMode

from qlora_kit.lora.layer import Adapter

TOKENS = 64


def added_in_place(onto: torch.Size, left: torch.Size, right: torch.Size, **_: object) -> int:
    """Of a product that is added in place: torch counts only those that make a new tensor."""
    return 2 * left[0] * left[1] * right[1]


IN_PLACE = {torch.ops.aten.addmm_: added_in_place}


def counted(step: object) -> int:
    """Multiplications and additions, a pair as one, of forward and backward pass."""
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        step()
    return counter.get_total_flops() // 2


def matrix(size: int, rank: int | None) -> int:
    """Of one matrix, a token: with an adapter of `rank`, or trained itself. Its input asks for a gradient, too."""
    x, weight = torch.randn(TOKENS, size, requires_grad=True), torch.randn(size, size)
    if rank is None:
        weight.requires_grad_(True)
        return counted(lambda: (x @ weight.T).sum().backward()) // TOKENS
    adapter = Adapter((size, size), rank, 32, dtype=torch.float32)
    torch.nn.init.normal_(adapter.a_RI)
    return counted(lambda: adapter(x, lambda dtype: weight.to(dtype), None).sum().backward()) // TOKENS


def main() -> None:
    """Three widths, ranks from 1 to 256."""
    torch.set_num_threads(1)
    rows = []
    for size in (256, 1024, 4096):
        full = matrix(size, None)
        for rank in (1, 16, 64, 256):
            lora = matrix(size, rank)
            rows.append({"size": size, "rank": rank, "full": full, "lora": lora, "share": round(lora / full, 4),
                         "formula": round(2 / 3 + 2 * rank / size, 4)})  # fmt: skip
    record("flops", rows, "1 thread")


if __name__ == "__main__":
    experiment("flops", main)
