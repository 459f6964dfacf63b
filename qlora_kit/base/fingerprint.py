"""Which base an adapter was trained on: a checksum that survives quantisation.

It is taken from what every format leaves dense: the norms, and rows of the input embedding, both rounded to bf16 from
the dtype of the checkpoint. So an adapter trained on the nf4 form of a checkpoint knows the int8 form and the 16-bit
form of the same checkpoint as its own, whatever the compute dtype, and another checkpoint of the same shape as a
stranger.
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


def _add(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
