"""Rotary positions, as GGUF's runtimes are told of them: keys, and for two kinds of long context a tensor of factors.

    llama3     rope_freqs.weight: by what each frequency is divided
    longrope   rope_factors_short.weight and rope_factors_long.weight: likewise, below and above the original length

Sources: Llama 3.1 (arXiv 2407.21783) and transformers' `modeling_rope_utils` for the factors of llama3, LongRoPE
(arXiv 2402.13753) and YaRN (arXiv 2309.00071) for the rest.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from qlora_kit.errors import RunError


def rope_keys(config: PretrainedConfig, head_dim: int, known: Sequence[str]) -> dict[str, Any]:
    """Keys, without the family's name.

    Args:
        config: of the model.
        head_dim: width of an attention head.
        known: kinds that runtimes compute for the family.

    Raises:
        RunError: the config asks for a kind that runtimes do not compute.
    """
    said = _parameters(config)
    kind = said["rope_type"]
    odd = {"mscale", "mscale_all_dim", "truncate"} & said.keys()
    if kind not in known or (kind == "yarn" and odd):
        what = f"{kind} with {', '.join(sorted(odd))}" if odd else kind
        raise RunError(
            f"rotary positions of the kind {what} are not supported for GGUF of a {config.model_type}; supported: "
            f"{', '.join(known)}"
        )
    keys: dict[str, Any] = {
        "rope.freq_base": float(said["rope_theta"]),
        "rope.dimension_count": int(head_dim * said.get("partial_rotary_factor", 1.0)),
    }
    local = config.rope_parameters.get("sliding_attention")
    if local is not None:
        keys["rope.freq_base_swa"] = float(local["rope_theta"])
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(said["factor"])}
    if kind == "longrope":
        keys["rope.scaling.attn_factor"] = _longrope_attention(config, said)
    if kind == "yarn" and said.get("attention_factor") is not None:
        # Runtimes multiply what is said by YaRN's own factor.
        keys["rope.scaling.attn_factor"] = said["attention_factor"] / (0.1 * math.log(said["factor"]) + 1)
    if kind in ("yarn", "longrope"):
        keys["rope.scaling.original_context_length"] = _original(config, said)
    for name in ("beta_fast", "beta_slow"):
        if kind == "yarn" and said.get(name) is not None:
            keys[f"rope.scaling.yarn_{name}"] = float(said[name])
    return keys


def rope_tensors(config: PretrainedConfig, head_dim: int) -> dict[str, Tensor]:
    """Factors of the frequencies by the tensor's name in GGUF, fp32, (half of the turned width,)."""
    if config.model_type == "gpt2":
        return {}
    said = _parameters(config)
    if said["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(said, head_dim)}
    if said["rope_type"] == "longrope":
        return {
            f"rope_factors_{which}.weight": torch.tensor(said[f"{which}_factor"], dtype=torch.float32)
            for which in ("long", "short")
        }
    return {}


def _parameters(config: PretrainedConfig) -> dict[str, Any]:
    """Of the layers that see everything, where layers differ."""
    said = config.rope_parameters
    return {"rope_type": "default", **said.get("full_attention", said)}


def _llama3_factors(said: dict[str, Any], head_dim: int) -> Tensor:
    """1 for wavelengths that the original context holds often enough, `factor` for those that it does not hold, and
    between the two a mean of both frequencies."""
    inverse = said["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = said["original_max_position_embeddings"] * inverse / (2 * math.pi)
    low, high = said["low_freq_factor"], said["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (share + (1 - share) / said["factor"])).float()


def _longrope_attention(config: PretrainedConfig, said: dict[str, Any]) -> float:
    if said.get("attention_factor") is not None:
        return float(said["attention_factor"])
    original = _original(config, said)
    factor = config.max_position_embeddings / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _original(config: PretrainedConfig, said: dict[str, Any]) -> int:
    return int(
        said.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
    )
