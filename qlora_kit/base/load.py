"""From a model folder to a frozen model on a device: dense weights come in one by one and leave quantised.

On CPU transformers maps the checkpoint's own pages, so the dense model never stands in memory: each linear layer is
read, quantised and let go before the next, pages too, and what stays dense is copied off the file, so that nothing on
disk is held open. Experts that a checkpoint holds one by one are joined by transformers in memory of its own, and are
quantised as they come in.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from qlora_kit.base.architecture import Head, auto_class, brings_code, head_of, read_config, untrained_modules
from qlora_kit.base.attention import implementation
from qlora_kit.base.copies import Copy, copy_place, find_copy, keep_copy
from qlora_kit.base.dense import nothing_kept
from qlora_kit.base.device import resolve_device, resolve_dtype
from qlora_kit.base.experts import quantized_on_arrival
from qlora_kit.base.files import check_weights_are_dense
from qlora_kit.base.formats import Kind, Quantization
from qlora_kit.base.freeze import freeze_and_quantize
from qlora_kit.base.hub import locate_model, say_nothing
from qlora_kit.base.pages import let_go_of_clean_files
from qlora_kit.base.prequantized import adopt_layers, check_agreement, stored_quantization
from qlora_kit.base.record import base_record, keep_record
from qlora_kit.base.vocabulary import extend_vocabulary
from qlora_kit.errors import ModelError, first_line, listed
from qlora_kit.memory.limit import whose_memory_ran_out

Watching = Callable[[PreTrainedModel], AbstractContextManager[None]]


def load_base(
    model: str | Path,
    *,
    quantization: Kind = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    compute_dtype: str = "auto",
    device: str = "auto",
    skip: Sequence[str] = (),
    quantize_head: bool = False,
    attention: str = "sdpa",
    revision: str | None = None,
    trust_remote_code: bool = False,
    vocabulary: int = 0,
    head: Head = "causal",
    labels: int | None = None,
    watching: Watching | None = None,
    cache: bool = False,
    notify: Callable[[str], None] = say_nothing,
) -> PreTrainedModel:
    """Load a model, quantise its linear layers and freeze it.

    Args:
        model: a folder, or a hub id. What bitsandbytes has quantised already is taken over as it is.
        quantization: nf4, fp4, int8 or none; of a quantised checkpoint, the format that it has.
        double_quant: quantise the 4-bit block constants too.
        block_size: weights that share one 4-bit constant, a power of two from 32 to 4096.
        compute_dtype: bfloat16, float16, float32, or auto (see `device.default_compute_dtype`).
        device: cpu, cuda, cuda:N, or auto.
        skip: names of linear layers that stay dense, as leaf names or as whole dotted names.
        quantize_head: quantise the output head and the input embedding, too.
        attention: sdpa, eager, flex or flash; sdpa stands in for one that cannot be had here, and
            eager for sdpa in families that have none.
        revision: of the hub repository.
        trust_remote_code: run code that the model folder brings.
        vocabulary: tokens that the embedding must have rows for; those that it lacks start as the mean of the others.
            0 leaves it as it is.
        head: causal (the next token) or classification (one label a text).
        labels: of a classification; None takes what the model's configuration says.
        watching: gives the block in which the dense model, as read, is quantised: for whoever counts its memory.
        cache: keep what is quantised in the user's cache folder, and take it from there where it was kept before; the
            model has the same bits.
        notify: given a line about what is kept, or why nothing is.

    Returns:
        A plain transformers model in evaluation mode. No parameter asks for a gradient.

    Raises:
        ModelError: the folder is no such model, is damaged, misses a tensor other than those of a new classifier, or
            `skip` names no linear layer, or the head cannot be quantised.
        DeviceError: the device is not there.
    """
    target = resolve_device(device)
    dtype = resolve_dtype(compute_dtype, target)
    folder = locate_model(str(model), revision, code=trust_remote_code)
    asked = Quantization(quantization, double_quant, block_size)
    if quantize_head and quantization == "none":
        raise ModelError("base.quantize_head=true needs a quantised format; set base.quantization to nf4, fp4 or int8")
    config = read_config(folder, head=head, labels=labels, trust_remote_code=trust_remote_code)
    stored = stored_quantization(config)
    if stored is not None:
        check_agreement(stored, asked)
    is_dense = stored is None and quantization != "none"

    def read(are_kept: bool) -> PreTrainedModel:
        """As it is stored, its record kept; experts are quantised as they arrive, unless a copy has their codes."""
        arriving = quantized_on_arrival(asked, dtype, target, are_kept=are_kept) if is_dense else nullcontext()
        with arriving:
            loaded, untrained, unused = _load(folder, config, implementation(attention, target, dtype), head)
        keep_record(loaded, asked, dtype, folder, untrained, vocabulary, unused)
        let_go_of_clean_files()  # some rows of every matrix were read
        return loaded

    decides = asked, sorted(skip), quantize_head, vocabulary, head, labels, trust_remote_code, target.type
    place = copy_place(folder, decides, notify) if cache and is_dense else None
    loaded, copy = _read_beside_copy(read, place, notify)
    kept = nothing_kept if copy is None else partial(copy.read, device=target)
    with nullcontext() if watching is None else watching(loaded):
        extend_vocabulary(loaded, vocabulary)
        if stored is not None:
            adopt_layers(loaded, dtype, target)
        made = freeze_and_quantize(
            loaded, asked, dtype, target, skip, quantize_head=quantize_head, quantize_body=stored is None, kept=kept
        )
    if place is not None and copy is None and place == copy_place(folder, decides, notify):
        keep_copy(made, place, base_record(made).mark, notify)
    return made


def _read_beside_copy(
    read: Callable[[bool], PreTrainedModel], place: Path | None, notify: Callable[[str], None]
) -> tuple[PreTrainedModel, Copy | None]:
    """What `read` gives, told whether a copy has its codes; and that copy, if it was made of these very weights."""
    copy = None if place is None else find_copy(place, notify)
    loaded = read(copy is not None)
    if copy is not None and copy.mark != base_record(loaded).mark:
        return read(False), None  # other weights than the files' times tell
    if copy is not None:
        notify(f"codes and constants are read from the quantised copy {place}")
    return loaded, copy


def stored_as(folder: Path, *, head: Head = "causal", trust_remote_code: bool = False) -> dict[str, Any]:
    """The settings with which `load_base` takes a folder as it is: dense, or in the format in which it is stored.

    Raises:
        ModelError: the folder's configuration cannot be read, or it is quantised by something else than bitsandbytes.
    """
    config = read_config(folder, head=head, trust_remote_code=trust_remote_code)
    stored = stored_quantization(config) or Quantization("none")
    # Of 16 bits the device decides which: not all have bf16. In them an fp32 file would not be what was exported.
    compute_dtype = "float32" if config.dtype == torch.float32 else "auto"
    return {"quantization": stored.kind, "double_quant": stored.double_quant, "compute_dtype": compute_dtype}


def original_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model that a base was made from, read again, as tall: its weights are the checkpoint's mapped pages.

    Args:
        model: from `load_base`.

    Raises:
        ModelError: the model was not read from a folder, or the checkpoint has no dense weights.
    """
    folder, head = base_record(model).folder, head_of(model)
    if folder is None:
        raise ModelError("the weights that this base was made from are not available: load it from their folder")
    config = read_config(folder, head=head, trust_remote_code=brings_code(model.config))
    if stored_quantization(config) is not None:
        raise ModelError(f"{folder} holds quantised weights, and what they were made from is not available")
    original = _load(folder, config, None, head)[0]
    extend_vocabulary(original, base_record(model).vocabulary)
    return original


def _load(
    folder: Path, config: PretrainedConfig, attention: str | None, head: Head
) -> tuple[PreTrainedModel, tuple[str, ...], tuple[str, ...]]:
    """The model as it is stored, in its own dtype, off its mapped file; its modules that are new; tensors that it has
    no place for."""
    is_dense = stored_quantization(config) is None
    if is_dense:
        check_weights_are_dense(folder)
    # Quantised weights would go to the current card, where there is one, whatever device is asked for.
    place = {} if is_dense else {"device_map": {"": "cpu"}}
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):  # by default of all cards, with a warning
            torch.manual_seed(0)  # a new classifier starts the same at every load
            loaded: Any = auto_class(config, head).from_pretrained(
                folder,
                config=config,
                dtype="auto",
                attn_implementation=attention,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=brings_code(config),
                output_loading_info=True,
                **place,
            )
    except (ValueError, RuntimeError, OSError, KeyError, ImportError) as error:
        if whose_memory_ran_out(error) is not None:
            raise  # the folder is not to blame
        why = first_line(error)
        if "mismatched" in why:
            why = "its tensors have different shapes than its config.json says"
            why += f" (with {config.num_labels} labels)" if head == "classification" else ""
        raise ModelError(f"{folder} cannot be loaded as a {head} model: {why}") from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    untrained = untrained_modules(model, missing) if head == "classification" else ()
    lost = [key for key in missing if not key.startswith(tuple(f"{name}." for name in untrained))]
    if lost:
        raise ModelError(
            f"{folder} has no tensor for {listed(lost)}: its weights are incomplete, and missing ones are never filled "
            "in at random"
        )
    unused = sorted(info["unexpected_keys"]) if head == "causal" else []  # a classifier leaves a head out
    if type(model.config) is not type(config):
        unused.insert(0, f"all of a {config.model_type} but its {model.config.model_type}")
    return model, untrained, tuple(unused)
