"""A finished run as weights for other programs, and what each kind of export costs, side by side."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.base.formats import Kind, Quantization
from qlora_kit.data import Batch, Encoded, EncodedSet
from qlora_kit.errors import QloraKitError, RunError
from qlora_kit.export import check_request, export_adapter, export_merged, export_quantized
from qlora_kit.recipe import Recipe, read_recipe
from qlora_kit.recipe.tasks import TASKS
from qlora_kit.report.folder import SCORES as SCORED
from qlora_kit.report.folder import TEXT, document
from qlora_kit.run.folder import DATA, RECIPE, SCORES, provenance_of
from qlora_kit.run.recorded import PLAIN, way_to_ask
from qlora_kit.run.rows import eval_batches, held_out_rows, training_rows
from qlora_kit.run.tokenizer import pad_id
from qlora_kit.run.use import load_run, run_of
from qlora_kit.storage import passing_folder

KINDS = ("merged", "adapter", "quantized", "gguf", "gguf-adapter")
FORMATS = ("nf4", "fp4", "int8")

CALIBRATION_ROWS = 128
"""Training rows on which re-quantised codes and constants are chosen."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a run is to be exported as.

    Attributes:
        to: merged, quantized, adapter, gguf or gguf-adapter.
        onto: what the adapter is merged into, dequantized or original.
        dtype: of merged weights, of what stays dense in a quantised export, or of a GGUF file; None takes bfloat16, or
            q4_k_m.
        quantization: nf4, fp4 or int8; None is the base's own.
        calibration_rows: training rows on which codes and constants are chosen anew; 0 rounds each weight for itself.
        max_kl: largest mean KL of the audit that passes; None takes the kind's own.
        force: take the adapter although its base's fingerprint differs, and write what the audit finds too far off.
    """

    to: str = "merged"
    onto: str = "dequantized"
    dtype: str | None = None
    quantization: str | None = None
    calibration_rows: int = CALIBRATION_ROWS
    max_kl: float | None = None
    force: bool = False

    @property
    def is_gguf(self) -> bool:
        """Whether the file is one of llama.cpp's."""
        return self.to.startswith("gguf")

    @property
    def written_in(self) -> str:
        """The dtype, where none was said, too."""
        return self.dtype or ("q4_k_m" if self.is_gguf else "bfloat16")

    def check_options(self) -> None:
        """Refuse an option that would change nothing of what is asked for (RunError)."""
        is_adapter, is_quantized = self.to.endswith("adapter"), self.to == "quantized"
        idle = {
            "--onto": is_adapter and self.onto != "dequantized",
            "--dtype": is_adapter and self.dtype is not None,
            "--max-kl": is_adapter and self.max_kl is not None,
            "--quantization": not is_quantized and self.quantization is not None,
            "--calibration-rows": not is_quantized and self.calibration_rows != CALIBRATION_ROWS,
        }
        name = next((name for name, is_idle in idle.items() if is_idle), None)
        if name is not None:
            raise RunError(f"{name} has no effect on an export --to {self.to}; leave it out")

    def check(self, out: Path | None, recipe: Recipe) -> None:
        """Refuse before a model is loaded what cannot be (RunError); `out` is None where the folder is chosen later."""
        if self.to not in KINDS:
            raise RunError(f"--to {self.to} is not one of the kinds of export: {', '.join(KINDS)}")
        if self.quantization not in (None, *FORMATS):
            raise RunError(f"--quantization {self.quantization} is not one of the formats: {', '.join(FORMATS)}")
        (_gguf().check_gguf_request if self.is_gguf else check_request)(out, self.written_in, self.onto)
        if self.to.endswith("adapter") and recipe.train.full_finetune:
            raise RunError(f"{recipe.output} trained every weight and has no adapter; export --to merged")
        if self.onto == "original" and recipe.lora.init == "loftq":
            raise RunError(
                "lora.init=loftq put what quantising lost into the adapter, and the original weights already have it; "
                "export --onto dequantized"
            )


@dataclass(frozen=True)
class _Loaded:
    """A run in memory, and the rows on which its exports are made and judged."""

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe

    @cached_property
    def rows(self) -> EncodedSet:
        """What was held out."""
        return held_out_rows(self.recipe, self.tokenizer, self.model.config, None)

    @cached_property
    def held_out(self) -> list[Batch] | None:
        """Rows of the audit; None where nothing was held out."""
        return self._batches(self.rows.rows) or None

    @property
    def scored_loss(self) -> float | None:
        """What the run lost on these rows when it was scored, in nats a token or text; None where it was scored on
        others, with another loss, or not at all."""
        if not (self.folder / SCORES).is_file() or TASKS[self.recipe.train.task].is_preference:
            return None
        scored_on = document(self.folder / DATA, {"fingerprints?": {"*": TEXT}}).get("fingerprints", {})
        if scored_on.get("eval") != self.rows.fingerprint:
            return None
        loss: float | None = document(self.folder / SCORES, SCORED)["adapter"].get("loss")
        return loss

    @property
    def asked_by(self) -> dict[str, str]:
        """How the run was asked in training; nothing where it tells texts apart."""
        if self.recipe.train.task == "classify":
            return {}
        run = run_of(self.folder)
        assert run is not None  # its model is loaded
        return way_to_ask(run, self.recipe)

    def calibration(self, count: int) -> list[Batch]:
        """Some training rows."""
        if count == 0:
            return []
        return self._batches(training_rows(self.recipe, self.tokenizer, self.model.config, count))

    def _batches(self, rows: Sequence[Encoded]) -> list[Batch]:
        return eval_batches(rows, pad_id(self.tokenizer), self.model.device, self.recipe.memory.eval_tokens)

    def export(self, out: Path, asked: Asked) -> dict[str, Any]:
        """Write one export."""
        provenance = provenance_of(self.recipe)
        if asked.to == "adapter":
            return export_adapter(self.model, out, tokenizer=self.tokenizer, provenance=provenance)
        if asked.to == "gguf-adapter":
            return _gguf().export_gguf_adapter(self.model, out, provenance=provenance)
        common: dict[str, Any] = {
            "onto": asked.onto,
            "dtype": asked.written_in,
            "audit_batches": self.held_out,
            "provenance": provenance | self.asked_by,
            "is_whole": self.recipe.train.full_finetune,
            "max_kl": asked.max_kl,
            "scored_loss": None if asked.force else self.scored_loss,
            "force": asked.force,
        }
        if asked.to == "merged":
            return export_merged(self.model, self.tokenizer, out, **common)
        if asked.is_gguf:
            is_chat = self.asked_by.get("prompts") != PLAIN
            return _gguf().export_gguf(self.model, self.tokenizer, out, is_chat=is_chat, **common)
        how = None if asked.quantization is None else Quantization(cast(Kind, asked.quantization))
        rows = self.calibration(asked.calibration_rows)
        return export_quantized(self.model, self.tokenizer, out, quantization=how, calibration=rows, **common)


def export_run(folder: Path, out: Path, asked: Asked, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Write a run's weights for other programs.

    Args:
        folder: of the run, or one of its checkpoints.
        out: the new folder.
        asked: as what.
        trust_remote_code: let the model's own code run.

    Returns:
        What export.json holds.
    """
    if (run := run_of(folder)) is not None:
        asked.check(out, read_recipe(run / RECIPE))
        asked.check_options()
    loaded = _Loaded(folder, *load_run(folder, force=asked.force, trust_remote_code=trust_remote_code))
    return loaded.export(out, asked)


def compare_exports(
    folder: Path, out: Path | None, asked: Asked, *, trust_remote_code: bool = False
) -> list[dict[str, Any]]:
    """Write a run's weights as every kind of export there is, one after another, and audit each.

    Args:
        folder: of the run, or one of its checkpoints.
        out: a new folder that keeps them, one folder a kind; None keeps none, and holds one at a time beside the run.
        asked: dtype, format, calibration rows and force for all of them; the kind is not read.
        trust_remote_code: let the model's own code run.

    Returns:
        a row a kind: `name`, `bytes` of all its files, the numbers of its audit, and `refused` where it cannot be.
    """
    asked = replace(asked, max_kl=float("inf"))
    if (run := run_of(folder)) is not None:
        replace(asked, to="merged", onto="dequantized").check(out, read_recipe(run / RECIPE))
    loaded = _Loaded(folder, *load_run(folder, force=asked.force, trust_remote_code=trust_remote_code))
    rows: list[dict[str, Any]] = []
    for name, one in _each(asked).items():
        with _place(folder, out, name) as place:
            try:
                one.check(place, loaded.recipe)
                exported = loaded.export(place, one)
            except QloraKitError as error:
                rows.append({"name": name, "refused": str(error)})
                continue
            held = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
            rows.append({"name": name, "bytes": held, **next(iter(exported["comparisons"].values()), {})})
    return rows


def _gguf() -> ModuleType:
    """The room that needs the package `gguf`, which not everybody has."""
    from qlora_kit.export import gguf

    return gguf


def _each(asked: Asked) -> dict[str, Asked]:
    """The kinds by name, which is that of their folder too."""
    quantized = replace(asked, to="quantized", onto="dequantized")
    gguf = replace(asked, to="gguf", onto="dequantized", dtype=None)
    return {
        "merged": replace(asked, to="merged", onto="dequantized"),
        "merged-onto-original": replace(asked, to="merged", onto="original"),
        "quantized": quantized,
        "quantized-plain": replace(quantized, calibration_rows=0),
        "gguf-q8_0": replace(gguf, dtype="q8_0"),
        "gguf-q4_k_m": replace(gguf, dtype="q4_k_m"),
        "adapter": replace(asked, to="adapter", onto="dequantized"),
        "gguf-adapter": replace(gguf, to="gguf-adapter"),
    }


@contextmanager
def _place(folder: Path, out: Path | None, name: str) -> Iterator[Path]:
    """Where an export goes: a folder that stays, or one that is gone afterwards."""
    if out is not None:
        yield out / name
        return
    with passing_folder(folder / "compare") as passing:
        yield passing / name
