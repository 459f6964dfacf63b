"""The adapter as an export: PEFT's two files, and what they were trained against."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.export.folder import write_generation_config, write_tokenizer
from qlora_kit.export.sealed import check_disk, check_vacant, seal, settings_of, without_prefix, write_card
from qlora_kit.export.trained_against import trained_against
from qlora_kit.lora.adapters import CONFIG, save_adapter
from qlora_kit.lora.layer import carriers
from qlora_kit.storage import read_json, staged_folder, write_text


def export_adapter(
    model: PreTrainedModel,
    out: Path,
    *,
    name: str = "default",
    tokenizer: PreTrainedTokenizerBase | None = None,
    provenance: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write one adapter as PEFT reads it, with what it was trained against; the same adapter gives the same bytes.

    Args:
        model: carries the adapter.
        out: folder to make; it must not be there, or be empty.
        name: of the adapter.
        tokenizer: with its chat template and added tokens, saved beside the adapter; None leaves it out.
        provenance: facts for the file's metadata, the card and export.json; `base` and `revision` also go into
            adapter_config.json, where PEFT looks for the base.

    Returns:
        what export.json holds.

    Raises:
        AdapterError: there is no adapter of that name, or it is not finite.
        RunError: `out` is not empty, or the disk has no room.
    """
    adapters = {key: carrier.adapters[name] for key, carrier in carriers(model) if name in carrier.adapters}
    check_vacant(out)
    check_disk(out, sum(p.nbytes for adapter in adapters.values() for p in adapter.parameters()))
    facts, against = {"base": model.config._name_or_path, **(provenance or {})}, trained_against(model)
    with staged_folder(out, replaces=False) as staged:
        save_adapter(model, staged, name=name, provenance={**against, **facts})
        config = read_json(staged / CONFIG) | {"base_model_name_or_path": facts["base"]}
        config |= {"revision": facts["revision"]} if "revision" in facts else {}
        write_text(staged / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        if tokenizer is not None:
            write_tokenizer(tokenizer, staged)
            write_generation_config(model, tokenizer, staged)  # PEFT does not read it; who loads the base can
        sections: dict[str, Mapping[str, object]] = {
            "Provenance": facts,
            "Adapter": settings_of(adapters),
            "Trained against": without_prefix(against),
        }
        write_card(staged, "LoRA adapter", facts["base"], "peft", ["qlora-kit", "qlora", "lora"], sections)
        return seal(staged, {"kind": "adapter", "comparisons": {}, "provenance": facts, "trained_against": against})
