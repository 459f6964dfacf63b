"""A run on fake tensors: the very code of the real one, with a ledger, no weights and no accelerator.

Real and fake differ in four places, each a seam of its own:
- where weights come from: a model built from its configuration, instead of the pages of a checkpoint;
- the optimizer's arithmetic: bitsandbytes reads values, so `AdapterOptimizer.rehearse` does all but that;
- the writer: `rehearse_checkpoint`, and an export's rehearsal, make what is written and write nothing;
- values: nothing here asks whether a loss is finite, and whether rows are packed is told, not read (`_told_packing`).
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import PretrainedConfig, PreTrainedModel, masking_utils
from transformers.initialization import no_init_weights

from qlora_kit.base.architecture import build_model, expected_untrained
from qlora_kit.base.attention import implementation
from qlora_kit.base.dense import QuantizedLinear, QuantizedWeight
from qlora_kit.base.freeze import body_linears, freeze_and_quantize
from qlora_kit.base.record import keep_record
from qlora_kit.base.text import text_parameters
from qlora_kit.base.vocabulary import QuantizedTable
from qlora_kit.data.pack import SHORT
from qlora_kit.errors import ModelError
from qlora_kit.lora import (
    REFERENCE,
    LoraReport,
    adapter_constants,
    adapter_parameters,
    add_recipe_lora,
    base_parameter_count,
)
from qlora_kit.lora.layer import LoraLinear
from qlora_kit.memory import Ledger
from qlora_kit.ops.stand_in import as_on_card
from qlora_kit.plan.depths import (
    count_layers,
    role,
    with_depth,
)
from qlora_kit.plan.recall import RecallingMode
from qlora_kit.plan.workload import Workload
from qlora_kit.recipe import TASKS, Layout, Lora, Train
from qlora_kit.train.activations import Blocks, activation_blocks, set_activation_policy
from qlora_kit.train.checkpoint import rehearse_checkpoint
from qlora_kit.train.classes import head_for
from qlora_kit.train.evaluate import rehearse_evaluation
from qlora_kit.train.isolation import no_packing
from qlora_kit.train.optim import AdapterOptimizer
from qlora_kit.train.step import accumulate_gradients
from qlora_kit.train.tasks import Task, task_of

After = Callable[[PreTrainedModel], None]

Named = list[tuple[str, torch.nn.Parameter]]


@dataclass(slots=True)
class _FakeRows:
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    documents: tuple[int, ...] | None
    attention_mask: Tensor | None
    is_good: Tensor | None


@dataclass(slots=True)
class FakeRun:
    """A model on fake tensors, ready to train."""

    model: PreTrainedModel
    parameters: Named
    optimizer: AdapterOptimizer
    work: Workload
    ledger: Ledger
    second: PreTrainedModel | None
    """Of full fine-tuning the model that a task holds to: there is no adapter to switch off. It only stands there,
    since a pass through it takes what one through the other takes."""


def fake_run(config: PretrainedConfig, work: Workload, does: Callable[[FakeRun], None]) -> dict[str, Any]:
    """A part of a run at the depth that the blocks of `work` are."""
    blocks = work.activations
    if isinstance(blocks, Blocks) and blocks.all != count_layers(config, head_for(work.task)):
        config = with_depth(config, blocks.all)
    with quiet(), RecallingMode():
        ledger = Ledger(host_apart=work.on_card)
        model, parameters = _build(config, work, ledger)
        second = _second(config, work, ledger)
        optimizer = AdapterOptimizer(parameters, work.optimizer, master_weights=work.master_weights)
        ledger.own("optimizer_state", (tensor for _, tensor in optimizer.state_tensors()))
        ledger.paged_bytes = sum(tensor.nbytes for tensor in optimizer.pageable()) if work.on_card else 0
        run = FakeRun(model, parameters, optimizer, work, ledger, second)
        del optimizer, second  # they go when the run lets them go
        with ledger, as_on_card(work.on_card), _named_if_read(model), _told_if_it_decides(model, work):
            does(run)
    names = list(activation_blocks(model))
    roles = {name: role(index, Blocks.of(blocks, len(names))) for index, name in enumerate(names)}
    return {
        "resident_bytes": ledger.current(),
        "host_peak_bytes": ledger.history.host_peak_by_phase(),
        "paged_bytes": ledger.paged_bytes,
        "parameters": _count_parameters(model, parameters),
        "layers": len(names),
        "history": ledger.history,
        "places": {(phase, roles.get(block)): held for (phase, block), held in ledger.history.peaks_by_place().items()},
    }


def train_once(run: FakeRun) -> None:
    """The last micro-batch of a step: where there may be several, the gradients of those before stand through it."""
    work, ledger = run.work, run.ledger
    if work.gradients_stand:
        for _, parameter in run.parameters:
            parameter.grad = torch.zeros_like(parameter)
        ledger.own("gradients", (parameter.grad for _, parameter in run.parameters if parameter.grad is not None))
    shape = (work.micro_batch, work.tokens)
    is_packed = work.layout != "apart"
    rows = [_rows(shape, work) for _ in range(work.accumulation)]  # all of a step are there from its start
    with _told_packing(is_packed) as asked:
        accumulate_gradients(
            run.model, rows[:1], shape[0] * shape[1], _task(work), phase=ledger.phase, loss_chunk=work.loss_chunk
        )
    if is_packed and not asked:
        raise no_packing(run.model)
    with ledger.phase("optimizer"):
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in run.parameters], 1.0)
        run.optimizer.rehearse()


def use_it(after: Mapping[str, After], run: FakeRun) -> None:
    """An evaluation, a checkpoint, and what comes after the run, when nothing is left of the optimizer."""
    work, ledger = run.work, run.ledger
    for module in run.model.modules():
        is_looked_up = isinstance(module, QuantizedTable)  # an embedding, of which rows are decoded
        if isinstance(module, QuantizedLinear) and module.workspace is not None and not is_looked_up:
            module.lent(work.dtype)  # a step leaves its buffer behind
    if work.eval_shape is not None:
        rows = _rows(work.eval_shape, replace(work, layout="apart", is_padded=work.eval_shape[0] > 1))
        with _told_packing(False):
            rehearse_evaluation(run.model, rows, _task(work), phase=ledger.phase, loss_chunk=work.loss_chunk)
    with ledger.phase("save"):
        kept = dict(run.parameters) | dict(adapter_constants(run.model))
        rehearse_checkpoint(kept, run.optimizer, on_card=work.on_card)
    del run.optimizer, run.second
    for phase, act in after.items():
        with ledger.phase(phase):
            act(run.model)


def _count_parameters(model: PreTrainedModel, parameters: Named) -> dict[str, int]:
    return {
        "total": base_parameter_count(model),
        "trainable": sum(parameter.numel() for _, parameter in parameters),
        "quantized": sum(module.weight_count for module in model.modules() if isinstance(module, QuantizedWeight)),
    }


def _build(config: PretrainedConfig, work: Workload, ledger: Ledger) -> tuple[PreTrainedModel, Named]:
    """The model as loading leaves it, with its adapter; the dense weights themselves are pages of a file."""

    def pages(of: Workload) -> PreTrainedModel:
        dense = dense_model(config, of)
        ledger.ignore(dense.parameters())
        return dense

    model = pages(work)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else work.dtype
    originals = pages(replace(work, dtype=stored)) if work.lora is not None and work.lora.init == "loftq" else None
    linears = [module.weight for _, module in body_linears(model)]
    with ledger, ledger.phase("load"):
        as_loaded(model, work)
    with ledger, ledger.phase("load/dense"):
        if work.on_card and work.quantization.kind != "none" and linears:
            # A matrix lies there dense while it is quantised; counted where all the others are quantised already.
            torch.empty_like(max(linears, key=torch.numel))
    with ledger, ledger.phase("load/adapters"):
        if work.lora is not None:
            if work.has_reference:
                add_adapter(model, work.lora, name=REFERENCE)
                for _, parameter in adapter_parameters(model, REFERENCE):
                    parameter.requires_grad_(False)
            add_adapter(model, work.lora, originals)
    del linears
    ledger.adopt(model, activation_blocks(model))
    named = list(text_parameters(model).items() if work.lora is None else adapter_parameters(model))
    for _, parameter in named:
        parameter.requires_grad_(True)
    set_activation_policy(model, work.activations)
    return model.train(), named


def add_adapter(
    model: PreTrainedModel, lora: Lora, originals: PreTrainedModel | None = None, name: str = "default"
) -> LoraReport:
    """Attach an adapter as a run does. What is weighed is how many tokens are added, and not which."""
    return add_recipe_lora(model, lora, token_ids=range(len(lora.added_tokens)), name=name, originals=originals)


def _second(config: PretrainedConfig, work: Workload, ledger: Ledger) -> PreTrainedModel | None:
    """The reference of full fine-tuning, where the task has one."""
    if work.lora is not None or not TASKS[work.task].holds_to_start:
        return None
    model = dense_model(config, work)
    ledger.ignore(model.parameters())
    with ledger, ledger.phase("load"):
        as_loaded(model, work)
    ledger.own("base_weights", (*model.parameters(), *model.buffers()))
    return model


def dense_model(config: PretrainedConfig, work: Workload) -> PreTrainedModel:
    """The model as its checkpoint has it, nothing frozen or quantised yet."""
    attention = implementation(work.attention, torch.device("cpu"), work.dtype)  # sdpa's keep what flex and flash keep
    with no_init_weights():
        model = build_model(config, work.dtype, attention, head_for(work.task))
    keep_record(model, work.quantization, work.dtype, untrained=expected_untrained(model))
    return model


def as_loaded(model: PreTrainedModel, work: Workload) -> PreTrainedModel:
    """The same as loading leaves it: frozen, and quantised as the workload says."""
    cpu = torch.device("cpu")
    return freeze_and_quantize(model, work.quantization, work.dtype, cpu, work.skip, quantize_head=work.quantize_head)


def _task(work: Workload) -> Task:
    return task_of(Train.model_validate({"task": work.task}), has_reference=work.has_reference)


def _rows(shape: tuple[int, int], work: Workload) -> _FakeRows:
    is_text, has_verdict = work.task == "classify", work.task == "kto"
    documents = _documents(shape, work.layout)
    shape = (1, math.prod(shape)) if work.layout == "joined" else (shape[0] * TASKS[work.task].sequences, shape[1])
    return _FakeRows(
        input_ids=torch.zeros(shape, dtype=torch.int64),
        labels=torch.zeros(shape[:1] if is_text else shape, dtype=torch.int64),
        position_ids=torch.zeros(shape, dtype=torch.int64) if documents else None,
        documents=documents,
        attention_mask=torch.zeros(shape, dtype=torch.bool) if is_text and work.is_padded else None,
        is_good=torch.zeros(shape[0] // 2, dtype=torch.bool) if has_verdict else None,
    )


def _documents(shape: tuple[int, int], layout: Layout) -> tuple[int, ...] | None:
    """Those that take most, as in `full_packs`: as long as can be, and one that no window cuts. Where a window does, a
    mask makes of shared keys and values a copy for each head, and the short one keeps its own beside them."""
    rows, tokens = shape
    if layout == "apart":
        return None
    cut = (tokens - SHORT, SHORT) if rows * tokens > 2 * SHORT else (tokens,)
    return (tokens,) * (rows - 1) + cut if layout == "joined" else cut * rows


@contextmanager
def _told_packing(is_packed: bool) -> Iterator[list[bool]]:
    """transformers reads off the positions whether a row holds several documents. It cannot on fake tensors, takes the
    worst, and builds a mask with which attention keeps more than in an unpacked step: there the answer is given here.

    What is yielded fills with an entry a question: a model that never asks does not keep documents apart."""
    ask, asked = masking_utils.find_packed_sequence_indices, list[bool]()

    def answer(position_ids: Tensor) -> Tensor | None:
        asked.append(True)
        return ask(position_ids) if is_packed else None

    masking_utils.find_packed_sequence_indices = answer
    try:
        yield asked
    finally:
        masking_utils.find_packed_sequence_indices = ask


@contextmanager
def _named_if_read(model: PreTrainedModel) -> Iterator[None]:
    """Name the layer whose weight a model reads by itself: of what is quantised or adapted there is none to read, and a
    product with the dense one would pass the adapter by."""
    try:
        yield
    except AttributeError as error:
        names = [name for name, module in model.named_modules() if module is error.obj]
        if error.name != "weight" or not names or not isinstance(error.obj, QuantizedLinear | LoraLinear):
            raise
        leaf = names[0].removesuffix(".base").rpartition(".")[2]
        raise ModelError(
            f"a {model.config.model_type} multiplies by the weight of {leaf} itself, bypassing quantisation and "
            f"adapters; leave it as it is: add {leaf} to base.skip, and list in lora.targets the layers to adapt, "
            "without it"
        ) from error


@contextmanager
def _told_if_it_decides(model: PreTrainedModel, work: Workload) -> Iterator[None]:
    """Say of a model that does this or that by the values of its tensors that it cannot be planned: here are none."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        instead = "" if work.layout == "apart" else "set data.packing=false, or "
        raise ModelError(
            f"a {model.config.model_type} reads values of its tensors to decide what to do ({error.func}), but a plan "
            f"has only shapes; {instead}use another release of transformers, or another model"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """transformers warns of missing weights and of what it thinks of a fake device; none of it concerns a plan."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
