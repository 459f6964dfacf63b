"""Heads that share keys and values: sdpa is given them so where a card has a kernel for it, and else as copies."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_plan import CONFIGS, WORK
from torch.nn import functional as F

from qlora_kit.base.attention import may_share_heads
from qlora_kit.ops.stand_in import as_on_card
from qlora_kit.plan.dry_run import dry_step


@pytest.mark.parametrize(("capability", "dtype", "shares"), [
    ((7, 5), torch.float16, False), ((7, 5), torch.float32, False),
    ((8, 6), torch.bfloat16, True), ((8, 6), torch.float16, True), ((9, 0), torch.float32, False),
])  # fmt: skip
def test_on_a_card_heads_share_keys_where_its_flash_kernel_runs(capability, dtype, shares, monkeypatch):
    """It wants Ampere and 16 bits; torch's memory-efficient kernel wants as many keys as queries
    (check_batch_size_and_num_heads_dense in aten/src/ATen/native/transformers/sdp_utils_cpp.h)."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    key = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1), dtype=dtype, shape=(1, 2, 5, 64))
    assert may_share_heads(None, key, key) is shares


def test_on_a_cpu_they_share_and_under_a_mask_nowhere():
    key = torch.empty(1, 2, 5, 64, dtype=torch.float16)
    assert may_share_heads(None, key, key)
    with as_on_card(True):
        assert not may_share_heads(None, key, key)
        assert may_share_heads(None, key.bfloat16(), key.bfloat16())
    assert not may_share_heads(torch.ones(1, 1, 5, 5, dtype=torch.bool), key, key)


def test_copies_of_shared_heads_change_no_logit_and_no_gradient(monkeypatch):
    attend, heads, found = F.scaled_dot_product_attention, [], []

    def noted(query, key, *rest, **how):
        heads.append((query.shape[1], key.shape[1]))
        return attend(query, key, *rest, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    for on_card in (False, True):
        model = tiny.llama(num_hidden_layers=1)
        with as_on_card(on_card):
            logits = model(tiny.tokens(), use_cache=False).logits
        logits.square().sum().backward()
        found.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    assert heads == [(4, 2), (4, 4)]
    for mine, theirs in zip(*found, strict=True):
        assert tiny.relative(mine, theirs) < 1e-6  # fp32, sums in another order


def test_a_plan_for_an_older_card_counts_the_copies():
    config = CONFIGS["llama"]
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    assert shared < heads
    width = config.hidden_size // heads
    work = replace(WORK, on_card=True, dtype=torch.float16, activations="keep", eval_shape=None)
    both = work, replace(work, on_card=False)
    peaks = [dry_step(config, each)["by_category"]["activations"] for each in both]
    copies = 2 * (heads - shared) * width * 2 * work.tokens * work.micro_batch * config.num_hidden_layers
    assert peaks[0] - peaks[1] == copies
