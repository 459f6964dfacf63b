"""The verbs from outside: a whole run on a tiny model; a mistake is one line and an exit code; nothing half-written."""

import errno
import gc
import inspect
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import told
from torch import OutOfMemoryError
from transformers import AutoModelForCausalLM, AutoTokenizer, ModernBertDecoderConfig
from typer.testing import CliRunner

from qlora_kit.base import load_base
from qlora_kit.cli import main
from qlora_kit.cli.app import app
from qlora_kit.cli.guard import reports_errors
from qlora_kit.cli.show import Screen
from qlora_kit.data import load_rows, split_eval
from qlora_kit.export import merge
from qlora_kit.memory import counter
from qlora_kit.recipe import read_recipe
from qlora_kit.run import Asked, load_run, verify
from qlora_kit.storage import checksums
from qlora_kit.train import loop as train_loop
from qlora_kit.train.optim import AdapterOptimizer
from qlora_kit.watch import Watch

train_run = import_module("qlora_kit.run.train")

PLAN_KEYS = {"parameters", "bits_per_quantized_parameter", "methods", "savings_vs_full", "budget", "planned_on",
             "device_profile", "steps", "tokens_per_s", "hours", "schema", "loss_chunk", "eval_tokens"}  # fmt: skip
RUN_FILES = {"recipe.yaml", "plan.json", "env.json", "metrics.jsonl", "memory.json", "report.html", "adapter",
             "checkpoints", "scores.json", "data.json", "result.json", "checksums.json"}  # fmt: skip


@pytest.fixture
def recipe(tmp_path, model_folder):
    """A recipe file whose run takes seconds, with its rows beside it."""
    rows = [
        {"prompt": f"say {word} ", "completion": word} for word in ("cat", "dog", "owl", "bee", "ant", "elk", "hen")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_recipe(tmp_path, model_folder)


def write_recipe(folder: Path, model_folder: Path, **train) -> Path:
    content = {
        "base": {"model": str(model_folder), "compute_dtype": "float32", "device": "cpu"},
        "lora": {"rank": 4},
        "data": {"train": "rows.jsonl", "max_tokens": 32, "eval": "rows.jsonl"},
        "train": {"steps": 4, "micro_batch": 4, "lr": 1e-3, **train},
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_mistake(result, *words: str, code: int = 2) -> None:
    """One line on standard error that says all of `words`, the exit code, and no traceback."""
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder):
    """A run that went through, made once."""
    folder = tmp_path_factory.mktemp("finished")
    rows = [{"prompt": f"say {word} ", "completion": word} for word in ("cat", "dog", "owl", "bee", "ant", "elk")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = call("train", write_recipe(folder, model_folder))
    assert result.exit_code == 0, result.output + str(result.exception)
    return folder / "run", result.output


@pytest.mark.slow
def test_a_packed_run_takes_the_memory_that_was_planned_for_it(recipe):
    result = call("train", recipe, "data.packing=true", "train.micro_batch=2", "train.accumulation=4")
    assert result.exit_code == 0, result.output
    run = recipe.parent / "run"
    packing = json.loads((run / "data.json").read_text())["packing"]
    assert packing["steps"] == 1
    assert packing["sequences"] < 7, "of seven rows"
    assert packing["longest"] == 32
    assert 0.8 < packing["efficiency"] <= 1
    memory = json.loads((run / "memory.json").read_text())
    assert abs(memory["error"]["peak"]) < 0.01
    assert json.loads((run / "plan.json").read_text())["tokens"] == 32


def test_a_run_fills_its_folder_as_documented(finished):
    run, _ = finished
    assert {path.name for path in run.iterdir()} - {".lock"} == RUN_FILES
    assert json.loads((run / "env.json").read_text())["optimizer"] == "adamw_8bit", "no pages without CUDA"
    assert {path.name for path in (run / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    plan = json.loads((run / "plan.json").read_text())
    assert plan.keys() >= PLAN_KEYS
    for method in plan["methods"].values():
        assert sum(method["by_category"].values()) == method["peak_bytes"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    memory = json.loads((run / "memory.json").read_text())
    assert abs(memory["error"]["peak"]) < 0.01
    assert (run / "checkpoints" / "step-000004" / "manifest.json").is_file()


def test_a_run_shows_plan_scores_and_where_everything_lies(finished):
    _, output = finished
    for words in ("full fine-tuning", "QLoRA needs", "step 4/4", "exact match", "adapter", "report.html", "export",
                  "scale 8"):  # fmt: skip
        assert words in output
    assert "warn" not in output.lower().replace("warning", "warn") or "hardly learns" in output


def test_eval_prints_one_json_object_and_the_base_differs_from_the_adapter(finished):
    run, _ = finished
    adapter, base = call("eval", run, "--json"), call("eval", run, "--json", "--base")
    scores = [json.loads(result.stdout) for result in (adapter, base)]
    assert scores[0].keys() >= {"schema", "loss", "perplexity", "tokens", "rows", "exact_match"}
    assert scores[0]["loss"] != scores[1]["loss"]
    assert scores[0]["rows"] == 6


def test_generate_answers_the_same_twice(finished):
    run, _ = finished
    first, second = (call("generate", run, "--prompt", "say cat ", "--max-new-tokens", 5) for _ in range(2))
    assert first.exit_code == 0
    assert first.output == second.output


def test_the_merged_export_loads_in_plain_transformers_and_is_audited(finished, tmp_path, monkeypatch):
    run, _ = finished
    result = call("export", run, "--to", "merged", "--dtype", "float32", "--out", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    audit = json.loads((tmp_path / "merged" / "export.json").read_text())["comparisons"]["merged"]
    assert audit["top1_agreement"] == 1.0
    assert audit["mean_kl"] < 1e-6  # adapters are bf16, sums fp32: 1.5e-8 was seen
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear"
    AutoTokenizer.from_pretrained(tmp_path / "merged")
    with monkeypatch.context() as patch:  # where a processor computes in bf16, the merged weight is rounded to 8 bits
        patch.setattr("qlora_kit.base.device.default_compute_dtype", lambda device: torch.float32)
        exported, trained = (
            json.loads(call("eval", folder, "--json", *more).stdout)
            for folder, more in ((tmp_path / "merged", ("--data", run.parent / "rows.jsonl")), (run, ()))
        )
    assert exported["loss"] == pytest.approx(trained["loss"], abs=2e-6)  # fp32, another order of additions


def test_the_adapter_export_has_a_card(finished, tmp_path):
    run, _ = finished
    assert call("export", run, "--to", "adapter", "--out", tmp_path / "adapter").exit_code == 0
    assert (tmp_path / "adapter" / "README.md").read_text().startswith("---\n")


def test_report_can_be_made_again_from_the_folder_alone(finished):
    run, _ = finished
    (run / "report.html").unlink()
    assert call("report", run).exit_code == 0
    assert (run / "report.html").stat().st_size > 5000


def test_plan_prints_json_and_exits_3_above_the_budget(recipe):
    result = call("plan", recipe, "--json")
    assert json.loads(result.stdout).keys() >= PLAN_KEYS
    refused = call("plan", recipe, "--budget", "200KiB")
    assert refused.exit_code == 3
    assert "memory.budget" in refused.stderr
    assert "full fine-tuning" in refused.stdout


def test_plan_without_the_rows_takes_every_row_to_be_full(recipe):
    result = call("plan", recipe, "data.train=/nowhere/rows.jsonl", "--json")
    assert json.loads(result.stdout)["tokens"] == 32
    assert json.loads(result.stdout)["steps"] is None


@pytest.mark.slow
def test_a_second_run_needs_a_word_and_overwrite_replaces(recipe):
    assert call("train", recipe).exit_code == 0
    assert_mistake(call("train", recipe), "already holds a run", "--resume", "--overwrite")
    assert call("train", recipe, "train.steps=2", "--overwrite").exit_code == 0
    assert len((recipe.parent / "run" / "checkpoints" / "step-000002").name) > 0


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_was_not_stopped(recipe):
    """Four steps in one go, and two, a stop and two more, through the command line: the same losses, bit for bit."""
    losses = []
    for output, commands in {
        "whole": [["train.save_every=2"]],
        "parts": [["train.save_every=2"], ["--resume"]],
    }.items():
        folder = recipe.parent / output
        for command in commands:
            if command == ["--resume"]:
                newest = folder / "checkpoints" / "step-000004"
                (newest / "optimizer.safetensors").write_bytes(b"damaged")
            result = call("train", recipe, f"output={folder}", "train.save_every=2", *command)
            assert result.exit_code == 0, result.output
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row])
    assert "left out a damaged checkpoint" in result.output
    assert losses[0] == losses[1]
    adapters = [recipe.parent / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "parts")]
    whole, parts = map(load_file, adapters)
    assert all((whole[key] == parts[key]).all() for key in whole)


def test_a_run_that_overfits_leaves_its_best_and_says_so(recipe, monkeypatch):
    told(monkeypatch, 3.0, 1.0, 1.5, 2.0)
    result = call("train", recipe, "train.eval_every=1")
    assert result.exit_code == 0, result.output
    assert "held-out loss was lowest at step 2 (1.000), and that is the run's result" in " ".join(result.output.split())
    run = recipe.parent / "run"
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[0] == "step-000002"
    best, end = (load_file(run / "checkpoints" / f"step-00000{step}" / "parameters.safetensors") for step in (2, 4))
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {str(value.tolist()) for value in adapter.values()} == {str(value.tolist()) for value in best.values()}
    assert {str(value.tolist()) for value in best.values()} != {str(value.tolist()) for value in end.values()}
    assert json.loads((run / "result.json").read_text())["step"] == 2
    facts = json.loads(call("report", run, "--json").stdout)
    assert facts["verdict"].startswith("Overfitting since step 2")
    assert "the best evaluation, 1.000 at step 2, is the run's result; training ended at step 4" in facts["verdict"]


def test_early_stopping_is_a_finish(recipe, monkeypatch):
    told(monkeypatch, 1.0, 1.5, 2.0, 2.0)
    result = call("train", recipe, "train.eval_every=1", "train.early_stopping=2")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (recipe.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 3
    assert (recipe.parent / "run" / "scores.json").is_file()
    assert "ended early, at step 3 of 4: no improvement in 2 evaluations" in " ".join(result.output.split())
    for line in ("ask      qlora-kit generate", "merge    qlora-kit export"):
        assert line in result.output, "it ends as every run does"
    told(monkeypatch, 0.5)
    lifted = call("train", recipe, "train.eval_every=1", "train.early_stopping=3", "--resume")
    assert lifted.exit_code == 0, lifted.output
    assert json.loads((recipe.parent / "run" / "result.json").read_text())["step"] == 4


def test_early_stopping_without_held_out_rows_is_told(recipe):
    result = call("train", recipe, "data.eval=null", "train.early_stopping=2")
    assert result.exit_code == 0, result.output
    assert "train.early_stopping has no effect" in result.output


@pytest.mark.slow
def test_a_resumed_run_that_is_stopped_leaves_no_scores_of_its_earlier_end(recipe, monkeypatch):
    told(monkeypatch, 3.0, 1.0, 1.5, 2.0, 2.0)
    assert call("train", recipe, "train.eval_every=1").exit_code == 0
    run = recipe.parent / "run"
    monkeypatch.setattr("qlora_kit.cli.show.Screen.stop_requested", lambda screen: True)
    assert call("train", recipe, "train.eval_every=1", "train.steps=8", "--resume").exit_code != 2
    assert not (run / "scores.json").exists()
    result = json.loads((run / "result.json").read_text())
    assert (result["folder"], result["step"], result["finished"]) == ("adapter", 5, False)
    verdict = json.loads(call("report", run, "--json").stdout)["verdict"]
    assert "is kept as a checkpoint; training ended at step 5" in verdict


@pytest.mark.slow
def test_a_best_that_was_lost_before_a_resume_rules_no_longer(recipe, monkeypatch):
    told(monkeypatch, 3.0, 1.0, 1.5, 2.0, 1.2, 1.3)
    assert call("train", recipe, "train.eval_every=1").exit_code == 0
    run = recipe.parent / "run"
    (run / "checkpoints" / "step-000002" / "parameters.safetensors").write_bytes(b"damaged")
    result = call("train", recipe, "train.eval_every=1", "train.steps=6", "--resume")
    assert result.exit_code == 0, result.output
    assert "step 2, is lost" in result.output
    assert json.loads((run / "result.json").read_text())["step"] == 5


def test_nothing_of_the_optimizer_is_left_when_a_run_is_scored(recipe, monkeypatch):
    alive, real = [], train_run.score
    monkeypatch.setattr(
        train_run,
        "score",
        lambda *given: alive.append([*map(type, gc.get_objects())].count(AdapterOptimizer)) or real(*given),
    )
    gc.collect()
    before = [*map(type, gc.get_objects())].count(AdapterOptimizer)
    assert call("train", recipe).exit_code == 0
    assert alive == [before]


def test_on_a_cpu_a_plan_above_what_is_free_is_refused(recipe, monkeypatch):
    monkeypatch.setattr("qlora_kit.plan.table.available_bytes", lambda device: 10_000)
    assert_mistake(call("train", recipe), "9.77 KiB is free here", "the least", code=3)
    planned = call("plan", recipe)
    assert planned.exit_code == 3
    assert "--gpu or --budget" in planned.stderr


def test_a_best_checkpoint_that_is_damaged_is_told_and_the_end_is_left(recipe, monkeypatch):
    told(monkeypatch, 1.0, 1.5, 2.0, 2.0)
    whole = train_loop.save_checkpoint

    def damaging(folder, *given):
        saved = whole(folder, *given)
        (folder / "step-000001" / "parameters.safetensors").write_bytes(b"damaged")
        return saved

    monkeypatch.setattr(train_loop, "save_checkpoint", damaging)
    result = call("train", recipe, "train.eval_every=1")
    assert result.exit_code == 0, result.output
    assert "lowest at step 1 (1.000), but" in " ".join(result.output.split())
    assert json.loads((recipe.parent / "run" / "result.json").read_text())["step"] == 4


@pytest.mark.slow
def test_a_run_within_a_budget_takes_fewer_rows_at_a_time_and_keeps_to_it(recipe):
    free = ["train.micro_batch=auto", "train.accumulation=auto"]
    ample = json.loads(call("plan", recipe, *free, "--json").stdout)
    budget = round(0.8 * ample["methods"]["qlora"]["peak_bytes"])
    result = call("train", recipe, *free, f"memory.budget={budget}B")
    assert result.exit_code == 0, result.output
    plan, memory = (json.loads((recipe.parent / "run" / name).read_text()) for name in ("plan.json", "memory.json"))
    assert plan["micro_batch"] < ample["micro_batch"] or plan["activations"] != ample["activations"]
    assert plan["micro_batch"] * plan["accumulation"] == ample["micro_batch"] * ample["accumulation"]
    assert memory["measured"]["peak_bytes"] <= budget
    assert abs(memory["error"]["peak"]) < 0.01
    assert plan["pace"]["micro_batch"] == plan["micro_batch"]


@pytest.mark.slow
def test_a_run_whose_budget_evaluation_decides_takes_fewer_held_out_rows_at_a_time_and_scores_the_same(recipe):
    """Short rows to train on, long ones held out: in their usual batches these take most of all."""
    held = recipe.parent / "held.jsonl"
    rows = [{"prompt": "count " * 2, "completion": " one" * (1 + row % 5)} for row in range(24)]
    held.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [recipe, f"data.eval={held}", "data.max_tokens=64", "train.micro_batch=1", "memory.activations=recompute"]
    result = call("train", *words)
    assert result.exit_code == 0, result.output
    run = recipe.parent / "run"
    ample, usual = (json.loads((run / name).read_text()) for name in ("memory.json", "scores.json"))
    phases = ample["planned"]["peak_by_phase"]
    budget = max(size for phase, size in phases.items() if phase != "evaluate") + 64 * 1024
    assert phases["evaluate"] > 1.2 * budget
    result = call("train", *words, f"memory.budget={budget}B", "--overwrite")
    assert result.exit_code == 0, result.output
    plan, memory, scores = (
        json.loads((run / name).read_text()) for name in ("plan.json", "memory.json", "scores.json")
    )
    assert plan["eval_tokens"] < 2048
    assert memory["measured"]["peak_bytes"] <= budget
    assert abs(memory["error"]["peak"]) < 0.01
    assert scores["adapter"]["loss"] == pytest.approx(usual["adapter"]["loss"], rel=1e-5), "padded and summed otherwise"


def test_a_run_that_takes_more_than_its_budget_ends_with_its_checkpoint_and_can_go_on(recipe, tmp_path, monkeypatch):
    """The process seems to grow by 2 GiB when the first checkpoint stands."""
    run, real = tmp_path / "run", counter.resident_bytes

    def grown():
        anonymous, file_backed = real()
        return anonymous + 2**31 * (run / "checkpoints" / "step-000002").is_dir(), file_backed

    settings = ["memory.budget=1GiB", "train.save_every=2", "memory.activations=keep"]
    with monkeypatch.context() as patch:
        patch.setattr(counter, "resident_bytes", grown)
        result = call("train", recipe, *settings)
    assert_mistake(
        result, "memory.budget is 1.00 GiB", "by step 3", "step-000002 is kept", "--resume", "memory.budget=2",
        "memory.activations=recompute", "train.micro_batch (now 4)", code=3,
    )  # fmt: skip
    assert not (run / "adapter").exists()
    assert max(path.name for path in (run / "checkpoints").iterdir()) == "step-000002"
    assert json.loads((run / "memory.json").read_text())["device_counter"]["start_bytes"] > 0
    assert "Not finished: the last is step 2 of 4." in (run / "report.html").read_text()
    gone_on = call("train", recipe, *settings, "--resume")
    assert gone_on.exit_code == 0, gone_on.output
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4


@pytest.mark.parametrize(("rank", "told"), [(2000, "lower lora.rank (adapters, grad"), (4, "lower data.max_tokens")])
def test_a_plan_above_the_budget_advises_what_most_of_it_goes_back_to(rank, told, recipe):
    refused = call("train", recipe, f"lora.rank={rank}", "memory.budget=300KiB")
    assert_mistake(refused, "the least that the recipe allows is", told, code=3)


def test_a_run_that_is_out_of_memory_in_the_middle_keeps_its_checkpoint_and_is_told_what_takes_less(
    recipe, tmp_path, monkeypatch
):
    """The third step asks for a PiB."""
    run, step, steps = tmp_path / "run", AdapterOptimizer.step, []

    def fails(*given):
        steps.append(1)
        return step(*given) if len(steps) < 3 else torch.empty(2**50, dtype=torch.uint8)

    monkeypatch.setattr(AdapterOptimizer, "step", fails)
    result = call("train", recipe, "train.micro_batch=auto", "train.save_every=1")
    assert_mistake(
        result, "the host ran out of memory in step 3; step-000002 is kept: continue with --resume and "
        "memory.activations=recompute, or start again with --overwrite and memory.activations=recompute "
        "train.micro_batch=1, which is planned for ", " KiB, or a lower data.max_tokens", code=3,
    )  # fmt: skip
    assert verify(run).faults == []
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


def test_a_run_that_is_out_of_memory_before_its_first_step_is_told_what_takes_less(recipe, monkeypatch):
    def fails(*_):
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(import_module("qlora_kit.run.course"), "rehearse", fails)
    result = call("train", recipe, "memory.activations=recompute")
    assert_mistake(result, "ran out of memory", "start again with a lower train.micro_batch (now 4)", code=3)
    assert "activations" not in result.stderr
    result = call("train", recipe, "train.micro_batch=auto", "--overwrite")
    assert_mistake(result, "start again with memory.activations=recompute train.micro_batch=1, which is", code=3)
    assert result.stderr.count("memory.activations=recompute") == 1, "it is told once"


@pytest.mark.parametrize("disk_is_full", [False, True])
def test_a_run_whose_loss_is_not_finite_leaves_its_report_and_ends_in_its_own_error(recipe, monkeypatch, disk_is_full):
    """The second step leaves parameters that are no numbers."""
    step, steps = AdapterOptimizer.step, []

    def spoils(optimizer, lr):
        step(optimizer, lr)
        steps.append(lr)
        if len(steps) == 2:
            for parameter in optimizer.parameters:
                parameter.data.fill_(math.nan)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(AdapterOptimizer, "step", spoils)
    if disk_is_full:
        monkeypatch.setattr("qlora_kit.report.page.write_text", full)
    assert_mistake(call("train", recipe, "data.eval=null"), "loss is not finite at step 3", "lower train.lr")
    page = recipe.parent / "run" / "report.html"
    assert page.exists() != disk_is_full
    if not disk_is_full:
        assert "Not finished: the last is step 3 of 4." in page.read_text()
        assert "the loss was not finite at 1 step, first at step 3" in page.read_text()


@pytest.mark.slow
def test_a_resumed_run_keeps_its_micro_batches_and_its_loss_though_memory_has_become_short(recipe, monkeypatch):
    run, command = recipe.parent / "run", ["train", recipe, "train.micro_batch=auto", "train.save_every=2"]
    assert call(*command).exit_code == 0
    whole, before = (
        load_file(run / "adapter" / "adapter_model.safetensors"),
        json.loads((run / "plan.json").read_text()),
    )
    (run / "checkpoints" / "step-000004" / "optimizer.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr("qlora_kit.plan.table.available_bytes", lambda device: 2**16)
    monkeypatch.setattr("qlora_kit.plan.choose.automatic_chunk", lambda vocab: 3)
    short = json.loads(call("plan", *command[1:], "--json").stdout)
    assert short["micro_batch"] < before["micro_batch"], "there is another choice now"
    assert short["eval_tokens"] < before["eval_tokens"]
    assert short["loss_chunk"] == 3 < before["loss_chunk"]
    assert_mistake(call(*command, "--resume"), "64.0 KiB is free here", code=3)
    monkeypatch.setattr("qlora_kit.run.build.check_budget", lambda plan: None)
    result = call(*command, "--resume")
    assert result.exit_code == 0, result.output
    after = json.loads((run / "plan.json").read_text())
    kept = ("micro_batch", "loss_chunk", "eval_tokens")
    assert [after[key] for key in kept] == [before[key] for key in kept]
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all((whole[key] == again[key]).all() for key in whole)


@pytest.mark.slow
def test_a_family_whose_logits_are_its_own_affair_is_trained_with_whole_ones_and_a_notice(recipe, model_folder):
    family = recipe.parent / "odd"
    shutil.copytree(model_folder, family, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    vocab = json.loads((model_folder / "config.json").read_text())["vocab_size"]
    config = ModernBertDecoderConfig(
        vocab_size=vocab, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0, cls_token_id=0, sep_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(family)
    result = call("train", recipe, f"base.model={family}")
    assert result.exit_code == 0, result.output
    assert "whole logits are used" in " ".join(result.output.split())
    rows = [json.loads(line) for line in (recipe.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    whole = call("train", recipe, f"base.model={family}", "memory.loss_chunk=5", "--overwrite")
    assert whole.exit_code == 0
    again = [json.loads(line) for line in (recipe.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if "loss" in row] == [row["loss"] for row in again if "loss" in row]


@pytest.mark.slow
def test_added_tokens_and_all_else_that_an_adapter_trains_go_through_every_verb(recipe):
    """New tokens, a norm trained whole, a PiSSA start and a quantised head: planned, resumed, exported."""
    run, rows = recipe.parent / "run", recipe.parent / "rows.jsonl"
    rows.write_text(rows.read_text().replace("say ", "say <note>"))
    settings = ["base.quantization=int8", "base.quantize_head=true", "lora.added_tokens=[<note>, <end>, s]",
                "lora.also_train=[model.norm]", "lora.init=pissa", "train.save_every=2"]  # fmt: skip
    result = call("train", recipe, *settings)
    assert result.exit_code == 0, result.output
    memory = json.loads((run / "memory.json").read_text())
    assert abs(memory["error"]["peak"]) < 0.01
    assert memory["error"]["adapters"] == 0
    whole = load_file(run / "adapter" / "adapter_model.safetensors")
    assert sum("trainable_tokens_delta" in key and len(value) == 3 for key, value in whole.items()) == 2
    assert any(key.endswith("model.norm.weight") for key in whole)
    (run / "checkpoints" / "step-000004" / "optimizer.safetensors").write_bytes(b"damaged")
    assert call("train", recipe, *settings, "--resume").exit_code == 0
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all((whole[key] == again[key]).all() for key in whole)
    for kind in ("merged", "adapter"):
        result = call("export", run, "--to", kind, "--out", run / f"{kind}-export")
        assert result.exit_code == 0, result.output
        tokenizer = AutoTokenizer.from_pretrained(run / f"{kind}-export")
        assert tokenizer.convert_tokens_to_ids(["<note>", "<end>"]) == [len(tokenizer) - 2, len(tokenizer) - 1]
    audit = json.loads((run / "merged-export" / "export.json").read_text())["comparisons"]["merged"]
    assert audit["max_kl"] < 1e-3
    assert AutoModelForCausalLM.from_pretrained(run / "merged-export").config.vocab_size == len(tokenizer)
    base = yaml.safe_load(recipe.read_text())["base"]["model"]
    merge(run / "adapter-export", base, run / "again")
    assert AutoTokenizer.from_pretrained(run / "again").convert_tokens_to_ids("<end>") == len(tokenizer) - 1
    same = [load_file(run / name / "model.safetensors") for name in ("merged-export", "again")]
    assert all((same[0][key] == same[1][key]).all() for key in same[0])


def test_a_resume_with_another_recipe_is_refused_and_more_steps_are_not(recipe):
    assert call("train", recipe).exit_code == 0
    before = (recipe.parent / "run" / "recipe.yaml").read_text()
    assert_mistake(
        call("train", recipe, "lora.alpha=64", "train.lr=1e-2", "--resume"), "lora.alpha was 32", "is 64", "train.lr"
    )
    assert (recipe.parent / "run" / "recipe.yaml").read_text() == before
    longer = call("train", recipe, "train.steps=6", "--resume")
    assert longer.exit_code == 0, longer.output
    assert "step 6/6" in longer.output
    files = {path: path.read_bytes() for path in (recipe.parent / "run").rglob("*") if path.is_file()}
    shorter = call("train", recipe, "train.steps=5", "--resume")
    assert_mistake(shorter, "step-000006 has taken 6 steps, and the recipe comes to 5", "train.steps=6")
    assert {path: path.read_bytes() for path in files if path.name != "report.html"} == {
        path: contents for path, contents in files.items() if path.name != "report.html"
    }


@pytest.mark.slow
def test_a_run_that_is_resumed_with_more_steps_keeps_the_rate_that_was_chosen_for_it(recipe, monkeypatch):
    monkeypatch.setattr("qlora_kit.train.schedule.SHORT_RUN", 3)
    run = recipe.parent / "run"
    assert call("train", recipe, "train.lr=auto", "train.steps=2").exit_code == 0
    begun = json.loads((run / "plan.json").read_text())["pace"]
    assert "a short run" in begun["lr_reason"]
    for steps in (4, 5):
        assert call("train", recipe, "train.lr=auto", f"train.steps={steps}", "--resume").exit_code == 0
        pace = json.loads((run / "plan.json").read_text())["pace"]
        assert (pace["lr"], pace["lr_reason"]) == (begun["lr"], begun["lr_reason"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["lr"] for row in rows if "lr" in row} == {begun["lr"]}


@pytest.mark.slow
@pytest.mark.parametrize("other", ["lora.rank=2", "train.optimizer=sgd"])
def test_a_run_that_cannot_be_forced_to_go_on_stays_as_it_was_begun(recipe, other):
    run = recipe.parent / "run"
    assert call("train", recipe, "train.steps=2").exit_code == 0
    begun = {name: (run / name).read_bytes() for name in ("recipe.yaml", "plan.json", "data.json")}
    assert_mistake(call("train", recipe, other, "train.steps=3", "--resume", "--force"), "resume with the recipe")
    assert begun == {name: (run / name).read_bytes() for name in begun}
    assert call("train", recipe, "train.steps=3", "--resume").exit_code == 0


@pytest.mark.slow
def test_a_run_that_is_forced_to_go_on_at_another_rate_does(recipe):
    """Which is what a run that broke off tells people to do."""
    run = recipe.parent / "run"
    assert call("train", recipe, "train.lr=1e-3", "train.steps=2").exit_code == 0
    for steps, asked, rates in ((3, "1e-4", (1e-4,)), (4, "auto", (1e-3, 1e-4))):
        assert call("train", recipe, f"train.lr={asked}", f"train.steps={steps}", "--resume", "--force").exit_code == 0
        last = [json.loads(line) for line in (run / "metrics.jsonl").open() if '"lr"' in line][-1]
        assert last["step"] == steps
        assert (last["lr"] in rates) == (asked != "auto")


@pytest.mark.slow
def test_an_earlier_run_outlives_a_base_that_cannot_be_loaded(recipe, model_folder, tmp_path):
    assert call("train", recipe).exit_code == 0
    adapter = (recipe.parent / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    assert_mistake(call("train", recipe, f"base.model={broken}", "--overwrite"), "no tensor for")
    assert (recipe.parent / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_weights_are_asked_for_only_when_the_plan_fits(recipe, monkeypatch):
    """A hub model of 15 GB is not downloaded to learn that it does not fit."""
    asked = []
    folder = yaml.safe_load(recipe.read_text())["base"]["model"]

    def locate(model, revision=None, *, weights=True, code=False, notify=None):
        asked.append(weights)
        return Path(folder)

    for module in ("prepare", "build"):
        monkeypatch.setattr(import_module(f"qlora_kit.run.{module}"), "locate_model", locate)
    assert call("train", recipe, "base.model=someone/small", "memory.budget=64KiB").exit_code == 3
    assert asked == [False]
    assert call("train", recipe, "base.model=someone/small").exit_code == 0
    assert asked == [False, False, True]


REMOTE_CONFIG = """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
REMOTE_MODEL = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.slow
def test_a_models_own_code_runs_through_every_verb_if_allowed_and_never_otherwise(recipe, model_folder, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(model_folder, own)
    (own / "configuration_own.py").write_text(REMOTE_CONFIG)
    (own / "modeling_own.py").write_text(REMOTE_MODEL)
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = json.loads((own / "config.json").read_text()) | {"model_type": "own", "auto_map": names}
    (own / "config.json").write_text(json.dumps(config))
    run, model = recipe.parent / "run", f"base.model={own}"
    verbs = [
        ("plan", recipe, model),
        ("train", recipe, model),
        ("eval", run),
        ("generate", run, "--prompt", "say cat "),
        ("export", run, "--to", "adapter", "--out", tmp_path / "adapter"),
    ]
    for verb in verbs:
        refused = call(*verb)
        assert refused.exit_code == 2, refused.output
        assert refused.stderr.startswith("error: ")
        allowed = call(*verb, "--trust-remote-code")
        assert allowed.exit_code == 0, allowed.output + str(allowed.exception)
    merged = call("export", run, "--out", tmp_path / "merged", "--trust-remote-code")
    assert_mistake(merged, "code of its own", "--to adapter")


def test_held_out_rows_that_are_all_too_long_are_counted_and_do_not_stop_a_run(recipe):
    rows = recipe.parent / "rows.jsonl"
    lines = rows.read_text().splitlines()
    for i in range(40):  # until the split chooses the one long row
        long = {"prompt": f"say {i} ", "completion": "long " * 20}
        rows.write_text("\n".join([*lines, json.dumps(long)]))
        if [row.completion for row in split_eval(load_rows(str(rows)))[1]] == [long["completion"]]:
            break
    result = call("train", recipe, "data.eval=auto")
    assert result.exit_code == 0, result.output
    assert "0 rows held out" in result.output
    assert json.loads((recipe.parent / "run" / "data.json").read_text())["eval"]["dropped"] == 1
    assert not (recipe.parent / "run" / "scores.json").exists()


def test_skipped_rows_are_counted_told_and_kept_out_of_a_run(recipe):
    rows = recipe.parent / "rows.jsonl"
    good = rows.read_text()
    rows.write_text('{"prompt": 5}\n' + good + "nonsense\n")
    assert call("train", recipe).stderr.startswith("error: 4 rows cannot be used"), "two in the rows, as many held out"
    result = call("train", recipe, "data.on_error=skip")
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "data 7 rows" in told
    assert ", 2 left out; 7 rows held out" in told
    assert f"note: 2 rows left out as unusable (data.on_error=skip): {rows}:1: missing 'completion'" in told
    assert f"{rows}:9: not JSON" in told
    data = json.loads((recipe.parent / "run" / "data.json").read_text())
    assert [data[part]["faults"] for part in ("train", "eval")] == [2, 2]
    assert [data[part]["rows"] for part in ("train", "eval")] == [7, 7]
    assert json.loads((recipe.parent / "run" / "scores.json").read_text())["rows"] == 7


@pytest.mark.slow
def test_split_rows_are_trained_packed_and_scored_with_every_token_once(recipe):
    whole = json.loads(call("preview", recipe, "--json").stdout)
    result = call("train", recipe, "data.max_tokens=6", "data.over_length=split", "data.packing=true")
    assert result.exit_code == 0, result.output
    run = recipe.parent / "run"
    data = json.loads((run / "data.json").read_text())
    assert (whole["train"]["split"], data["train"]["split"]) == (0, 7)
    assert ", 7 split; " in result.output
    assert data["train"]["rows"] + data["train"]["no_trained"] > whole["train"]["rows"] == 7
    for part in ("train", "eval"):
        assert data[part]["trained_tokens"] == whole[part]["trained_tokens"] > 0
    scores = json.loads((run / "scores.json").read_text())
    assert scores["adapter"]["tokens"] == data["eval"]["trained_tokens"]
    assert "exact_match" not in scores["adapter"], "no piece is a prompt and its whole answer"


@pytest.mark.slow
def test_a_prompt_is_put_as_training_put_it(recipe, model_folder, tmp_path):
    """The tokenizer has a chat template; a run on completions does not use it, and one on chats does."""
    chatty = tmp_path / "chatty"
    shutil.copytree(model_folder, chatty)
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}" + (
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(chatty)
    turns = [{"role": "user", "content": "say cat "}, {"role": "assistant", "content": "cat"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    for rows, is_chat in (("rows.jsonl", False), ("chats.jsonl", True)):
        output, path = tmp_path / f"run-{rows}", tmp_path / rows
        made = call("train", recipe, f"base.model={chatty}", f"data.train={path}", f"data.eval={path}",
                    f"output={output}", "data.max_tokens=64")  # fmt: skip
        assert made.exit_code == 0, made.output
        answers = [call("generate", output, "--prompt", "say cat ", *raw).output for raw in ([], ["--raw"])]
        assert (answers[0] != answers[1]) == is_chat


@pytest.mark.slow
def test_chatml_is_refused_where_its_marks_are_no_tokens_and_no_template_need_be_named(recipe):
    turns = [{"role": "user", "content": "say cat "}, {"role": "assistant", "content": "cat"}]
    (recipe.parent / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    chats = f"data.train={recipe.parent / 'chats.jsonl'}"
    assert_mistake(call("train", recipe, chats, "data.template=chatml"), "<|im_end|>", "data.template=plain")
    result = call("train", recipe, chats, "data.eval=null", "data.max_tokens=64")
    assert result.exit_code == 0, result.output
    assert "chats are written by the shipped template plain" in result.output


def test_a_full_disk_is_one_line(recipe, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/there/plan.json")

    monkeypatch.setattr("qlora_kit.run.folder.write_json", full)
    assert_mistake(call("train", recipe), "/there/plan.json", "No space left")


def test_a_run_whose_checkpoints_will_have_no_room_ends_before_its_first_step(recipe, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10_000))
    assert_mistake(call("train", recipe), "keeping 2 checkpoints (train.keep_checkpoints) needs", "9.77 KiB free")
    assert not (recipe.parent / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("ask", [lambda: torch.empty(2**60, dtype=torch.uint8), lambda: bytearray(2**60)])
def test_a_verb_that_runs_out_of_memory_says_so_in_a_line(finished, ask, monkeypatch):
    monkeypatch.setattr("qlora_kit.run.use.score_rows", lambda *_, **__: ask())
    assert_mistake(call("eval", finished[0]), "the host ran out of memory", code=3)


def test_ctrl_c_before_any_verb_has_begun_is_no_traceback(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora_kit.cli.app.main", interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


def test_a_pipe_that_nobody_reads_any_more_ends_no_run(monkeypatch):
    def stream():
        read, write = os.pipe()
        os.close(read)
        return open(write, "w")

    with stream() as file:
        screen = Screen()
        screen.console.file = file
        for _ in range(2):
            screen.note("x" * 9999)
    with stream() as file:
        monkeypatch.setattr(sys, "stdout", file)
        reports_errors(lambda: print("x" * 9999, flush=True))()


@pytest.mark.parametrize("place", ["plan_prepared", "load_recipe_base"])
def test_a_signal_before_training_ends_at_once_and_changes_nothing(recipe, monkeypatch, place):
    def interrupted(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except (RuntimeError, ValueError, OSError) as error:  # as libraries do around what they call
            pytest.fail(f"a library would have taken the signal for an error of its own: {error!r}")
        pytest.fail("the signal did not end it")

    monkeypatch.setattr(f"qlora_kit.run.build.{place}", interrupted)
    result = call("train", recipe)
    assert result.exit_code == 143
    assert "before training" in result.output
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_in_training_quits_at_once(number, code):
    child = os.fork()
    if child == 0:
        screen = Screen()
        screen.loaded_whole(1)
        with screen.catching_signals():
            signal.raise_signal(number)
            if screen.stop_requested():
                signal.raise_signal(number)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code


@pytest.fixture
def ctrl_c():
    """SIGINT as a program in the foreground has it, wherever the tests run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupting(Watch):
    """Ctrl-C while a step is told."""

    def __init__(self, step):
        self.step = step

    def row(self, row):
        if row["step"] == self.step and "loss" in row:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_of_a_program_is_raised_once_its_step_is_saved_and_at_the_last_step_the_run_is_finished(recipe):
    checked = read_recipe(recipe)
    with pytest.raises(KeyboardInterrupt, match="step 2 is done and saved"):
        train_run.train(checked, watch=Interrupting(2))
    assert max(path.name for path in (recipe.parent / "run" / "checkpoints").iterdir()) == "step-000002"
    assert train_run.train(checked, resume=True, watch=Interrupting(4)).finished


def test_a_tracker_that_is_not_installed_is_refused_and_not_left_out(recipe, monkeypatch):
    monkeypatch.setattr("qlora_kit.train.trackers.get_available_trackers", list)
    assert_mistake(call("train", recipe, "train.trackers=[wandb]"), "wandb", "pip install wandb")


BAD = {
    "no model folder": (["base.model=./nowhere"], ["nowhere"]),
    "wrong key": (["lora.rnak=32"], ["lora.rnak", "lora.rank"]),
    "no such file": (["data.train=nothing.jsonl"], ["nothing.jsonl"]),
    "a rank of 0": (["lora.rank=0"], ["lora.rank", "at least 1"]),
    "no GPU when asked for": (["base.device=cuda"], ["cuda", "doctor"]),
    "targets that match nothing": (["lora.targets=[q_prj]"], ["q_prj", "q_proj"]),
    "longer than the model's positions": (["data.max_tokens=99999"], ["99999", "positions"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(recipe, name):
    overrides, words = BAD[name]
    if name == "no GPU when asked for" and __import__("torch").cuda.is_available():
        pytest.skip("there is a GPU")
    assert_mistake(call("train", recipe, *overrides), *words)
    assert not (recipe.parent / "run" / "adapter").exists()
    assert not (recipe.parent / "run" / "checkpoints").exists()


def test_empty_data_is_one_line(recipe):
    (recipe.parent / "rows.jsonl").write_text("")
    assert_mistake(call("train", recipe), "rows.jsonl")
    assert not (recipe.parent / "run").exists()


def test_an_output_that_is_a_file_is_refused_before_anything_is_read(recipe):
    (recipe.parent / "run").write_text("mine")
    assert_mistake(call("train", recipe), "is a file")
    assert (recipe.parent / "run").read_text() == "mine"


def test_a_folder_of_other_things_is_never_replaced(recipe):
    (recipe.parent / "run").mkdir()
    (recipe.parent / "run" / "thesis.tex").write_text("years of work")
    assert_mistake(call("train", recipe, "--overwrite"), "not empty")
    assert (recipe.parent / "run" / "thesis.tex").exists()


def test_overwrite_removes_a_run_and_nothing_that_lies_beside_it(recipe):
    run = recipe.parent / "run"
    assert call("train", recipe).exit_code == 0
    (run / "notes.txt").write_text("what I saw")
    assert call("train", recipe, "train.steps=2", "--overwrite").exit_code == 0
    assert (run / "notes.txt").read_text() == "what I saw"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


def test_a_folder_with_a_recipe_of_ones_own_is_no_run(recipe):
    """`output: .` beside one's recipe.yaml and rows: nothing of them goes, whatever is asked for."""
    rows = (recipe.parent / "rows.jsonl").read_text()
    assert_mistake(call("train", recipe, f"output={recipe.parent}", "--overwrite"), "holds no run")
    assert (recipe.parent / "rows.jsonl").read_text() == rows


def test_a_run_that_failed_at_its_start_can_be_started_again(recipe):
    assert call("train", recipe, "lora.targets=[q_prj]").exit_code == 2
    assert call("train", recipe).exit_code == 0


def test_every_mistake_in_a_recipe_is_told_at_once(recipe):
    result = call("train", recipe, "lora.rnak=1", "train.stepz=2")
    assert result.exit_code == 2
    assert "2 mistakes" in result.stderr
    assert "lora.rank" in result.stderr
    assert "train.steps" in result.stderr


@pytest.mark.parametrize("verb", ["eval", "generate", "export", "report"])
def test_verbs_on_something_else_than_a_run_say_so(tmp_path, verb):
    more = {"generate": ["--prompt", "x"], "export": ["--out", tmp_path / "out"]}.get(verb, [])
    assert_mistake(call(verb, tmp_path, *more), str(tmp_path))
    (tmp_path / "file").touch()
    assert_mistake(call(verb, tmp_path / "file", *more), f"{tmp_path / 'file'} is a file; give the folder of a run")
    assert_mistake(call(verb, tmp_path / "none", *more), f"there is no folder {tmp_path / 'none'}")
    assert_mistake(call(verb, tmp_path / ("x" * 300), *more), "File name too long")


def test_a_folder_in_the_place_of_a_file_of_the_run_is_one_line(recipe, monkeypatch):
    def is_folder(*_, **__):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), "/there/memory.json")

    monkeypatch.setattr(import_module("qlora_kit.run.train"), "prepare", is_folder)
    assert_mistake(call("train", recipe), "/there/memory.json: Is a directory")


def test_what_an_export_cannot_do_is_said_before_a_base_is_loaded(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_kit.run.use.load_recipe_base", lambda *_, **__: pytest.fail("the base was loaded"))
    assert_mistake(call("export", finished[0], "--dtype", "float8", "--out", tmp_path / "new"), "float8", "bfloat16")
    (tmp_path / "thesis.tex").write_text("years of work")
    assert_mistake(call("export", finished[0], "--out", tmp_path), "not empty")
    for more in ((), ("--compare",)):
        told = call("export", finished[0], "--out", tmp_path / "thesis.tex" / "new", *more)
        assert_mistake(told, "thesis.tex is a file; choose another folder")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "disk")
    assert_mistake(call("export", finished[0], "--out", tmp_path / "disk"), "where a disk is mounted", "below it")


IDLE = {
    "--onto": ("adapter", "original"),
    "--dtype": ("gguf-adapter", "q8_0"),
    "--max-kl": ("adapter", "1"),
    "--quantization": ("merged", "nf4"),
    "--calibration-rows": ("gguf", "7"),
}


@pytest.mark.parametrize("name", IDLE)
def test_an_option_that_would_change_nothing_of_an_export_is_refused(finished, tmp_path, monkeypatch, name):
    monkeypatch.setattr("qlora_kit.run.use.load_recipe_base", lambda *_, **__: pytest.fail("the base was loaded"))
    kind, value = IDLE[name]
    told = call("export", finished[0], "--to", kind, name, value, "--out", tmp_path / "new")
    assert_mistake(told, f"{name} has no effect on an export --to {kind}")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_export_leaves_nothing_that_looks_whole_and_running_it_again_completes(
    finished, tmp_path, number, code
):
    command = [Path(sys.executable).with_name("qlora-kit"), "export", finished[0], "--to", "quantized",
               "--out", tmp_path / "new"]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while not any(tmp_path.iterdir()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    process.send_signal(number)
    assert "Traceback" not in process.communicate(timeout=60)[1]
    assert process.returncode == code
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ([f".new.{process.pid}.tmp"] if number == signal.SIGKILL else [])
    assert call("export", finished[0], "--to", "quantized", "--out", tmp_path / "new").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_exports_are_requantised_by_word(finished, tmp_path):
    run, _ = finished
    calls = {
        "quantized": ["--to", "quantized", "--quantization", "fp4", "--json"],
        "plain": ["--to", "quantized", "--calibration-rows", 0],
    }
    results = {name: call("export", run, *more, "--out", tmp_path / name) for name, more in calls.items()}
    for name, result in results.items():
        assert result.exit_code == 0, (name, result.output)
    said = {name: json.loads((tmp_path / name / "export.json").read_text()) for name in calls}
    assert json.loads(results["quantized"].stdout) == said["quantized"]
    assert said["quantized"]["quantization"]["format"] == "fp4"
    assert said["quantized"]["quantization"]["calibration_rows"] == 6
    assert (said["plain"]["quantization"]["format"], said["plain"]["quantization"]["calibration_rows"]) == ("nf4", 0)
    assert "quantized against the model as trained: mean KL" in results["plain"].output
    assert "caution: layers with 48 inputs" in results["plain"].output
    score = call("eval", tmp_path / "plain", "--data", run.parent / "rows.jsonl", "--json")
    assert score.exit_code == 0, score.output


@pytest.mark.parametrize("keeps", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_comparison_has_a_line_a_kind_and_keeps_what_it_wrote_only_where_it_is_told_to(finished, tmp_path, keeps):
    run, _ = finished
    before = {path.name for path in run.iterdir()}
    more = ["--out", tmp_path / "all"] if keeps else []
    result = call("export", run, "--compare", "--dtype", "float32", "--calibration-rows", 1, *more)
    assert result.exit_code == 0, result.output
    dense, gguf = ["merged", "merged-onto-original", "quantized", "quantized-plain"], ["gguf-q8_0", "gguf-q4_k_m"]
    names = [*dense, *gguf, "adapter", "gguf-adapter"]
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines[1:9]] == names
    assert [line.split()[0] for line in lines if "not audited" in line] == ["adapter", "gguf-adapter"]
    assert "100.00%" in lines[1], "what is merged in fp32 says the same"
    assert {path.name for path in run.iterdir()} == before
    assert keeps == (tmp_path / "all").exists()
    if keeps:
        assert {path.name for path in (tmp_path / "all").iterdir()} == set(names)
        told = call("export", run, "--compare", "--out", tmp_path / "all")
        assert_mistake(told, "not empty")


@pytest.mark.slow
def test_an_export_of_a_base_that_has_changed_since_is_refused_though_its_marks_are_the_same(
    model_folder, tmp_path, monkeypatch
):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(model_folder, base)
    rows = [{"prompt": f"say {word} ", "completion": word} for word in ("cat", "dog", "owl", "bee", "ant", "elk")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call("train", write_recipe(tmp_path, base)).exit_code == 0
    assert call("export", tmp_path / "run", "--out", out).exit_code == 0
    shutil.rmtree(out)
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("down_proj.weight"):
            tensor[0] = 30.0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert_mistake(call("export", tmp_path / "run", "--out", out), "another base")
    assert call("export", tmp_path / "run", "--out", out, "--force").exit_code == 0
    shutil.rmtree(out)
    # As where a larger matrix is changed between the pieces of it that are marked.
    monkeypatch.setattr("qlora_kit.base.record.BaseRecord.differences", lambda self, told: [])
    for kind in ("merged", "quantized"):
        told = call("export", tmp_path / "run", "--to", kind, "--out", out)
        assert_mistake(
            told, "held-out loss is", "when it was trained", "its base or its adapter has changed since", "--force"
        )
        assert not out.exists()
    scores = tmp_path / "run" / "scores.json"
    before = scores.read_text()
    for broken in ("{}", '{"base": {}, "adapter": []}', '{"base": {}, "adapter": {"loss": "x"}}', "["):
        scores.write_text(broken)
        assert_mistake(call("export", tmp_path / "run", "--out", out), "scores.json")
    scores.write_text(before)
    assert call("export", tmp_path / "run", "--out", out, "--force").exit_code == 0
    assert call("export", tmp_path / "run", "--to", "adapter", "--out", tmp_path / "adapter").exit_code == 0
    assert_mistake(call("generate", tmp_path / "adapter", "--prompt", "x"), "without its base", "--to merged")


def test_an_export_far_from_what_was_trained_exits_2_and_is_not_kept_unless_forced(finished, tmp_path):
    more = ("--max-kl", "0", "--out", tmp_path / "out")
    assert_mistake(call("export", finished[0], *more), "above 0", "--force")
    assert not (tmp_path / "out").exists()
    assert call("export", finished[0], *more, "--force").exit_code == 0
    assert_mistake(call("export", finished[0]), "--out is missing", "--compare")
    assert_mistake(call("export", finished[0], "--quantization", "int3", "--out", tmp_path / "new"), "int3", "nf4, fp4")


def test_the_command_line_and_python_take_as_many_calibration_rows():
    command = import_module("qlora_kit.cli.export")
    assert inspect.signature(command.export).parameters["calibration_rows"].default == Asked().calibration_rows


def without_adapter(run):
    shutil.rmtree(run / "adapter")


def with_nan(run):
    weights = load_file(run / "adapter/adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    with safe_open(run / "adapter/adapter_model.safetensors", "pt") as file:
        save_file(weights, run / "adapter/adapter_model.safetensors", file.metadata())
    result = json.loads((run / "result.json").read_text())  # as a run writes it that ended so
    (run / "result.json").write_text(json.dumps(result | {"files": checksums(run / "adapter")}))


def on_another_base(run):
    tiny.llama(seed=1, vocab_size=258, eos_token_id=0).save_pretrained(run / "base")
    content = yaml.safe_load((run / "recipe.yaml").read_text())
    shutil.copytree(
        content["base"]["model"],
        run / "base",
        ignore=shutil.ignore_patterns("model*", "config.json"),
        dirs_exist_ok=True,
    )
    content["base"]["model"] = str(run / "base")
    (run / "recipe.yaml").write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(without_adapter, "has no adapter yet"), (with_nan, "NaN"), (on_another_base, "another base")],
)
@pytest.mark.parametrize("kind", ["quantized", "gguf-adapter"])
def test_a_run_that_cannot_be_exported_is_one_line_with_nothing_left(finished, tmp_path, spoil, said, kind):
    shutil.copytree(finished[0], tmp_path / "run")
    spoil(tmp_path / "run")
    assert_mistake(call("export", tmp_path / "run", "--to", kind, "--out", tmp_path / "out"), said)
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


@pytest.mark.slow
def test_a_loftq_start_is_planned_with_what_it_reads_and_pages_of_the_checkpoint_are_not_counted(recipe):
    run = recipe.parent / "run"
    load = {}
    for init in ("default", "loftq"):
        result = call("train", recipe, f"lora.init={init}", "base.quantization=int8", "--overwrite")
        assert result.exit_code == 0, result.output
        memory = json.loads((run / "memory.json").read_text())
        assert abs(memory["error"]["peak"]) < 0.01
        load[init] = [memory[side]["peak_by_phase"]["load"] for side in ("planned", "measured")]
    assert load["loftq"][1] > 1.1 * load["default"][1], "a matrix, what it was made from, and what was lost"
    assert load["loftq"][0] == pytest.approx(load["loftq"][1], rel=0.01)


def test_a_loftq_start_is_not_put_onto_the_original(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    content = yaml.safe_load((run / "recipe.yaml").read_text())
    content["lora"]["init"] = "loftq"
    (run / "recipe.yaml").write_text(yaml.safe_dump(content))
    told = call("export", run, "--onto", "original", "--out", tmp_path / "out")
    assert_mistake(told, "loftq", "--onto dequantized")


def test_unbuilt_exports_and_idle_options_are_refused_of_runs_and_of_checkpoints(finished, tmp_path):
    for folder in (finished[0], next((finished[0] / "checkpoints").iterdir())):
        assert_mistake(call("export", folder, "--to", "onnx", "--out", tmp_path / "g"), "onnx", "merged")
        told = call("export", folder, "--to", "adapter", "--onto", "original", "--out", tmp_path / "g")
        assert_mistake(told, "--onto has no effect on an export --to adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_exported_as_gguf_with_its_audit_and_its_adapter_too(finished, tmp_path):
    shown = call("export", finished[0], "--to", "gguf", "--dtype", "q8_0", "--out", tmp_path / "g")
    assert shown.exit_code == 0, shown.stderr
    assert "gguf against the model as trained: mean KL" in shown.stdout
    assert {path.name for path in (tmp_path / "g").iterdir()} == {"model.gguf", "Modelfile", "README.md", "export.json"}
    assert json.loads((tmp_path / "g/export.json").read_text())["comparisons"]["gguf"]["mean_kl"] < 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "g", gguf_file="model.gguf")("say cat").input_ids
    assert call("export", finished[0], "--to", "gguf-adapter", "--out", tmp_path / "a").exit_code == 0
    assert (tmp_path / "a/adapter.gguf").read_bytes()[:4] == b"GGUF"
    assert_mistake(call("export", finished[0], "--to", "gguf", "--dtype", "q3_k", "--out", tmp_path / "n"), "q4_k_m")


@pytest.mark.slow
def test_what_the_readme_says_of_other_programs_is_so(finished, model_folder, tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    section = readme.split("## Use it elsewhere\n")[1].split("\n## ")[0]
    commands, code, *_ = (block.split("\n", 1)[1] for block in section.split("```")[1::2])
    monkeypatch.chdir(tmp_path)
    lines = commands.splitlines()
    assert len(lines) == 5
    for line in lines:
        verb, run, *more = shlex.split(line, comments=True)[1:]
        assert (verb, run) == ("export", "runs/default")
        done = call(verb, finished[0], *more)
        assert done.exit_code == 0, done.output
    said, ids = {}, torch.arange(3, 20)[None]
    statements = [line for line in code.replace("Qwen/Qwen3-8B", str(model_folder)).splitlines() if line]
    for line in statements:
        exec(line, said)
        if line.startswith("model ="):
            name = line.split('"')[-2]
            said[name] = said["model"].eval()(ids, use_cache=False).logits.float()
    assert call("export", finished[0], "--onto", "original", "--dtype", "float32", "--out", "original").exit_code == 0
    assert json.loads(Path("original/export.json").read_text())["onto"] == "original"
    wanted = {"merged": load_run(finished[0])[0], "adapter": load_base("original", quantization="none")}
    for name, model in wanted.items():
        assert tiny.relative(said[name], tiny.logits(model, ids)) < 1e-2  # bf16
    # bitsandbytes decodes layers as narrow as these wrongly on a CPU: test_requantize.py has wider ones.
    assert torch.isfinite(said["quantized"]).all()
    assert Path("gguf/model.gguf").is_file()
    assert Path("gguf-adapter/adapter.gguf").is_file()


def test_recipes_can_be_listed_shown_and_copied(tmp_path):
    assert "quickstart" in call("recipes", "list").stdout
    assert call("recipes", "show", "default").stdout.startswith("#")
    assert call("recipes", "copy", "default", tmp_path / "mine.yaml").exit_code == 0
    assert_mistake(call("recipes", "copy", "default", tmp_path / "mine.yaml"), "already exists")
    assert call("recipes", "copy", "quickstart", tmp_path / "its-own.yaml").exit_code == 0
    copied, shipped = (read_recipe(name, ["output=runs/one"]) for name in (tmp_path / "its-own.yaml", "quickstart"))
    assert copied == shipped, "with base and rows where they are"
    assert_mistake(call("recipes", "copy", "default", tmp_path / "none" / "mine.yaml"), "cannot be written")
    assert_mistake(call("recipes", "show", "defalt"), "defalt", "default")
    assert "lora.rank" in call("recipes", "schema").stdout


def test_a_run_folder_that_was_moved_goes_on_where_it_is_now(finished, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "moved")
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(str(finished[0]), f"{tmp_path}/before"))
    told = f"{run} was moved or copied from {tmp_path}/before", f"add output={run}"
    assert_mistake(call("train", run / "recipe.yaml", "--resume"), *told)
    original = shutil.copytree(run, tmp_path / "before")
    assert_mistake(call("train", run / "recipe.yaml", "--resume"), *told, f"output={original}")
    assert call("train", run / "recipe.yaml", "--resume", f"output={run}").exit_code == 0
    assert verify(run).faults == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train"], "error: missing argument 'recipe'; see qlora-kit train --help"),
        (["trian"], "error: no such command 'trian'. Did you mean 'train'? see qlora-kit --help"),
        (
            ["plan", "quickstart", "--bugdet", "3"],
            "error: no such option: --bugdet (Possible options: --budget); see qlora-kit plan --help",
        ),
        (["recipes", "show"], "error: missing argument 'name'; see qlora-kit recipes show --help"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_told_in_one_line(monkeypatch, capsys, words, told):
    monkeypatch.setattr(sys, "argv", ["qlora-kit", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", f"{told}\n")


def test_a_command_that_needs_another_word_shows_its_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qlora-kit", "recipes"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "schema" in capsys.readouterr().err


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys; sys.argv = ['qlora-kit', '--help']\n"
        "from qlora_kit.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'pydantic', 'bitsandbytes'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "train" in done.stdout
    assert done.stdout.strip().endswith(("[]", "['pydantic']"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_and_tells_how_to_go_on(recipe, number, code):
    command = [str(Path(sys.executable).with_name("qlora-kit")), "train", str(recipe), "train.steps=100000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    metrics = recipe.parent / "run" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count("\n") > 3:
            break
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    assert "--resume" in output
    assert "Traceback" not in output
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    newest = max(path.parent.name for path in (recipe.parent / "run" / "checkpoints").glob("step-*/manifest.json"))
    assert newest == f"step-{step:06d}", "not a step is lost"
    assert f"Not finished: the last is step {step:,} of 100,000." in (metrics.parent / "report.html").read_text()
