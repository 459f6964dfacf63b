"""The plan is the program, run on nothing: its bytes are the real step's bytes, and it leaves the process as it was."""

import copy
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    BertConfig,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
    masking_utils,
)
from transformers.models.llama import modeling_llama

from qlora_kit.base import Quantization, kernels
from qlora_kit.base.architecture import build_model
from qlora_kit.base.freeze import freeze_and_quantize
from qlora_kit.data import Encoded, collate, collate_texts
from qlora_kit.errors import ModelError
from qlora_kit.export import rehearse_merge
from qlora_kit.export.plain import export_merged
from qlora_kit.export.stream import SLICE_ELEMENTS
from qlora_kit.lora import adapter_parameters, add_lora
from qlora_kit.memory import CATEGORIES, Ledger, PeakCounter
from qlora_kit.ops import wide
from qlora_kit.ops.stand_in import as_on_card
from qlora_kit.plan import Workload, available_bytes, devices, dry_run, plan_methods
from qlora_kit.plan.devices import device_name, estimated_tokens_per_s, matmul_rate
from qlora_kit.recipe import Base, Data, Lora, Memory, Recipe, Train
from qlora_kit.report.plan_text import plan_text
from qlora_kit.run.prepare import packing_of
from qlora_kit.train.activations import activation_blocks, set_activation_policy
from qlora_kit.train.checkpoint import rehearse_checkpoint
from qlora_kit.train.head import automatic_chunk
from qlora_kit.train.loop import Job, rehearse, train_loop
from qlora_kit.train.metrics import MetricsLog
from qlora_kit.train.optim import AdapterOptimizer
from qlora_kit.train.pace import Pace
from qlora_kit.train.step import accumulate_gradients
from qlora_kit.train.tasks import CLASSIFICATION

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
    "mixtral": MixtralConfig(**{**tiny.LLAMA, **SHAPE}, num_local_experts=4, num_experts_per_tok=2),
    "gemma3": Gemma3TextConfig(**{**tiny.LLAMA, **SHAPE}, head_dim=16, sliding_window=8,
                               layer_types=["sliding_attention", "full_attention"]),
    "bert": BertConfig(**{**tiny.LLAMA, **SHAPE}, attention_probs_dropout_prob=0.0),
}  # fmt: skip
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
    eval_shape=(1, 40),
)


def real_model(config, work, ledger):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = "classification" if work.task == "classify" else "causal"
        model = build_model(config, work.dtype, work.attention, head)
    ledger.ignore(model.parameters())
    also = work.lora.also_train
    with ledger.watch("load"):
        freeze_and_quantize(model, work.quantization, work.dtype, CPU, work.skip, quantize_head=work.quantize_head)
        add_lora(model, rank=work.lora.rank, alpha=work.lora.alpha, dropout=work.lora.dropout, also_train=also)
    ledger.adopt(model, activation_blocks(model))
    set_activation_policy(model, work.activations)
    return model.train()


def held_out(config, rows, length):
    ids = tiny.tokens(rows, length, seed=1, vocab=config.vocab_size).tolist()
    return collate([Encoded(row, [True] * length) for row in ids], 0)


def real_step(config, work, folder):
    """What the ledger of a run says: the rehearsal and the first step of the loop itself, and that step's metrics."""
    ledger = Ledger(host_apart=work.on_card)
    model = real_model(config, work, ledger)
    parameters = dict(adapter_parameters(model))
    optimizer = AdapterOptimizer(list(parameters.items()), work.optimizer, master_weights=work.master_weights)
    packing = packing_of(work.layout, SimpleNamespace(micro_batch=work.micro_batch), work.tokens)
    long = work.tokens - 2 * (work.layout == "packed")  # such a sequence then holds two rows
    lengths = [long] * (work.micro_batch * work.accumulation) + [2] * (0 if packing is None else packing.sequences)
    ids = [tiny.tokens(1, n, vocab=config.vocab_size)[0].tolist() for n in lengths]
    job = Job(
        model=model,
        parameters=parameters,
        optimizer=optimizer,
        rows=[Encoded(row, [True] * len(row)) for row in ids],
        eval_batches=[] if work.eval_shape is None else [held_out(config, *work.eval_shape)],
        pad_id=0,
        pace=Pace(1, work.micro_batch, work.accumulation, 1, None, 1e-3, "the test", 0, 0),
        train=Train(),
        loss_chunk=work.loss_chunk,
        folder=folder,
        packing=packing,
    )
    ledger.own("optimizer_state", (tensor for _, tensor in optimizer.state_tensors()))
    metrics = MetricsLog(folder / "metrics.jsonl")
    with as_on_card(work.on_card):
        with ledger:
            rehearse(job, ledger)
        assert train_loop(job, metrics, PeakCounter(CPU), ledger)
    metrics.close()
    return ledger.summary(), metrics.rows[0]


def assert_agrees(planned, measured):
    """Both were equal to the byte; the bounds leave room for another processor's kernels, which rows do not go by."""
    peak = measured["peak_bytes"]
    rows = measured["by_category"]["other"]
    assert planned["by_category"]["other"] == pytest.approx(rows, abs=4), "but for the loss"
    assert planned["peak_bytes"] == pytest.approx(peak, rel=0.01)
    for name, held in measured["by_category"].items():
        if held > 0.01 * peak:
            assert planned["by_category"][name] == pytest.approx(held, rel=0.02), name
        else:
            assert planned["by_category"][name] <= 0.02 * peak, name
    # torch's own AdamW makes temporaries the size of one matrix; the plan does not run its arithmetic.
    assert planned["peak_by_phase"] == pytest.approx(measured["peak_by_phase"], abs=0.01 * peak)


# --- the plan and the step --------------------------------------------------------------------------------------------


def test_blocks_that_keep_products_take_less_than_all_and_more_than_inputs():
    works = (replace(WORK, activations=policy, micro_batch=4) for policy in ("recompute", "selective", "keep"))
    least, between, most = (dry_run(CONFIGS["llama"], work)["by_category"]["activations"] for work in works)
    assert 1.3 * least < between < most / 1.3


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("activations", ["keep", "selective", "recompute"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_a_planned_step_takes_the_bytes_of_the_real_one(kind, activations, micro_batch, tmp_path):
    work = replace(WORK, quantization=Quantization(kind), activations=activations, micro_batch=micro_batch)
    planned, (measured, _) = dry_run(CONFIGS["llama"], work), real_step(CONFIGS["llama"], work, tmp_path)
    assert_agrees(planned, measured)
    held = measured["by_category"]
    inputs = CONFIGS["llama"].num_hidden_layers * micro_batch * WORK.tokens * CONFIGS["llama"].hidden_size * 4
    assert held["activations"] > inputs, "every block keeps at least what it runs again from"
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


def test_a_step_with_a_quantised_head_and_embedding_takes_the_bytes_of_the_real_one(tmp_path):
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size = 8192
    work = replace(WORK, quantize_head=True, activations="recompute", eval_shape=None)  # which would let buffers go
    planned, (measured, _) = dry_run(config, work), real_step(config, work, tmp_path)
    whole = config.vocab_size * config.hidden_size * 4
    assert whole > 0.3 * measured["peak_bytes"], "a buffer for one of them would be seen"
    assert_agrees(planned, measured)


@pytest.mark.parametrize(
    ("family", "attention", "layout"),
    [("llama", "sdpa", "packed"), ("llama", "sdpa", "joined"), ("gpt2", "eager", "packed"),
     ("gemma3", "sdpa", "packed"), *(pytest.param(*case, marks=pytest.mark.slow) for case in [
         ("llama", "eager", "packed"), ("gpt2", "sdpa", "joined"), ("gemma3", "eager", "packed"),
         ("gemma3", "sdpa", "joined"), ("qwen3", "sdpa", "packed"), ("qwen3", "eager", "packed"),
         ("mixtral", "sdpa", "joined"), ("mixtral", "eager", "packed")])],
)  # fmt: skip
def test_a_planned_step_of_packed_rows_takes_the_bytes_of_the_real_one(
    family, attention, layout, tmp_path, monkeypatch
):
    # Products of 64 rows and more take other memory than those of fewer, and how many an expert gets no plan knows.
    monkeypatch.setattr(wide, "multiplies_fp32_faster", lambda: False)
    dtype = torch.bfloat16 if family == "mixtral" else torch.float32
    work = replace(WORK, layout=layout, attention=attention, dtype=dtype, accumulation=2)
    measured, _ = real_step(CONFIGS[family], work, tmp_path)
    assert_agrees(dry_run(CONFIGS[family], work), measured)


def real_classification(config, work, lengths):
    """What the ledger says of two real steps on texts of these lengths."""
    ledger = Ledger(host_apart=work.on_card)
    model = real_model(config, work, ledger)
    parameters = list(adapter_parameters(model))
    optimizer = AdapterOptimizer(parameters, work.optimizer, master_weights=work.master_weights)
    ledger.own("optimizer_state", (tensor for _, tensor in optimizer.state_tensors()))
    texts = [
        ids[:length] for ids, length in zip(tiny.tokens(len(lengths), max(lengths)).tolist(), lengths, strict=True)
    ]
    with ledger:
        for _ in range(2):
            batches = [collate_texts(texts, [0, 2, 1, 0][: len(texts)], 0)] * (2 if work.gradients_stand else 1)
            count = len(texts) * len(batches)
            loss = accumulate_gradients(model, batches, count, CLASSIFICATION, phase=ledger.phase).value
            with ledger.phase("optimizer"):
                torch.nn.utils.clip_grad_norm_([parameter for _, parameter in parameters], 1.0)
                optimizer.step(1e-3)
        with ledger.phase("save"):
            rehearse_checkpoint(dict(parameters), optimizer, on_card=work.on_card)
    assert 0.1 < loss.item() < 3
    return ledger.summary()


PADDED, LEVEL = (TOKENS, 9, 30, 22), (TOKENS,) * 4


@pytest.mark.parametrize(
    ("family", "attention", "lengths"),
    [("bert", "sdpa", PADDED), ("bert", "eager", PADDED), ("bert", "sdpa", LEVEL), ("llama", "sdpa", PADDED),
     *(pytest.param(family, attention, lengths, marks=pytest.mark.slow) for family, attention, lengths in [
         ("bert", "sdpa", (TOKENS,)), ("bert", "eager", LEVEL), ("llama", "sdpa", LEVEL), ("llama", "eager", PADDED)])],
)  # fmt: skip
def test_a_planned_classification_takes_the_bytes_of_the_real_one(family, attention, lengths):
    config = copy.deepcopy(CONFIGS[family])
    config.num_labels = 3
    lora = Lora(rank=8, also_train=[{"bert": "classifier", "llama": "score"}[family]])
    shape = {"micro_batch": len(lengths), "is_padded": min(lengths) < TOKENS, "eval_shape": None}
    work = replace(WORK, task="classify", attention=attention, lora=lora, **shape)
    measured = real_classification(config, work, lengths)
    assert_agrees(dry_run(config, work), measured)
    assert measured["by_category"]["other"] < 0.01 * measured["peak_bytes"]


# --- the process is left as it was ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_real_step_after_a_dry_run_is_the_step_without_one(kind, tmp_path):
    work = replace(WORK, quantization=Quantization(kind))
    steps = []
    for is_planned in (False, True):
        kernels.table_8bit.cache_clear()
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


def test_a_layer_whose_weight_the_model_reads_itself_is_named_and_may_be_left_as_it_is():
    sizes = {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 16}
    config = FalconH1Config(**{**tiny.LLAMA, **SHAPE}, **sizes)
    work = replace(WORK, accumulation=1, eval_shape=None)
    with pytest.raises(ModelError, match=r"falcon_h1 multiplies by the weight of out_proj itself.* base\.skip"):
        dry_run(config, work)
    with pytest.raises(
        ModelError, match=r"the weight of out_proj itself"
    ):  # of the quantised layer, without an adapter
        dry_run(config, replace(work, lora=Lora(rank=8, targets=["q_proj"])))
    left = replace(work, lora=Lora(rank=8, targets=["q_proj", "in_proj"]), skip=("out_proj",))
    assert dry_run(config, left)["parameters"]["quantized"] > 0


@pytest.mark.parametrize("decides", [lambda x: x.sum() > 9, lambda x: len(x[x > 9]) > 9])
@pytest.mark.parametrize(
    ("layout", "words"), [("apart", "only shapes; use"), ("packed", "set data.packing=false, or use")]
)
def test_a_model_that_decides_by_values_is_told_that_a_plan_has_none(layout, words, decides, monkeypatch):
    forward = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda mlp, x: forward(mlp, x) if decides(x) else x)
    work = replace(WORK, layout=layout, lora=Lora(rank=8, targets="attention"))
    with pytest.raises(ModelError, match=rf"a llama reads values .*(dense|nonzero|index).*{words} another release"):
        dry_run(CONFIGS["llama"], work)


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
    model = real_model(CONFIGS["llama"], WORK, Ledger())
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
        "device_profile", "steps", "tokens_per_s", "hours", "rank", "capacity",
    }  # fmt: skip
    assert set(plan["parameters"]) == {"total", "trainable", "quantized"}
    assert set(plan["methods"]) == {"qlora", "lora_16bit", "full_finetune"}
    for method in plan["methods"].values():
        assert set(method) >= {"peak_bytes", "resident_bytes", "by_category", "peak_by_phase"}
        assert set(method["by_category"]) == set(CATEGORIES)
        assert set(method["peak_by_phase"]) >= {"forward", "loss", "backward", "optimizer"}
    assumed = plan["methods"]["full_finetune"]["assumes"]
    assert set(assumed) == {"optimizer", "master_weights", "activations", "loss", "bytes_a_parameter"}
    assert assumed["bytes_a_parameter"] == 12
    assert plan["method"] == "qlora"
    assert {"tokens_per_s", "hours", "next", "traded"} == set(plan["estimates"])
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
    assert (plan["rank"], plan["capacity"]["held_bits"]) == (8, 2 * plan["parameters"]["trainable"])
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


@pytest.mark.slow
def test_automatic_activations_are_kept_where_they_fit_and_recomputed_where_not(plan):
    tight = plan_methods(recipe(memory=Memory(budget="1MiB")), CONFIGS["llama"], PACE, TOKENS)
    assert (plan["activations"], tight["activations"]) == ("keep", "recompute")
    assert tight["budget"] == 2**20 < tight["methods"]["qlora"]["peak_bytes"] < plan["methods"]["qlora"]["peak_bytes"]
    assert tight["methods"]["full_finetune"]["assumes"]["activations"] == "recompute"


@pytest.mark.slow
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
        ("q_proj",), loss_chunk=9,
    )  # fmt: skip


def test_the_device_is_known():
    assert 2**28 < available_bytes(CPU) < 2**45
    assert "CPU" in device_name(CPU)
    rate = matmul_rate(CPU, torch.float32, seconds=0.01)
    assert rate > 1e8
    fast, slow = (estimated_tokens_per_s(10**9, recomputed, rate) for recomputed in (0, 1))
    assert fast == pytest.approx(1.5 * slow)


@pytest.mark.parametrize(("load", "threads", "kind", "is_told"), [
    (2.5, 2, "cpu", True), (2.5, 1, "cpu", False), (1.5, 2, "cpu", False), (2.5, 2, "cuda", False),
])  # fmt: skip
def test_a_busy_machine_is_told_of_where_threads_would_wait_for_each_other(load, threads, kind, is_told, monkeypatch):
    monkeypatch.setattr(devices.psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(devices.psutil, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    told = devices.busy_note(torch.device(kind))
    assert (told is not None) == is_told
    if told is not None:
        assert "load 2.5 on 2 cores" in told
        assert "OMP_NUM_THREADS=1" in told


@pytest.mark.parametrize(("limit", "is_lower"), [("1073741824", True), ("max", False), ("99999999999999", False)])
def test_in_a_container_what_is_free_is_what_its_limit_leaves(limit, is_lower, tmp_path, monkeypatch):
    free = available_bytes(torch.device("cpu"))
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text("73741824")
    monkeypatch.setattr(devices, "_CGROUP", tmp_path)
    assert free > 10**9, "there is more than the container's limit leaves"
    if is_lower:
        assert available_bytes(torch.device("cpu")) == 10**9
    else:
        assert available_bytes(torch.device("cpu")) == pytest.approx(free, rel=0.2)


@pytest.mark.parametrize("kind", ["nf4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "none"))])
def test_the_planned_export_takes_the_bytes_of_the_real_one(kind, tmp_path):
    model = tiny.quantized(tiny.llama(hidden_size=768, intermediate_size=3072, num_hidden_layers=3), kind)
    add_lora(model, rank=4)
    ledger = Ledger()
    ledger.adopt(model)
    held = ledger.peak()
    with ledger.watch("export"):
        export_merged(model, None, tmp_path / "out", dtype="bfloat16")
    measured = ledger.peak_by_phase()["export"]
    assert measured > held + 3 * 2 * SLICE_ELEMENTS, "matrices leave in slices, of which several stand"
    work = replace(WORK, quantization=Quantization(kind), lora=Lora(rank=4), dtype=torch.float32)
    planned = dry_run(model.config, work, {"export": rehearse_merge})["peak_by_phase"]["export"]
    assert 0 <= planned - measured < 1024, "scalars of the run"
