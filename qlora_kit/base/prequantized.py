"""Checkpoints that bitsandbytes has quantised already: their codes and constants are taken over as they are.

transformers reads them into bitsandbytes' own layers, which the kit never runs: each is turned into a `QuantizedLinear`
around copies of its tensors, which lie in the checkpoint's mapped file. The other way round, `packed` gives the tensors
of a layer as bitsandbytes 0.50 serialises them, which is how transformers finds them in a checkpoint.
"""

import json
from collections.abc import Mapping
from typing import Any

import bitsandbytes.nn as bnb
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.core_model_loading import WeightConverter, WeightTransform
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb8bitDeserialize
from transformers.pytorch_utils import Conv1D

from qlora_kit.base.dense import QuantizedLinear
from qlora_kit.base.formats import Quantization
from qlora_kit.base.kernels import ABSMAX_BLOCK, table_4bit, table_8bit
from qlora_kit.base.pages import copy_off
from qlora_kit.base.text import text_modules
from qlora_kit.base.vocabulary import QuantizedTable
from qlora_kit.errors import ModelError


def stored_quantization(config: PretrainedConfig) -> Quantization | None:
    """How a checkpoint is stored, by its configuration; None if it is dense.

    Raises:
        ModelError: it is quantised by something else than bitsandbytes, or says two formats at once.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    said = stored if isinstance(stored, dict) else stored.to_dict()
    if said.get("load_in_4bit") and said.get("load_in_8bit"):
        raise ModelError("the model's config.json sets both load_in_4bit and load_in_8bit; correct it to one of them")
    if said.get("load_in_4bit"):
        return Quantization(said["bnb_4bit_quant_type"], bool(said.get("bnb_4bit_use_double_quant")), 64)
    if said.get("load_in_8bit"):
        return Quantization("int8")
    raise ModelError(
        f"the model is already quantised, by {said.get('quant_method', 'an unknown method')}; only quantisation by "
        "bitsandbytes is supported: give the 16-bit model that it was made from"
    )


def check_agreement(stored: Quantization, asked: Quantization) -> None:
    """Refuse to call a checkpoint something else than it is.

    Raises:
        ModelError: says which settings are those of the checkpoint.
    """
    if stored.kind != asked.kind or (stored.is_4bit and stored != asked):
        settings = f"base.quantization={stored.kind}"
        if stored.is_4bit:
            settings += f" base.double_quant={str(stored.double_quant).lower()} base.block_size={stored.block_size}"
        raise ModelError(f"the model is already stored in {stored.kind}, and cannot be requantised: set {settings}")


def adopt_layers(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Turn bitsandbytes' layers of a loaded model into the kit's, around the same codes and constants, copied.

    Args:
        model: a transformers model, changed in place.
        dtype: of the biases.
        device: where those that text goes through end; others stay in the memory of the host.
    """
    head, read = model.get_output_embeddings(), set(text_modules(model))
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.Linear4bit | bnb.Linear8bitLt):
            kind = QuantizedTable if module is head else QuantizedLinear
            place = device if module in read else torch.device("cpu")
            model.set_submodule(name, _adopted(module, kind, dtype, place))
    # Left on, these would bar `.to`, make an export call itself quantised, and be asked to pack what it writes.
    model._weight_conversions = [rule for rule in model._weight_conversions if not _unpacks(rule)]
    model.hf_quantizer.remove_quantization_config(model)
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(mark, None)


def packed(
    stored: Mapping[str, Tensor], shape: tuple[int, int], quantization: Quantization, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a layer in a checkpoint, by the ends of their names.

    Args:
        stored: codes and constants, as `quantize` names them.
        shape: (out, in).
        quantization: of these.
        dtype: in which bitsandbytes is to decode 4-bit codes where a program asks for no other.

    Returns:
        int8: `weight` (out, in), `SCB` (out,) and a `weight_format` of 0, by rows. 4-bit: `weight`, uint8 (bytes, 1),
        its constants and tables as `weight.*`, and the rest as JSON in bytes.
    """
    if quantization.kind == "int8":
        return {"weight": stored["codes"], "SCB": stored["absmax"], "weight_format": torch.tensor(0, dtype=torch.uint8)}
    made = {
        "weight": stored["codes"].view(-1, 1),
        "weight.absmax": stored["absmax"],
        "weight.quant_map": table_4bit(quantization.kind, stored["codes"].device),
    }
    state: dict[str, Any] = {
        "quant_type": quantization.kind,
        "blocksize": quantization.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": shape,
    }
    if quantization.double_quant:
        made["weight.nested_absmax"] = stored["absmax_scale"]
        made["weight.nested_quant_map"] = table_8bit(stored["codes"].device)
        offset = stored["absmax_offset"].item()
        state |= {"nested_blocksize": ABSMAX_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    made[f"weight.quant_state.bitsandbytes__{quantization.kind}"] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8
    )
    return made


def _unpacks(rule: WeightTransform) -> bool:
    """Whether it is bitsandbytes' own for reading a file, of which transformers has no reverse."""
    steps = rule.operations if isinstance(rule, WeightConverter) else ()
    return any(isinstance(step, Bnb4bitDeserialize | Bnb8bitDeserialize) for step in steps)


def _adopted(module: Any, kind: type[QuantizedLinear], dtype: torch.dtype, device: torch.device) -> QuantizedLinear:
    stored, quantization = _four_bit(module) if isinstance(module, bnb.Linear4bit) else _eight_bit(module)
    return kind.from_stored(
        (module.out_features, module.in_features),
        {name: copy_off(tensor, tensor.dtype, device) for name, tensor in stored.items()},
        None if module.bias is None else copy_off(module.bias.detach(), dtype, device),
        quantization,
        is_transposed=issubclass(getattr(module, "source_cls", nn.Linear), Conv1D),
    )


def _four_bit(module: Any) -> tuple[dict[str, Tensor], Quantization]:
    state = module.weight.quant_state
    quantization = Quantization(state.quant_type, state.nested, state.blocksize)
    stored = {"codes": module.weight.data.view(-1), "absmax": state.absmax}
    if state.nested:
        stored |= {"absmax_scale": state.state2.absmax, "absmax_offset": state.offset}
    return stored, quantization


def _eight_bit(module: Any) -> tuple[dict[str, Tensor], Quantization]:
    constants = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return {"codes": module.weight.data, "absmax": constants.float()}, Quantization("int8")
