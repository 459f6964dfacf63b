"""Which base an adapter was trained on: checksums that survive quantisation.

The fingerprint is taken from what every format leaves dense: the norms, and rows of the input embedding, both rounded
to bf16 from the dtype of the checkpoint. So an adapter trained on the nf4 form of a checkpoint knows the int8 form and
the 16-bit form of the same checkpoint as its own, whatever the compute dtype, and another model of the same shape as a
stranger.

A model from which only the linear layers were trained on (a merged export), or of which only the settings were changed,
has the same fingerprint. More marks tell these apart, each under a name that says what it can be compared with: those
of the body and of the head, of pieces of each matrix or, where a base is stored quantised, of its codes, which only the
same format has; and that of the configuration, to which each version of transformers adds keys of its own.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.base.pages import let_go_if_clean
from qlora_kit.base.vocabulary import read_rows, row_count

EMBEDDING_ROWS = 256
"""Rows of the embedding that count, spread evenly over the vocabulary."""
_PIECES, _PIECE = 5, 4096
"""Of each matrix: pieces that count, spread evenly over it, and numbers in each. Of the weights of a 7B model that is
0.1 %; a model that was trained on has other numbers in every one."""
_INERT = frozenset(
    (
        *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "quantization_config"),
        *("use_cache", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("num_labels", "id2label", "label2id", "problem_type"),
    )
)
"""Settings that change nothing of what the weights compute: how they are stored, what runs ask for, names."""


class Placeholder(nn.Parameter):
    """A parameter whose weight is elsewhere, with the pieces of it that mark a base."""

    pieces: Tensor


def base_marks(model: PreTrainedModel, kind: str) -> dict[str, str]:
    """All that marks a base, by name; what two bases both have under one name is equal if they are the same.

    Args:
        model: dense as it was read, or as bitsandbytes stored it, before anything is put in its layers' place.
        kind: in which it is stored where it is not dense.

    Returns:
        `sha256:...` each: `fingerprint`; where all is dense `weights`, of one row of each matrix of the body, which
        older versions know, too; `body` and `head`, or with the kind in their names; and `config`, likewise.
    """
    embedding: Any = model.get_input_embeddings()
    body = [
        (name, parameter)
        for name, parameter in sorted(model.base_model.named_parameters())
        if parameter.ndim > 1 and parameter is not embedding.weight
    ]
    output: Any = model.get_output_embeddings()
    own_head = () if output is None or output.weight is embedding.weight else (("head", output.weight),)
    marks = {"fingerprint": fingerprint(model)}
    if all(parameter.is_floating_point() for _, parameter in body):
        marks["weights"] = _digest((name, _middle_row(parameter)) for name, parameter in body)
    for part, held in (("body", body), ("head", own_head)):
        if held:
            is_dense = all(parameter.is_floating_point() for _, parameter in held)
            marks[part if is_dense else f"{part}-{kind}"] = _digest((name, pieces(each)) for name, each in held)
    said = json.dumps(_settings(model.config.to_dict()), sort_keys=True, default=str)
    marks[f"config-{transformers.__version__}"] = f"sha256:{hashlib.sha256(said.encode()).hexdigest()}"
    return marks


def fingerprint(model: PreTrainedModel) -> str:
    """`sha256:...` over names, shapes and bf16 values of a base's norms and embedding rows.

    Args:
        model: dense as it was read, before anything is rounded or put in its layers' place.
    """
    norms = [
        (name, parameter) for name, parameter in sorted(model.base_model.named_parameters()) if parameter.ndim == 1
    ]
    embedding: Any = model.get_input_embeddings()
    count = row_count(embedding)
    rows = torch.linspace(0, count - 1, min(EMBEDDING_ROWS, count)).long()
    return _digest([*norms, ("embedding", read_rows(embedding, rows, torch.bfloat16))])


def pieces(weight: Tensor) -> Tensor:
    """Pieces of a matrix or of a stack of them, or of codes, (5, up to 4096), a tensor of their own."""
    if isinstance(weight, Placeholder):
        return weight.pieces
    flat = weight.detach().flatten()
    length = min(len(flat), _PIECE)
    made = torch.stack([flat[(len(flat) - length) * each // (_PIECES - 1) :][:length] for each in range(_PIECES)])
    let_go_if_clean(flat)  # each piece brought megabytes of its file into memory
    return made


def _middle_row(weight: Tensor) -> Tensor:
    while weight.ndim > 1:
        weight = weight[len(weight) // 2]
    return weight


def _settings(said: Any) -> Any:
    """A configuration without what is inert, the configurations in it likewise."""
    if isinstance(said, dict):
        return {str(key): _settings(value) for key, value in said.items() if key not in _INERT}
    return [_settings(value) for value in said] if isinstance(said, list | tuple) else said


def _digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """`sha256:...` over names, shapes and values; fractions as bf16, codes as they are."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        tensor = tensor.detach().to("cpu", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
