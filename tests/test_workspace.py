"""Weights are decoded into one buffer a model, and no two that are in use at once ever share it."""

import copy
import pickle
import threading
from functools import partial

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from qlora_kit.base.architecture import build_model
from qlora_kit.base.dense import QuantizedWeight, quantize_linear, share_workspace
from qlora_kit.base.formats import Quantization
from qlora_kit.lora import add_lora
from qlora_kit.ops import Workspace, lora_linear

SHAPE = {"hidden_size": 64, "intermediate_size": 192}
LARGEST = 4 * SHAPE["hidden_size"] * SHAPE["intermediate_size"]


def workspaces(model) -> set[Workspace | None]:
    return {module.workspace for module in model.modules() if isinstance(module, QuantizedWeight)}


def held_bytes(model) -> int:
    (workspace,) = workspaces(model)
    return sum(buffer.nbytes for buffer in workspace._idle.values())


def without_workspace(model):
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            module.workspace = None
    return model


def small_llama():
    return tiny.llama(**SHAPE)


def tuned(make=small_llama, kind="nf4", dtype=torch.float32):
    model = tiny.quantized(make(), kind, dtype=dtype)
    add_lora(model, rank=4, alpha=8, dtype=torch.float32)
    tiny.wake(model)
    return model.train()


def gradients(model) -> list[torch.Tensor]:
    tiny.train_step(model)
    return [p.grad for p in model.parameters() if p.requires_grad]


def assert_same(found, wanted) -> None:
    assert len(found) == len(wanted) > 10
    assert all(g.norm() > 0 for g in wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def some_layers(model):
    return list(tiny.quantized_layers(model).values())


# --- lending ---


def test_one_weight_after_another_stands_in_the_same_memory():
    first, *rest = some_layers(tuned())
    first.workspace.lend((1, LARGEST // 4), torch.float32, first.codes)
    address = first.lent(torch.float32).data_ptr()
    for layer in rest:
        lent = layer.lent(torch.float32)
        assert lent.data_ptr() == address
        assert torch.equal(lent, layer.dense(torch.float32))
        del lent


def test_a_weight_that_is_held_is_never_written_over():
    one, two, *_ = some_layers(tuned())
    held, other = one.lent(torch.float32), two.lent(torch.float32)
    assert torch.equal(held, one.dense(torch.float32))
    assert torch.equal(other, two.dense(torch.float32))
    assert not torch.equal(held[:8], other[:8])


def test_dense_is_nobody_elses():
    one, two, *_ = some_layers(tuned())
    kept = one.dense(torch.float32)
    address = one.lent(torch.float32).data_ptr()
    assert address != kept.data_ptr() != one.dense(torch.float32).data_ptr()
    two.lent(torch.float32).zero_()
    assert torch.equal(kept, one.dense(torch.float32))


def test_a_layer_alone_has_no_workspace_and_needs_none():
    layer = some_layers(tuned())[0]
    wanted = layer(torch.ones(3, 64))
    layer.workspace = None
    assert torch.equal(layer(torch.ones(3, 64)), wanted)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.mixtral])
@pytest.mark.parametrize(("kind", "dtype"), [("nf4", torch.float32), ("nf4", torch.bfloat16), ("int8", torch.float32)])
def test_training_and_evaluation_are_bit_for_bit_those_without_a_workspace(make, kind, dtype):
    model, plain = tuned(make, kind, dtype), without_workspace(tuned(make, kind, dtype))
    assert len(workspaces(model)) == 1
    assert_same(gradients(model), gradients(plain))
    assert torch.equal(tiny.logits(model.eval()), tiny.logits(plain.eval()))


# --- whose it is ---


def test_two_models_share_none():
    assert not workspaces(tuned()) & workspaces(tuned())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own(copied):
    model = tuned()
    wanted = gradients(model)
    twin = copied(model)
    assert workspaces(model) != workspaces(twin)
    assert len(workspaces(twin)) == 1
    assert held_bytes(twin) == 0 < held_bytes(model)
    assert_same(gradients(twin), wanted)
    tiny.logits(twin)
    assert held_bytes(twin) == 0, "the copy's body lets go of the copy's memory"


def test_a_state_dict_holds_nothing_of_it():
    model, plain = tuned(), without_workspace(tuned())
    gradients(model)
    assert held_bytes(model) > 0
    assert model.state_dict().keys() == plain.state_dict().keys()


# --- when it stands ---


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_body_lets_go_of_it_and_the_backward_pass_leaves_one_matrix(kind):
    model = tuned(kind=kind)
    seen = {}
    model.model.layers[1].register_forward_hook(lambda *_: seen.update(body=held_bytes(model)))
    model.lm_head.register_forward_pre_hook(lambda *_: seen.update(head=held_bytes(model)))
    gradients(model)
    assert seen == {"body": LARGEST, "head": 0}
    assert held_bytes(model) == LARGEST


def test_a_quantised_head_leaves_nothing_beside_the_loss():
    model = tuned()
    model.lm_head = quantize_linear(model.lm_head, Quantization(), torch.float32, tiny.CPU)
    share_workspace(model)
    loss = model(tiny.tokens(), labels=tiny.tokens(), use_cache=False).loss
    assert loss.requires_grad
    assert model.lm_head.workspace is None
    assert not some_layers(model)[0].workspace._idle


# --- threads, modes, and the ways in which a model is called ---


def test_two_threads_that_train_two_layers_at_once_get_the_right_products():
    """Both decode before either multiplies, as a scheduler might have it."""
    layers = some_layers(tuned())[:2]
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    lent = []

    def train(number, meet, results):
        layer, leaf = layers[number], x[number].clone().requires_grad_()

        def decode(dtype):
            weight = layer.lent(dtype)
            meet()
            lent.append(weight.data_ptr())
            return weight

        y = lora_linear(leaf, decode)
        y.square().sum().backward()
        results[number] = y.detach(), leaf.grad

    alone, together = {}, {}
    for number in (0, 1):
        train(number, lambda: None, alone)
    assert len(set(lent)) == 1, "one after the other they share the buffer"
    assert all(dx.norm() > 0 for _, dx in alone.values())
    for _ in range(5):
        meet = threading.Barrier(2, timeout=30).wait
        threads = [threading.Thread(target=train, args=(number, meet, together)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number in (0, 1):
            assert all(torch.equal(a, b) for a, b in zip(together.pop(number), alone[number], strict=True))


def test_a_fake_run_leaves_the_real_one_right_and_the_other_way_around():
    model, ids = tuned(), tiny.tokens()
    wanted = gradients(without_workspace(tuned()))
    for _ in range(2):
        with FakeTensorMode(allow_non_fake_inputs=True):
            lent = some_layers(model)[0].lent(torch.float32)
            assert isinstance(lent, FakeTensor)
            model.lm_head(model.model(ids, use_cache=False)[0]).sum().backward()
            del lent
        for parameter in model.parameters():
            parameter.grad = None
        assert_same(gradients(model), wanted)
    fake = []
    for _ in range(2):  # one model under two modes, whose tensors must not meet
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake.append(some_layers(model)[0](torch.zeros(2, 64)).shape)
    assert fake == [(2, 64), (2, 64)]


def test_a_model_made_of_fake_tensors_keeps_fake_memory():
    config = small_llama().config
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = tiny.quantized(build_model(config, torch.float32, "sdpa"))
        some_layers(model)[0](torch.zeros(2, 64))
    (workspace,) = workspaces(model)
    assert all(isinstance(buffer, FakeTensor) for buffer in workspace._idle.values())
    assert held_bytes(model) == 4 * 64 * 64


def test_an_evaluation_in_inference_mode_does_not_bar_training():
    model, wanted = tuned(), gradients(without_workspace(tuned()))
    with torch.inference_mode():
        layer = some_layers(model)[0]
        layer(torch.ones(1, 64))
        assert held_bytes(model) > 0
    assert_same(gradients(model), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_give_the_same_gradients(reentrant):
    wanted = gradients(without_workspace(tuned()))
    model = tuned()
    model.enable_input_require_grads()
    for block in model.model.layers:
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)
    assert_same(gradients(model), wanted)


def test_a_layer_called_twice_before_its_backward_passes_mixes_nothing_up():
    layer = some_layers(tuned())[0]
    xs = [torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)).requires_grad_() for seed in (0, 1)]
    apart = [torch.autograd.grad(layer(x).square().sum(), x)[0] for x in xs]
    ys = [layer(x).square().sum() for x in xs]
    together = [torch.autograd.grad(y, x)[0] for y, x in zip(ys, xs, strict=True)]
    assert not torch.equal(*apart)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_torch_compile_reads_a_layer_of_a_model():
    """With the eager backend: tracing must not break it."""
    model = tuned()
    layer = some_layers(model)[0]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    wanted = [x.clone().requires_grad_() for _ in range(2)]
    ys = [forward(leaf) for forward, leaf in zip((layer, torch.compile(layer, backend="eager")), wanted, strict=True)]
    assert torch.equal(*ys)
    for y in ys:
        y.square().sum().backward()
    assert torch.equal(wanted[0].grad, wanted[1].grad)
    assert wanted[0].grad.norm() > 0


@pytest.mark.long
def test_torch_compile_reads_a_whole_model():
    """A compiled program takes the low-rank products of each layer alone."""
    assert_same(gradients(torch.compile(tuned(), backend="eager")), gradients(tiny.one_by_one(tuned())))


def test_memory_of_another_kind_is_another_buffer():
    workspace, like = Workspace(), torch.empty(0)
    small = workspace.lend((2, 3), torch.float32, like).data_ptr()
    assert workspace.lend((1, 6), torch.float32, like).data_ptr() == small
    workspace.lend((4, 1), torch.bfloat16, like)
    workspace.lend((7, 9), torch.float32, like)
    held = {buffer.dtype: buffer.numel() for buffer in workspace._idle.values()}
    assert held == {torch.bfloat16: 4, torch.float32: 63}
    workspace.release()
    assert not workspace._idle
