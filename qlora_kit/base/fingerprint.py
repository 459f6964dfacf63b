"""Which base an adapter was trained on: checksums that survive quantisation.

The fingerprint is taken from what every format leaves dense: the norms, and rows of the input embedding, both rounded
to bf16 from the dtype of the checkpoint. So an adapter trained on the nf4 form of a checkpoint knows the int8 form and
the 16-bit form of the same checkpoint as its own, whatever the compute dtype, and another model of the same shape as a
stranger.

A model from which only the linear layers were trained on (a merged export) has the same fingerprint. Where a base is
read from dense weights, a second mark tells these apart: of one row of each of its matrices.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.base.vocabulary import read_rows, row_count

EMBEDDING_ROWS = 256
"""Rows of the embedding that count, spread evenly over the vocabulary."""


def fingerprint(model: PreTrainedModel) -> str:
    """`sha256:...` over names, shapes and bf16 values of a base's norms and embedding rows.

    Args:
        model: dense as it was read, before anything is rounded or put in its layers' place.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.base_model.named_parameters()):
        if parameter.ndim == 1:
            _add(digest, name, parameter)
    embedding: Any = model.get_input_embeddings()
    count = row_count(embedding)
    rows = torch.linspace(0, count - 1, min(EMBEDDING_ROWS, count)).long()
    _add(digest, "embedding", read_rows(embedding, rows, torch.bfloat16))
    return f"sha256:{digest.hexdigest()}"


def weights_mark(model: PreTrainedModel) -> str:
    """`sha256:...` over one row of every matrix of a base's body; empty where they are not all dense.

    Args:
        model: as above.
    """
    digest = hashlib.sha256()
    embedding: Any = model.get_input_embeddings()
    for name, parameter in sorted(model.base_model.named_parameters()):
        if not parameter.is_floating_point():
            return ""
        if parameter.ndim > 1 and parameter is not embedding.weight:
            row = parameter
            while row.ndim > 1:
                row = row[len(row) // 2]  # type: ignore[assignment]
            _add(digest, name, row)
    return f"sha256:{digest.hexdigest()}"


def _add(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
