"""The ledger counts every storage once, while it lives, and says whose it is; the counter is the system's own word."""

import gc
import mmap
import time

import pytest
import tiny
import torch
from tiny import LLAMA
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, masking_utils

from qlora_kit.base.architecture import build_model
from qlora_kit.lora import adapter_parameters, add_lora
from qlora_kit.memory import CATEGORIES, PHASES, History, Ledger, PeakCounter, from_host, to_host
from qlora_kit.memory.counter import resident_bytes
from qlora_kit.train.optim import AdapterOptimizer
from qlora_kit.train.step import accumulate_gradients

KIB = 1024
CPU = torch.device("cpu")


class Batch:
    """Rows for a step, of any kind of tensor."""

    position_ids = documents = attention_mask = None

    def __init__(self, rows=2, length=16, vocab=97):
        self.input_ids = torch.zeros(rows, length, dtype=torch.int64).add_(torch.arange(length) % vocab)
        self.labels = self.input_ids.clone()


def training_step(kind="nf4", make=tiny.llama):
    """Two steps of a tiny model, watched from the start of the first; the ledger and what it watched."""
    model = tiny.quantized(make(), kind)
    add_lora(model, rank=4, alpha=8)
    model.train()
    parameters = list(adapter_parameters(model))
    optimizer = AdapterOptimizer(parameters, "adamw")
    ledger = Ledger(model)
    ledger.own("optimizer_state", (tensor for _, tensor in optimizer.state_tensors()))
    with ledger:
        for _ in range(2):
            accumulate_gradients(model, [Batch(), Batch()], 60, phase=ledger.phase)
            with ledger.phase("optimizer"):
                optimizer.rehearse()
    return ledger, model, optimizer


# --- storages ---------------------------------------------------------------------------------------------------------


def test_a_storage_counts_once_however_many_views_it_has():
    with Ledger() as ledger:
        x = torch.zeros(KIB)
        views = [x.view(32, 32), x[::2], x.t(), x.detach(), x.expand(7, KIB), x.as_strided((3,), (1,))]
        x.add_(1)
        x.mul_(2).clamp_(0, 1)
        torch.add(x, 1, out=x)
        assert len(views) == 6
        assert ledger.current() == 4 * KIB
        y = x + 1
        assert ledger.current() == 8 * KIB
    assert ledger.peak() == 8 * KIB
    assert y.numel() == KIB


def test_a_view_keeps_its_whole_storage_alive():
    with Ledger() as ledger:
        x = torch.zeros(KIB)
        head = x[:1]
        del x
        assert ledger.current() == 4 * KIB
        del head
        assert ledger.current() == 0
    assert ledger.peak() == 4 * KIB


def test_freed_storages_leave_and_the_peak_stays():
    with Ledger() as ledger:
        for _ in range(5):
            x = torch.zeros(KIB)
            del x
        assert ledger.current() == 0
        a, b = torch.zeros(KIB), torch.zeros(KIB, dtype=torch.uint8)
        del a
        assert ledger.current() == KIB
        del b
    assert ledger.peak() == 5 * KIB
    assert sum(ledger.by_category().values()) == ledger.peak()


def test_what_was_there_before_counts_from_its_first_appearance_in_a_result():
    x = torch.zeros(KIB)
    with Ledger() as ledger:
        y = x + 1
        assert ledger.current() == 4 * KIB
        x.add_(1)
        assert ledger.current() == 8 * KIB
        assert y.any()


def test_nothing_is_counted_outside_the_block_and_the_block_can_be_entered_again():
    ledger = Ledger()
    with ledger:
        x = torch.zeros(KIB)
    y = torch.zeros(KIB)
    assert ledger.current() == 4 * KIB
    with ledger:
        z = torch.zeros(KIB)
        assert ledger.current() == 8 * KIB
        del x
        assert ledger.current() == 4 * KIB
    del z
    assert ledger.current() == 0, "a death is seen outside the block too"
    assert ledger.peak() == 8 * KIB
    assert y.numel() == KIB


def test_two_ledgers_one_inside_the_other_see_the_same():
    outer, inner = Ledger(), Ledger()
    with outer, outer.phase("forward"):
        x = torch.zeros(KIB)
        with inner, inner.phase("evaluate"):
            y = torch.ones(KIB)
    assert x.numel() == y.numel() == KIB
    assert outer.peak() == 8 * KIB
    assert inner.peak() == 4 * KIB
    assert inner.peak_by_phase() == {"evaluate": 4 * KIB}


def test_one_ledger_inside_itself_counts_nothing_twice():
    ledger = Ledger()
    with ledger:
        with ledger:
            x = torch.zeros(KIB)
        y = torch.zeros(KIB)
        assert ledger.current() == 8 * KIB
    assert x.numel() == y.numel() == KIB
    assert ledger.peak() == 8 * KIB


def test_an_empty_ledger_answers_with_zeros():
    assert Ledger().summary() == {
        "peak_bytes": 0, "resident_bytes": 0, "by_category": dict.fromkeys(CATEGORIES, 0), "peak_by_phase": {},
        "host_peak_bytes": 0, "paged_bytes": 0,
    }  # fmt: skip


# --- whose they are ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "none"])
def test_a_models_weights_count_by_their_bytes_under_their_owners(kind):
    model = tiny.quantized(tiny.llama(), kind)
    add_lora(model, rank=4, alpha=8, dtype=torch.bfloat16)
    held = Ledger(model).by_category()
    packed = {"nf4": 0.5, "fp4": 0.5, "int8": 1, "none": 4}[kind]
    linear = sum(layer.numel() for name, layer in tiny.llama().named_parameters() if "proj" in name)
    dense = sum(p.numel() for name, p in tiny.llama().named_parameters() if "proj" not in name)
    rotary = sum(buffer.nbytes for name, buffer in model.named_buffers() if "inv_freq" in name)
    assert held["base_weights"] == linear * packed + dense * 4 + rotary
    constants = [b for name, b in model.named_buffers() if name.rpartition(".")[2].startswith("absmax")]
    assert held["quantization_state"] == sum(b.nbytes for b in constants)
    assert (held["quantization_state"] > 0) == (kind != "none")
    assert held["adapters"] == sum(2 * p.numel() for _, p in adapter_parameters(model))
    assert sum(held.values()) == Ledger(model).peak()


def test_tied_weights_count_once():
    tied, untied = (tiny.llama(tie_word_embeddings=is_tied) for is_tied in (True, False))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert Ledger(untied).peak() - Ledger(tied).peak() == 4 * 97 * 48


@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_the_categories_sum_to_the_peak_of_a_step_and_hardly_anything_is_nobodys(kind):
    ledger, model, optimizer = training_step(kind)
    held = ledger.by_category()
    assert set(held) == set(CATEGORIES)
    assert sum(held.values()) == ledger.peak() == max(ledger.peak_by_phase().values())
    assert held["other"] < 0.01 * ledger.peak()
    assert min(held[name] for name in ("base_weights", "adapters", "optimizer_state", "activations", "workspace")) > 0
    assert set(ledger.peak_by_phase()) == {"forward", "loss", "backward", "optimizer"} <= set(PHASES)
    assert held["base_weights"] + held["quantization_state"] + held["adapters"] == Ledger(model).peak()
    state = sum(tensor.nbytes for name, tensor in optimizer.state_tensors() if name != "rounding")
    assert state <= held["optimizer_state"] <= state + optimizer._generator.get_state().nbytes


def test_after_a_step_stands_what_stood_before_it_and_one_decoded_matrix():
    ledger, model, optimizer = training_step()
    gc.collect()
    state = sum(tensor.nbytes for name, tensor in optimizer.state_tensors() if name != "rounding")
    largest = 4 * LLAMA["intermediate_size"] * LLAMA["hidden_size"]
    assert ledger.current() == Ledger(model).peak() + state + largest
    assert ledger.current() < ledger.peak()


@pytest.mark.parametrize("peak_in", ["forward", "optimizer"])
def test_activations_wait_for_the_backward_pass_and_workspace_does_not(peak_in):
    model = nn.Module()
    model.weight = weight = nn.Parameter(torch.randn(64, 64) / 8)
    spare = {"forward": 0, "optimizer": 0, peak_in: 1 << 20}
    ledger = Ledger(model)
    with ledger:
        x_BD = torch.randn(8, 64)  # outside all phases, like the rows of a batch
        with ledger.phase("forward"):
            h = (x_BD @ weight).exp()  # exp keeps its result; the product is gone
            torch.zeros(spare["forward"], dtype=torch.uint8)
        with ledger.phase("loss"):
            loss = h.sum()
        kept = h.nbytes
        del h
        with ledger.phase("backward"):
            loss.backward()
        loss = loss.item()
        with ledger.phase("optimizer"):
            step = weight.grad * 0.1
            torch.zeros(spare["optimizer"], dtype=torch.uint8)
    assert max(ledger.peak_by_phase(), key=ledger.peak_by_phase().get) == peak_in
    wanted = dict.fromkeys(CATEGORIES, 0) | {"base_weights": weight.nbytes, "other": x_BD.nbytes, "workspace": 1 << 20}
    if peak_in == "forward":
        wanted["activations"] = kept
    else:
        wanted["gradients"] = weight.grad.nbytes
        wanted["workspace"] += step.nbytes
    assert ledger.by_category() == wanted


def test_gradients_are_found_where_the_next_forward_pass_makes_the_peak():
    ledger, model, _ = training_step()
    wanted = sum(p.nbytes for _, p in adapter_parameters(model))
    assert ledger.by_category()["gradients"] == wanted, "two micro-batches: those of the first stand through the second"


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_the_same_step_on_fake_and_on_real_tensors_has_the_same_accounts_byte_for_byte(kind, monkeypatch):
    # transformers reads off the positions that no mask is needed; on fake tensors it cannot, and the plan tells it so.
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    real = training_step(kind)[0].summary()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = training_step(kind, fake_llama)[0].summary()
    assert real["peak_bytes"] > 2 * real["by_category"]["adapters"] > 0
    for account in ("peak_bytes", "by_category", "peak_by_phase"):
        assert fake[account] == real[account], account


def fake_llama():
    return build_model(LlamaConfig(**tiny.LLAMA), torch.float32, "sdpa")


def test_plain_operators_have_the_same_accounts_on_fake_and_on_real_tensors_byte_for_byte():
    def work():
        with Ledger() as ledger, ledger.phase("forward"):
            x = torch.zeros(33, 65, requires_grad=True)
            y = torch.softmax(x @ x.t(), -1) @ x
            loss = (y.float() * y.detach()[:, :1]).sum()
            with ledger.phase("backward"):
                loss.backward()
        return ledger.summary()

    real = work()
    with FakeTensorMode():
        fake = work()
    assert real["peak_bytes"] > 4 * 33 * 65
    assert fake == real


# --- where they were made -----------------------------------------------------------------------------------------


def test_the_largest_allocations_name_the_module_that_made_them_and_no_weights():
    ledger, model, _ = training_step("none")
    largest = ledger.history.largest()
    assert 2 <= len(largest) <= 10
    assert [each["bytes"] for each in largest] == sorted((each["bytes"] for each in largest), reverse=True)
    assert {each["category"] for each in largest} <= {"activations", "workspace", "gradients", "other"}
    assert all(each["operator"] and each["shape"] for each in largest)
    modules = dict(model.named_modules())
    named = [each for each in largest if each["module"]]
    assert named, "part of them is made inside of the model"
    assert all(each["module"] in modules or each["module"].rpartition(".")[0] for each in named)
    mlp = [each for each in named if ".mlp" in each["module"]]
    assert mlp, "the feed-forward layers keep most"
    assert all(each["shape"][-1] in (LLAMA["intermediate_size"], LLAMA["hidden_size"], 4) for each in mlp)


def test_weights_are_not_among_the_largest_though_the_ledger_saw_them_made():
    ledger = Ledger()
    with ledger, ledger.phase("load"):
        model = nn.Linear(64, 64)
    ledger.adopt(model)
    with ledger, ledger.phase("forward"):
        y = model(torch.zeros(4, 64))
    assert ledger.by_category()["base_weights"] > 10 * y.nbytes
    assert {each["category"] for each in ledger.history.largest()} == {"activations"}


def test_blocks_are_places_of_their_own_forward_and_backward():
    model = tiny.quantized(tiny.llama(), "none")
    add_lora(model, rank=4, alpha=8)
    names = ["model.layers.0", "model.layers.1"]
    ledger = Ledger()
    ledger.adopt(model, names)
    with ledger:
        accumulate_gradients(model.train(), [Batch()], 30, phase=ledger.phase)
        with ledger.phase("optimizer"):
            torch.zeros(KIB)
    places = ledger.history.peaks_by_place()
    assert {block for phase, block in places if phase == "backward"} == {"", *names}
    assert {block for phase, block in places if phase == "optimizer"} == {""}
    totals = {place: sum(held.values()) for place, held in places.items()}
    assert totals["forward", names[1]] > totals["forward", names[0]], "activations add up"
    assert totals["backward", names[1]] > totals["backward", names[0]], "and go again"
    assert max(totals.values()) == ledger.peak()
    hooks = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert [type(module).__name__ for module in hooks] == ["LlamaModel"], "but for the workspace's own, none is left"


def test_a_timeline_is_short_in_order_and_holds_the_peak():
    ledger, _, _ = training_step()
    samples = ledger.history.timeline()
    assert 20 < len(samples) <= 200
    assert max(sum(sample["bytes"].values()) for sample in samples) == ledger.peak()
    phases = [sample["phase"] for sample in samples if sample["phase"]]
    assert phases.index("forward") < phases.index("loss") < phases.index("backward") < phases.index("optimizer")


def test_a_phase_of_a_single_event_has_a_moment_of_its_own_in_a_timeline():
    history = History()
    for number in range(1000):
        history.mark("optimizer" if number == 501 else "backward", "")
    assert [moment["phase"] for moment in history.timeline()].count("optimizer") == 1


def test_a_timeline_of_more_phases_than_samples_is_short_too():
    with Ledger() as ledger:
        for number in range(300):
            with ledger.phase("forward" if number % 2 else "backward"):
                torch.zeros(KIB + number)
    samples = ledger.history.timeline()
    assert 100 < len(samples) <= 200
    assert max(sum(sample["bytes"].values()) for sample in samples) == ledger.peak() == 4 * (KIB + 299)


@pytest.mark.parametrize("is_apart", [False, True])
def test_what_waits_in_the_hosts_memory_is_counted_apart_where_that_is_another(is_apart):
    ledger = Ledger(host_apart=is_apart)
    with ledger, ledger.phase("forward"):
        x = torch.zeros(KIB)
        waiting = to_host(x)
        back = from_host(waiting, CPU)
        assert torch.equal(back, x)
        assert ledger.current() == (2 if is_apart else 3) * 4 * KIB
    assert ledger.summary()["host_peak_bytes"] == (4 * KIB if is_apart else 0)
    assert len({each.data_ptr() for each in (x, waiting, back)}) == 3


def test_pages_of_a_file_are_never_counted():
    mapped = torch.zeros(KIB)
    ledger = Ledger()
    ledger.ignore([mapped])
    with ledger, ledger.phase("load"):
        view = mapped.view(32, 32).detach()
        assert ledger.current() == 0
        copy = view.to(torch.bfloat16)
        assert ledger.current() == copy.nbytes
    del view, mapped
    assert ledger.peak() == 2 * KIB


# --- the system's own count -------------------------------------------------------------------------------------------


def test_what_the_loss_lets_go_of_is_workspace_and_no_activation():
    with Ledger() as ledger:
        with ledger.phase("forward"):
            gone, kept = torch.zeros(KIB), torch.zeros(2 * KIB)
        with ledger.phase("loss"):
            del gone
        with ledger.phase("backward"):
            del kept
    held = ledger.by_category()
    assert (held["workspace"], held["activations"]) == (4 * KIB, 8 * KIB)


def test_gradients_are_among_the_largest_allocations_and_weights_are_not():
    model = nn.Linear(KIB, 4, bias=False)
    with Ledger(model) as ledger, ledger.phase("backward"):
        model.weight.grad = torch.zeros_like(model.weight)
    assert [(each["category"], each["bytes"]) for each in ledger.history.largest()] == [("gradients", 16 * KIB)]


def test_a_block_that_gives_back_more_than_it_takes_has_taken_nothing():
    with PeakCounter(CPU) as counter:
        counter.start_bytes = 2**60
        counter.sample()
    assert counter.taken_bytes == 0


@pytest.mark.skipif(resident_bytes() == (0, 0), reason="this system has no /proc/self/status")
def test_the_counter_sees_a_tensor_of_64_mib():
    size = 64 * 2**20
    before = resident_bytes()[0]
    with PeakCounter(CPU, interval_s=0.01) as counter:
        pages = mmap.mmap(
            -1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )  # not from the heap, which may hold that much freed memory still
        torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
        deadline = time.monotonic() + 5
        while counter.peak_bytes < before + 0.9 * size and time.monotonic() < deadline:
            time.sleep(0.01)
        inside = counter.peak_bytes
        del pages
    assert inside >= before + 0.9 * size
    assert counter.peak_bytes >= inside
    assert counter.file_backed_bytes > 0, "the libraries' own code"
    assert "RssAnon" in counter.name
