"""Time of the loss and its gradient behind a dense head: whole logits against a few tokens at a time.

    python benchmarks/loss.py [TOKENS VOCAB WIDTH [DTYPE]]      default: 512 32000 512 float32

One thread, process CPU time, the ways in turn, medians and ranges of seven rounds after one that does not count.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from qlora_kit.ops import linear_cross_entropy
from qlora_kit.train.objectives import causal_loss_sum

ROUNDS = 7


def ways(tokens: int, vocab: int, width: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Each does forward and backward once, on the same numbers."""
    h = torch.randn(tokens, width).to(dtype).requires_grad_()
    w = (torch.randn(vocab, width) * 0.02).to(dtype)
    labels = torch.randint(0, vocab, (tokens,))

    def whole() -> None:
        (causal_loss_sum(F.linear(h[None], w), labels[None]) / tokens).backward()

    def chunked(chunk: int) -> Callable[[], None]:
        return lambda: linear_cross_entropy(h, labels, w, chunk=chunk, divisor=tokens).backward()

    return {"whole logits": whole} | {f"chunks of {tokens // part}": chunked(tokens // part) for part in (1, 2, 4, 8)}


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens, vocab, width = map(int, sys.argv[1:4] or (512, 32_000, 512))
    dtype = getattr(torch, sys.argv[4] if len(sys.argv) > 4 else "float32")
    taken: dict[str, list[float]] = {}
    for _ in range(ROUNDS + 1):
        for name, way in ways(tokens, vocab, width, dtype).items():
            started = time.process_time()
            way()
            taken.setdefault(name, []).append(1000 * (time.process_time() - started))
    for name, (_, *times) in taken.items():
        print(f"{name:14} {statistics.median(times):8.0f} ms ({min(times):.0f}..{max(times):.0f})")


if __name__ == "__main__":
    main()
