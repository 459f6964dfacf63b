"""What only a CUDA device can show: the same codes and values as on the CPU, a step that learns, paged state."""

import threading

import pytest
import torch
from tiny import llama, tokens, wake

from qlora_kit.base.device import resolve_dtype
from qlora_kit.base.formats import Quantization, quantize
from qlora_kit.base.freeze import freeze_and_quantize
from qlora_kit.lora import adapter_parameters, add_lora
from qlora_kit.memory import PeakCounter
from qlora_kit.memory.limit import whose_memory_ran_out
from qlora_kit.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from qlora_kit.train.isolation import leaked_gradient
from qlora_kit.train.optim import AdapterOptimizer

pytestmark = pytest.mark.gpu
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_the_gpu_stores_and_reads_what_the_cpu_does(kind):
    """Decoded values differ at most where a weight lies within rounding of the middle between two codes."""
    models = [
        freeze_and_quantize(llama(hidden_size=128, intermediate_size=256), Quantization(kind), torch.float32, device)
        for device in (CPU, CUDA)
    ]
    on_cpu, on_cuda = (model.model.layers[0].mlp.up_proj.dense(torch.float32).cpu() for model in models)
    assert on_cpu.abs().max() > 0
    assert ((on_cpu - on_cuda).abs() > 1e-5 * on_cpu.abs().max()).float().mean() < 1e-3


def test_codes_made_on_the_gpu_are_the_cpus_but_for_ties():
    w_OI = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    on_cpu, on_cuda = (quantize(w_OI.to(device), Quantization())["codes"].cpu() for device in (CPU, CUDA))
    assert (on_cpu != on_cuda).float().mean() < 1e-4


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adamw"])
def test_steps_on_the_gpu_lower_the_loss_in_bf16(kind):
    model = freeze_and_quantize(llama(hidden_size=128, intermediate_size=256), Quantization(), torch.bfloat16, CUDA)
    add_lora(model, rank=32)
    optimizer = AdapterOptimizer(list(adapter_parameters(model)), kind)
    ids = tokens(4, 32).to(CUDA)
    losses = []
    for _ in range(30):
        loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step(3e-3)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.effective_kind == kind


def test_gradients_on_the_gpu_agree_with_the_cpus_in_fp32():
    gradients = []
    for device in (CPU, CUDA):
        model = freeze_and_quantize(llama(), Quantization("int8"), torch.float32, device)
        add_lora(model, dtype=torch.float32)
        wake(model)
        ids = tokens().to(device)
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for _, p in adapter_parameters(model)]))
    assert gradients[0].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()  # TF32 is off; sums in another order


def test_forward_and_backward_decode_into_one_buffer_though_they_are_two_threads():
    model = freeze_and_quantize(llama(hidden_size=128, intermediate_size=256), Quantization(), torch.bfloat16, CUDA)
    layer = model.model.layers[0].mlp.up_proj
    threads, addresses, read = set(), set(), layer.read

    def watched(*asked, **how):
        threads.add(threading.get_ident())
        weight = read(*asked, **how)
        addresses.add(weight.data_ptr())
        return weight

    layer.read = watched
    x = torch.randn(4, 128, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert (len(threads), len(addresses)) == (2, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_gradient_flows_between_packed_documents_on_the_gpu(dtype, attention):
    model = llama(hidden_size=128, intermediate_size=256)
    model.set_attn_implementation(attention)
    assert leaked_gradient(freeze_and_quantize(model, Quantization(), dtype, CUDA)) == 0.0


@pytest.mark.parametrize("compute_dtype", ["auto", "float16", "float32"])
def test_attention_on_the_gpu_makes_no_scores_of_all_pairs_of_tokens(compute_dtype):
    """Of four heads that share two of keys; 256 MiB in fp32, and more than once where they are made."""
    model = llama(hidden_size=128, intermediate_size=256, num_hidden_layers=1, max_position_embeddings=4096)
    model = freeze_and_quantize(model, Quantization(), resolve_dtype(compute_dtype, CUDA), CUDA)
    add_lora(model)
    ids = tokens(1, 4096).to(CUDA)
    with PeakCounter(CUDA) as counter:
        model.train().model(input_ids=ids, use_cache=False)[0].float().sum().backward()
    assert 0 < counter.taken_bytes < 2**27  # 39 MiB of tensors in fp32, and a library's workspace of up to 32


def test_the_counter_reads_the_allocators_peak():
    with PeakCounter(CUDA) as counter:
        torch.empty(2**26, dtype=torch.uint8, device=CUDA)
    assert counter.peak_bytes >= 2**26


def stepped(steps, optimizer=None, model=None):
    """A model whose adapters are large enough to be paged, and its optimizer, some steps on."""
    if model is None:
        model = freeze_and_quantize(llama(hidden_size=512, intermediate_size=512), Quantization(), torch.bfloat16, CUDA)
        torch.manual_seed(0)
        add_lora(model, rank=256)
        optimizer = AdapterOptimizer(list(adapter_parameters(model)), "paged_adamw_8bit")
    for step in steps:
        ids = tokens(4, 32, seed=step).to(CUDA)
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step(3e-3)
    return model, optimizer


def test_paged_state_comes_back_from_a_checkpoint_to_the_bit(tmp_path):
    whole, wanted = stepped(range(6))
    assert any(tensor.dtype == torch.uint8 for tensor in wanted.pageable())
    assert wanted.effective_kind == "paged_adamw_8bit"
    first, optimizer = stepped(range(3))
    made = save_checkpoint(tmp_path, dict(adapter_parameters(first)), optimizer, Progress(step=3), keep=1)
    second, found = stepped(range(0))
    assert load_checkpoint(made, dict(adapter_parameters(second)), found).step == 3
    stepped(range(3, 6), found, second)
    for (name, ours), (_, theirs) in zip(adapter_parameters(second), adapter_parameters(whole), strict=True):
        assert torch.equal(ours, theirs), name
    assert not torch.equal(dict(adapter_parameters(first))[name], theirs)
    states = dict(found.state_tensors()), dict(wanted.state_tensors())
    assert states[0].keys() == states[1].keys()
    assert not [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]


def test_a_cards_refusal_is_known_as_one():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**50, dtype=torch.uint8, device=CUDA)
    assert whose_memory_ran_out(refused.value) == "device"
