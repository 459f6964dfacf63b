"""The two matrices as tall as the vocabulary, input embedding and output head: quantised, looked up, and made taller.

A head that is tied to the embedding shares its codes, too. The rows of a quantised matrix are read without the rest of
it: a row's codes and constants are its own, since `block_size` has to divide the width.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from qlora_kit.base.dense import Kept, QuantizedLinear, device_of, nothing_kept
from qlora_kit.base.formats import Quantization, block_constants
from qlora_kit.base.pages import let_go
from qlora_kit.errors import ModelError
from qlora_kit.ops import LogitRule, sliced_cross_entropy, sliced_linear


class QuantizedTable(QuantizedLinear):
    """A quantised matrix, (vocabulary, width), that is multiplied with and of which rows are looked up."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., vocabulary), in the dtype of x, decoded a slice at a time."""
        if not self.rows_are_whole:
            return super().forward(x)
        return sliced_linear(x, self._some_rows, (self.out_features, self.in_features), self.bias)

    def loss(self, h_ND: Tensor, labels_N: Tensor, rule: LogitRule, divisor: float) -> Tensor:
        """`sliced_cross_entropy` behind this matrix as a head."""
        shape = self.out_features, self.in_features
        return sliced_cross_entropy(h_ND, labels_N, self._some_rows, shape, self.bias, rule=rule, divisor=divisor)

    @property
    def rows_are_whole(self) -> bool:
        """Whether no block of weights reaches over two rows; in a checkpoint that was stored quantised it may."""
        return not self.quantization.is_4bit or self.in_features % self.quantization.block_size == 0

    def _some_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        return self.rows(torch.arange(rows.start, rows.stop, device=self.codes.device), dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the stored weight, (len(ids), width), in `dtype`: the same values as in `dense`.

        Args:
            ids: (N,), int64.
            dtype: to read them in.
        """
        if not self.rows_are_whole:
            return self.dense(dtype)[ids]
        if self.quantization.kind == "int8":
            stored = {"codes": self.codes.index_select(0, ids), "absmax": self.absmax[ids]}
            return self.read(stored, dtype, rows=len(ids))
        codes = self.codes.view(self.out_features, -1).index_select(0, ids)  # which refuses ids below zero
        blocks = self.in_features // self.quantization.block_size
        constants = (ids[:, None] * blocks + torch.arange(blocks, device=ids.device)).view(-1)
        absmax = block_constants(self.absmax, self.absmax_scale, self.absmax_offset, constants)
        return self.read({"codes": codes.view(-1), "absmax": absmax}, dtype, rows=len(ids))


class QuantizedEmbedding(nn.Module):
    """An input embedding whose rows are decoded when they are looked up.

    Args:
        table: the matrix.
        is_tied: whether the matrix is that of the output head, and registered there.
        scale: factor of every row that is looked up.
        dtype: of what it gives.
    """

    weight: Tensor

    def __init__(self, table: QuantizedTable, is_tied: bool, scale: float | Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.is_tied, self.scale = is_tied, scale
        self.own = None if is_tied else table
        self._shared = [table] if is_tied else []  # a list, so that torch does not register it a second time
        # No weights: their dtype and device, which some models ask an embedding for, and which follow the model's.
        empty = torch.empty(0, table.in_features, dtype=dtype, device=table.codes.device)
        self.register_buffer("weight", empty, persistent=False)

    @property
    def table(self) -> QuantizedTable:
        """The matrix, be it the head's or not."""
        return self._shared[0] if self.own is None else self.own

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., width), in the compute dtype."""
        rows = self.table.rows(ids.reshape(-1), self.weight.dtype)
        return scaled(rows.view(*ids.shape, -1), self.scale)


def scaled(rows: Tensor, scale: float | Tensor) -> Tensor:
    """Rows of an embedding times the factor that some families put on them, in the dtype of the rows."""
    if isinstance(scale, Tensor):
        scale = scale.to(rows)
    return rows if isinstance(scale, float) and scale == 1 else rows * scale


def embedding_scale(embedding: nn.Module) -> float | Tensor:
    """The factor that an input embedding puts on the rows that it looks up.

    Raises:
        ModelError: it is no plain or scaled embedding, so what it does to a row is not known.
    """
    if isinstance(embedding, QuantizedEmbedding):
        return embedding.scale
    if type(embedding) is nn.Embedding:
        return 1.0
    scale = getattr(embedding, "embed_scale", None)
    if not isinstance(embedding, nn.Embedding) or not isinstance(scale, float | Tensor):
        raise ModelError(
            f"the input embedding is a {type(embedding).__name__}, and how it changes a row is not known: leave out "
            "base.quantize_head and lora.added_tokens"
        )
    return scale


def read_rows(matrix: Any, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of an embedding's or a head's weight without any factor, (len(ids), width), a tensor of their own.

    Args:
        matrix: dense or quantised.
        ids: (N,), int64.
        dtype: to read them in.
    """
    if isinstance(matrix, QuantizedEmbedding | QuantizedTable):
        return _table(matrix).rows(ids, dtype)
    return matrix.weight.detach()[ids.to(matrix.weight.device)].to(dtype)


def row_count(matrix: Any) -> int:
    """Rows of an embedding or a head, dense or quantised."""
    return (
        _table(matrix).out_features if isinstance(matrix, QuantizedEmbedding | QuantizedTable) else len(matrix.weight)
    )


def row_width(matrix: Any) -> int:
    """Width of the rows of an embedding or a head, dense or quantised."""
    if isinstance(matrix, QuantizedEmbedding | QuantizedTable):
        return _table(matrix).in_features
    return matrix.weight.shape[1]


UNLEARNT = 0.01
"""Share of a usual row's norm below which a row, or what parts it from another, is nothing that was learnt."""


def unlearnt_rows(matrix: Any, ids: Sequence[int], others: Sequence[int]) -> list[int]:
    """Which of some tokens' rows were never trained, as far as the rows can tell.

    A row that is almost zero says nothing, and one that is almost another's cannot be told from it: so rows are that
    stayed as they were added (at zero, at one mean, or as copies). Rows left at random numbers of their own look like
    trained ones and are not found.

    Args:
        matrix: embedding or head, dense or quantised.
        ids: of the tokens, ascending, each once.
        others: ids of rows to compare with, none of them among `ids`: special tokens, and rows behind the last token,
            which nothing trains.

    Source: Land and Bartolo 2024, arXiv 2405.05417 (tokens that training has not seen show in their rows, small or near
    rows known to be unused); the share is ours, far below the distance of any two rows that were trained.
    """
    every, device = row_count(matrix), device_of(matrix)
    sample = torch.arange(0, every, max(1, every // 1024), device=device)
    usual = read_rows(matrix, sample, torch.float32).norm(dim=1).median()
    rows_ND = read_rows(matrix, torch.tensor([*ids, *others], device=device), torch.float32)
    apart_KN = torch.cdist(rows_ND[: len(ids)], rows_ND, compute_mode="donot_use_mm_for_euclid_dist")
    apart_KN.fill_diagonal_(torch.inf)
    least_K = torch.minimum(rows_ND[: len(ids)].norm(dim=1), apart_KN.amin(1))
    return [token for token, least in zip(ids, least_K.tolist(), strict=True) if least < UNLEARNT * usual]


def _table(matrix: QuantizedEmbedding | QuantizedTable) -> QuantizedTable:
    return matrix.table if isinstance(matrix, QuantizedEmbedding) else matrix


def are_tied(embedding: Any, head: Any) -> bool:
    """Whether an output head (None where a model has none) and an input embedding are one matrix."""
    if isinstance(embedding, QuantizedEmbedding):
        return embedding.is_tied
    return head is not None and getattr(head, "weight", None) is embedding.weight


def quantize_vocabulary(
    model: PreTrainedModel,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    kept: Kept = nothing_kept,
) -> None:
    """Quantise the input embedding and the output head in place; tied, they share one matrix.

    Args:
        model: dense.
        quantization: the format, not `none`.
        dtype: of the head's bias and of the rows that are looked up.
        device: where the codes are made and kept.
        kept: codes that are there already.

    Raises:
        ModelError: a block of weights would reach over two rows, or one of the two is of no known kind.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    scale, width = embedding_scale(embedding), embedding.weight.shape[1]
    if quantization.is_4bit and width % quantization.block_size:
        raise ModelError(
            f"base.quantize_head needs base.block_size to divide the embedding's width of {width}; "
            f"{quantization.block_size} does not"
        )
    if head is not None and type(head) is not nn.Linear:
        raise ModelError(f"the output head is a {type(head).__name__}; base.quantize_head is possible only on a Linear")
    names = {id(module): name for name, module in model.named_modules()}
    ties = are_tied(embedding, head)
    if head is not None:
        bias = None if head.bias is None else head.bias.detach().to(device, dtype, copy=True)
        table = _quantized(head.weight, bias, quantization, device, kept(names[id(head)]))
        model.set_submodule(names[id(head)], table)
    if not ties:
        table = _quantized(embedding.weight, None, quantization, device, kept(f"{names[id(embedding)]}.own"))
    model.set_submodule(names[id(embedding)], QuantizedEmbedding(table, ties, scale, dtype))


def _quantized(
    weight_OI: Tensor,
    bias: Tensor | None,
    quantization: Quantization,
    device: torch.device,
    stored: Mapping[str, Tensor] | None,
) -> QuantizedTable:
    """The table of a dense matrix, whose pages are let go, or of its codes and constants where they are there."""
    if stored is None:
        table = QuantizedTable(weight_OI.detach().to(device), bias, quantization)
        let_go(weight_OI)
    else:
        out, width = weight_OI.shape
        table = QuantizedTable.from_stored((out, width), stored, bias, quantization)
    return table


def longer_config(config: PretrainedConfig, rows: int) -> PretrainedConfig:
    """The configuration of a model whose vocabulary was extended to at least `rows`."""
    longer = copy.deepcopy(config)
    text = longer.get_text_config()
    text.vocab_size = max(text.vocab_size, rows)
    return longer


@torch.no_grad()
def extend_vocabulary(model: PreTrainedModel, rows: int) -> None:
    """Make embedding and head at least `rows` tall; rows that come are the mean of those that were there.

    Args:
        model: dense there, its weights read.
        rows: at least as many as the tokenizer has tokens.

    Raises:
        ModelError: embedding or head are quantised already.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    before = row_count(embedding)
    if rows <= before:
        return
    weights = {weight for end in (embedding, head) if end is not None for weight in end.parameters()}
    if not all(weight.is_floating_point() for weight in weights):
        raise ModelError(f"the checkpoint's head is quantised, so its {before} tokens cannot become {rows}")
    model.resize_token_embeddings(rows, mean_resizing=False)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {weight for end in ends if end is not None for weight in end.parameters()}
    for weight in weights:
        weight[before:] = weight[:before].mean(0, dtype=torch.float32).to(weight.dtype)
