"""Packed documents under sdpa: every family of the list computes what its rows do one by one, and no pair too many."""

import random
import threading

import pytest
import tiny
import torch
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig
from transformers.integrations import sdpa_attention

from qlora_kit.base.documents import FAMILIES, Documents, is_listed, reading
from qlora_kit.data import Encoded, arrange, collate_packs, full_packs
from qlora_kit.lora import adapter_parameters, add_lora
from qlora_kit.memory import Ledger
from qlora_kit.train.activations import set_activation_policy
from qlora_kit.train.step import accumulate_gradients

FP32 = 2e-6  # a few roundings of 6e-8 each, in products of other shapes; of a norm over all tokens
LENGTHS = (3, 19, 1, 9, 12)  # two are longer than the window, and one is a token alone
WINDOW = 5
SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64, "sliding_window": WINDOW,
    "moe_intermediate_size": 32, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 64, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 32,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "attention_dropout": 0.0, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "moe_num_experts": 4, "moe_k": 2,
}  # fmt: skip
WINDOWED = {"cohere2", "exaone4", "gemma3_text", "ministral", "ministral3", "mistral", "mixtral", "olmo3", "phi3",
            "phimoe", "starcoder2"}  # fmt: skip


def small(family, **more):
    """A random fp32 model of a family, its window (where it has one) shorter than some documents."""
    kind = CONFIG_MAPPING[family]
    usual = kind()
    changes = {name: value for name, value in SMALL.items() if hasattr(usual, name)}
    if getattr(usual, "layer_types", None) is not None:
        changes["layer_types"] = (list(dict.fromkeys(usual.layer_types)) * 4)[:4]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**changes, **more), dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)  # or attention is flat, and a leak would hardly be seen
    return model


def said(model, ids, positions, lengths=None):
    """Logits and the gradient of a sum of them by the embeddings."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with reading(lengths):
        logits = model(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits
    weights = torch.linspace(0.3, 1, logits.shape[-1])
    (gradient,) = torch.autograd.grad((logits * weights).sum(), embedded)
    return logits.detach(), gradient


@pytest.fixture
def computed(monkeypatch):
    """Tokens of queries, and whether there was a mask, of each call of torch's attention."""
    calls, attend = [], functional.scaled_dot_product_attention

    def counted(query, *args, attn_mask=None, **how):
        calls.append((query.shape[2], attn_mask is not None))
        return attend(query, *args, attn_mask=attn_mask, **how)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", counted)
    return calls


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_of_the_list_says_of_packed_documents_what_it_says_of_each_alone(family, computed):
    model = small(family)
    assert model.config._attn_implementation == "sdpa"
    ids, positions = tiny.tokens(1, sum(LENGTHS)), torch.cat([torch.arange(n) for n in LENGTHS])[None]
    alone = [said(model, *each) for each in zip(ids.split(LENGTHS, 1), positions.split(LENGTHS, 1), strict=True)]
    logits, gradient = (torch.cat(parts, 1) for parts in zip(*alone, strict=True))
    computed.clear()
    found, turned = said(model, ids, positions, LENGTHS)
    assert {tokens for tokens, _ in computed} == set(LENGTHS), "nothing is computed of two documents"
    assert tiny.relative(found, logits) < FP32
    assert tiny.relative(turned, gradient) < FP32
    layers = model.config.num_hidden_layers
    assert len(computed) == layers * len(LENGTHS)
    masked = [tokens for tokens, is_masked in computed if is_masked]
    assert all(tokens > WINDOW for tokens in masked), "where the window does not matter there is no mask"
    assert bool(masked) == (family in WINDOWED)


def test_documents_of_several_sequences_are_read_one_by_one(computed):
    model = small("llama")
    ids, lengths = tiny.tokens(2, 12), (5, 7, 9, 3)
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, 12)
    logits, gradient = said(model, ids, positions, lengths)
    assert [tokens for tokens, _ in computed] == [*lengths] * 4
    places = [(0, 0, 5), (0, 5, 12), (1, 0, 9), (1, 9, 12)]
    for row, start, end in places:
        one, turned = said(model, ids[row : row + 1, start:end], positions[row : row + 1, start:end])
        assert tiny.relative(logits[row, start:end], one[0]) < FP32
        assert tiny.relative(gradient[row, start:end], turned[0]) < FP32


@pytest.mark.parametrize("policy", ["keep", "selective", "recompute", "offload"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_block_that_runs_again_in_another_thread_reads_the_same_documents(policy, family):
    """On a card autograd runs in a thread of its own, and the step is no longer reading then."""
    model = tiny.quantized(small(family))
    add_lora(model, rank=4, alpha=8, dtype=torch.float32)
    tiny.wake(model)
    set_activation_policy(model.train(), policy)
    ids, lengths = tiny.tokens(1, 24), (7, 17)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    def gradient(threaded):
        parameters = [parameter for _, parameter in adapter_parameters(model)]
        with reading(lengths):
            loss = model(input_ids=ids, position_ids=positions, use_cache=False).logits.square().mean()
        found = []
        turn = lambda: found.extend(torch.autograd.grad(loss, parameters))  # noqa: E731
        if threaded:
            thread = threading.Thread(target=turn)
            thread.start()
            thread.join()
        else:
            with reading(lengths):
                turn()
        return torch.cat([each.flatten() for each in found])

    assert torch.equal(gradient(True), gradient(False))


def test_outside_of_the_block_and_in_other_threads_nothing_is_read_as_documents(computed):
    model, ids = small("llama"), tiny.tokens(1, 9)
    elsewhere = []
    with reading((4, 5)):
        thread = threading.Thread(target=lambda: elsewhere.append(tiny.logits(model, ids)))
        thread.start()
        thread.join()
    assert torch.equal(elsewhere[0], tiny.logits(model, ids))
    assert {tokens for tokens, _ in computed} == {9}


def test_a_family_that_is_not_listed_gets_the_mask_of_transformers(computed, monkeypatch):
    monkeypatch.setattr("qlora_kit.base.documents.FAMILIES", frozenset())
    model = small("llama")
    assert not is_listed(model.config)
    ids, positions = tiny.tokens(1, 12), torch.cat([torch.arange(5), torch.arange(7)])[None]
    wanted = [said(model, *each)[0] for each in zip(ids.split((5, 7), 1), positions.split((5, 7), 1), strict=True)]
    computed.clear()
    found, _ = said(model, ids, positions, (5, 7))
    assert computed == [(12, True)] * 4
    assert tiny.relative(found, torch.cat(wanted, 1)) < FP32


def test_a_model_with_a_rule_of_its_own_for_the_mask_gets_that_of_transformers(computed):
    model = small("gemma3_text", use_bidirectional_attention=True)
    ids, positions = tiny.tokens(1, 12), torch.cat([torch.arange(5), torch.arange(7)])[None]
    wanted = [said(model, *each)[0] for each in zip(ids.split((5, 7), 1), positions.split((5, 7), 1), strict=True)]
    computed.clear()
    found, _ = said(model, ids, positions, (5, 7))
    assert any(is_masked for _, is_masked in computed)
    assert tiny.relative(found, torch.cat(wanted, 1)) < FP32


def test_a_folder_whose_own_code_calls_itself_by_the_name_of_a_family_is_not_of_the_list():
    class Other(LlamaConfig):
        """As a folder's own code defines it."""

    assert is_listed(LlamaConfig())
    assert not is_listed(Other())


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_no_rows_end_to_end_take_more_than_those_of_the_rehearsal(family, policy):
    model = tiny.quantized(small(family))
    add_lora(model, rank=4, alpha=8, dtype=torch.float32)
    set_activation_policy(model.train(), policy)
    draw = random.Random(0)
    rows = [Encoded([draw.randrange(3, 97) for _ in range(n)], [True] * n) for n in (*range(2, 17), *range(9, 17))]
    room = 4 * 16

    def peak(pack):
        batch = collate_packs([pack], 0)
        for _, parameter in adapter_parameters(model):
            parameter.grad = None
        with Ledger(model) as ledger:
            accumulate_gradients(model, [batch], batch.count)
        return ledger.peak()

    (longest,) = full_packs(rows, 1, room)
    assert sum(len(row.input_ids) for row in longest) == room
    most = peak(longest)
    for _ in range(20):
        rows = draw.sample(rows, len(rows))
        (pack,), *_ = arrange([len(row.input_ids) for row in rows[:8]], 1, room)
        assert peak([rows[row] for row in pack]) <= 1.002 * most, [len(rows[row].input_ids) for row in pack]
    assert peak([rows[0]]) < 0.6 * most


def test_a_mask_of_a_window_is_made_once_for_all_layers():
    documents = Documents((6, 9, 3, 9), window=4)
    masks = {n: documents.mask(n) for n in documents.lengths}
    assert masks[9].untyped_storage().data_ptr() == masks[6].untyped_storage().data_ptr()
    assert documents.mask(9).data_ptr() == masks[9].data_ptr()
    assert masks[3] is None
    sees = lambda i, j: i - 4 < j <= i  # noqa: E731
    assert all(masks[n].tolist() == [[sees(i, j) for j in range(n)] for i in range(n)] for n in (6, 9))
    assert Documents((9,)).mask(9) is None


def test_what_is_not_packed_goes_through_the_attention_of_transformers(monkeypatch):
    called = []
    attend = sdpa_attention.sdpa_attention_forward
    monkeypatch.setattr(
        "qlora_kit.base.documents.sdpa_attention_forward", lambda *a, **k: called.append(1) or attend(*a, **k)
    )
    tiny.logits(small("llama"))
    assert len(called) == 4
