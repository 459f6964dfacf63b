"""Attention by tiles: each document read by itself, as float64 reads it, with what its way back needs and no more."""

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from qlora_kit.base import documents
from qlora_kit.base.documents import reading
from qlora_kit.memory import Ledger
from qlora_kit.ops import attend, attend_plain, can_attend
from qlora_kit.ops import attention as native
from qlora_kit.ops.stand_in import as_on_card
from qlora_kit.train.activations import set_activation_policy

pytestmark = pytest.mark.skipif(not native._is_compiled(), reason="this processor multiplies no tiles")

ROUNDING = 2**-8
"""What one rounding to bf16 errs by. Of a norm over many values it is half of that; P and dS are rounded once, too."""
CASES = [  # documents, heads, heads of keys, width, window
    ((1,), 2, 1, 32, None),
    ((16, 1, 31), 4, 4, 64, None),
    ((17, 32, 33, 2), 4, 2, 128, None),
    ((127, 128, 129, 1), 2, 1, 64, None),
    ((300, 5, 64), 6, 2, 96, None),
    ((40,), 1, 1, 256, None),
    ((300, 20, 65), 2, 1, 64, 33),
    ((200, 31), 2, 2, 32, 1),
    ((300, 257), 2, 1, 32, 256),
]


def drawn(lengths, heads, groups, width, seed=0, spread=1.0):
    """Queries, keys, values and the gradient of an output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths), each, width) for each in (heads, groups, groups, heads)]
    return [(torch.randn(shape, generator=generator) * spread).bfloat16() for shape in shapes]


def both_ways(function, q, k, v, d_out, *how):
    """An output, and the gradients of q, k and v."""
    q, k, v = inputs = [each.detach().requires_grad_() for each in (q, k, v)]
    out = function(q, k, v, *how)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out.to(out.dtype))]


def exact(q, k, v, d_out, *how):
    return both_ways(attend_plain, *(each.double() for each in (q, k, v, d_out)), *how)


def error(found, wanted, scale):
    """Of the norm; of gradients that are nothing, as of a token alone, beside `scale`."""
    return ((found.double() - wanted).norm() / max(wanted.norm(), scale)).item()


@pytest.mark.parametrize(("lengths", "heads", "groups", "width", "window"), CASES, ids=str)
def test_outputs_and_gradients_are_those_of_float64_within_a_rounding(lengths, heads, groups, width, window):
    inputs, how = drawn(lengths, heads, groups, width), (lengths, window, width**-0.5)
    wanted = exact(*inputs, *how)
    for name, one, other in zip(("out", "dq", "dk", "dv"), both_ways(attend, *inputs, *how), wanted, strict=True):
        assert one.dtype == torch.bfloat16
        assert error(one, other, 0.01) < ROUNDING, name


def test_the_window_and_the_bounds_of_documents_are_felt():
    inputs = drawn((60, 40), 2, 1, 32)
    lone, windowed, joined = (
        both_ways(attend, *inputs, lengths, window, 0.2)
        for lengths, window in (((60, 40), None), ((60, 40), 20), ((100,), None))
    )
    for other in (windowed, joined):
        for one, two in zip(lone, other, strict=True):
            assert tiny.relative(one.float(), two.float()) > 0.1


def test_errors_are_no_larger_than_those_of_torchs_own_attention():
    lengths, width = (230,), 64
    inputs = drawn(lengths, 4, 4, width)

    def torchs(q, k, v, *_):
        heads = (each.transpose(0, 1)[None] for each in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1)

    how = lengths, None, width**-0.5
    wanted = exact(*inputs, *how)
    found = zip(both_ways(attend, *inputs, *how), both_ways(torchs, *inputs, *how), wanted, strict=True)
    beside = [error(mine, true, 1e-6) / error(theirs, true, 1e-6) for mine, theirs, true in found]
    assert max(beside[:2]) < 1.05
    assert max(beside[2:]) < 0.9, "its sums over queries, those of keys and values, stay in fp32"


def test_a_document_has_the_same_bits_alone_beside_others_on_more_threads_and_in_any_order_of_memory():
    lengths, how = (70, 33, 150, 1), (None, 0.125)
    inputs = drawn(lengths, 4, 2, 64)
    together = both_ways(attend, *inputs, lengths, *how)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 33):
            torch.set_num_threads(count)
            for one, other in zip(both_ways(attend, *inputs, lengths, *how), together, strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)
    parts = zip(lengths, zip(*(each.split(lengths) for each in (*inputs, *together)), strict=True), strict=True)
    for n, (*mine, out, dq, dk, dv) in parts:
        alone = both_ways(attend, *mine, (n,), *how)
        assert all(torch.equal(*pair) for pair in zip(alone, (out, dq, dk, dv), strict=True))
    turned = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in inputs]
    doubled = [torch.stack((each, each), -1)[..., 0] for each in inputs]
    assert not doubled[0].is_contiguous()
    for others in (turned, doubled):
        for one, other in zip(both_ways(attend, *others, lengths, *how), together, strict=True):
            assert torch.equal(one, other)


def test_what_is_no_number_in_a_document_reaches_no_other_and_stays_in_its_own():
    lengths, how = (40, 50), (None, 0.2)
    inputs = drawn(lengths, 2, 1, 32)
    clean = both_ways(attend, *inputs, lengths, *how)
    for which in range(3):
        spoilt = [each.clone() for each in inputs]
        spoilt[which][20, 0, 3] = torch.nan
        found = both_ways(attend, *spoilt, lengths, *how)
        for one, other in zip(found, clean, strict=True):
            assert torch.equal(one[40:], other[40:])
        if which < 2:  # a weight of nothing times a value that is no number is none
            assert torch.equal(found[0][:20], clean[0][:20]), "tokens before it do not see it"
        # The gradient of values does not depend on values.
        assert [bool(each[:40].isnan().any()) for each in found] == [True, True, True, which < 2]


@pytest.mark.parametrize("spread", [30.0, 1e-4])
def test_scores_as_large_as_thousands_or_all_alike_are_no_fault(spread):
    lengths, how = (90, 31), (None, 1.0)
    q, k, v, d_out = drawn(lengths, 2, 2, 64)
    inputs = (q * spread).bfloat16(), (k * spread).bfloat16(), v, d_out
    wanted = exact(*inputs, lengths, *how)
    largest = (inputs[0].float().transpose(0, 1) @ inputs[1].float().permute(1, 2, 0)).abs().max()
    assert largest > 5000 or largest < 1e-6
    found = both_ways(attend, *inputs, lengths, *how)
    assert error(found[0], wanted[0], 1e-6) < ROUNDING
    assert error(found[3], wanted[3], 1e-6) < ROUNDING
    # Where all but one weight are nothing, what is left of q's gradient is a difference of roundings.
    assert all(each.isfinite().all() for each in found)


def test_it_keeps_its_inputs_its_output_and_a_number_for_each_softmax_and_nothing_else():
    lengths = (60, 40)
    q, k, v, _ = (each.requires_grad_() for each in drawn(lengths, 4, 2, 64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        out = attend(q, k, v, lengths, None, 0.1)
    assert {each.data_ptr() for each in kept} >= {each.data_ptr() for each in (q, k, v, out)}
    assert sum(each.nbytes for each in kept) == 2 * (2 * q.numel() + 2 * k.numel()) + 4 * 100 * 4


@pytest.mark.parametrize("name", ["attend", "attend_back"])
def test_the_operators_say_truly_what_they_give_and_what_they_write(name):
    lengths = (20, 13)
    q, k, v, d_out = drawn(lengths, 2, 1, 32)
    how = list(lengths), 2**40, 0.2
    forth = q, k, v, *how, native._space(q, k, lengths)
    given = torch.ops.qlora_kit.attend(*forth)
    back = d_out, *given, q, k, v, *how, native._space(q, k, lengths, is_back=True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.qlora_kit, name), forth if name == "attend" else back, test_utils=tests)


def test_what_it_does_not_take_is_told_before_and_refused_if_asked_for_all_the_same():
    q, k, v, _ = drawn((8,), 2, 1, 32)
    assert can_attend(q, k, v)
    narrow = [each[..., :16].contiguous() for each in (q, k, v)]
    for others in (narrow, [each.float() for each in (q, k, v)], (q, k, v[..., :16]), (q, k.half(), v)):
        assert not can_attend(*others)
    with pytest.raises(RuntimeError, match="can_attend says no"):
        attend(*narrow, (8,), None, 1.0)
    with pytest.raises(RuntimeError, match=r"documents of \[9\] tokens for 8"):
        attend(q, k, v, (9,), None, 1.0)
    with pytest.raises(RuntimeError, match="a window of 0"):
        attend(q, k, v, (8,), 0, 1.0)
    with pytest.raises(RuntimeError, match=r"keys \(7, 1, 32\)"):
        attend(q, k[:7], v, (8,), None, 1.0)
    with pytest.raises(RuntimeError, match=r"queries \(8, 0, 32\)"):
        attend(q[:, :0], k, v, (8,), None, 1.0)
    with pytest.raises(RuntimeError, match=r"queries \(8, 32\)"):
        attend(q[:, 0], k, v, (8,), None, 1.0)
    for rows, floats in ((1, 8), (0, native._room(q, (8,), is_back=False))):
        with pytest.raises(RuntimeError, match="to work in"):
            torch.ops.qlora_kit.attend(q, k, v, [8], 9, 1.0, torch.empty(rows, floats))


def test_a_window_of_any_size_is_one():
    inputs = drawn((60,), 2, 1, 32)
    none = both_ways(attend, *inputs, (60,), None, 0.2)
    for window in (60, 2**40, 2**62, 2**63 - 1):
        assert all(
            torch.equal(*pair) for pair in zip(none, both_ways(attend, *inputs, (60,), window, 0.2), strict=True)
        )


@pytest.mark.parametrize(
    "defaults", [{"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"device": "meta"}, {"threads": 33}], ids=str
)
def test_that_a_processor_has_it_is_found_whatever_the_defaults_are(defaults):
    with tiny.defaults(**defaults), torch.inference_mode():
        assert native._is_compiled.__wrapped__(), "asked anew"


def test_no_tokens_make_none():
    nothing = [each.requires_grad_() for each in drawn((), 2, 1, 32)[:3]]
    out = attend(*nothing, (), None, 1.0)
    out.sum().backward()
    assert out.shape == nothing[0].grad.shape == (0, 2, 32)


def test_it_counts_the_flops_of_each_document_by_itself():
    q, k, v, _ = (each.requires_grad_() for each in drawn((10, 30), 4, 2, 32))
    with FlopCounterMode(display=False) as counter:
        attend(q, k, v, (10, 30), None, 1.0).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * (10**2 + 30**2) * 4 * 32


# --- in a model -------------------------------------------------------------------------------------------------------


def wide(dtype=torch.bfloat16):
    """A Llama whose heads are wide enough."""
    return tiny.llama(hidden_size=128, intermediate_size=192, num_hidden_layers=2).to(dtype)


def counted(monkeypatch):
    calls = []
    monkeypatch.setattr(documents, "attend", lambda *of: calls.append(of[3]) or attend(*of))
    return calls


def logits_of(model, ids, **how):
    return model(ids, use_cache=False, **how).logits.detach().float()


def test_a_model_reads_its_rows_with_it_and_says_what_it_says_without(monkeypatch):
    model, ids, calls = wide(), tiny.tokens(3, 40), counted(monkeypatch)
    mine = logits_of(model, ids)
    assert calls == [(40, 40, 40)] * 2
    with as_on_card(True):
        theirs = logits_of(model, ids)
    assert len(calls) == 2
    truth = logits_of(wide(torch.float32), ids)
    assert 0 < tiny.relative(mine, truth) < 1.1 * tiny.relative(theirs, truth)


def test_packed_rows_are_read_as_rows_alone(monkeypatch):
    model, calls, lengths = wide(), counted(monkeypatch), (3, 40, 1, 21)
    ids = tiny.tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with reading(lengths):
        packed = logits_of(model, ids, position_ids=positions)
    assert calls == [lengths] * 2
    rows = [logits_of(model, row) for row in ids.split(lengths, 1)]
    for one, other in zip(packed.split(lengths, 1), rows, strict=True):
        assert tiny.relative(one, other) < 2e-3  # products of other shapes, and torch's attention of a token alone


def test_where_tokens_see_those_after_them_or_only_some_or_lie_in_a_cache_torch_is_asked(monkeypatch):
    model, ids, calls = wide(), tiny.tokens(2, 12), counted(monkeypatch)
    padded = torch.ones_like(ids)
    padded[0, :4] = 0
    logits_of(model, ids, attention_mask=padded)
    assert not calls
    whole = model(ids, use_cache=True)
    assert len(calls) == 2
    step = model(ids[:, :1], past_key_values=whole.past_key_values, use_cache=True)
    assert step.logits.isfinite().all()
    assert len(calls) == 2
    logits_of(wide(torch.float32), ids)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    logits_of(model, ids)
    assert len(calls) == 2


def test_what_the_kernel_would_leave_out_goes_to_torch(monkeypatch):
    model, calls = wide(), counted(monkeypatch)
    layer = model.model.layers[0].self_attn
    q, k, v = (torch.randn(2, heads, 9, 32, dtype=torch.bfloat16) for heads in (4, 2, 2))

    def read(mask=None, heads=(q, k, v), **how):
        return documents._attention(layer, *heads, mask, **how)[0]

    packed = documents.Documents((5, 4, 9))
    for mask in (None, packed):
        causal, apart = read(mask), read(mask, is_causal=False)
        assert tiny.relative(causal.float(), apart.float()) > 0.1
        with pytest.raises(ValueError, match="softcap"):
            read(mask, softcap=30.0)
    assert calls == [(9, 9), (5, 4, 9)]
    assert read(heads=(q[:1], k, v)).shape == (2, 9, 4, 32), "one row of queries for two of keys, as torch has it"
    model.config.is_causal = False
    assert not documents.is_listed(model.config)


@pytest.mark.parametrize("policy", ["recompute", "keep"])
def test_a_step_on_one_thread_takes_less_memory_with_it_and_its_gradients_err_no_more_than_without(policy):
    def step(dtype, on_card):
        model, ledger = wide(dtype).train(), Ledger()
        set_activation_policy(model, policy)
        ledger.ignore(model.parameters())
        with ledger, as_on_card(on_card), reading((100, 200)):
            model(tiny.tokens(1, 300), use_cache=False).logits.float().square().mean().backward()
        return ledger.summary()["peak_bytes"], torch.cat([each.grad.flatten().float() for each in model.parameters()])

    (mine, by_tiles), (theirs, by_torch) = (step(torch.bfloat16, on_card) for on_card in (False, True))
    _, truth = step(torch.float32, False)
    assert mine <= theirs
    assert 1e-3 < tiny.relative(by_tiles, truth) < 1.05 * tiny.relative(by_torch, truth) < 0.05
