"""The kinds of model that have a place in GGUF, and the facts about each that its runtimes read.

A runtime knows a family by its name and computes it in one way, whatever the config of the model says: so what the
config says and the file cannot is refused here, and never left out in silence.

Sources: github.com/ggml-org/ggml, docs/gguf.md (keys); github.com/ggml-org/llama.cpp, src/models (what is computed).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from qlora_kit.base.architecture import brings_code, head_of
from qlora_kit.errors import RunError
from qlora_kit.export.gguf.rope import rope_keys

Value = str | bool | int | float | list[str] | list[int] | list[float]
"""Of one key: a whole number is stored in 32 bits without a sign, a fraction as fp32."""

_SILU, _GELU = ("silu",), ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_GEMMA_27B_LAYERS = (46, 62)
"""Of Gemma 2 and 3: these alone scale attention by the width of the model over its heads."""
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_ATTENTION, _MLP = ("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True, slots=True)
class Family:
    """How one `model_type` of transformers is kept in GGUF."""

    architecture: str
    """What GGUF calls it."""
    activations: tuple[str, ...] = _SILU
    """Of the MLP: what runtimes compute, by transformers' names."""
    turns_in_pairs: bool = False
    """Whether rotary positions turn neighbours of q and k in runtimes; transformers turns the halves of a head."""
    norm_shift: float = 0.0
    """What a norm adds to its weight; GGUF holds the sum."""
    local_every: int = 0
    """Layers of which one sees everything and the others a window; 0: runtimes have no window."""
    has_caps: bool = False
    """Whether runtimes cap attention's logits and the last ones: at 50 and 30 if they are told nothing."""
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    """Kinds of rotary positions that runtimes compute as transformers does."""
    biases: tuple[str, ...] = ()
    """Tensors that may have a bias there."""
    odds: Callable[[PretrainedConfig], Iterator[str]] = lambda config: iter(())
    """What else of a config runtimes do not compute, in words."""
    whole: str = ""
    """What GGUF calls a model that has its sight, too, where that is another name: an adapter goes on such a file."""


def _gpt2_odds(config: PretrainedConfig) -> Iterator[str]:
    if not config.scale_attn_weights:
        yield "scale_attn_weights=false"
    if config.scale_attn_by_inverse_layer_idx:
        yield "scale_attn_by_inverse_layer_idx=true"


def _gemma_odds(config: PretrainedConfig) -> Iterator[str]:
    is_27b = config.num_hidden_layers in _GEMMA_27B_LAYERS
    wanted = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
    if config.query_pre_attn_scalar != wanted:
        yield f"query_pre_attn_scalar={config.query_pre_attn_scalar} (runtimes take {wanted})"


_LLAMA = Family(
    "llama",
    turns_in_pairs=True,
    ropes=("default", "linear", "llama3", "yarn"),
    biases=(*_ATTENTION, "attn_output", *_MLP),
)
_QWEN2 = Family("qwen2", biases=_ATTENTION)
_GEMMA = Family("gemma", _GELU, norm_shift=1.0, ropes=("default", "linear"))

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _QWEN2,
    "qwen2_vl_text": replace(_QWEN2, whole="qwen2vl"),
    "qwen2_5_vl_text": replace(_QWEN2, whole="qwen2vl"),
    "qwen3": Family("qwen3"),
    "qwen3_vl_text": Family("qwen3", whole="qwen3vl"),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, architecture="gemma2", local_every=2, has_caps=True, odds=_gemma_odds),
    "gemma3_text": replace(_GEMMA, architecture="gemma3", local_every=6, odds=_gemma_odds),
    "phi3": Family("phi3", ropes=("default", "linear", "yarn", "longrope")),
    "gpt2": Family(
        "gpt2",
        _GELU,
        biases=("attn_qkv", "attn_output", "attn_norm", "ffn_up", "ffn_down", "ffn_norm", "output_norm"),
        odds=_gpt2_odds,
    ),
}
"""By `model_type` of what reads text. That of Qwen's models that see counts a token's place three times, which for
text is three times the same: it computes what the family without sight does."""


def family_of(model: PreTrainedModel) -> Family:
    """The family of a model.

    Raises:
        RunError: it has none that is built, or its config asks for what runtimes do not compute.
    """
    config = model.config.get_text_config()
    name = model.config._name_or_path or "the model"
    if brings_code(model) or head_of(model) != "causal":
        raise RunError(f"{name} is a {type(model).__name__}, and GGUF holds transformers' causal language models only")
    family = FAMILIES.get(config.model_type)
    if family is None:
        built = ", ".join(kind for kind, each in FAMILIES.items() if not each.whole)
        raise RunError(
            f"{name} is of the family {config.model_type}, for which GGUF is not supported; supported: {built}"
        )
    odds = [*_odds(config, family), *family.odds(config)]
    if odds:
        raise RunError(
            f"{name} has {', '.join(odds)}, which GGUF's runtimes do not compute for {family.architecture}; "
            "export --to merged"
        )
    return family


def metadata(config: PretrainedConfig, family: Family) -> dict[str, Value]:
    """What runtimes must know of a model beside its tensors and its tokenizer, under keys with the family's name."""
    heads, width = config.num_attention_heads, config.hidden_size
    keys: dict[str, Value] = {
        "context_length": context_length(config, family),
        "embedding_length": width,
        "block_count": config.num_hidden_layers,
        "attention.head_count": heads,
        "vocab_size": config.vocab_size,
    }
    if config.model_type == "gpt2":
        keys |= {
            "feed_forward_length": config.n_inner or 4 * width,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    else:
        head_dim = head_width(config)
        keys |= {
            "feed_forward_length": config.intermediate_size,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            **rope_keys(config, head_dim, family.ropes),
        }
    if family.local_every:
        keys["attention.sliding_window"] = config.sliding_window
    if family.has_caps:
        keys |= {cap: float(getattr(config, cap)) for cap in _CAPS}
    return {f"{family.architecture}.{key}": value for key, value in keys.items()}


def head_width(config: PretrainedConfig) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def context_length(config: PretrainedConfig, family: Family) -> int:
    """Tokens that runtimes may take: up to its window where the model has one and runtimes have none, since there both
    still compute the same."""
    window = None if family.local_every else _window(config)
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def _window(config: PretrainedConfig) -> int | None:
    layers = getattr(config, "layer_types", None)
    is_used = "sliding_attention" in layers if layers else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if is_used else None


def _odds(config: PretrainedConfig, family: Family) -> Iterator[str]:
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    activation = activation or config.activation_function
    if activation not in family.activations:
        yield f"the activation {activation} (runtimes compute {family.activations[0]})"
    for cap in _CAPS:
        value = getattr(config, cap, None)
        if (value is not None) != family.has_caps:
            yield f"{cap}={'null' if value is None else value}"
    if family.local_every:
        every = range(1, config.num_hidden_layers + 1)
        wanted: list[Any] = ["sliding_attention" if layer % family.local_every else "full_attention" for layer in every]
        if list(config.layer_types) != wanted:
            yield f"other layers than every {family.local_every}th that see everything"
