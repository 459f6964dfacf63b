"""Attention under sdpa: packed documents are each read by themselves, as a row of its own is, and no mask is made.

    N tokens of a micro-batch, n of one document, H heads, D width of a head

One call of the kit's kernel reads all of them, where there is one for the processor; elsewhere torch's is called for
each. Rows that are not packed go the same way, each as one document.

transformers gives sdpa a mask of all pairs of tokens of a sequence. Its kernels then compute every pair, those that may
not see each other too, and the mask is as large as the square of the sequence. Here the model's mask is only the list
of the documents' lengths, which the host knows; attention cuts queries, keys and values by it.

The families for which this is so are a list, since some carry a state past any attention; the tests hold each against
its rows one by one. Others get transformers' mask.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora_kit.ops import attend, can_attend
from qlora_kit.ops.stand_in import stands_for_card

FAMILIES = frozenset((
    "apertus", "arcee", "cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "exaone4", "gemma", "gemma3_text", "glm",
    "glm4", "glm4_moe", "gpt2", "gpt_neox", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "llama",
    "ministral", "ministral3", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3",
    "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
))  # fmt: skip
"""Values of `model_type` whose attention keeps documents apart by their lengths alone."""

_READ: ContextVar[tuple[int, ...] | None] = ContextVar("documents", default=None)


@dataclass(frozen=True)
class Documents:
    """What stands in the place of a mask.

    Attributes:
        lengths: tokens of each document, in order, through all sequences; N in all.
        window: how many tokens back one sees, itself included; None is to the start of its document.
        device: of the model.
    """

    lengths: tuple[int, ...]
    window: int | None = None
    device: torch.device | str = "cpu"

    @cached_property
    def _longest(self) -> Tensor:
        """The mask of the longest document: that of any other is its upper left corner."""
        n = max(self.lengths)
        return torch.ones(n, n, dtype=torch.bool, device=self.device).tril_().triu_(1 - (self.window or n))

    def mask(self, n: int) -> Tensor | None:
        """(n, n), bool, of a document that is longer than the window; None where causal attention will do."""
        return None if self.window is None or n <= self.window else self._longest[:n, :n]


@contextmanager
def reading(lengths: Sequence[int] | None) -> Iterator[None]:
    """A block in which a forward pass reads packed documents.

    What blocks are given stays with them, so that they may run again outside of it and in another thread.

    Args:
        lengths: tokens of each document, in order, with the padding that follows it; None where none are packed.
    """
    token = _READ.set(None if lengths is None else tuple(lengths))
    try:
        yield
    finally:
        _READ.reset(token)


def is_listed(config: PretrainedConfig) -> bool:
    """Whether it is a model of one of the families, whose tokens see none after them; a folder's own code may call
    itself by their names."""
    body = config.get_text_config()
    is_known = body.model_type in FAMILIES and type(body).__module__.startswith("transformers.models.")
    return is_known and getattr(body, "is_causal", True) is not False


def _mask(*args: Any, **kwargs: Any) -> Any:
    """As transformers' own; the documents where some are read, and the model adds no rule of its own to the mask."""
    lengths = _READ.get()
    if lengths is None or kwargs["use_vmap"] or not is_listed(kwargs["config"]):
        return sdpa_mask(*args, **kwargs)
    return Documents(lengths, kwargs.get("local_size") or None, kwargs["device"])


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers' own: (batch, H, tokens, D) each, and back (batch, tokens, H, D)."""
    is_packed = isinstance(attention_mask, Documents)
    if is_packed or _is_whole(query, key, attention_mask):
        if _may_attend(module, query, key, value, kwargs):
            rows = attention_mask if is_packed else Documents((query.shape[2],) * len(query))
            return _end_to_end(query, key, value, rows, kwargs.get("scaling")), None
        if is_packed:
            return _one_by_one(module, query, key, value, attention_mask, kwargs), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _is_whole(query: Tensor, key: Tensor, mask: Any) -> bool:
    """Whether each row is a document: no token of it is hidden, and none comes from a cache."""
    return mask is None and len(query) == len(key) and query.shape[2] == key.shape[2] > 1


def _may_attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, how: Mapping[str, Any]) -> bool:
    """Whether the kit's own kernel computes all that is asked for, of tokens that see those before them."""
    is_causal = getattr(module, "is_causal", True) if how.get("is_causal") is None else how["is_causal"]
    is_plain = not how.get("dropout") and all(how.get(name) is None for name in ("position_bias", "cache", "softcap"))
    return bool(is_causal) and is_plain and not stands_for_card() and can_attend(query, key, value)


def _end_to_end(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float | None) -> Tensor:
    """By the kit's kernel."""
    q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return attend(q, k, v, documents.lengths, documents.window, scale).unflatten(0, (len(query), query.shape[2]))


def _one_by_one(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, documents: Documents, how: Mapping[str, Any]
) -> Tensor:
    """By torch's, whose outputs are written once more to stand in one tensor."""
    cut = [each.transpose(1, 2).flatten(0, 1).split(documents.lengths) for each in (query, key, value)]
    read = []
    for n, parts in zip(documents.lengths, zip(*cut, strict=True), strict=True):
        q, k, v = (part.transpose(0, 1)[None] for part in parts)
        out, _ = sdpa_attention_forward(module, q, k, v, documents.mask(n), **how)
        read.append(out[0])
    return torch.cat(read).unflatten(0, (len(query), query.shape[2]))


AttentionMaskInterface.register("sdpa", _mask)
AttentionInterface.register("sdpa", _attention)
