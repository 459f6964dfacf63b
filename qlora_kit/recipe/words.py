"""The schema in words: what each place in a recipe must hold, read off the types, and what was most likely meant."""

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qlora_kit.recipe.schema import Recipe, Says

Trail = tuple[str | int, ...]
"""The way to a value: `("data", "train", 0, "weight")`."""

FAMILIAR = {
    "base_model": "base.model",
    "model_name": "base.model",
    "model_name_or_path": "base.model",
    "load_in_4bit": "base.quantization",
    "load_in_8bit": "base.quantization",
    "bnb_4bit_compute_dtype": "base.compute_dtype",
    "attn_implementation": "base.attention",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "lora_target_modules": "lora.targets",
    "modules_to_save": "lora.also_train",
    "use_dora": "lora.dora",
    "use_rslora": "lora.scaling",
    "dataset": "data.train",
    "datasets": "data.train",
    "train_dataset": "data.train",
    "eval_dataset": "data.eval",
    "val_set_size": "data.eval",
    "max_length": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "sequence_len": "data.max_tokens",
    "sample_packing": "data.packing",
    "train_on_inputs": "data.loss_on",
    "chat_template": "data.template",
    "learning_rate": "train.lr",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup",
    "optim": "train.optimizer",
    "batch_size": "train.micro_batch",
    "micro_batch_size": "train.micro_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulation",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "early_stopping_patience": "train.early_stopping",
    "report_to": "train.trackers",
    "gradient_checkpointing": "memory.activations",
    "output_dir": "output",
}
"""What other programs call a key, to key: for the question "did you mean"."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A place that a recipe can fill.

    Its key is as a user writes it, where `[]` stands for any item of a list and `.*` for any key of a mapping. `field`
    is None for such items.
    """

    key: str
    alternatives: tuple[str, ...]
    field: FieldInfo | None = None

    @property
    def words(self) -> str:
        """What a value must be, as in `a whole number of at least 1 or auto`."""
        return _joined(self.alternatives)

    @property
    def is_section(self) -> bool:
        """Whether it holds keys of the schema and no value of its own."""
        return self.field is not None and _is_model(self.field.annotation)

    @property
    def is_mapping(self) -> bool:
        """Whether the user chooses the keys in it, as in lora.rank_pattern."""
        return f"{self.key}.*" in SLOTS


def slot_at(trail: Trail) -> Slot | None:
    """The slot that `trail` leads to; None if the schema has no such place."""
    key = ""
    for part in trail:
        step = "[]" if isinstance(part, int) else f".{part}" if key else part
        key += step if key + step in SLOTS else ".*"
    return SLOTS.get(key)


def dotted(trail: Trail) -> str:
    """The trail as a user writes it: `data.train[0].weight`. Names from a hostile file come out short and printable."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{brief(part)}" for part in trail)
    return text.removeprefix(".")


def brief(text: str, most: int = 60) -> str:
    """`text` on one line: at most `most` characters of it, and escapes in place of what cannot be printed."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return shown + "..." if len(text) > most else shown


def nearest(trail: Trail) -> str | None:
    """The key most likely meant by a wrong one: the same name elsewhere, another program's name, or a similar name."""
    parent, name = slot_at(trail[:-1]), str(trail[-1])
    keys = sorted((slot.key for slot in SLOTS.values() if slot.field), key=lambda key: key.count("."))
    beside = f"{parent.key}." if parent else ""
    siblings = {_leaf(key): key for key in keys if key == beside + _leaf(key)}
    anywhere = {_leaf(key): key for key in reversed(keys)}  # of the least deep ones the first
    if name in anywhere:
        return anywhere[name]
    if name in FAMILIAR:
        return FAMILIAR[name]
    for leaves, cutoff in ((siblings, 0.6), (anywhere, 0.75)):
        for leaf in get_close_matches(name, leaves, n=1, cutoff=cutoff):
            return leaves[leaf]
    return None


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _joined(alternatives: Sequence[str]) -> str:
    *first, last = alternatives
    return f"{', '.join(first)} or {last}" if first else last


def _slots(model: type[BaseModel], prefix: str = "") -> Iterator[Slot]:
    """Every place in a model and, depth first, in what its fields hold."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        yield Slot(key, tuple(_alternatives(field.annotation, field.metadata)), field)
        yield from _inside(key, field.annotation)


def _inside(key: str, hint: Any) -> Iterator[Slot]:
    """The places inside a value of type `hint`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if _is_model(hint):
        yield from _slots(hint, f"{key}.")
    elif origin is Annotated:
        yield from _inside(key, arguments[0])
    elif origin in (Union, types.UnionType):
        for member in arguments:
            yield from _inside(key, member)
    elif origin in (list, dict):
        item_key = f"{key}[]" if origin is list else f"{key}.*"
        yield Slot(item_key, tuple(_alternatives(arguments[-1])))
        yield from _inside(item_key, arguments[-1])


def _alternatives(hint: Any, metadata: Sequence[Any] = ()) -> list[str]:
    """What a value of type `hint` can be, one phrase each; a type with `Says` speaks for itself."""
    for note in reversed(metadata):
        if isinstance(note, Says):
            return list(note.alternatives)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _alternatives(arguments[0], arguments[1:])
    if origin is Literal:
        return list(arguments)
    if origin in (Union, types.UnionType):
        return [phrase for member in arguments for phrase in _alternatives(member)]
    if origin is list:
        return [f"a list of {_joined(_alternatives(arguments[0]))}"]
    if _is_model(hint):
        return ["a mapping of " + ", ".join(field.alias or name for name, field in hint.model_fields.items())]
    return {bool: ["true", "false"], type(None): ["null"]}[hint]


def _is_model(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, BaseModel)


SLOTS = {slot.key: slot for slot in _slots(Recipe)}
