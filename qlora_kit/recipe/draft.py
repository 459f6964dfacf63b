"""A recipe while it is read: values that may be wrong, where each was written, and every mistake in them."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qlora_kit.recipe import paths, yaml12
from qlora_kit.recipe.schema import Recipe
from qlora_kit.recipe.words import SLOTS, Trail, brief, dotted, nearest, slot_at


@dataclass(frozen=True, slots=True)
class Origin:
    """A text that values come from. `number` is 0 for the recipe file and counts the overrides from 1.

    `folder` is what relative paths in it are relative to.
    """

    number: int
    label: str
    folder: Path


@dataclass(frozen=True, slots=True)
class Spot:
    """A value, how it was written, and where."""

    value: Any
    written: str
    origin: Origin
    line: int


class Draft:
    """Collects values from a file and overrides, and mistakes from every check, so that all are reported together."""

    def __init__(self, file: Origin) -> None:
        self._file = file
        self._values: dict[str, Any] = {}
        self._spots: dict[Trail, Spot] = {}
        self._mistakes: list[tuple[int, int, str]] = []

    def add_file(self, root: yaml.MappingNode) -> None:
        """Take over everything that the recipe file says."""
        self._values = self._take(root, (), self._file, line=0)

    def add_override(self, override: str, origin: Origin) -> None:
        """Put what `key=value` says in the place of what was there."""
        key, equals, text = override.partition("=")
        trail = tuple(key.strip().split(".", maxsplit=2))
        slot = slot_at(trail)
        if not equals:
            self._note(origin, 1, "an override is written key=value, as in lora.rank=32")
        elif slot is None:
            self._note(origin, 1, _unknown(trail))
        elif slot.is_section:
            self._note(origin, 1, f"{slot.key} is a section; set its keys one by one, as in lora.rank=32")
        else:
            try:
                self._put(trail, yaml12.parse(text) or yaml12.NOTHING, origin)
            except yaml12.Unreadable as error:
                self._note(origin, 1, brief(str(error), 200))

    def complete(self, name: str) -> None:
        """Put defaults where pydantic cannot know them: sections left out or left empty, and the run folder."""
        for slot in SLOTS.values():
            if slot.is_section and self._values.get(slot.key) is None:
                self._values[slot.key] = {}
        if self._values.get("output") is None:
            self._values["output"] = paths.absolute("output", f"runs/{name}", self._file.folder)

    def check(self) -> Recipe | None:
        """The recipe, if every value fits the schema; what does not fit joins the mistakes."""
        try:
            return Recipe.model_validate(self._values)
        except ValidationError as error:
            self._explain(error.errors(include_url=False, include_input=False))
            return None

    def mistakes(self) -> list[str]:
        """One line a mistake: those in the file by line, then those in the overrides."""
        return [text for _, _, text in sorted(self._mistakes, key=lambda mistake: mistake[:2])]

    def _note(self, origin: Origin, line: int, text: str) -> None:
        place = f"{origin.label}:{line}" if line and origin is self._file else origin.label
        self._mistakes.append((origin.number, line, f"{place}: {text}"))

    def _put(self, trail: Trail, node: yaml.Node, origin: Origin) -> None:
        for old in [old for old in self._spots if old[: len(trail)] == trail]:
            del self._spots[old]
        value = self._take(node, trail, origin, line=1)
        holder: Any = self._values
        for part in trail[:-1]:
            if holder.get(part) is None:
                holder[part] = {}
            holder = holder[part]
            if not isinstance(holder, dict):
                return  # the file says something else than a mapping here, and is told so
        holder[trail[-1]] = value

    def _take(self, node: yaml.Node, trail: Trail, origin: Origin, line: int) -> Any:
        """The value of a node; on the way, where it and everything in it stands."""
        value: Any
        match node:
            case yaml.MappingNode():
                value = self._take_mapping(node, trail, origin)
            case yaml.SequenceNode():
                value = [
                    self._take(item, (*trail, index), origin, item.start_mark.line + 1)
                    for index, item in enumerate(node.value)
                ]
            case yaml.ScalarNode():
                value = yaml12.scalar(node)
        slot = slot_at(trail)
        if slot and isinstance(value, str):
            value = paths.absolute(slot.key, value, origin.folder)
        self._spots[trail] = Spot(value, brief(yaml12.written(node)), origin, line)
        return value

    def _take_mapping(self, node: yaml.MappingNode, trail: Trail, origin: Origin) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, item in node.value:
            line, inner = key.start_mark.line + 1, (*trail, key.value)
            if not isinstance(key, yaml.ScalarNode):
                self._note(origin, line, f"a key must be text, found {brief(yaml12.written(key))}")
            elif key.value in values:
                self._note(origin, line, f"{dotted(inner)} is written twice, first in line {self._spots[inner].line}")
            else:
                values[key.value] = self._take(item, inner, origin, line)
        return values

    def _explain(self, errors: Iterable[ErrorDetails]) -> None:
        """Say in the schema's words what pydantic found.

        A union of types yields an error for each of its members; the one that reaches deepest into the value belongs to
        the member that the user meant.
        """
        found = defaultdict(list)
        for error in errors:
            found[self._trail(error)].append(error)
        outer = {trail[:depth] for trail in found for depth in range(len(trail))}
        for trail in [trail for trail in found if trail not in outer]:
            spot = self._spots.get(trail) or self._spots.get(trail[:-1]) or Spot(None, "", self._file, 0)
            self._note(spot.origin, spot.line, _sentence(trail, found[trail], spot))

    def _trail(self, error: ErrorDetails) -> Trail:
        """Where in the values an error is: pydantic's location less the names that it gives to members of unions."""
        trail: Trail = ()
        value: Any = self._values
        for part in error["loc"]:
            inside = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
            if inside:
                trail, value = (*trail, part), value[part]
        return (*trail, error["loc"][-1]) if error["type"] == "missing" else trail


def _sentence(trail: Trail, errors: list[ErrorDetails], spot: Spot) -> str:
    """One mistake in words."""
    kinds = {error["type"] for error in errors}
    if "extra_forbidden" in kinds:
        return _unknown(trail)
    reasons = "; ".join(
        filter(None, (str(error["ctx"]["error"]) for error in errors if error["type"] == "value_error"))
    )
    because = f": {brief(reasons, 120)}" if reasons else ""
    if any(error["loc"][-1] == "[key]" for error in errors):
        return f"{dotted(trail)} is not a usable name{because}"
    slot = slot_at(trail)
    assert slot is not None, trail
    if "missing" in kinds:
        return f"{dotted(trail)} is missing; it must be {slot.words}"
    if "text" in slot.alternatives and isinstance(spot.value, int | float):
        because = ", which is text only in quotes"
    return f"{dotted(trail)} must be {slot.words}, found {spot.written}{because}"


def _unknown(trail: Trail) -> str:
    meant = nearest(trail)
    return f"{dotted(trail)} is not a key" + (f" (did you mean {meant}?)" if meant else "")
