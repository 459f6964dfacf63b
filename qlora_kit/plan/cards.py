"""Common cards and the memory that their drivers report, so that a run can be planned for a card that is not here.

Source: the totals that nvidia-smi prints on these cards. Where error correction is on by default (T4, L4, A10, A40,
L40S), they are a sixteenth below what the card is sold with. The card of a laptop is another one, mostly with less than
its namesake; its driver says so (`NVIDIA GeForce RTX 4090 Laptop GPU`), and its total here is from public bug reports.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from qlora_kit.errors import RecipeError
from qlora_kit.plan.devices import CUDA_RESERVE_BYTES
from qlora_kit.units import MIB

TOTAL_MIB = {
    "GTX 1080": 8192,
    "GTX 1080 Ti": 11264,
    "RTX 2060": 6144,
    "RTX 2070": 8192,
    "RTX 2080": 8192,
    "RTX 2080 Ti": 11264,
    "RTX 3050": 8192,
    "RTX 3060": 12288,
    "RTX 3060 Ti": 8192,
    "RTX 3070": 8192,
    "RTX 3070 Ti": 8192,
    "RTX 3080": 10240,
    "RTX 3080 Ti": 12288,
    "RTX 3090": 24576,
    "RTX 3090 Ti": 24564,
    "RTX 4060": 8188,
    "RTX 4060 Ti": 8188,
    "RTX 4060 Ti 16GB": 16380,
    "RTX 4070": 12282,
    "RTX 4070 Super": 12282,
    "RTX 4070 Ti": 12282,
    "RTX 4070 Ti Super": 16376,
    "RTX 4080": 16376,
    "RTX 4080 Super": 16376,
    "RTX 4090": 24564,
    "RTX 5060": 8151,
    "RTX 5060 Ti": 8151,
    "RTX 5060 Ti 16GB": 16311,
    "RTX 5070": 12227,
    "RTX 5070 Ti": 16303,
    "RTX 5080": 16303,
    "RTX 5090": 32607,
    "Quadro RTX 6000": 24576,
    "RTX A4000": 16376,
    "RTX A5000": 24564,
    "RTX A6000": 49140,
    "RTX 6000 Ada": 49140,
    "T4": 15360,
    "V100 16GB": 16384,
    "V100 32GB": 32768,
    "L4": 23034,
    "A10": 23028,
    "A10G": 23028,
    "A40": 46068,
    "L40S": 46068,
    "A100 40GB": 40960,
    "A100 80GB": 81920,
    "H100 80GB": 81559,
    "H200": 143771,
    "RTX 3050 Laptop": 4096,
    "RTX 3050 Laptop 6GB": 6141,
    "RTX 3060 Laptop": 6144,
    "RTX 3070 Laptop": 8192,
    "RTX 3070 Ti Laptop": 8192,
    "RTX 3080 Laptop 8GB": 8192,
    "RTX 3080 Laptop 16GB": 16384,
    "RTX 3080 Ti Laptop": 16384,
    "RTX 4050 Laptop": 6141,
    "RTX 4060 Laptop": 8188,
    "RTX 4070 Laptop": 8188,
    "RTX 4080 Laptop": 12282,
    "RTX 4090 Laptop": 16376,
    "RTX 5060 Laptop": 8151,
    "RTX 5070 Laptop": 8151,
    "RTX 5070 Ti Laptop": 12227,
    "RTX 5080 Laptop": 16303,
    "RTX 5090 Laptop": 24463,
}

WITHOUT_BF16 = ("GTX 1080", "GTX 1080 Ti", "RTX 2060", "RTX 2070", "RTX 2080", "RTX 2080 Ti", "Quadro RTX 6000", "T4",
                "V100 16GB", "V100 32GB")  # fmt: skip
"""Cards older than Ampere, which multiply no bf16."""

_NOISE = {"nvidia", "geforce", "tesla", "rtx", "gtx", "gpu", "pcie", "sxm", "hbm", "generation"}
"""Words that tell no two cards of the table apart; a number may stand behind them (SXM4)."""
_GLUED = re.compile(r"rtx|gtx|ti(?=super|laptop|\d|\b)|super|laptop|ada\b")
"""Words that are written without a space, too: `rtx4090`, `4060ti16gb`."""
_REPORTED = 0.93
"""Least share of the memory that a card is sold with which its driver reports."""


@dataclass(frozen=True, slots=True)
class Card:
    """A card as a target of plans.

    Attributes:
        name: as in the table.
        usable_bytes: what its driver reports less what CUDA itself takes (`CUDA_RESERVE_BYTES`).
        compute_dtype: what `compute_dtype: auto` is there.
    """

    name: str
    usable_bytes: int
    compute_dtype: str


def find_card(name: str) -> Card:
    """The card that a person or its driver means: `4090`, `rtx4090` and `NVIDIA GeForce RTX 4090` are one.

    Memory may be left out of a name, and no other word that tells cards apart: `1080` is not `1080 Ti`.

    Raises:
        RecipeError: no card of the table has these words and this memory, or several that differ in memory have.
    """
    words, sizes = _parts(name)
    found = [card for card in TOTAL_MIB if words == _parts(card)[0] and _has_memory(card, sizes)]
    chosen = [card for card in found if sizes == _parts(card)[1]] or found
    if not chosen:
        with_these_words = [card for card in TOTAL_MIB if words and words <= _parts(card)[0]]
        nearest = with_these_words or difflib.get_close_matches(name, TOTAL_MIB, n=3, cutoff=0)
        raise RecipeError(
            f"the card {name!r} is not in the table; nearest: {', '.join(nearest)}; or give its memory with --budget"
        )
    if len({TOTAL_MIB[card] for card in chosen}) > 1:
        raise RecipeError(f"the card {name!r} may be one of {', '.join(chosen)}; specify which one")
    card = chosen[0]
    dtype = "float16" if card in WITHOUT_BF16 else "bfloat16"
    return Card(card, TOTAL_MIB[card] * MIB - CUDA_RESERVE_BYTES, dtype)


def fitting_cards(needed: Mapping[str, int]) -> list[dict[str, Any]]:
    """Which cards have room for which method.

    Args:
        needed: bytes by method, with what a card's allocator adds.

    Returns:
        for each card of the table its name, `usable_bytes`, and by method whether they are enough.
    """
    usable = {name: find_card(name).usable_bytes for name in TOTAL_MIB}
    return [
        {"name": name, "usable_bytes": room, **{method: count <= room for method, count in needed.items()}}
        for name, room in usable.items()
    ]


@cache
def _parts(name: str) -> tuple[frozenset[str], frozenset[int]]:
    """What of a name tells cards apart: its words, and the gigabytes that it says.

    >>> words, sizes = _parts("NVIDIA RTX4060ti 16 GB")
    >>> sorted(words), set(sizes)
    (['4060', 'ti'], {16})
    """
    spaced = re.sub(r"(?<=\d)[\s_-]+(?=gi?b?\b)", "", _GLUED.sub(r" \g<0> ", name.lower()))
    parts = re.findall(r"[a-z0-9]+", spaced)
    sizes = {part: int(size[1]) for part in parts if (size := re.fullmatch(r"(\d+)g(?:i?b)?", part))}
    words = (part for part in parts if part not in sizes and re.sub(r"\d+e?$", "", part) not in _NOISE)
    return frozenset(words), frozenset(sizes.values())


def _has_memory(card: str, sizes: Iterable[int]) -> bool:
    """Whether a card is sold with each of so many gigabytes."""
    return all(_REPORTED * size <= TOTAL_MIB[card] / 1024 <= size for size in sizes)
