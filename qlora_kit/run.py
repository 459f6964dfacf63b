"""One run from end to end, a function an arrow:

    recipe -> prepare (files, tokenizer, rows) -> plan -> load and adapt -> train -> score -> report

Everything that a person sees goes through `Watch`; everything that stays goes into the run folder.
"""

import fcntl
import importlib.metadata
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.base import load_base, locate_model
from qlora_kit.base.dense import parameter_count
from qlora_kit.base.load import read_config, resolve_device
from qlora_kit.data import Batch, Encoded, EncodedSet, collate, encode_rows, find_template, load_rows, split_eval
from qlora_kit.errors import DataError, FitError, RunError
from qlora_kit.export import export_adapter, export_merged
from qlora_kit.lora import LoraReport, adapter_parameters, adapters_off, add_lora, load_adapter, save_adapter
from qlora_kit.memory import Ledger, PeakCounter
from qlora_kit.plan import plan_methods
from qlora_kit.plan.devices import device_name
from qlora_kit.recipe import Base, Data, Recipe, dump_recipe, read_recipe
from qlora_kit.report import write_report
from qlora_kit.storage import write_json, write_text
from qlora_kit.train.activations import set_activation_policy
from qlora_kit.train.checkpoint import Progress, load_checkpoint, newest_checkpoint
from qlora_kit.train.evaluate import Score, evaluate_loss, exact_match, generate_texts
from qlora_kit.train.loop import Job, rehearse_longest, train_loop
from qlora_kit.train.metrics import MetricsLog
from qlora_kit.train.optim import AdapterOptimizer, definite_masters
from qlora_kit.train.pace import ROWS_A_STEP, Pace, set_pace
from qlora_kit.units import format_bytes
from qlora_kit.watch import Watch

ADAPTER = "adapter"
SAMPLES = 4
"""Held-out rows that are answered before and after."""
SHORT_ANSWER = 32
"""Tokens up to which every answer is generated and compared: above that exact match says little and costs much."""
SAMPLE_TOKENS = 64
"""Most tokens of a sample where answers are longer."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known before any weight is read.

    Attributes:
        folder: of the model.
        config: of the model.
        tokenizer: with the chat template that the recipe names.
        train: encoded training rows.
        eval: encoded held-out rows; empty where the recipe wants none.
        pace: steps and batch sizes.
    """

    folder: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    train: EncodedSet
    eval: EncodedSet
    pace: Pace

    @property
    def pad_id(self) -> int:
        """Fills rows on the right; labels go by position, so any token will do."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.tokenizer.eos_token_id or 0


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended.

    Attributes:
        folder: the run folder.
        finished: False where a stop was requested before the last step.
        step: optimizer steps done.
        scores: as in scores.json; None where the run did not finish or has no held-out rows.
        seconds: wall-clock time of the whole run.
    """

    folder: Path
    finished: bool
    step: int
    scores: dict[str, Any] | None
    seconds: float


def plan_memory(recipe: Recipe, watch: Watch | None = None) -> dict[str, Any]:
    """What plan.json would hold: nothing is loaded but the model's configuration and, where they are, the rows.

    Without the rows every row is taken to be `data.max_tokens` long, and how many steps they make is not known.

    Raises:
        QloraKitError: as `train`, as far as it gets.
    """
    watch = watch or Watch()
    if not _rows_are_missing(recipe):
        return _plan(recipe, prepare(recipe, watch, weights=False))
    watch.note(f"there is no {recipe.data.train}: planned for rows of data.max_tokens={recipe.data.max_tokens}")
    config = read_config(locate_model(recipe.base.model, recipe.base.revision, weights=False, notify=watch.note))
    tokens = recipe.data.max_tokens
    pace = set_pace(recipe.train, ROWS_A_STEP, tokens, ROWS_A_STEP * tokens, _parameters(config))
    return plan_methods(recipe, config, pace, tokens) | {"steps": None, "hours": None}


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    watch: Watch | None = None,
    trust_remote_code: bool = False,
) -> Result:
    """Run a recipe and fill its run folder.

    Args:
        recipe: from `read_recipe`.
        resume: go on from the newest checkpoint that verifies.
        overwrite: remove a run that stands in the folder.
        watch: is told what happens.
        trust_remote_code: let the model folder's own code run.

    Raises:
        QloraKitError: anything that the user can mend, one line each; a `FitError` if the plan is above the budget.
    """
    started, watch, folder = time.monotonic(), watch or Watch(), Path(recipe.output)
    resolve_device(recipe.base.device)
    _open_run_folder(folder, resume, overwrite)
    prepared = prepare(recipe, watch, weights=True)
    with _locked(folder):
        plan = _plan(recipe, prepared)
        _describe_run(recipe, prepared, plan, folder)
        watch.planned(plan)
        check_budget(plan)
        model, report = _load_and_adapt(recipe, prepared, plan, trust_remote_code)
        watch.adapted(report)
        finished, progress = _train(recipe, prepared, plan, model, folder, watch, resume)
        save_adapter(model, folder / ADAPTER, provenance=_provenance(recipe))
        scores = None
        if finished and prepared.eval.rows:
            scores = score(model, prepared)
            write_json(folder / "scores.json", scores)
            watch.scored(scores)
        write_report(folder)
    return Result(folder, finished, progress.step, scores, time.monotonic() - started)


def prepare(recipe: Recipe, watch: Watch, *, weights: bool) -> Prepared:
    """Find the model, read and encode the rows, and set the pace.

    Args:
        recipe: the run.
        watch: is told of downloads and of what became of the rows.
        weights: whether the model's weights are needed, or its configuration and tokenizer alone.
    """
    folder = locate_model(recipe.base.model, recipe.base.revision, weights=weights, notify=watch.note)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, recipe.data.template)
    train_rows, eval_rows = _read_rows(recipe, tokenizer, config)
    trained, rows = train_rows.counts.trained_tokens, train_rows.counts.rows
    longest = max(len(row.input_ids) for row in train_rows.rows)
    pace = set_pace(recipe.train, rows, longest, trained, _parameters(config))
    prepared = Prepared(folder, config, tokenizer, train_rows, eval_rows, pace)
    watch.prepared(prepared)
    if pace.warning is not None:
        watch.note(pace.warning)
    return prepared


def load_tokenizer(folder: Path, template: str = "auto") -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the chat template that the recipe names, so that every export carries it.

    Raises:
        DataError: there is no tokenizer in the folder, or no such template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} has no tokenizer that can be read: {str(error).splitlines()[0]}") from error
    source = find_template(template)
    if source is not None:
        tokenizer.chat_template = source
    return tokenizer


def load_run(
    folder: Path, *, device: str | None = None, bare_base: bool = False, force: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Recipe]:
    """A finished run as a model to use: its base, with its adapter unless the bare base is asked for.

    Args:
        folder: the run folder.
        device: other than the recipe's.
        bare_base: leave the adapter away.
        force: take the adapter although its base's fingerprint differs.

    Raises:
        RunError: the folder is no run, or has no adapter yet.
    """
    if not (folder / "recipe.yaml").is_file():
        raise RunError(f"{folder} is no run folder (it has no recipe.yaml); give the output of a `qlora-kit train`")
    recipe = read_recipe(folder / "recipe.yaml")
    model = load_base(recipe.base.model, **_base_settings(recipe, device))
    if not bare_base:
        if not (folder / ADAPTER).is_dir():
            raise RunError(f"{folder} has no adapter yet; let the run finish with `qlora-kit train ... --resume`")
        load_adapter(model, folder / ADAPTER, force=force)
    tokenizer = load_tokenizer(locate_model(recipe.base.model, recipe.base.revision), recipe.data.template)
    return model, tokenizer, recipe


def evaluate(folder: Path, *, data: Path | None, bare_base: bool, force: bool) -> Score:
    """Loss, perplexity and, where answers are short, exact match: of a run, its bare base, or a folder with weights.

    Args:
        folder: a run folder, or a model folder (then `data` must be given).
        data: rows in any format that training reads; None takes the run's held-out rows.
        bare_base: leave the adapter away.
        force: take the adapter although its base's fingerprint differs.
    """
    if (folder / "recipe.yaml").is_file():
        model, tokenizer, recipe = load_run(folder, bare_base=bare_base, force=force)
        rows = _held_out_rows(recipe, tokenizer, model.config, data)
    else:
        if data is None:
            raise RunError(f"{folder} is no run folder; to evaluate a model folder give the rows with --data FILE")
        model = load_base(folder, quantization="none")
        tokenizer = load_tokenizer(folder)
        recipe = Recipe(base=Base(model=str(folder)), data=Data(train=str(data)))
        rows = _held_out_rows(recipe, tokenizer, model.config, data)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    measured, _ = score_rows(model, tokenizer, rows.rows, eval_batches(rows.rows, pad, model.device))
    return measured


def answer(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    raw: bool,
    bare_base: bool,
    force: bool,
) -> str:
    """What a run's model says to a prompt; through its chat template, where it has one and `raw` is not asked for."""
    model, tokenizer, _ = load_run(folder, bare_base=bare_base, force=force)
    if tokenizer.chat_template is not None and not raw:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    return generate_texts(model, tokenizer, [ids], max_new_tokens=max_new_tokens, temperature=temperature)[0]


def export_run(folder: Path, out: Path, *, to: str, onto: str, dtype: str, force: bool) -> dict[str, Any]:
    """Write a run's weights for other programs.

    Args:
        folder: of the run.
        out: the new folder.
        to: merged or adapter.
        onto: what the adapter is merged into; dequantized is built.
        dtype: of merged weights.
        force: take the adapter although its base's fingerprint differs.

    Returns:
        What export.json holds.
    """
    if to not in ("merged", "adapter"):
        raise RunError(f"--to {to} is not built yet in this version; built: merged, adapter")
    if onto != "dequantized":
        raise RunError(f"--onto {onto} is not built yet in this version; built: dequantized")
    model, tokenizer, recipe = load_run(folder, force=force)
    if to == "adapter":
        return export_adapter(model, out, provenance=_provenance(recipe))
    rows = _held_out_rows(recipe, tokenizer, model.config, None).rows
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    return export_merged(
        model,
        tokenizer,
        out,
        dtype=dtype,
        audit_batches=eval_batches(rows, pad, model.device),
        provenance=_provenance(recipe),
    )


def score(model: PreTrainedModel, prepared: Prepared) -> dict[str, Any]:
    """The base and the adapter on the held-out rows: losses, exact match where it says something, and a few answers."""
    batches = eval_batches(prepared.eval.rows, prepared.pad_id, model.device)
    with adapters_off(model):
        base, base_texts = score_rows(model, prepared.tokenizer, prepared.eval.rows, batches)
    adapter, texts = score_rows(model, prepared.tokenizer, prepared.eval.rows, batches)
    samples = [
        {
            "prompt": prepared.tokenizer.decode(row.prompt or [], skip_special_tokens=True),
            "reference": row.answer,
            "base": before,
            "adapter": after,
        }
        for row, before, after in list(zip(answered_rows(prepared.eval.rows), base_texts, texts, strict=False))[
            :SAMPLES
        ]
    ]
    return {
        "rows": len(prepared.eval.rows),
        "base": base.as_json(),
        "adapter": adapter.as_json(),
        "samples": samples,
    }


def score_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Encoded], batches: list[Batch]
) -> tuple[Score, list[str]]:
    """Loss of the model on `rows`, and its answers: to all rows where answers are short, to the first few otherwise."""
    measured = evaluate_loss(model, batches)
    answered = answered_rows(rows)
    if not answered:
        return measured, []
    lengths = [len(row.input_ids) - len(row.prompt or ()) for row in answered]
    is_short = max(lengths) <= SHORT_ANSWER
    asked = answered if is_short else answered[:SAMPLES]
    room = max(lengths) + 1 if is_short else SAMPLE_TOKENS
    texts = generate_texts(model, tokenizer, [row.prompt or [] for row in asked], max_new_tokens=room)
    if not is_short:
        return measured, texts
    fields = asdict(measured) | {"exact_match": exact_match(texts, [row.answer or "" for row in asked])}
    return Score(**fields), texts


def answered_rows(rows: list[Encoded]) -> list[Encoded]:
    """Rows that end in one answer to one prompt, so that a model can be asked for it."""
    return [row for row in rows if row.prompt is not None and row.answer is not None]


def eval_batches(rows: list[Encoded], pad_id: int, device: torch.device, micro_batch: int = 16) -> list[Batch]:
    """Held-out rows side by side, those of like length together."""
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    return [
        collate(ordered[start : start + micro_batch], pad_id).to(device)
        for start in range(0, len(ordered), micro_batch)
    ]


def _held_out_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, data: Path | None
) -> EncodedSet:
    """The run's held-out rows, or those of another file encoded as the run's own are."""
    if data is not None:
        rows = load_rows(str(data), format=recipe.data.format, columns=recipe.data.columns)
        return _encode(rows, recipe, tokenizer, config)
    held_out = _read_rows(recipe, tokenizer, config)[1]
    if not held_out.rows:
        raise RunError(f"{recipe.output} held no rows out (data.eval is null); give rows with --data FILE")
    return held_out


def _read_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> tuple[EncodedSet, EncodedSet]:
    data = recipe.data
    sources = (
        data.train
        if isinstance(data.train, str)
        else [item if isinstance(item, str) else item.model_dump(exclude_none=True) for item in data.train]
    )
    examples = load_rows(sources, format=data.format, columns=data.columns)
    held_out: list[Any] = []
    if data.eval == "auto":
        examples, held_out = split_eval(examples)
    elif data.eval is not None:
        held_out = load_rows(data.eval, format=data.format, columns=data.columns)
    encoded = _encode(examples, recipe, tokenizer, config)
    return encoded, _encode(held_out, recipe, tokenizer, config) if held_out else EncodedSet()


def _encode(
    examples: list[Any], recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> EncodedSet:
    text_config = config.get_text_config()
    return encode_rows(
        examples,
        tokenizer,
        loss_on="all" if recipe.train.task == "pretrain" else recipe.data.loss_on,
        max_tokens=recipe.data.max_tokens,
        over_length=recipe.data.over_length,
        vocab_size=text_config.vocab_size,
        max_positions=getattr(text_config, "max_position_embeddings", None),
    )


def _rows_are_missing(recipe: Recipe) -> bool:
    """Whether the rows are a local file that is not there (a hub id is looked for when it is read)."""
    path = recipe.data.train
    return isinstance(path, str) and Path(path).is_absolute() and not Path(path).exists()


def _plan(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    longest = max(len(row.input_ids) for row in prepared.train.rows)
    return plan_methods(recipe, prepared.config, prepared.pace, longest)


def check_budget(plan: Mapping[str, Any]) -> None:
    """Hold a plan against its budget.

    Raises:
        FitError: the peak is above it.
    """
    peak, budget = plan["methods"]["qlora"]["peak_bytes"], plan["budget"]
    if budget is not None and peak > budget:
        raise FitError(
            f"the plan needs {format_bytes(peak)}, memory.budget is {format_bytes(budget)}; "
            f"lower train.micro_batch (now {plan['micro_batch']}) or data.max_tokens; or memory.activations=recompute"
        )


def _load_and_adapt(
    recipe: Recipe, prepared: Prepared, plan: Mapping[str, Any], trust_remote_code: bool
) -> tuple[PreTrainedModel, LoraReport]:
    settings = _base_settings(recipe, None) | {"trust_remote_code": trust_remote_code}
    model = load_base(str(prepared.folder), **settings)
    model.config._name_or_path = recipe.base.model
    lora = recipe.lora
    report = add_lora(
        model,
        rank=int(lora.rank),
        alpha=lora.alpha,
        targets=lora.targets,
        dropout=lora.dropout,
        scaling=lora.scaling,
        init=lora.init,  # type: ignore[arg-type]
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        seed=recipe.train.seed,
    )
    set_activation_policy(model, plan["activations"])
    return model, report


def _train(
    recipe: Recipe,
    prepared: Prepared,
    plan: Mapping[str, Any],
    model: PreTrainedModel,
    folder: Path,
    watch: Watch,
    resume: bool,
) -> tuple[bool, Progress]:
    torch.manual_seed(recipe.train.seed)
    parameters = dict(adapter_parameters(model))
    optimizer = AdapterOptimizer(
        list(parameters.items()),
        recipe.train.optimizer,
        master_weights=definite_masters(recipe.train.master_weights),
        lr_ratio=recipe.lora.lr_ratio,
        weight_decay=recipe.train.weight_decay,
        seed=recipe.train.seed,
    )
    job = Job(
        model=model,
        parameters=parameters,
        optimizer=optimizer,
        rows=prepared.train.rows,
        eval_batches=eval_batches(prepared.eval.rows, prepared.pad_id, model.device),
        pad_id=prepared.pad_id,
        pace=prepared.pace,
        train=recipe.train,
        folder=folder,
        watch=watch.row,
        stop_requested=watch.stop_requested,
    )
    if resume:
        newest, faults = newest_checkpoint(folder / "checkpoints")
        for fault in faults:
            watch.note(f"left out a damaged checkpoint: {fault}")
        job.progress = load_checkpoint(newest, parameters, optimizer)
        watch.note(f"going on from {newest.name}")
    metrics = MetricsLog(folder / "metrics.jsonl", resume_from=job.progress.step if resume else None)
    with PeakCounter(model.device) as counter:
        ledger = Ledger(model)
        ledger.own("optimizer_state", (tensor for _, tensor in optimizer.state_tensors()))
        with ledger:
            rehearse_longest(job, ledger)
        try:
            finished = train_loop(job, metrics, counter, ledger)
        finally:
            metrics.close()
            _write_memory(folder, plan["methods"]["qlora"], ledger, counter)
    return finished, job.progress


def _write_memory(folder: Path, planned: Mapping[str, Any], ledger: Ledger, counter: PeakCounter) -> None:
    measured = ledger.summary()
    categories = measured["by_category"]
    error = {"peak": _relative(planned["peak_bytes"], measured["peak_bytes"])} | {
        name: _relative(planned["by_category"][name], count) for name, count in categories.items() if count
    }
    write_json(
        folder / "memory.json",
        {
            "planned": dict(planned),
            "measured": measured,
            "error": error,
            "device_counter": {"name": counter.name, "peak_bytes": counter.peak_bytes},
            "file_backed_bytes": counter.file_backed_bytes,
        },
    )


def _relative(planned: int, measured: int) -> float:
    return planned / measured - 1


def _describe_run(recipe: Recipe, prepared: Prepared, plan: Mapping[str, Any], folder: Path) -> None:
    write_text(folder / "recipe.yaml", dump_recipe(recipe))
    write_json(folder / "plan.json", dict(plan))
    write_json(folder / "env.json", _environment(resolve_device(recipe.base.device)))
    counts = {"train": asdict(prepared.train.counts)}
    if prepared.eval.rows:
        counts["eval"] = asdict(prepared.eval.counts)
    write_json(folder / "data.json", counts)


def _environment(device: torch.device) -> dict[str, Any]:
    packages = ("torch", "bitsandbytes", "transformers", "accelerate", "datasets", "safetensors")
    return {
        "qlora_kit": importlib.metadata.version("qlora-kit"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device_name(device),
        "cuda": torch.version.cuda or "none",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _provenance(recipe: Recipe) -> dict[str, str]:
    base = recipe.base
    return {
        "qlora_kit.base": base.model,
        "qlora_kit.revision": base.revision or "",
        "qlora_kit.quantization": base.quantization,
        "qlora_kit.double_quant": str(base.double_quant).lower(),
        "qlora_kit.block_size": str(base.block_size),
    }


def _base_settings(recipe: Recipe, device: str | None) -> dict[str, Any]:
    base = recipe.base
    return {
        "quantization": base.quantization,
        "double_quant": base.double_quant,
        "block_size": base.block_size,
        "compute_dtype": base.compute_dtype,
        "device": device or base.device,
        "skip": base.skip,
        "attention": base.attention,
        "revision": base.revision,
    }


def _parameters(config: PretrainedConfig) -> int:
    """Parameters of the model, counted on a model without storage."""
    from qlora_kit.base.load import build_model

    with torch.device("meta"):
        return parameter_count(build_model(config, torch.bfloat16, "sdpa"))


def _open_run_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file, and a run needs a folder of its own; set output to another name")
    has_run = (folder / "recipe.yaml").is_file()
    if resume and not has_run:
        raise RunError(f"{folder} holds no run to resume; start it without --resume")
    if has_run and not (resume or overwrite):
        raise RunError(f"{folder} holds a run already; go on with --resume, replace it with --overwrite, or set output")
    if folder.is_dir() and any(folder.iterdir()) and not has_run:
        raise RunError(f"{folder} is not empty and holds no run; set output to another folder")
    if overwrite and has_run:
        with _locked(folder):
            shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{folder} cannot be made: {error.strerror}; set output to a folder that can be written"
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One run a folder: the lock goes with the process that holds it, however it ends."""
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another run is writing to {folder}; wait for it, or set output to another folder"
            ) from None
        yield
