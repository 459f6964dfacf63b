"""However rows are laid out, whatever attends and however the loss is taken: one loss, one gradient."""

import itertools

import pytest
import tiny
import torch
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import masking_utils
from transformers.integrations import flex_attention as integration

from qlora_kit.data import Encoded, collate_rows
from qlora_kit.lora import adapter_parameters, add_lora
from qlora_kit.train.evaluate import evaluate_loss
from qlora_kit.train.step import accumulate_gradients

FP32 = 1e-6  # some roundings of 6e-8: sums are taken in another order in every layout
LENGTHS = (5, 17, 9, 3)
LAYOUTS = {  # micro-batches of sequences of rows
    ("padded", "4 rows"): [[[0], [1], [2], [3]]],
    ("padded", "2 x 2"): [[[0], [1]], [[2], [3]]],
    ("padded", "1 x 4"): [[[0]], [[1]], [[2]], [[3]]],
    ("packed", "4 rows"): [[[0, 1], [2, 3]]],
    ("packed", "2 x 2"): [[[0, 1]], [[2, 3]]],
    ("packed", "1 x 4"): [[[0, 1, 2, 3]]],
}
CASES = list(itertools.product(LAYOUTS, ("sdpa", "eager", "flex_attention"), (None, 6)))


def batches(layout):
    ids = tiny.tokens(4, max(LENGTHS), seed=3).tolist()
    rows = [Encoded(row[:n], [place >= n // 2 for place in range(n)]) for row, n in zip(ids, LENGTHS, strict=True)]
    return [collate_rows([[rows[row] for row in pack] for pack in packs], 0) for packs in LAYOUTS[layout]]


@pytest.fixture(scope="module")
def model():
    # Wide initial weights, or attention would be flat, and what leaks would hardly be seen.
    model = tiny.quantized(tiny.llama(initializer_range=0.2))
    add_lora(model, rank=4, alpha=8, dtype=torch.float32)
    tiny.wake(model)
    return model.train()


def step(model, layout, attention, loss_chunk):
    """Loss, norm and gradients of one step."""
    model.set_attn_implementation(attention)
    parameters = [parameter for _, parameter in adapter_parameters(model)]
    for parameter in parameters:
        parameter.grad = None
    given = [batch.to(model.device) for batch in batches(layout)]
    loss = accumulate_gradients(model, given, sum(batch.count for batch in given), loss_chunk=loss_chunk).value.item()
    gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])
    return loss, gradient.norm().item(), gradient


@pytest.fixture(scope="module")
def wanted(model):
    """A step whose rows go through the model one by one, in eager attention and with whole logits."""
    return step(model, ("padded", "1 x 4"), "eager", None)


@pytest.fixture
def flexed(monkeypatch):
    """Flex attention as torch has it uncompiled, with a backward pass on any device; counts its calls.

    torch refuses that pass on a CPU, and what it compiles there for packed rows is no C++ (2.13). The masks, which are
    what a layout changes, are made of rows and positions by the same code as on a card.
    """
    calls = []
    plainly = lambda *args, **how: create_block_mask(*args, **{**how, "_compile": False})  # noqa: E731
    attend = lambda *args, **how: calls.append(how["block_mask"]) or flex_attention(*args, **how)  # noqa: E731
    monkeypatch.setattr(masking_utils, "create_block_mask", plainly)
    monkeypatch.setattr(integration, "WrappedFlexAttention", lambda _: lambda: attend)
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    return calls


@pytest.mark.parametrize(("layout", "attention", "loss_chunk"), CASES)
def test_layout_attention_and_chunks_change_neither_loss_nor_gradient(
    layout, attention, loss_chunk, model, wanted, flexed
):
    assert wanted[1] > 0.1
    assert any(batch.position_ids is not None for batch in batches(layout)) == (layout[0] == "packed")
    loss, norm, gradient = step(model, layout, attention, loss_chunk)
    assert bool(flexed) == (attention == "flex_attention")
    assert loss == pytest.approx(wanted[0], rel=FP32)
    assert norm == pytest.approx(wanted[1], rel=FP32)
    assert tiny.relative(gradient, wanted[2]) < FP32


def test_documents_that_are_not_told_apart_would_have_another_loss(model, wanted):
    (batch,) = batches(("packed", "1 x 4"))
    batch = type(batch)(batch.input_ids, batch.labels, batch.lengths, batch.trained_tokens, batch.rows, batch.count)
    model.set_attn_implementation("eager")
    assert evaluate_loss(model, [batch]).loss != pytest.approx(wanted[0], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_flex_attention_changes_neither_loss_nor_gradient(layout):
    model = tiny.quantized(tiny.llama(initializer_range=0.2)).to("cuda")
    add_lora(model, rank=4, alpha=8, dtype=torch.float32)
    tiny.wake(model)
    wanted, found = (step(model.train(), layout, attention, None) for attention in ("eager", "flex_attention"))
    assert found[0] == pytest.approx(wanted[0], rel=1e-4), "its products are in TF32"
    assert tiny.relative(found[2], wanted[2]) < 1e-2
