"""The least that the mathematics of a step needs, so that a plan can say how far from it the step is.

    floor = resident + gradients + checkpoints + max(work + decoded, loss)
    resident     quantised weights + dense weights + adapters + optimizer state
    gradients    of the adapters, bf16
    checkpoints  the input of every layer
    work         a layer going backward with nothing kept that can be had again: its input and normed input, q, k, v,
                 attention output; the middle of the layer and its normed form, gate, up, their product; one gradient
    decoded      the largest matrix, and its fp32 block constants
    loss         hidden states, their gradient, and the logits and fp32 softmax of 256 tokens

In a step of one micro-batch gradients come as checkpoints go, layer by layer, so that both are never there in full.

It counts no allocator, no library and no kernel's own workspace, takes every fusion to be made, and moves nothing to
the host: with checkpoints offloaded, a head in 4 bits or the MLP in tiles, a step may take less. With rank 16, bf16,
8-bit Adam and no masters it is 6.42 GiB for Llama-3.1-8B at 2,048 tokens.

Source: counted from the layers' formulas. A gated MLP wants gate, up and product beside its input and one gradient, as
fused LoRA kernels have it (Unsloth's `fast_lora`); the forms of memory are those of QLoRA, arXiv 2305.14314.
"""

import math
from collections.abc import Mapping

from transformers import PretrainedConfig

from qlora_kit.base.formats import ABSMAX_BLOCK, Quantization

LOSS_ROWS = 256
"""Tokens whose logits exist at one time."""
BF16, FP32 = 2, 4
NF4 = Quantization("nf4")
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_MOMENTS = {"adamw": 2, "lion": 1, "ademamix": 3, "sgd": 0}
_ACCOUNTED = 0.02
"""Share of the weights that may be other than the usual matrices: norms and biases."""


def floor_bytes(
    config: PretrainedConfig,
    parameters: Mapping[str, int],
    *,
    tokens: int,
    micro_batch: int = 1,
    accumulation: int = 2,
    quantization: Quantization = NF4,
    optimizer: str = "adamw_8bit",
    has_masters: bool = False,
    dense_width: int = 2,
) -> int | None:
    """The least bytes of one step of LoRA on a decoder, or None where the formula does not speak of such a model.

    It speaks of layers with q, k, v, o, gate, up and down. Whether a model is made of these is told by its weights:
    those that the configuration's sizes make must be all that it has, but for norms and biases.

    Args:
        config: of the model.
        parameters: {total, trainable, quantized}, as a dry run tells them: the model's, the adapters', and those of
            the model that are quantised.
        tokens: of a row.
        micro_batch: rows in one forward pass.
        accumulation: micro-batches in a step; above 1 the gradients of the first stand through the second.
        quantization: of the quantised weights, in 4 bits.
        optimizer: a name of `train.optimizer`; whether its state is paged makes no difference here.
        has_masters: whether the optimizer keeps fp32 copies of the adapters, 4 bytes a parameter.
        dense_width: bytes of a number of the activations and of what stays dense. Adapters and their gradients are
            bf16.
    """
    sizes = config.get_text_config()
    is_known = all(isinstance(getattr(sizes, name, None), int) for name in _NEEDED)
    if not is_known or not _accounts_for(config, parameters):
        return None
    rows, layers = tokens * micro_batch, sizes.num_hidden_layers
    resident = parameters["quantized"] * quantization.bits_per_parameter(sizes.hidden_size) / 8
    resident += (parameters["total"] - parameters["quantized"]) * dense_width
    resident += parameters["trainable"] * (BF16 + _state_width(optimizer) + FP32 * has_masters)
    gradients = parameters["trainable"] * BF16
    checkpoints = layers * sizes.hidden_size * rows * dense_width
    in_loss, in_layer = _loss(sizes, rows, dense_width), _layer(sizes, rows, dense_width, quantization)
    if accumulation > 1:
        return math.ceil(resident + gradients + checkpoints + max(in_layer, in_loss))
    in_backward = in_layer + max(checkpoints + gradients / layers, checkpoints / layers + gradients)
    return math.ceil(resident + max(checkpoints + in_loss, in_backward))


def _layer(sizes: PretrainedConfig, rows: int, width: int, quantization: Quantization) -> int:
    """`work` and `decoded`."""
    hidden, (query, key) = sizes.hidden_size, _attention_widths(sizes)
    largest = max(sizes.intermediate_size, query) * hidden
    # Input and normed input, q, k, v, attention output; then middle and normed middle, gate, up, product; a gradient.
    kept = (2 * hidden + query + 2 * key + query) + (2 * hidden + 3 * sizes.intermediate_size)
    return kept * rows * width + largest * width + largest // quantization.block_size * FP32


def _loss(sizes: PretrainedConfig, rows: int, width: int) -> int:
    return 2 * sizes.hidden_size * rows * width + min(LOSS_ROWS, rows) * sizes.vocab_size * (width + FP32)


def _attention_widths(sizes: PretrainedConfig) -> tuple[int, int]:
    """Outputs of q, and of k or v."""
    heads = sizes.num_attention_heads
    width = getattr(sizes, "head_dim", None) or sizes.hidden_size // heads
    return heads * width, (getattr(sizes, "num_key_value_heads", None) or heads) * width


def _accounts_for(config: PretrainedConfig, parameters: Mapping[str, int]) -> bool:
    """Whether the usual matrices, the embedding and the head are what the model has, but for norms and biases."""
    sizes = config.get_text_config()
    query, key = _attention_widths(sizes)
    layer = sizes.hidden_size * (2 * query + 2 * key + 3 * sizes.intermediate_size)
    ends = sizes.vocab_size * sizes.hidden_size * (1 if config.tie_word_embeddings else 2)
    usual = sizes.num_hidden_layers * layer + ends
    return 0 <= parameters["total"] - usual <= _ACCOUNTED * usual


def _state_width(optimizer: str) -> float:
    """Bytes of the optimizer's state for one parameter; 8-bit states have an fp32 constant for every 256."""
    family, _, bits = optimizer.removeprefix("paged_").partition("_")
    return _MOMENTS[family] * (1 + FP32 / ABSMAX_BLOCK if bits == "8bit" else FP32)
