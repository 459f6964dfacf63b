"""Which base an adapter was trained on: a checksum that survives quantisation.

It is taken from what every format leaves dense: the norms, and rows of the input embedding, both rounded to bf16. So an
adapter trained on the nf4 form of a checkpoint knows the int8 form and the 16-bit form of the same checkpoint as its
own, and another checkpoint of the same shape as a stranger.
"""

import hashlib

import torch
from torch import Tensor
from transformers import PreTrainedModel

EMBEDDING_ROWS = 256
"""Rows of the embedding that count, spread evenly over the vocabulary."""


def fingerprint(model: PreTrainedModel) -> str:
    """`sha256:...` over names, shapes and bf16 values of the base's norms and embedding rows."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.base_model.named_parameters()):
        if parameter.ndim == 1 and ".adapters." not in name:
            _add(digest, name.replace(".base.", "."), parameter)
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    rows = torch.linspace(0, len(embedding) - 1, min(EMBEDDING_ROWS, len(embedding))).long()
    _add(digest, "embedding", embedding[rows.to(embedding.device)])
    return f"sha256:{digest.hexdigest()}"


def _add(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
