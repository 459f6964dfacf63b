"""Full fine-tuning: the same loop on every weight of a dense base, planned to the byte, with plain weights to show."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from qlora_kit.base import Quantization
from qlora_kit.base.architecture import build_model
from qlora_kit.base.freeze import freeze_and_quantize
from qlora_kit.cli.app import app
from qlora_kit.data import Encoded, Sampler, side_by_side
from qlora_kit.errors import FitError, ModelError, RunError
from qlora_kit.export import merged_tensors, save_model
from qlora_kit.memory import Ledger, PeakCounter
from qlora_kit.plan import Workload, dry_run, plan_methods
from qlora_kit.recipe import Recipe, Train, base_as_held, not_read, read_recipe, with_adapters
from qlora_kit.report.plan_text import plan_text
from qlora_kit.run import Asked, check_budget, export_run, load_run, plan_memory, train
from qlora_kit.train import optim
from qlora_kit.train.activations import set_activation_policy
from qlora_kit.train.checkpoint import load_checkpoint, newest_checkpoint
from qlora_kit.train.loop import Job, rehearse, train_loop
from qlora_kit.train.metrics import MetricsLog
from qlora_kit.train.optim import AdapterOptimizer
from qlora_kit.train.pace import Pace
from qlora_kit.watch import Watch

SHAPE = {"hidden_size": 128, "intermediate_size": 320, "vocab_size": 512}
FP32_RTOL = 1e-6  # a few roundings of 6e-8 each, summed in another order
WORK = Workload(
    quantization=Quantization("none"),
    lora=None,
    dtype=torch.float32,
    attention="sdpa",
    micro_batch=2,
    tokens=48,
    accumulation=1,
    activations="keep",
    optimizer="adamw_32bit",
    master_weights="stochastic",
)


def config(*, is_tied=False, **changes):
    return LlamaConfig(**{**tiny.LLAMA, **SHAPE, "tie_word_embeddings": is_tied, **changes})


def trainable(settings, work):
    """A real model all of whose weights train, as a run makes it ready."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(settings, work.dtype, work.attention)
    freeze_and_quantize(model, work.quantization, work.dtype, tiny.CPU)
    set_activation_policy(model.requires_grad_(True), work.activations)
    return model.train()


def rows(count, length=48, vocab=512, seed=0):
    return [Encoded(row, [True] * length) for row in tiny.tokens(count, length, seed, vocab).tolist()]


def job_of(model, folder, work, *, steps=1, lr=1e-3, data=None, **train):
    parameters = dict(model.named_parameters())
    optimizer = AdapterOptimizer(
        list(parameters.items()), work.optimizer, master_weights=work.master_weights,
        weight_decay=train.get("weight_decay", 0.0),
    )  # fmt: skip
    return Job(
        model=model,
        parameters=parameters,
        optimizer=optimizer,
        rows=data or rows(work.micro_batch * work.accumulation),
        eval_batches=[],
        pad_id=0,
        pace=Pace(steps, work.micro_batch, work.accumulation, 1000, 1000, lr, "the test", 0, 0),
        train=Train(**{"warmup": 0.0, **train}),
        folder=folder,
    )


def run(job, ledger=None, resume_from=None):
    metrics = MetricsLog(job.folder / "metrics.jsonl", resume_from)
    train_loop(job, metrics, PeakCounter(tiny.CPU), ledger)
    metrics.close()
    return metrics.rows


# --- the loop ---------------------------------------------------------------------------------------------------------


def reference_loop(model, data, *, steps, rows_a_step, lr, clip, decay):
    """Plain torch in float64 and nothing of the kit's: a row at a time, torch's clipping and AdamW, all weights."""
    model = model.double().train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=decay)
    sampler, history = Sampler(len(data), 0), []
    for _ in range(steps):
        chosen = [data[index] for index in sampler.next_rows(rows_a_step)]
        count = sum(sum(row.trained[1:]) for row in chosen)
        optimizer.zero_grad()
        total = 0.0
        for row in chosen:
            ids, counts = torch.tensor(row.input_ids), torch.tensor(row.trained[1:])
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            loss = (nn.functional.cross_entropy(logits, ids[1:], reduction="none") * counts).sum() / count
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip).item()
        optimizer.step()
        history.append((total, norm))
    return history, dict(model.named_parameters())


def uneven_rows():
    """Rows of several lengths, half of each trained."""
    found = []
    for seed, length in enumerate((3, 40, 5, 17, 9, 33, 4, 12)):
        ids = tiny.tokens(1, length, seed).tolist()[0]
        found.append(Encoded(ids, [place >= min(length // 2, length - 1) for place in range(length)]))
    return found


@pytest.mark.parametrize(("make", "is_tied"), [(tiny.llama, False), (tiny.llama, True), (tiny.gpt2, True)])
def test_full_fine_tuning_equals_a_plain_loop_and_moves_every_parameter(make, is_tied, tmp_path):
    changes = {} if make is tiny.gpt2 else {"tie_word_embeddings": is_tied}
    model = freeze_and_quantize(make(**changes), Quantization("none"), torch.float32, tiny.CPU).requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    work = replace(WORK, optimizer="adamw", accumulation=2)
    job = job_of(model, tmp_path, work, steps=8, lr=2e-3, data=uneven_rows(), weight_decay=0.1, max_grad_norm=1.0)
    found = [row for row in run(job) if "loss" in row]
    plain = make(**changes)
    wanted, final = reference_loop(plain, uneven_rows(), steps=8, rows_a_step=4, lr=2e-3, clip=1.0, decay=0.1)
    assert wanted[-1][0] < 0.95 * wanted[0][0], "it learns"
    assert [row["loss"] for row in found] == pytest.approx([loss for loss, _ in wanted], rel=FP32_RTOL)
    assert [row["grad_norm"] for row in found] == pytest.approx([norm for _, norm in wanted], rel=10 * FP32_RTOL)
    assert job.parameters.keys() == final.keys()
    assert len({id(parameter) for parameter in job.parameters.values()}) == len(before)
    for name, parameter in job.parameters.items():
        assert not torch.equal(parameter, before[name]), f"{name} did not move"
        # Adam divides by roots of tiny second moments, where rounding weighs more than in the gradient's own norm.
        assert tiny.relative(parameter, final[name]) < 20 * FP32_RTOL, name


@pytest.mark.parametrize("work", [
    WORK,
    replace(WORK, dtype=torch.bfloat16),
    replace(WORK, dtype=torch.bfloat16, master_weights="fp32", optimizer="adamw_8bit", activations="recompute"),
], ids=["fp32", "bf16 rounded at random", "bf16 with masters"])  # fmt: skip
def test_a_resumed_full_fine_tune_equals_an_unbroken_one_bit_for_bit(work, tmp_path):
    data, settings = rows(8, vocab=97), config(vocab_size=97, hidden_size=48, intermediate_size=176, is_tied=True)
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    whole = job_of(trainable(settings, work), folders[0], work, steps=4, data=data)
    losses = [row["loss"] for row in run(whole)]
    first = job_of(trainable(settings, work), folders[1], work, steps=4, data=data)
    first.stop_requested = lambda: first.progress.step == 2
    run(first)
    then = job_of(trainable(settings, work), folders[1], work, steps=4, data=data)
    then.progress = load_checkpoint(newest_checkpoint(then.folder / "checkpoints")[0], then.kept, then.optimizer)
    assert then.progress.step == 2
    assert [row["loss"] for row in run(then, resume_from=2)] == losses
    assert losses[-1] < losses[0]
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, then.parameters[name]), name


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_tied", "changes"), [
    (False, {}),
    (True, {"dtype": torch.bfloat16}),
    (True, {"activations": "recompute", "optimizer": "adamw"}),
    (False, {"activations": "recompute", "dtype": torch.bfloat16, "master_weights": "fp32",
             "optimizer": "adamw_8bit"}),
], ids=["fp32, kept", "bf16, tied, kept", "torch's AdamW, tied, recomputed", "masters, recomputed"])  # fmt: skip
def test_the_planned_step_is_the_real_one_to_the_byte(is_tied, changes, tmp_path):
    work = replace(WORK, accumulation=2, **changes)
    planned = dry_run(config(is_tied=is_tied), work)
    job = job_of(trainable(config(is_tied=is_tied), work), tmp_path, work)
    measured = watched(job)
    held, total = measured["by_category"], sum(parameter.numel() for parameter in job.parameters.values())
    assert planned["parameters"] == {"total": total, "trainable": total, "quantized": 0}
    assert measured["peak_by_phase"]["loss"] > 1.1 * measured["resident_bytes"], "there are activations"
    for name in ("base_weights", "gradients", "optimizer_state", "adapters", "quantization_state"):
        assert planned["by_category"][name] == held[name], name
    assert held["adapters"] == held["quantization_state"] == 0
    assert held["gradients"] == work.dtype.itemsize * total
    a_parameter = {"adamw_8bit": 2, "adamw_32bit": 8, "adamw": 8}[work.optimizer]  # two moments
    a_parameter += 4 if work.master_weights == "fp32" else 0
    assert held["optimizer_state"] == pytest.approx(a_parameter * total, rel=0.05)
    # What the plan has not: the positions of the rows, and scalars of the loop.
    rows_bytes = 8 * work.micro_batch * work.tokens * work.accumulation
    assert 0 <= measured["peak_bytes"] - planned["peak_bytes"] <= rows_bytes + 16
    for phase, peak in measured["peak_by_phase"].items():
        assert 0 <= peak - planned["peak_by_phase"][phase] <= rows_bytes + 1024, phase


def test_a_step_that_is_cut_into_more_micro_batches_than_were_planned_takes_what_was_planned(tmp_path):
    work = replace(WORK, micro_batch=3)
    job = job_of(trainable(config(), work), tmp_path, work, data=[*rows(1), *rows(2, length=36)])
    assert len(side_by_side([48, 36, 36], job.room)) == 2
    planned, measured = dry_run(config(), work), watched(job)
    assert abs(measured["peak_bytes"] / planned["peak_bytes"] - 1) < 0.01
    for phase, peak in measured["peak_by_phase"].items():
        assert peak == pytest.approx(planned["peak_by_phase"][phase], rel=0.01), phase


def watched(job):
    """What a run's ledger says: the rehearsal and the first step."""
    ledger = Ledger(job.model)
    ledger.own("optimizer_state", (tensor for _, tensor in job.optimizer.state_tensors()))
    with ledger:
        assert rehearse(job, ledger) == [], "a gradient reaches every tensor"
    run(job, ledger)
    return ledger.summary()


def test_parameters_are_lifted_some_at_a_time_and_each_to_the_same_bits(monkeypatch):
    """Whatever stands together in fp32, 16-bit parameters end alike, with the same draws, and what stands is less."""

    def stepped(masters):
        generator = torch.Generator().manual_seed(0)
        shapes = {"a": (64, 64), "norm": (64,), "b": (32, 64), "c": (48, 64)}
        dtypes = {"norm": torch.float32}
        parameters = [
            (name, nn.Parameter(torch.randn(shape, generator=generator).to(dtypes.get(name, torch.bfloat16))))
            for name, shape in shapes.items()
        ]
        optimizer = AdapterOptimizer(parameters, "adamw_32bit", master_weights=masters)
        ledger = Ledger()
        for _ in range(3):
            for _, parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            with ledger, ledger.phase("optimizer"):
                optimizer.step(1e-3)
        return [parameter.detach().clone() for _, parameter in parameters], ledger.peak()

    for masters in ("fp32", "stochastic"):
        apart, low = stepped(masters)
        with monkeypatch.context() as patch:
            patch.setattr("qlora_kit.train.optim._cut", lambda pairs: [pairs])
            together, high = stepped(masters)
        assert all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))
        assert low < high


# --- the recipe -------------------------------------------------------------------------------------------------------


def recipe_of(**sections):
    content = {
        "base": {"model": "./nowhere", "device": "cpu", "compute_dtype": "bfloat16"},
        "data": {"train": "rows.jsonl"},
        "train": {"full_finetune": True},
    }
    return Recipe.model_validate(content | sections)


def test_parameters_are_lifted_together_up_to_the_elements_of_the_largest():
    pairs = [(torch.nn.Parameter(torch.ones(n).bfloat16()), torch.nn.Parameter(torch.ones(n))) for n in (4, 2, 2, 1, 3)]
    direct = torch.nn.Parameter(torch.ones(9))
    found = optim._cut([*pairs, (direct, direct)])
    assert [[stepped.numel() for _, stepped in cut] for cut in found] == [[9], [4], [2, 2], [1, 3]]


def test_a_recipe_with_the_defaults_trains_a_dense_base_and_says_what_it_does_not_read():
    recipe = recipe_of()
    assert recipe.base.quantization == "nf4"
    assert base_as_held(recipe).quantization == "none"
    assert base_as_held(with_adapters(recipe)) == recipe.base
    assert list(not_read(recipe)) == ["base.quantization=nf4"]
    base = {"model": "m", "quantization": "none"}
    lora = {"rank": 32, "also_train": ["norm"], "added_tokens": ["<a>"]}
    assert list(not_read(recipe_of(base=base))) == []
    assert list(not_read(recipe_of(base=base, lora=lora))) == ["lora.rank=32", "lora.also_train=['norm']"]
    work = Workload.of(recipe, micro_batch=1, accumulation=1, tokens=8, activations="keep")
    assert (work.lora, work.quantization.kind, work.master_weights) == (None, "none", "stochastic")


@pytest.fixture(scope="module")
def plans():
    """The plan of full fine-tuning, and of QLoRA with the same recipe otherwise."""
    pace = Pace(200, 2, 2, 20, None, 2e-4, "the test", 5000, 1000)
    shape, recipes = config(num_hidden_layers=1), (recipe_of(), with_adapters(recipe_of()))
    with pytest.MonkeyPatch.context() as patch:  # or speeds compare what else the machine did, as much as the steps
        patch.setattr("qlora_kit.plan.table.matmul_rate", lambda device, dtype: 1e11)
        return [plan_methods(recipe, shape, pace, tokens=24) for recipe in recipes]


def test_the_plan_of_a_full_fine_tune_is_of_its_own_step_and_flatters_nobody(plans):
    full, qlora = plans
    assert (full["method"], qlora["method"]) == ("full_finetune", "qlora")
    assert full["methods"].keys() == qlora["methods"].keys() == {"qlora", "lora_16bit", "full_finetune"}
    assert full["methods"]["qlora"] == qlora["methods"]["qlora"]
    assert full["parameters"]["trainable"] == full["parameters"]["total"] == qlora["parameters"]["total"]
    assumed = full["methods"]["full_finetune"]["assumes"]
    assert assumed["optimizer"] == "paged_adamw_8bit"
    assert "stochastic rounding" in assumed["master_weights"]
    assert assumed["bytes_a_parameter"] == pytest.approx(6, abs=0.1), "2 and 2, and two moments in 8 bits"
    assert qlora["methods"]["full_finetune"]["assumes"]["bytes_a_parameter"] == 12, "as the paper counts"
    ratio = full["methods"]["qlora"]["peak_bytes"] / full["methods"]["full_finetune"]["peak_bytes"]
    assert full["savings_vs_full"] == pytest.approx(1 - ratio)
    assert full["tokens_per_s"] < 0.9 * qlora["tokens_per_s"], "a gradient of every weight is a third more arithmetic"
    text = plan_text({"schema": 1, **full})
    assert "full fine-tuning (this recipe)" in text
    assert "QLoRA (this recipe)" not in text
    assert "trained (all)" in text
    assert "This run is full fine-tuning; QLoRA would need" in text


def test_the_budget_is_held_against_full_fine_tuning(plans):
    peaks = {name: method["peak_bytes"] for name, method in plans[0]["methods"].items()}
    between = (peaks["qlora"] + peaks["full_finetune"]) // 2
    assert peaks["qlora"] < between < peaks["full_finetune"]
    check_budget({**plans[1], "budget": between})
    with pytest.raises(FitError, match=r"train\.full_finetune=false"):
        check_budget({**plans[0], "budget": between})


@pytest.mark.parametrize(("base", "stored", "message"), [
    ({"compute_dtype": "float16"}, None, "float16.*no room for small gradients"),
    ({}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "stored quantised.*16-bit model"),
])  # fmt: skip
def test_what_cannot_be_trained_whole_is_refused_in_one_line(base, stored, message, tmp_path):
    content = config().to_dict() | ({} if stored is None else {"quantization_config": stored})
    (tmp_path / "config.json").write_text(json.dumps(content))
    recipe = recipe_of(
        base={"model": str(tmp_path), "device": "cpu", **base}, data={"train": "/nowhere/rows.jsonl", "max_tokens": 32}
    )
    with pytest.raises(ModelError, match=message) as caught:
        plan_memory(recipe)
    assert "\n" not in str(caught.value)


# --- a whole run ------------------------------------------------------------------------------------------------------


class Notes(Watch):
    """Keeps what it is told, and stops after a step."""

    def __init__(self, stop_after=None):
        self.notes, self.step, self.stop_after = [], 0, stop_after

    def note(self, text):
        self.notes.append(text)

    def row(self, row):
        self.step = row["step"]

    def stop_requested(self):
        return self.step == self.stop_after


def write_recipe(folder):
    """A tiny tied Llama with a byte-level tokenizer and a chat template, rows, and a recipe file."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["say cat"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder / "base")
    model = tiny.llama(vocab_size=len(tokenizer), eos_token_id=0, tie_word_embeddings=True, num_hidden_layers=1)
    model.save_pretrained(folder / "base")
    lines = [{"prompt": f"say {word} ", "completion": word} for word in ("cat", "dog", "owl", "bee", "ant", "elk")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = {
        "base": {"model": str(folder / "base"), "compute_dtype": "float32", "device": "cpu"},
        "lora": {"rank": 4, "added_tokens": ["<new>"]},
        "data": {"train": "rows.jsonl", "max_tokens": 32, "eval": "rows.jsonl"},
        "train": {"steps": 4, "micro_batch": 4, "lr": 3e-3, "full_finetune": True, "optimizer": "adamw"},
        "output": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that went through, made once, and what it noted."""
    watch = Notes()
    result = train(read_recipe(write_recipe(tmp_path_factory.mktemp("full"))), watch=watch)
    assert result.finished
    return result.folder, watch.notes


def read(run_folder, name):
    return json.loads((run_folder / name).read_text())


def test_a_run_leaves_a_model_and_no_adapter_and_keeps_to_its_plan(finished):
    run_folder, notes = finished
    assert not (run_folder / "adapter").exists()
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja"} == {path.name for path in (run_folder / "model").iterdir()}  # fmt: skip
    unread = [note.rpartition(": ")[2] for note in notes if "have no effect" in note]
    assert unread == ["base.quantization=nf4, lora.rank=4"], "said once"
    plan, memory = read(run_folder, "plan.json"), read(run_folder, "memory.json")
    assert plan["method"] == "full_finetune"
    assert memory["planned"] == plan["methods"]["full_finetune"]
    total = plan["parameters"]["total"]
    held = memory["measured"]["by_category"]
    assert held["adapters"] == held["quantization_state"] == 0
    assert (held["gradients"], held["optimizer_state"] // total) == (4 * total, 8)
    rows_bytes = held["other"] / memory["measured"]["peak_bytes"]  # the rows themselves, which the plan has not
    assert abs(memory["error"]["peak"]) < rows_bytes + 1e-4 < 0.01
    for name in ("base_weights", "gradients", "optimizer_state"):
        assert abs(memory["error"][name]) < 1e-3, name
    page = (run_folder / "report.html").read_text()
    assert "full fine-tuning of" in page
    assert "a LoRA adapter" not in page


def test_the_model_loads_in_plain_transformers_with_the_logits_of_the_run(finished, monkeypatch):
    run_folder, _ = finished
    model, tokenizer, _ = load_run(run_folder)
    compiled = tiny.logits(model, tiny.tokens(vocab=len(tokenizer)))
    tiny.uncompiled(monkeypatch)
    plain, info = AutoModelForCausalLM.from_pretrained(run_folder / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.dtype == torch.float32
    model, tokenizer, _ = load_run(run_folder)
    ids = tiny.tokens(vocab=len(tokenizer))
    assert torch.equal(tiny.logits(plain, ids), tiny.logits(model, ids))
    assert tiny.relative(compiled, tiny.logits(plain, ids)) < 1e-6  # fp32 sums in another order
    base = load_run(run_folder, bare_base=True)[0]
    original = AutoModelForCausalLM.from_pretrained(run_folder.parent / "base")
    assert torch.equal(tiny.logits(base, ids)[..., : original.vocab_size], tiny.logits(original, ids))
    assert tiny.relative(tiny.logits(plain, ids), tiny.logits(base, ids)) > 0.01, "it was trained"
    saved = load_file(newest_checkpoint(run_folder / "checkpoints")[0] / "parameters.safetensors")
    weights = load_file(run_folder / "model" / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in saved)
    words = AutoTokenizer.from_pretrained(run_folder / "model")
    assert words.convert_tokens_to_ids("<new>") == len(tokenizer) - 1 < plain.vocab_size
    assert words.apply_chat_template([{"role": "user", "content": "say cat"}], tokenize=False) == "say cat"


def test_scores_compare_with_the_base_as_it_was(finished):
    run_folder, _ = finished
    scores = read(run_folder, "scores.json")
    assert scores["adapter"]["loss"] < 0.9 * scores["base"]["loss"]
    assert {"rows", "base", "adapter", "samples"} <= scores.keys()
    for more, key in ((("--base",), "base"), ((), "adapter")):
        told = CliRunner().invoke(app, ["eval", str(run_folder), "--json", *more])
        assert json.loads(told.stdout)["loss"] == pytest.approx(scores[key]["loss"], rel=FP32_RTOL)
    said = CliRunner().invoke(app, ["generate", str(run_folder), "--prompt", "say cat ", "--max-new-tokens", "3"])
    assert said.exit_code == 0, said.output


def test_the_weights_are_exported_with_an_audit_and_there_is_no_adapter_to_export(finished, tmp_path, monkeypatch):
    tiny.uncompiled(monkeypatch)
    run_folder, _ = finished
    exported = export_run(run_folder, tmp_path / "out", Asked(dtype="float32"))
    audit = exported["comparisons"]["merged"]
    assert audit["max_kl"] == 0.0
    assert audit["loss_export"] == audit["loss_as_trained"]
    assert (exported["kind"], exported["trained_in"]) == ("merged", "float32")
    ours, copy = (load_file(folder / "model.safetensors") for folder in (run_folder / "model", tmp_path / "out"))
    assert ours.keys() == copy.keys()
    assert all(torch.equal(ours[name], copy[name]) for name in ours)
    assert "Fully fine-tuned model" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(RunError, match="has no adapter; export --to merged"):
        export_run(run_folder, tmp_path / "no", Asked(to="adapter"))
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_model_bit_for_bit_and_is_replaced_whole(finished, tmp_path):
    recipe = read_recipe(finished[0].parent / "recipe.yaml", [f"output={tmp_path / 'run'}"])
    stopped = train(recipe, watch=Notes(stop_after=2))
    assert (stopped.finished, stopped.step) == (False, 2)
    assert train(recipe, resume=True).finished
    unbroken, resumed = (load_file(run / "model" / "model.safetensors") for run in (finished[0], tmp_path / "run"))
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    with pytest.raises(RunError, match=r"train\.full_finetune was True"):
        train(with_adapters(recipe), resume=True)
    assert train(with_adapters(recipe), overwrite=True).finished
    assert (tmp_path / "run" / "adapter").is_dir()
    assert not (tmp_path / "run" / "model").exists()


def test_a_model_folder_is_complete_or_absent(tmp_path):
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight[5, 7] = float("nan")
    with pytest.raises(ModelError, match=r"lm_head\.weight holds NaN"):
        save_model(model, None, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [tiny.mixtral, tiny.gpt2, tiny.llama])
def test_experts_and_transposed_layers_train_and_are_saved_like_the_rest(make, tmp_path):
    model = freeze_and_quantize(make(), Quantization("none"), torch.float32, tiny.CPU).requires_grad_(True)
    before = {tensor.name: tensor.read() for tensor in merged_tensors(model, torch.float32)}
    work = replace(WORK, accumulation=2)
    run(job_of(model.train(), tmp_path, work, steps=3, data=uneven_rows()))
    save_model(model, None, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert tiny.relative(tiny.logits(plain), tiny.logits(model.eval())) < FP32_RTOL
    after = {tensor.name: tensor.read() for tensor in merged_tensors(model, torch.float32)}
    assert all(not torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "adamw_32bit"])
def test_a_full_fine_tune_on_the_gpu_learns_in_bf16_and_takes_what_was_planned(optimizer, tmp_path):
    work = replace(WORK, dtype=torch.bfloat16, optimizer=optimizer, micro_batch=4)
    settings = config(hidden_size=256, intermediate_size=512)
    cuda = torch.device("cuda")
    model = freeze_and_quantize(build_model(settings, work.dtype, "sdpa"), work.quantization, work.dtype, cuda)
    job = job_of(model.requires_grad_(True).train(), tmp_path, work, steps=20)
    planned, held = dry_run(settings, work)["by_category"], watched(job)["by_category"]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]
    for name in ("base_weights", "gradients", "optimizer_state"):
        assert held[name] == pytest.approx(planned[name], rel=0.01), name
