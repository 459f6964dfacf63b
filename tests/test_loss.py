"""The loss a few tokens at a time is the loss: same value, same gradients, and the logits never stand whole."""

import math
import sys

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    ModernBertDecoderConfig,
    Qwen3Config,
    masking_utils,
)

from qlora_kit.base import Quantization
from qlora_kit.base.architecture import build_model
from qlora_kit.base.freeze import freeze_and_quantize
from qlora_kit.lora import adapter_parameters, add_lora
from qlora_kit.memory import Ledger
from qlora_kit.ops import (
    IGNORED,
    LogitRule,
    head_cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_plain,
    native,
    sliced_cross_entropy,
    sliced_linear,
    softmax_gradient,
)
from qlora_kit.train.activations import set_activation_policy
from qlora_kit.train.evaluate import evaluate_loss
from qlora_kit.train.forward import evaluation_mode, loss_sum
from qlora_kit.train.head import automatic_chunk, has_own_head, logit_rule
from qlora_kit.train.probe import settled_chunk
from qlora_kit.train.step import accumulate_gradients

slices = sys.modules["qlora_kit.ops.slices"]
op = sys.modules["qlora_kit.ops.linear_cross_entropy"]  # its function bears the same name
by_slices = sys.modules["qlora_kit.ops.sliced_cross_entropy"]
RULES = [LogitRule(), LogitRule(0.25), LogitRule(cap=5.0), LogitRule(2.0, 5.0)]
CHUNKS = [1, 7, 1000]
TOKENS, WIDTH, VOCAB = 37, 24, 61
DIVISOR = 17


@pytest.fixture(params=["compiled", "plain"])
def way(request, monkeypatch):
    """Row by row in C, and by torch's operators in slices."""
    if request.param == "plain":
        tiny.uncompiled(monkeypatch)
    else:
        assert native.library() is not None, "these tests want a C compiler"
    return request.param


def slice_after(monkeypatch, elements):
    """Slices of a chunk, and of the gradients that are scaled, of so many elements."""
    for room in (op, softmax_gradient):
        monkeypatch.setattr(room, "SLICE_ELEMENTS", elements)


# --- the op -----------------------------------------------------------------------------------------------------------


def problem(dtype=torch.float64, seed=0):
    """Input, labels of which some are ignored, weight and bias of a head, with logits of a few units."""
    draw = torch.Generator().manual_seed(seed)
    h = torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64)
    w = torch.randn(VOCAB, WIDTH, generator=draw, dtype=torch.float64) * 0.5
    b = torch.randn(VOCAB, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=draw)
    labels[[0, 11, 36]] = IGNORED
    return h.to(dtype), labels, w.to(dtype), b.to(dtype)


def answers(loss, *inputs: Tensor, factor=1.0) -> list[Tensor]:
    """The value of a function and the gradients of all its inputs, where what follows multiplies it by `factor`."""
    leaves = [each.clone().requires_grad_() for each in inputs]
    value = loss(*leaves)
    (factor * value).backward()
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves)
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def plain(labels, rule):
    return lambda h, w, b: linear_cross_entropy_plain(h, labels, w, b, rule, DIVISOR)


def dense(labels, rule, chunk):
    return lambda h, w, b: linear_cross_entropy(h, labels, w, b, chunk=chunk, rule=rule, divisor=DIVISOR)


def any_head(labels, rule, chunk):
    def loss(h, w, b):
        head = lambda x: nn.functional.linear(x, w, b)  # noqa: E731
        return head_cross_entropy(h, labels, head, [w, b], chunk=chunk, rule=rule, divisor=DIVISOR)

    return loss


@pytest.mark.parametrize("kind", [dense, any_head])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("rule", RULES)
def test_value_and_gradients_are_those_of_whole_logits(kind, chunk, rule):
    """In float64, where rounding is below 1e-15 and nothing else can hide."""
    h, labels, *head = problem()
    wanted = answers(plain(labels, rule), h, *head, factor=3.0)
    found = answers(kind(labels, rule, chunk), h, *head, factor=3.0)
    assert all(each.norm() > 0.1 for each in wanted)
    assert max(map(tiny.relative, found, wanted)) < 1e-13


@pytest.mark.parametrize("kind", [dense, any_head])
@pytest.mark.parametrize("rule", RULES)
def test_in_fp32_it_is_the_same_up_to_its_rounding(kind, rule, way):
    h, labels, *head = problem(torch.float32)
    found, wanted = (answers(loss, h, *head) for loss in (kind(labels, rule, 7), plain(labels, rule)))
    assert max(map(tiny.relative, found, wanted)) < 1e-6


@pytest.mark.parametrize("kind", [dense, any_head])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_in_16_bits_it_is_no_further_from_the_truth_than_whole_logits_are(kind, dtype, rule, way):
    """dh is rounded as often as there: the same up to 5 %. dW is rounded once a chunk, which costs up to a half."""
    for seed in range(3):
        h, labels, *head = problem(dtype, seed)
        truth = answers(plain(labels, rule), *(each.double() for each in (h, *head)))
        value, *bounds = map(tiny.relative, answers(plain(labels, rule), h, *head), truth)
        found, dh, dw, db = map(tiny.relative, answers(kind(labels, rule, 13), h, *head), truth)
        assert min(bounds) > 1e-4, "whole logits are rounded"
        assert found < max(1.05 * value, 1e-4)
        assert dh <= 1.05 * bounds[0]
        assert max(dw / bounds[1], db / bounds[2]) < 1.6


def test_a_slice_of_the_vocabulary_at_a_time_changes_nothing(monkeypatch):
    tiny.uncompiled(monkeypatch)
    h, labels, *head = problem(torch.bfloat16)
    once = answers(dense(labels, RULES[3], 13), h, *head)
    slice_after(monkeypatch, 2 * VOCAB + 1)
    assert all(map(torch.equal, answers(dense(labels, RULES[3], 13), h, *head)[1:], once[1:]))


def sliced(labels, rule, decoded=None):
    """A frozen head by slices of its rows; it notes in `decoded` what it reads."""

    def loss(h, w, b):
        w, b = w.detach(), b.detach()

        def decode_rows(rows, dtype):
            if decoded is not None:
                decoded.append((rows.start, rows.stop))
            return w[rows].to(dtype)

        return sliced_cross_entropy(h, labels, decode_rows, tuple(w.shape), b, rule=rule, divisor=DIVISOR)

    return loss


def of_input(loss, h, *head, factor=1.0):
    """Value and dh."""
    return answers(lambda h: loss(h, *head), h, factor=factor)


@pytest.mark.parametrize("tokens", [1, 7, 1000])
@pytest.mark.parametrize("rows", [1, 13, 1000])
@pytest.mark.parametrize("rule", RULES)
def test_a_head_read_by_slices_gives_value_and_gradient_of_whole_logits(tokens, rows, rule, monkeypatch):
    """In float64; slices of one row, of some of which the last is shorter, and of all."""
    monkeypatch.setattr(by_slices, "TOKENS", tokens)
    monkeypatch.setattr(slices, "SLICE_ELEMENTS", rows * WIDTH)
    h, labels, *head = problem()
    decoded = []
    wanted = of_input(plain(labels, rule), h, *head, factor=3.0)
    found = of_input(sliced(labels, rule, decoded), h, *head, factor=3.0)
    assert all(each.norm() > 0.1 for each in wanted)
    assert max(map(tiny.relative, found, wanted)) < 1e-13
    assert len(decoded) == 2 * -(-TOKENS // tokens) * -(-VOCAB // rows), "every slice is decoded twice a chunk"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_in_16_bits_slices_are_hardly_further_from_the_truth_than_whole_logits_are(dtype, rule, monkeypatch):
    """The value is the same up to 5 %. dh is summed over slices in fp32, but the product of each is rounded to 16 bits:
    with five slices errors as large as one rounding's that add up like random ones, so up to a half more."""
    monkeypatch.setattr(slices, "SLICE_ELEMENTS", 13 * WIDTH)
    for seed in range(3):
        h, labels, *head = problem(dtype, seed)
        truth = of_input(plain(labels, rule), *(each.double() for each in (h, *head)))
        bounds = list(map(tiny.relative, of_input(plain(labels, rule), h, *head), truth))
        value, dh = map(tiny.relative, of_input(sliced(labels, rule), h, *head), truth)
        assert bounds[1] > 1e-4, "whole logits are rounded"
        assert value < max(1.05 * bounds[0], 1e-4)
        assert dh <= 1.5 * bounds[1]


def test_a_head_read_by_slices_never_has_more_logits_than_it_may(monkeypatch):
    """However narrow the head; nothing is larger than they are in fp32."""
    monkeypatch.setattr(by_slices, "ROWS", 30)
    h, labels, *head = problem(torch.bfloat16)
    ledger = Ledger()
    with ledger:
        of_input(sliced(labels, LogitRule()), h, *head)
    assert max(each.nbytes for each, _ in ledger.history.events()) == 30 * TOKENS * 4 < VOCAB * TOKENS * 4


def test_no_batch_takes_more_for_a_head_read_by_slices_than_a_longer_one(monkeypatch):
    """Or the rehearsal of the longest rows would not be one of them all."""
    monkeypatch.setattr(by_slices, "ROWS", 30)
    monkeypatch.setattr(by_slices, "TOKENS", 16)

    def peak(tokens):
        h, labels, *head = problem(torch.bfloat16)
        ledger = Ledger()
        with ledger, ledger.phase("loss"):
            of_input(sliced(labels[:tokens], LogitRule()), h[:tokens], *head)
        return ledger.peak()

    peaks = [peak(tokens) for tokens in range(1, TOKENS + 1)]
    assert peaks == sorted(peaks)
    assert peaks[-1] > peaks[0]


@pytest.mark.parametrize("rule", RULES)
def test_no_tokens_have_no_loss_and_gradients_of_zero(rule, way):
    h, labels, *head = problem(torch.float32)
    none = labels[:0]
    for found in (
        answers(dense(none, rule, 7), h[:0], *head),
        answers(any_head(none, rule, 7), h[:0], *head),
        of_input(sliced(none, rule), h[:0], *head),
    ):
        loss, dh, *of_head = found
        assert loss == 0
        assert dh.shape == (0, WIDTH)
        assert not any(each.any() for each in of_head)


def test_a_head_read_by_slices_without_a_gradient_is_decoded_once():
    h, labels, *head = problem(torch.float32)
    decoded = []
    with torch.no_grad():
        found = sliced(labels, LogitRule(), decoded)(h, *head)
    assert found == pytest.approx(plain(labels, LogitRule())(h, *head).item(), rel=1e-6)
    assert decoded == [(0, VOCAB)]


def test_a_head_read_by_slices_may_have_rows_that_never_win(monkeypatch):
    """A bias of -inf keeps a token from being said; a whole slice of them is no NaN."""
    h, labels, w, b = problem(torch.float32)
    b[:10] = -torch.inf
    labels[labels < 10] = 20
    wanted = of_input(plain(labels, LogitRule()), h, w, b)
    monkeypatch.setattr(slices, "SLICE_ELEMENTS", 5 * WIDTH)
    found = of_input(sliced(labels, LogitRule()), h, w, b)
    assert torch.isfinite(wanted[0])
    assert max(map(tiny.relative, found, wanted)) < 1e-6


def test_a_head_read_by_slices_survives_logits_that_overflow_an_exponential():
    h, labels, w, b = problem(torch.float32)
    wanted = of_input(plain(labels, LogitRule()), h, w * 400, b)
    found = of_input(sliced(labels, LogitRule()), h, w * 400, b)
    assert (h @ (w * 400).t()).max() > 1000
    assert torch.isfinite(found[0])
    assert max(map(tiny.relative, found, wanted)) < 1e-6


@pytest.mark.parametrize("kind", [dense, any_head])
def test_ignored_tokens_get_no_gradient_and_do_no_harm(kind, way):
    h, labels, *head = problem(torch.float32)
    h[11] *= 1e4
    _, dh, dw, _ = answers(kind(labels, LogitRule(), 7), h, *head)
    assert not dh[labels == IGNORED].any()
    assert (dh[labels != IGNORED].norm(dim=1) > 0).all()
    assert dw.isfinite().all()
    for each in answers(kind(torch.full_like(labels, IGNORED), LogitRule(), 7), h, *head):
        assert not each.any()


@pytest.mark.parametrize("kind", [dense, any_head])
def test_what_asks_for_no_gradient_gets_none(kind):
    h, labels, w, b = problem()
    wanted = answers(kind(labels, LogitRule(), 7), h, w, b)
    for asks in range(1, 8):
        leaves = [each.clone().requires_grad_(bool(asks >> bit & 1)) for bit, each in enumerate((h, w, b))]
        if kind is any_head and asks < 6:  # which is given those parameters alone that are trained
            continue
        kind(labels, LogitRule(), 7)(*leaves).backward()
        for leaf, gradient in zip(leaves, wanted[1:], strict=True):
            assert (leaf.grad is None) if not leaf.requires_grad else torch.equal(leaf.grad, gradient)
    with torch.no_grad():
        value = kind(labels, LogitRule(), 7)(h, w.requires_grad_(), b)
    assert not value.requires_grad
    assert torch.equal(value, wanted[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("vocab", [1, 15, 16, 1024, 5003])
def test_row_by_row_in_c_it_is_float64_up_to_one_rounding(vocab, rule, dtype, way):
    draw = torch.Generator().manual_seed(0)
    logits = (6 * torch.randn(9, vocab, generator=draw)).to(dtype)
    labels = torch.randint(0, vocab, (9,), generator=draw)
    labels[[0, 4]], labels[1] = IGNORED, vocab - 1
    l64 = logits.double().requires_grad_()
    wanted = 0.7 * nn.functional.cross_entropy(rule(l64), labels, ignore_index=IGNORED, reduction="sum")
    wanted.backward()
    loss = softmax_gradient.loss_and_gradient(logits, labels, rule, 0.7)  # puts the gradient in the place of the logits
    assert not logits[labels == IGNORED].any()
    assert (loss - wanted.detach()).abs() <= 1e-6 * wanted.detach().abs() + 1e-6
    if vocab > 1:  # of a single token the gradient is nothing
        # Exponentials and sums are fp32, off by some units of its last place; what is kept is rounded once.
        assert tiny.relative(logits, l64.grad) < max(torch.finfo(dtype).eps, 2e-6)


def test_logits_that_are_no_numbers_are_so_in_c_as_in_plain_torch(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 40, generator=draw), torch.full((1,), 3)
    logits[0] *= 1e4
    logits[1, 5] = -math.inf
    logits[2, 5] = math.inf
    logits[3, 5] = math.nan
    logits[4] = -3e38
    logits[5] = -math.inf
    found = {}
    for way in ("compiled", "plain"):
        if way == "plain":
            tiny.uncompiled(monkeypatch)
        rows = logits.clone()
        assert (softmax_gradient._kernel(rows) is None) == (way == "plain")
        losses = torch.stack([softmax_gradient.loss_and_gradient(row[None], labels, RULES[0], 0.7) for row in rows])
        found[way] = losses, rows
    assert found["plain"][0].isfinite().tolist() == [True, True, False, False, True, False]
    for compiled, plain in zip(*found.values(), strict=True):
        torch.testing.assert_close(compiled, plain, equal_nan=True, rtol=1e-6, atol=1e-7)


def test_in_c_more_threads_give_the_same_bits(monkeypatch):
    logits, labels = torch.randn(37, 3001).bfloat16(), torch.arange(37)
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(softmax_gradient, "threads", lambda threads=threads: threads)
        rows = logits.clone()
        found.append((softmax_gradient.loss_and_gradient(rows, labels, RULES[0], 1.0), rows))
    assert found[0][1].any()
    assert all(map(torch.equal, *found))


def test_a_second_backward_pass_gives_the_same_again():
    h, labels, w, b = problem()
    h.requires_grad_()
    loss = dense(labels, LogitRule(), 7)(h, w, b)
    first, second = (torch.autograd.grad(loss, h, retain_graph=True)[0] for _ in range(2))
    assert first.norm() > 0
    assert torch.equal(first, second)


def test_under_autocast_the_products_are_autocasts():
    h, labels, w, _ = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = answers(lambda h: linear_cross_entropy(h, labels, w, chunk=7), h)
    wanted = answers(lambda h: linear_cross_entropy(h.bfloat16(), labels, w.bfloat16(), chunk=7), h)
    assert all(map(torch.equal, found, wanted))


def test_a_label_that_is_no_token_is_refused(way):
    h, labels, w, _ = problem()
    for odd in (VOCAB, -5):
        labels[3] = odd
        with pytest.raises((RuntimeError, IndexError)):
            linear_cross_entropy(h.float(), labels, w.float(), chunk=7)
        with pytest.raises((RuntimeError, IndexError)):
            sliced_cross_entropy(h, labels, lambda rows, _: w[rows], tuple(w.shape))


# --- models -----------------------------------------------------------------------------------------------------------

SHAPE = {**tiny.LLAMA, "head_dim": 12}
CONFIGS = {
    "qwen3": Qwen3Config(**{**SHAPE, "tie_word_embeddings": True}),
    "gemma2": Gemma2Config(**{**SHAPE, "tie_word_embeddings": True}, final_logit_softcapping=3.0),
    "granite": GraniteConfig(**tiny.LLAMA, logits_scaling=3.0),
    "cohere": CohereConfig(**{**tiny.LLAMA, "tie_word_embeddings": True}, logit_scale=0.25),
}
FAMILIES = ["llama", "gpt2", *CONFIGS]


def model_of(family="llama"):
    if family in CONFIGS:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return tiny.spread(AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32)).eval()
    return {"llama": tiny.llama, "gpt2": tiny.gpt2}[family]()


def tuned(model, kind="nf4", *, quantize_head=False, dtype=torch.float32, **lora):
    """A model with an adapter that is awake, every gradient of which is far from zero."""
    freeze_and_quantize(model, Quantization(kind), dtype, tiny.CPU, quantize_head=quantize_head)
    add_lora(model, **{"rank": 4, "alpha": 8, "dtype": torch.float32, **lora})
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return model.train()


def full(model):
    return freeze_and_quantize(model, Quantization("none"), torch.float32, tiny.CPU).requires_grad_(True).train()


class Batch:
    """Rows of several lengths, part of them trained."""

    position_ids = documents = attention_mask = is_good = None

    def __init__(self, rows=3, length=11, vocab=97):
        self.input_ids = (
            torch.zeros(rows, length, dtype=torch.int64) + torch.arange(rows * length).view(rows, -1) % vocab
        )
        self.labels = self.input_ids.clone()
        self.labels[:, :3] = IGNORED
        self.labels[1:2, 7:] = IGNORED
        self.rows = rows

    @property
    def count(self):
        return int((self.labels[:, 1:] != IGNORED).sum())

    trained_tokens = count


def trained_by(model, loss_chunk) -> list[Tensor]:
    """Loss and every gradient after two micro-batches."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    loss = accumulate_gradients(model, [Batch(), Batch(2, 5)], 30, loss_chunk=loss_chunk)
    return [loss.value, *(parameter.grad for parameter in parameters)]


def assert_trains_alike(model, chunks=CHUNKS, tolerance=1e-6):
    wanted = trained_by(model, None)
    assert len(wanted) > 4
    assert all(each is not None and each.norm() > 1e-6 for each in wanted)
    for chunk in chunks:
        for found, each in zip(trained_by(model, chunk), wanted, strict=True):
            assert tiny.relative(found, each) < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_as_with_whole_logits(family):
    """Adapters' gradients have passed through the body, which adds its own rounding to that of the loss: 5e-6."""
    model = tuned(model_of(family))
    rule = logit_rule(model.config)
    assert (rule != LogitRule()) == (family in ("gemma2", "granite", "cohere"))
    assert_trains_alike(model, tolerance=5e-6)
    assert settled_chunk(model, range(20), 7) == (7, None)


HEADS = {
    "quantised": lambda: tuned(tiny.llama(hidden_size=64), quantize_head=True),
    "quantised to int8, tied": lambda: tuned(model_of("qwen3"), "int8", quantize_head=True),
    "adapted": lambda: tuned(model_of(), targets=["all-linear", "head"]),
    "adapted by DoRA": lambda: tuned(model_of(), targets=["all-linear", "head"], dora=True),
    "quantised and adapted": lambda: tuned(
        tiny.llama(hidden_size=64), quantize_head=True, targets=["all-linear", "head"]
    ),
    "of added tokens": lambda: tuned(model_of(), added_tokens=[5, 90]),
    "of added tokens, tied": lambda: tuned(model_of("qwen3"), added_tokens=[5, 90]),
    "of added tokens, quantised": lambda: tuned(tiny.llama(hidden_size=64), quantize_head=True, added_tokens=[5, 90]),
    "trained whole": lambda: tuned(model_of(), also_train=["lm_head"]),
    "untied and adapted": lambda: tuned(model_of("qwen3"), targets=["all-linear", "head"], untie_head=True),
    "of full fine-tuning": lambda: full(model_of()),
    "of full fine-tuning, tied": lambda: full(model_of("gpt2")),
}


@pytest.mark.parametrize("head", HEADS)
def test_every_kind_of_head_trains_as_with_whole_logits(head):
    model = HEADS[head]()
    assert_trains_alike(model, chunks=[7], tolerance=5e-6)
    assert settled_chunk(model, range(20), 7) == (7, None)


def test_a_head_alone_can_be_trained():
    model = tuned(model_of(), targets=["head"])
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    wanted, found = trained_by(model, None), trained_by(model, 7)
    assert all(each.norm() > 1e-6 for each in wanted)
    assert max(map(tiny.relative, found, wanted)) < 1e-6


def test_recomputed_blocks_train_alike():
    model = tuned(model_of())
    set_activation_policy(model, "recompute")
    assert_trains_alike(model, chunks=[7], tolerance=5e-6)


@pytest.mark.parametrize("head", ["quantised", "trained whole"])
def test_an_evaluation_gives_the_same_loss(head):
    model = HEADS[head]()
    whole, chunked = (evaluate_loss(model, [Batch(), Batch(2, 5)], loss_chunk=chunk) for chunk in (None, 7))
    assert whole.loss > 1
    assert chunked.loss == pytest.approx(whole.loss, rel=1e-6)
    assert (chunked.tokens, chunked.rows) == (whole.tokens, whole.rows)


def test_decoded_weights_are_gone_before_the_head_begins():
    model = tuned(tiny.llama(hidden_size=64), quantize_head=True)
    held = []
    workspace, loss = next(iter(tiny.quantized_layers(model).values())).workspace, model.lm_head.loss
    model.lm_head.loss = lambda *given: held.append(len(workspace._idle)) or loss(*given)
    loss_sum(model, Batch(), loss_chunk=7).backward()
    assert held == [0]


# --- what stands ------------------------------------------------------------------------------------------------------

WIDE = {"vocab_size": 4096, "num_hidden_layers": 1}
ROWS, LENGTH, CHUNK = 2, 48, 8


def watched(model, loss_chunk, rows=ROWS, length=LENGTH):
    """A step's ledger, and how many bytes stood at the most in the loss above those at its beginning."""
    ledger, start = Ledger(model), []
    model.base_model.register_forward_hook(lambda *_: start.append(ledger.current()))
    with ledger:
        accumulate_gradients(model, [Batch(rows, length)], rows * length, phase=ledger.phase, loss_chunk=loss_chunk)
    return ledger, ledger.peak_by_phase()["loss"] - start[0]


STANDING = {
    "dense": (lambda dtype: tuned(tiny.llama(**WIDE), dtype=dtype), 0),
    "quantised": (lambda dtype: tuned(tiny.llama(**WIDE), "int8", quantize_head=True, dtype=dtype), 64 * 48 * 12),
    "adapted": (lambda dtype: tuned(tiny.llama(**WIDE), targets=["head"], dtype=dtype), 5 * WIDE["vocab_size"] * 4 * 4),
}  # with what the head itself needs: 64 rows of codes and what they are decoded to; B and its gradients


@pytest.mark.parametrize("head", STANDING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_never_stand_whole(head, dtype, way, monkeypatch):
    """By hand: a chunk's logits in the compute dtype; of 16 bits, but in C, a slice in fp32; dh; what the head needs.
    Two more rows of the chunk and 4 KiB pay for what is as small as a column."""
    make, needed = STANDING[head]
    slice_after(monkeypatch, 2 * WIDE["vocab_size"])
    monkeypatch.setattr(slices, "SLICE_ELEMENTS", 64 * 48)
    size, vocab = dtype.itemsize, WIDE["vocab_size"]
    sliced = 2 * vocab * 4 if size == 2 and way == "plain" else 0
    bound = (CHUNK + 2) * vocab * size + sliced + ROWS * LENGTH * 48 * size + 4096 + needed
    whole = ROWS * (LENGTH - 1) * vocab * size
    assert watched(make(dtype), None)[1] > 2 * whole
    ledger, above = watched(make(dtype), CHUNK)
    assert above <= bound < whole
    assert all(each.nbytes < whole for each, _ in ledger.history.events() if each.phase == "loss")


def test_full_fine_tuning_holds_the_gradient_of_its_head_and_a_chunk():
    vocab = WIDE["vocab_size"]
    above = watched(full(tiny.llama(**WIDE)), CHUNK)[1]
    assert above <= vocab * 48 * 4 + CHUNK * vocab * 4 + ROWS * LENGTH * 48 * 4 + 8 * vocab + 4096


@pytest.mark.parametrize("head", ["dense", "quantised", "adapted", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_and_real_accounts_agree_to_the_byte(head, dtype, way, monkeypatch):
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    monkeypatch.setattr(slices, "SLICE_ELEMENTS", 9 * tiny.LLAMA["hidden_size"])  # of which fake tensors see three

    def accounts(model):
        model = {
            "dense": lambda: tuned(model, dtype=dtype),
            "quantised": lambda: tuned(model, "int8", quantize_head=True, dtype=dtype),
            "adapted": lambda: tuned(model, targets=["all-linear", "head"], dtype=dtype),
            "full": lambda: full(model),
        }[head]()
        return watched(model, 7, 2, 16)[0].summary()

    config = tiny.llama().config
    real = accounts(tiny.llama())
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = accounts(build_model(config, torch.float32, "sdpa"))
    assert real["peak_by_phase"]["loss"] > 4096
    assert fake == real


# --- which models, and how many tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "tokens"), [(32_000, 1344), (151_936, 256), (262_144, 128), (10**6, 64)])
def test_an_automatic_chunk_is_what_fits_256_mib(vocab, tokens):
    assert automatic_chunk(vocab) == tokens
    assert tokens % 64 == 0
    assert tokens == 64 or 6 * vocab * tokens <= 2**28 < 6 * vocab * (tokens + 64)


def odd_model():
    """Of a family that puts a layer between its body and what transformers calls its output embedding."""
    settings = {key: value for key, value in tiny.LLAMA.items() if key != "num_key_value_heads"}
    config = ModernBertDecoderConfig(**settings, cls_token_id=1, sep_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_makes_its_logits_otherwise_keeps_them_whole_and_says_so(dtype):
    model = odd_model().to(dtype).train()
    assert has_own_head(model)
    assert loss_sum(model, Batch(), loss_chunk=7).item() != pytest.approx(loss_sum(model, Batch()).item(), rel=1e-3)
    before = torch.get_rng_state()
    chunk, why = settled_chunk(model, range(20), 7)
    assert chunk is None
    assert "ModernBertDecoder" in why
    assert "memory.loss_chunk" in why
    assert "\n" not in why
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert settled_chunk(model, range(20), None) == (None, None)


def test_a_model_without_a_head_of_its_own_keeps_its_logits_whole():
    model = tuned(model_of())
    model.base_model_prefix = "nothing"
    assert model.base_model is model
    chunk, why = settled_chunk(model, range(20), 7)
    assert chunk is None
    assert "no head" in why
    assert torch.equal(loss_sum(model, Batch(), loss_chunk=7), loss_sum(model, Batch()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_takes_no_rounding_for_a_difference(family):
    model = tuned(model_of(family), dtype=torch.bfloat16)
    assert settled_chunk(model, range(20), 7) == (7, None)
    with evaluation_mode(model):
        assert loss_sum(model, Batch(), loss_chunk=7).isfinite()


@pytest.mark.parametrize("change", [{"logits_scaling": 3.1}, {"final_logit_softcapping": 3.2}, {"logit_scale": 1.04}])
def test_the_probe_finds_a_rule_that_is_a_little_off(change, monkeypatch):
    model = tuned(model_of())
    assert settled_chunk(model, range(20), 7) == (7, None)
    for name, value in change.items():
        monkeypatch.setattr(model.config, name, value, raising=False)
    assert settled_chunk(model, range(20), 7)[0] is None


def test_the_probe_takes_no_number_for_no_agreement():
    model = tiny.llama()
    assert settled_chunk(model, list(range(16)), 8) == (8, None)
    model.lm_head.weight.data[0, 0] = math.nan
    assert settled_chunk(model, list(range(16)), 8)[0] is None


def test_sliced_heads_are_left_as_they_are():
    """The loss writes into a head's logits: what the head itself gives must be its own at every call."""
    w = torch.randn(VOCAB, WIDTH)
    h, labels = problem(torch.float32)[:2]
    head = lambda x: sliced_linear(x, lambda rows, dtype: w[rows].to(dtype), (VOCAB, WIDTH))  # noqa: E731
    before = head(h).clone()
    head_cross_entropy(h.requires_grad_(), labels, head, [], chunk=7).backward()
    assert torch.equal(head(h), before)
