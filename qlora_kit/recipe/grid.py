"""A recipe and axes, `key=a,b,c`, as a grid of recipes: one for each combination of their values.

An axis is cut at its top-level commas, those in no bracket and no quotes; each piece is a value in YAML, as in any
override. An override with one value is no axis, and holds for every run.
"""

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.errors import RecipeError
from qlora_kit.recipe.read import read_recipe
from qlora_kit.recipe.schema import Recipe
from qlora_kit.recipe.words import brief

MOST_RUNS = 500
"""In a grid: more are a slip of the pen, since every one of them trains."""
LONGEST_VALUE = 40
"""Characters of a value in a folder's name."""
_COSTLY_FIRST = ("base.", "data.", "train.task")
"""Axes whose change makes a run read its base or its rows anew: they change least often."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a grid.

    Attributes:
        name: of its folder.
        settings: by axis the value as it was written.
        recipe: checked, with the output of its own.
    """

    name: str
    settings: Mapping[str, str]
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Grid:
    """What a sweep is to run.

    Attributes:
        recipe: its name or path as it was given.
        folder: that holds the folders of the runs.
        axes: by key the values as they were written.
        cells: the runs, in the order in which they share most.
    """

    recipe: str
    folder: Path
    axes: Mapping[str, Sequence[str]]
    cells: Sequence[Cell]


def has_axes(overrides: Sequence[str]) -> bool:
    """Whether one of them has several values."""
    return bool(_axes(overrides)[0])


def read_grid(recipe: str | os.PathLike[str], overrides: Sequence[str]) -> Grid:
    """Read and check every recipe of a grid.

    Args:
        recipe: as for `read_recipe`.
        overrides: `key=value` for all runs, or `key=a,b,c` for an axis. An `output` holds the folders of the runs;
            without it that is the recipe's own, with `-sweep` behind it.

    Raises:
        RecipeError: there is no axis, one is given twice or has a value twice, the grid is too large, or a recipe of it
            is wrong in any way.
    """
    axes, fixed = _axes(overrides)
    if not axes:
        raise RecipeError(
            "there is nothing to sweep over; give a key with several values, as in train.lr=1e-4,2e-4,4e-4"
        )
    runs = 1
    for values in axes.values():
        runs *= len(values)
    if runs > MOST_RUNS:
        raise RecipeError(f"the grid has {runs:,} runs, and at most {MOST_RUNS} are allowed; leave values out")
    base = read_recipe(recipe, [*fixed, *(f"{key}={values[0]}" for key, values in axes.items())])
    is_named = any(override.partition("=")[0].strip() == "output" for override in fixed)
    folder = Path(base.output if is_named else f"{base.output}-sweep")
    cells = []
    for settings in _combinations(axes):
        name = _name(settings, axes)
        words = [
            *fixed,
            *(f"{key}={value}" for key, value in settings.items()),
            f"output={json.dumps(str(folder / name))}",
        ]
        cells.append(Cell(name, settings, read_recipe(recipe, words)))
    return Grid(os.fspath(recipe), folder, axes, cells)


def _axes(overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The axes, and what holds for every run."""
    axes, fixed = dict[str, list[str]](), list[str]()
    for override in overrides:
        key, equals, text = override.partition("=")
        key, values = key.strip(), list(_cut(text))
        if not equals or len(values) < 2:
            fixed.append(override)
            continue
        wrong = [value for value in values if not value or values.count(value) > 1]
        if key in axes:
            raise RecipeError(f"{key} is given twice; write all of its values after one {key}=")
        if key == "output":
            raise RecipeError("output cannot be an axis: each run gets a folder of its own in it; give one")
        if wrong:
            fault = f"has {brief(wrong[0])} twice" if wrong[0] else "has nothing between two commas"
            raise RecipeError(f"{key}={brief(text)} {fault}; give each value once")
        axes[key] = values
    return axes, fixed


def _cut(text: str) -> Iterator[str]:
    """The pieces between top-level commas.

    >>> list(_cut("[q_proj,v_proj], all-linear,'a,b'"))
    ['[q_proj,v_proj]', 'all-linear', "'a,b'"]
    """
    depth, quote, start = 0, "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            yield text[start:place].strip()
            start = place + 1
    yield text[start:].strip()


def _combinations(axes: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
    """One value of each axis, by key in the order of the axes."""
    outer_first = sorted(axes, key=lambda key: not key.startswith(_COSTLY_FIRST))  # stable: as given otherwise
    for values in itertools.product(*(axes[key] for key in outer_first)):
        chosen = dict(zip(outer_first, values, strict=True))
        yield {key: chosen[key] for key in axes}


def _name(settings: Mapping[str, str], axes: Mapping[str, Sequence[str]]) -> str:
    """`rank=4,lr=2e-4`: a folder's name that tells a run from the others."""
    leaves = Counter(key.rpartition(".")[2] for key in settings)
    parts = []
    for key, value in settings.items():
        leaf = key.rpartition(".")[2]
        plain = [_plain(each) for each in axes[key]]
        place = axes[key].index(value)
        said = plain[place] if plain.count(plain[place]) == 1 else f"{plain[place]}-{place + 1}"
        parts.append(f"{leaf if leaves[leaf] == 1 else key}={said}")
    return ",".join(parts)


def _plain(value: str) -> str:
    """A value with nothing in it that a folder's name cannot hold; of a path the end."""
    return re.sub(r"[^A-Za-z0-9.+_-]+", "-", value).strip("-.")[-LONGEST_VALUE:] or "value"
