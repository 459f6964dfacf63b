"""Single rows of the embedding and the head that an adapter trains: those of added tokens.

The base keeps its own rows; where a trained one is looked up or multiplied with, it comes in their place. A head that
is tied to the embedding uses the embedding's rows. In PEFT's files they are `trainable_token_indices`.

Axes: K trained rows, D width of the embedding.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.base.dense import device_of, is_linear
from qlora_kit.base.record import base_record
from qlora_kit.base.vocabulary import are_tied, embedding_scale, read_rows, row_count, scaled
from qlora_kit.errors import AdapterError
from qlora_kit.lora.layer import Carrier, bare


class TokenRows(nn.Module):
    """Trained rows of a matrix that is as tall as the vocabulary.

    Args:
        ids_K: token ids, ascending, int64.
        rows_KD: where the rows start.
    """

    ids_K: Tensor

    def __init__(self, ids_K: Tensor, rows_KD: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids_K", ids_K, persistent=False)
        self.rows_KD = nn.Parameter(rows_KD)


class RowsEmbedding(Carrier):
    """An input embedding of which adapters train rows."""

    @property
    def weight(self) -> Any:
        """The frozen matrix, which some models ask for its dtype."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., D): trained rows where there are some, the base's elsewhere."""
        frozen = self.base(ids)
        if self.active is None:
            return frozen
        rows: Any = self.adapters[self.active]
        place = torch.searchsorted(rows.ids_K, ids.contiguous()).clamp_(max=len(rows.ids_K) - 1)
        trained = scaled(F.embedding(place, rows.rows_KD), embedding_scale(self.base)).to(frozen.dtype)
        return torch.where((rows.ids_K[place] == ids)[..., None], trained, frozen)


class RowsHead(Carrier):
    """An output head of which adapters train rows."""

    def forward(self, h: Tensor) -> Tensor:
        """(..., D) -> (..., vocabulary)."""
        logits = self.base(h)
        if self.active is None:
            return logits
        rows: Any = self.adapters[self.active]
        bias = None if self.base.bias is None else self.base.bias[rows.ids_K]
        # In place: a second tensor of logits would be the largest of the whole step.
        return logits.index_copy_(-1, rows.ids_K, F.linear(h, rows.rows_KD.to(h.dtype), bias).to(logits.dtype))


def head_name(model: PreTrainedModel) -> str | None:
    """Dotted name of the output head, if the model has one that is a linear layer."""
    head: Any = model.get_output_embeddings()
    if head is None or not is_linear(bare(head)):
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def end_names(model: PreTrainedModel) -> list[str]:
    """Dotted names of the input embedding and, where the model has one, of the output head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [next(name for name, module in model.named_modules() if module is end) for end in ends if end is not None]


def head_is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head and the input embedding are one matrix, whatever they carry."""
    return are_tied(bare(model.get_input_embeddings()), bare(model.get_output_embeddings()))


def train_rows(model: PreTrainedModel, ids: Sequence[int], name: str) -> None:
    """Let the adapter `name` train these tokens' rows of the input embedding and of the output head.

    Args:
        model: frozen.
        ids: ascending, each once; `check_rows` has seen them.
        name: of the adapter.
    """
    rows_of_embedding(model, ids, name)
    if model.get_output_embeddings() is not None and not head_is_tied(model):
        rows_of_head(model, ids, name)


def rows_of_embedding(
    model: PreTrainedModel, ids: Sequence[int], name: str, *, for_tied_head: bool = True
) -> TokenRows:
    """The rows of the input embedding alone, which start as the base's.

    Args:
        model: frozen.
        ids: ascending, each once; `check_rows` has seen them.
        name: of the adapter.
        for_tied_head: let a head that is tied to the embedding use them, too.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_one = for_tied_head and head_is_tied(model)
    rows = _start(model, bare(embedding), ids)
    _carrier(model, embedding, RowsEmbedding).adapters[name] = rows
    if is_one:
        _carrier(model, head, RowsHead).adapters[name] = rows
    return rows


def rows_of_head(model: PreTrainedModel, ids: Sequence[int], name: str) -> TokenRows:
    """The rows of the output head alone; they start as the base's."""
    head = model.get_output_embeddings()
    rows = _start(model, bare(head), ids)
    _carrier(model, head, RowsHead).adapters[name] = rows
    return rows


def check_rows(model: PreTrainedModel, ids: Sequence[int], taken: Collection[str]) -> None:
    """Refuse tokens whose rows cannot be trained.

    Args:
        model: frozen.
        ids: of the tokens.
        taken: dotted names of the layers and modules that the adapter trains otherwise.

    Raises:
        AdapterError: an id has no row, or embedding or head carry something else.
        ModelError: the embedding is of an unknown kind.
    """
    if not ids:
        return
    strange = [each for each in ids if isinstance(each, bool) or not isinstance(each, int)]
    if strange:
        raise AdapterError(f"added_tokens has {strange[0]!r}, wanted ids of tokens, which are whole numbers")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding_scale(bare(embedding))
    rows = row_count(bare(embedding))
    odd = next((each for each in ids if not 0 <= each < rows), None)
    if odd is not None:
        raise AdapterError(f"added_tokens has the id {odd}, and the embedding has {rows} rows; extend it at loading")
    others = [module for module in (embedding, head) if isinstance(module, Carrier)]
    is_taken = any(end == name or end.startswith(f"{name}.") for end in end_names(model) for name in taken)
    if is_taken or any(not isinstance(module, RowsEmbedding | RowsHead) for module in others):
        raise AdapterError(
            "embedding or head is already trained by another part of an adapter; their rows cannot be trained as "
            "well: leave out "
            "lora.added_tokens, or the head in lora.targets and lora.also_train"
        )


def _start(model: PreTrainedModel, matrix: Any, ids: Sequence[int]) -> TokenRows:
    ids_K = torch.tensor(list(ids), device=device_of(matrix))
    return TokenRows(ids_K, read_rows(matrix, ids_K, base_record(model).dtype))


def _carrier(model: PreTrainedModel, module: Any, kind: type[Carrier]) -> Carrier:
    if isinstance(module, kind):
        return module
    name = next(name for name, other in model.named_modules() if other is module)
    carrier = kind(module).train(module.training)
    model.set_submodule(name, carrier)
    return carrier
