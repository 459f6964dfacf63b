"""The plan is the program, run on nothing: its bytes are the real step's bytes, and it leaves the process as it was."""

import json
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPT2Config, LlamaConfig, Qwen3Config, masking_utils

from qlora_kit.base import Quantization, formats, kernels
from qlora_kit.base.load import build_model, freeze_and_quantize
from qlora_kit.data import Encoded
from qlora_kit.lora import adapter_parameters, add_lora
from qlora_kit.memory import CATEGORIES, Ledger, PeakCounter
from qlora_kit.plan import Workload, available_bytes, dry_run, plan_methods
from qlora_kit.plan.devices import device_name, estimated_tokens_per_s, matmul_rate
from qlora_kit.recipe import Base, Data, Lora, Memory, Recipe, Train
from qlora_kit.report.text import plan_text
from qlora_kit.train.activations import set_activation_policy
from qlora_kit.train.head import automatic_chunk
from qlora_kit.train.loop import Job, rehearse_longest, train_loop
from qlora_kit.train.metrics import MetricsLog
from qlora_kit.train.optim import AdapterOptimizer
from qlora_kit.train.pace import Pace

dry_run_room = sys.modules["qlora_kit.plan.dry_run"]  # its function bears the same name
CPU = torch.device("cpu")
TOKENS = 48
SHAPE = {"hidden_size": 128, "intermediate_size": 320, "vocab_size": 512, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**{**tiny.LLAMA, **SHAPE}),
    "qwen3": Qwen3Config(**{**tiny.LLAMA, **SHAPE, "head_dim": 16, "tie_word_embeddings": True}),
    "gpt2": GPT2Config(
        vocab_size=512, n_positions=64, n_embd=128, n_layer=2, n_head=4, resid_pdrop=0.1, attn_pdrop=0.0
    ),
}
WORK = Workload(
    quantization=Quantization("nf4"),
    lora=Lora(rank=8),
    dtype=torch.float32,
    attention="sdpa",
    micro_batch=2,
    tokens=TOKENS,
    accumulation=1,
    activations="keep",
    optimizer="adamw_8bit",
    master_weights="fp32",
)


def real_model(config, work):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(config, work.dtype, work.attention)
    freeze_and_quantize(model, work.quantization, work.dtype, CPU, work.skip)
    add_lora(model, rank=work.lora.rank, alpha=work.lora.alpha, dropout=work.lora.dropout)
    set_activation_policy(model, work.activations)
    return model.train()


def real_step(config, work, folder):
    """What the ledger of a run says: the rehearsal and the first step of the loop itself, and that step's metrics."""
    model = real_model(config, work)
    parameters = dict(adapter_parameters(model))
    optimizer = AdapterOptimizer(list(parameters.items()), work.optimizer, master_weights=work.master_weights)
    ids = tiny.tokens(work.micro_batch * work.accumulation, work.tokens, vocab=config.vocab_size).tolist()
    job = Job(
        model=model,
        parameters=parameters,
        optimizer=optimizer,
        rows=[Encoded(row, [True] * len(row)) for row in ids],
        eval_batches=[],
        pad_id=0,
        pace=Pace(1, work.micro_batch, work.accumulation, 1, None, 1e-3, "the test", 0, 0),
        train=Train(),
        loss_chunk=work.loss_chunk,
        folder=folder,
    )
    ledger = Ledger(model)
    ledger.own("optimizer_state", (tensor for _, tensor in optimizer.state_tensors()))
    metrics = MetricsLog(folder / "metrics.jsonl")
    with ledger:
        rehearse_longest(job, ledger)
    assert train_loop(job, metrics, PeakCounter(CPU), ledger)
    metrics.close()
    return ledger.summary(), metrics.rows[0]


def assert_agrees(planned, measured):
    """Both were equal to the byte, the rows themselves aside; the bounds leave room for another processor's kernels."""
    peak = measured["peak_bytes"]
    assert planned["peak_bytes"] == pytest.approx(peak, rel=0.01)
    for name, held in measured["by_category"].items():
        if held > 0.01 * peak:
            assert planned["by_category"][name] == pytest.approx(held, rel=0.02), name
        else:
            assert planned["by_category"][name] <= 0.02 * peak, name
    # torch's own AdamW makes temporaries the size of one matrix; the plan does not run its arithmetic.
    assert planned["peak_by_phase"] == pytest.approx(measured["peak_by_phase"], abs=0.01 * peak)


# --- the plan and the step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_a_planned_step_takes_the_bytes_of_the_real_one(kind, activations, micro_batch, tmp_path):
    work = replace(WORK, quantization=Quantization(kind), activations=activations, micro_batch=micro_batch)
    planned, (measured, _) = dry_run(CONFIGS["llama"], work), real_step(CONFIGS["llama"], work, tmp_path)
    assert_agrees(planned, measured)
    held = measured["by_category"]
    assert held["activations"] > 0.05 * measured["peak_bytes"]
    assert held["other"] < 0.01 * measured["peak_bytes"]
    assert min(held["base_weights"], held["adapters"], held["optimizer_state"]) > 0
    assert (held["quantization_state"] > 0) == (kind != "none")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {"activations": "recompute"}),
        ("gpt2", {"activations": "keep"}),
        ("llama", {"loss_chunk": 16}),
        ("gpt2", {"loss_chunk": 40, "dtype": torch.bfloat16, "accumulation": 2}),
        ("llama", {"accumulation": 2, "lora": Lora(rank=8, dropout=0.1)}),
        ("llama", {"dtype": torch.bfloat16, "master_weights": "stochastic", "optimizer": "adamw"}),
        (
            "llama",
            {"attention": "eager", "skip": ("down_proj",), "quantization": Quantization("fp4", double_quant=False)},
        ),
    ],
)
def test_other_families_and_settings_agree_too(family, changes, tmp_path):
    work = replace(WORK, **changes)
    assert_agrees(dry_run(CONFIGS[family], work), real_step(CONFIGS[family], work, tmp_path)[0])


def test_two_shallow_depths_tell_a_deep_model(monkeypatch):
    deep = LlamaConfig(**{**tiny.LLAMA, **SHAPE, "num_hidden_layers": 10})
    work = replace(WORK, optimizer="adamw")
    steps, run = [], dry_run_room._step_on_fake_tensors
    monkeypatch.setattr(
        dry_run_room,
        "_step_on_fake_tensors",
        lambda config, work: steps.append(config.num_hidden_layers) or run(config, work),
    )
    told = dry_run(deep, work)
    assert steps == [2, 4]
    whole = run(deep, work)
    assert deep.num_hidden_layers == 10, "the caller's own configuration is left alone"
    assert told["peak_bytes"] == pytest.approx(whole["peak_bytes"], rel=0.005)
    assert told["resident_bytes"] == pytest.approx(whole["resident_bytes"], rel=0.005)
    assert told["parameters"] == whole["parameters"]
    for name, held in whole["by_category"].items():
        assert told["by_category"][name] == pytest.approx(held, abs=0.005 * whole["peak_bytes"]), name
    assert sum(told["by_category"].values()) == pytest.approx(told["peak_bytes"], abs=len(CATEGORIES))


def test_layers_of_several_kinds_are_run_in_full(monkeypatch):
    kinds = ["sliding_attention", "full_attention"] * 4
    mixed = Qwen3Config(
        **{**tiny.LLAMA, "num_hidden_layers": 8},
        head_dim=12,
        layer_types=kinds,
        use_sliding_window=True,
        sliding_window=8,
    )
    depths = []
    monkeypatch.setattr(
        dry_run_room, "_step_on_fake_tensors", lambda config, work: depths.append(config.num_hidden_layers)
    )
    dry_run(mixed, WORK)
    assert depths == [8]


# --- the process is left as it was ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_real_step_after_a_dry_run_is_the_step_without_one(kind, tmp_path):
    work = replace(WORK, quantization=Quantization(kind))
    steps = []
    for is_planned in (False, True):
        formats._absmax_table.cache_clear()
        kernels.table_4bit.cache_clear()
        random_state, threads = torch.get_rng_state(), torch.get_num_threads()
        if is_planned:
            dry_run(CONFIGS["llama"], work)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert torch.get_num_threads() == threads
        steps.append(real_step(CONFIGS["llama"], work, tmp_path)[1])
    assert steps[0]["loss"] > 1
    assert [steps[1][key] for key in ("loss", "grad_norm")] == [steps[0][key] for key in ("loss", "grad_norm")]
    assert type(torch.zeros(1)) is torch.Tensor


def test_transformers_asks_its_own_questions_again_even_after_a_failed_plan():
    ask = masking_utils.find_packed_sequence_indices
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    assert ask(packed).tolist() == [[0, 0, 0, 1, 1]]
    with pytest.raises(KeyError):
        dry_run(CONFIGS["llama"], replace(WORK, attention="sdpa", lora=Lora(rank=8), optimizer="adamw", skip=_Broken()))
    assert masking_utils.find_packed_sequence_indices is ask
    assert type(torch.zeros(1)) is torch.Tensor


class _Broken(tuple):
    def __iter__(self):
        raise KeyError


# --- optimizers and parameters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("masters", ["fp32", "stochastic", "none"])
@pytest.mark.parametrize("kind", ["adamw", "sgd", "paged_adamw_8bit", "adamw_32bit", "lion_8bit", "ademamix_8bit"])
def test_the_planned_optimizer_state_is_that_of_the_real_optimizer(kind, masters):
    def state(seed):
        shapes = {"x.a_RI": (64, 128), "x.b_OR": (128, 64), "y.a_RI": (8, 24)}
        parameters = [
            (name, torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))) for name, shape in shapes.items()
        ]
        optimizer = AdapterOptimizer(parameters, kind, master_weights=masters)
        if seed is not None:
            for _, parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step(1e-3)
        return {
            name: (tensor.shape, tensor.dtype, tensor.untyped_storage().nbytes())
            for name, tensor in optimizer.state_tensors()
        }

    real = state(0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = state(None)
    assert fake == real, "what a step leaves stands from the start"
    assert any(name.startswith("x.a_RI/") for name in real) or kind == "sgd"


def test_the_plans_optimizer_state_is_that_of_the_run():
    model = real_model(CONFIGS["llama"], WORK)
    optimizer = AdapterOptimizer(list(adapter_parameters(model)), WORK.optimizer)
    wanted = sum(tensor.nbytes for name, tensor in optimizer.state_tensors() if name != "rounding")
    assert dry_run(CONFIGS["llama"], WORK)["by_category"]["optimizer_state"] == wanted


@pytest.mark.parametrize(("is_tied", "depth"), [(True, 2), (False, 10)])
def test_parameters_are_counted_by_their_true_shapes(is_tied, depth):
    config = LlamaConfig(**{**tiny.LLAMA, "num_hidden_layers": depth, "tie_word_embeddings": is_tied})
    H, F, V, KV, rank = 48, 176, 97, 24, 8  # hidden, feed-forward, vocabulary, key and value width
    linears = [(H, H), (KV, H), (KV, H), (H, H), (F, H), (F, H), (H, F)]
    quantized = depth * sum(out * width for out, width in linears)
    assert dry_run(config, replace(WORK, micro_batch=1, tokens=8))["parameters"] == {
        "quantized": quantized,
        "total": quantized + depth * 2 * H + H + V * H * (1 if is_tied else 2),
        "trainable": depth * sum(rank * (out + width) for out, width in linears),
    }


# --- plan.json --------------------------------------------------------------------------------------------------------

PACE = Pace(200, 2, 2, 20, None, 2e-4, "the test", 5000, 1000)


def recipe(**sections):
    base = Base(model="./nowhere", device="cpu", compute_dtype="bfloat16")
    return Recipe(**{"base": base, "data": Data(train="rows.jsonl"), "lora": Lora(rank=8)} | sections)


@pytest.fixture(scope="module")
def plan():
    return plan_methods(recipe(), CONFIGS["llama"], PACE, TOKENS)


def test_a_plan_holds_what_the_run_folder_promises(plan):
    assert set(plan) >= {
        "parameters", "bits_per_quantized_parameter", "methods", "savings_vs_full", "budget", "planned_on",
        "device_profile", "steps", "tokens_per_s", "hours",
    }  # fmt: skip
    assert set(plan["parameters"]) == {"total", "trainable", "quantized"}
    assert set(plan["methods"]) == {"qlora", "lora_16bit", "full_finetune"}
    for method in plan["methods"].values():
        assert set(method) >= {"peak_bytes", "resident_bytes", "by_category", "peak_by_phase"}
        assert set(method["by_category"]) == set(CATEGORIES)
        assert set(method["peak_by_phase"]) >= {"forward", "loss", "backward", "optimizer"}
    assert set(plan["methods"]["full_finetune"]["assumes"]) == {"optimizer", "master_weights", "activations", "loss"}
    assert {"tokens_per_s", "hours", "next"} == set(plan["estimates"])
    assert json.loads(json.dumps(plan, allow_nan=False)) == plan


def test_a_plans_numbers_agree_with_each_other(plan):
    peaks = {name: method["peak_bytes"] for name, method in plan["methods"].items()}
    assert peaks["qlora"] < peaks["lora_16bit"] < peaks["full_finetune"]
    for method in plan["methods"].values():
        assert sum(method["by_category"].values()) == method["peak_bytes"] == max(method["peak_by_phase"].values())
        assert 0 < method["resident_bytes"] < method["peak_bytes"]
    assert plan["savings_vs_full"] == pytest.approx(1 - peaks["qlora"] / peaks["full_finetune"])
    assert plan["bits_per_quantized_parameter"] == 4 + (8 + 32 / 256) / 64
    assert plan["hours"] == pytest.approx(PACE.tokens / plan["tokens_per_s"] / 3600)  # not as if all rows were longest
    assert (plan["steps"], plan["budget"]) == (200, None)
    assert plan["methods"]["lora_16bit"]["by_category"]["quantization_state"] == 0
    quantized = plan["parameters"]["quantized"]
    dense = 2 * (plan["parameters"]["total"] - quantized)
    rotary = 4 * SHAPE["hidden_size"] // SHAPE["num_attention_heads"]  # two buffers of half a head's width, fp32
    assert plan["methods"]["qlora"]["by_category"]["base_weights"] == quantized // 2 + dense + rotary


def test_full_fine_tuning_takes_twelve_bytes_a_parameter_and_its_activations(plan):
    held, total = plan["methods"]["full_finetune"]["by_category"], plan["parameters"]["total"]
    rotary = 4 * SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    assert held["base_weights"] == 2 * total + rotary
    assert held["gradients"] == 2 * total
    assert held["optimizer_state"] == 8 * total
    assert held["adapters"] == held["quantization_state"] == 0
    assert held["activations"] > 0


def test_a_recipe_in_float32_is_compared_with_full_fine_tuning_in_float32(plan):
    """Sixteen bytes a parameter, where the plan in bf16 has twelve."""
    wide = plan_methods(recipe(base=Base(model="./nowhere", device="cpu", compute_dtype="float32")),
                        CONFIGS["llama"], PACE, TOKENS)  # fmt: skip
    full, narrow = (each["methods"]["full_finetune"]["by_category"] for each in (wide, plan))
    assert (plan["compared_in"], wide["compared_in"]) == ("bfloat16", "float32")
    assert full["gradients"] == 2 * narrow["gradients"] == 4 * wide["parameters"]["total"]
    assert full["optimizer_state"] == narrow["optimizer_state"]
    assert "float32" in wide["methods"]["full_finetune"]["assumes"]["master_weights"]
    assert "LoRA 32-bit" in plan_text({"schema": 1, **wide})
    assert "more; the others are planned in" not in plan_text({"schema": 1, **wide})
    assert "in float32 on this device, which takes more" in plan_text({"schema": 1, **plan, "computed_in": "float32"})
    assert "LoRA 16-bit" in plan_text({"schema": 1, **plan})


def test_automatic_activations_are_kept_where_they_fit_and_recomputed_where_not(plan):
    tight = plan_methods(recipe(memory=Memory(budget="1MiB")), CONFIGS["llama"], PACE, TOKENS)
    assert (plan["activations"], tight["activations"]) == ("keep", "recompute")
    assert tight["budget"] == 2**20 < tight["methods"]["qlora"]["peak_bytes"] < plan["methods"]["qlora"]["peak_bytes"]
    assert tight["methods"]["full_finetune"]["assumes"]["activations"] == "recompute"


def test_all_methods_take_the_loss_as_the_recipe_has_it(plan):
    peaks = {}
    for chunk in (8, 1000):
        chunked = plan_methods(recipe(memory=Memory(loss_chunk=chunk)), CONFIGS["llama"], PACE, TOKENS)
        assert chunked["loss_chunk"] == chunk
        assert chunked["methods"]["full_finetune"]["assumes"]["loss"] == f"logits of {chunk} tokens at a time"
        peaks[chunk] = {name: method["peak_by_phase"]["loss"] for name, method in chunked["methods"].items()}
    assert all(peaks[8][name] < peaks[1000][name] for name in ("qlora", "lora_16bit", "full_finetune"))
    assert plan["loss_chunk"] == automatic_chunk(512)
    whole = dry_run(CONFIGS["llama"], replace(WORK, loss_chunk=None))["peak_by_phase"]["loss"]
    assert dry_run(CONFIGS["llama"], replace(WORK, loss_chunk=1000))["peak_by_phase"]["loss"] < whole


def test_a_workload_is_what_the_recipe_asks_for():
    asked = Recipe(
        base=Base(model="./nowhere", device="cpu", compute_dtype="float32", quantization="fp4", double_quant=False,
                  block_size=128, skip=["q_proj"], attention="eager"),
        data=Data(train="rows.jsonl"),
        lora=Lora(rank=4, dropout=0.1),
        train=Train(optimizer="lion_8bit", master_weights="auto"),
    )  # fmt: skip
    work = Workload.of(asked, micro_batch=3, accumulation=5, tokens=77, activations="recompute", loss_chunk=9)
    assert work == Workload(
        Quantization("fp4", False, 128), asked.lora, torch.float32, "eager", 3, 77, 5, "recompute", "lion_8bit", "fp32",
        ("q_proj",), False, 9,
    )  # fmt: skip


def test_the_device_is_known():
    assert 2**28 < available_bytes(CPU) < 2**45
    assert "CPU" in device_name(CPU)
    rate = matmul_rate(CPU, torch.float32, seconds=0.01)
    assert rate > 1e8
    fast, slow = (estimated_tokens_per_s(10**9, is_recomputed, rate) for is_recomputed in (False, True))
    assert fast == pytest.approx(1.5 * slow)
