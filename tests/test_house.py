"""The house stands as it was drawn: imports go down only, files stay readable. Doors of libraries: `test_docs.py`."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest
import torch

import qlora_kit
from qlora_kit.export.folder import library_versions
from qlora_kit.run.folder import environment

ROOT = Path(qlora_kit.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")  # the public face is lazy: exempt
FLOORS = {
    "cli": 6,
    "run": 5,
    "watch": 4.5,
    "plan": 4, "export": 4, "report": 4,
    "train": 3,
    "lora": 2, "data": 2,
    "base": 1.5,
    "ops": 1, "memory": 1,
    "recipe": 0.5, "storage": 0.5,
    "crew": 0.2,
    "errors": 0, "interrupt": 0, "units": 0,
}  # fmt: skip
HIGHEST_IMPORT = {"report": 1.5}
"""Rooms that are kept further from the rest than their floor does: a report is made from files alone."""


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(path: Path) -> str:
    return where(path).split("/")[0].removesuffix(".py")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> list[tuple[int, str]]:
    """Line and dotted name of every import, those inside functions and behind TYPE_CHECKING too."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where(path)}:{node.lineno} imports relatively"
            if node.module == "qlora_kit":
                found += [(node.lineno, f"qlora_kit.{a.name}") for a in node.names if a.name != "__version__"]
            else:
                folder = ROOT.parent.joinpath(*node.module.split("."))
                files = [
                    a.name for a in node.names if (folder / f"{a.name}.py").is_file() or (folder / a.name).is_dir()
                ]
                found += [(node.lineno, f"{node.module}.{name}") for name in files]
                if len(files) < len(node.names):
                    found.append((node.lineno, node.module))
    return found


def is_allowed(importer: str, imported: str) -> bool:
    if importer == imported:
        return True
    if imported not in FLOORS or FLOORS[imported] > HIGHEST_IMPORT.get(importer, 9):
        return False
    return FLOORS[imported] < FLOORS[importer]


def functions(node: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Public classes, functions and methods that can be reached from outside, with their dotted names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield inside + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from functions(child, f"{inside}{child.name}.")


def test_there_is_a_house_to_walk_through():
    assert {"base", "ops", "lora", "data", "recipe", "errors"} <= {room(path) for path in FILES}
    assert sum(1 for path in FILES for _, name in imports(path) if name.startswith("qlora_kit.")) > 30


def test_the_rule_itself_refuses_what_it_should():
    for importer, imported in [
        ("lora", "train"),
        ("lora", "data"),
        ("ops", "base"),
        ("report", "train"),
        ("errors", "units"),
        ("plan", "export"),
        ("recipe", "base"),
        ("lora", "nowhere"),
    ]:
        assert not is_allowed(importer, imported), (importer, imported)
    assert is_allowed("base", "ops")
    assert is_allowed("cli", "run")


def test_every_file_belongs_to_a_room_of_the_plan():
    assert [where(path) for path in FILES if room(path) not in FLOORS] == []


def test_imports_go_down_only():
    wrong = [
        f"{where(path)}:{line} imports {name}"
        for path in FILES
        for line, name in imports(path)
        if name.startswith("qlora_kit.") and not is_allowed(room(path), name.split(".")[1])
    ]
    assert wrong == []


def circle(needs: dict[str, set[str]]) -> list[str]:
    """Names that need each other in a loop; none where they can be put in an order."""
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_files_import_each_other_in_a_circle():
    """Not even for a type that only a checker reads: two rooms that name each other are one room."""
    modules = {f"qlora_kit.{where(path).removesuffix('.py').removesuffix('/__init__').replace('/', '.')}": path
               for path in FILES}  # fmt: skip
    needs = {name: {other for _, other in imports(path) if other in modules} for name, path in modules.items()}
    assert sum(map(len, needs.values())) > 500, "they are seen"
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}), "and so is a circle"
    assert circle(needs) == []


def test_no_room_imports_the_public_face():
    """The lazy face imports every room; a room that imported it back would import its own roof."""
    wrong = [f"{where(path)}:{line}" for path in FILES for line, name in imports(path) if name == "qlora_kit"]
    assert wrong == []


def test_only_the_command_line_prints():
    wrong = [
        f"{where(path)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        and room(path) != "cli"
    ]  # fmt: skip
    assert wrong == []


RAISES_NOTHING_ELSE = ("errors.py",)
"""Where a library raises `Exception` itself; its kinds are raised again there."""


def test_no_handler_catches_everything():
    """`suppress` counts as a handler: what it is given is what it swallows."""
    too_broad = {"Exception", "BaseException"}
    wrong = []
    for path in FILES:
        if where(path) in RAISES_NOTHING_ELSE:
            continue
        for node in ast.walk(tree(path)):
            caught: list[ast.AST] = []
            if isinstance(node, ast.ExceptHandler):
                if node.type is None:
                    wrong.append(f"{where(path)}:{node.lineno}")
                    continue
                caught = [node.type]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
                caught = node.args
            if any(isinstance(n, ast.Name) and n.id in too_broad for c in caught for n in ast.walk(c)):
                wrong.append(f"{where(path)}:{node.lineno}")
    assert wrong == []


PIPES = "crew.py"
"""It pickles what it sends to processes that it begins itself, and no file."""


def test_nothing_is_kept_or_read_as_a_pickle():
    files = [path for path in FILES if where(path) != PIPES]
    pickling = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    wrong = [
        f"{where(path)}:{line}" for path in files for line, name in imports(path) if name.split(".")[0] in pickling
    ]
    wrong += [
        f"{where(path)}:{node.lineno}"
        for path in files
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
        and node.attr in ("save", "load")
        and ast.unparse(node) in ("torch.save", "torch.load", "numpy.load", "np.load")
    ]
    assert wrong == []


def test_no_file_is_longer_than_500_lines():
    lengths = {where(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_everything_public_says_what_it_is():
    wrong = [where(path) for path in FILES if ast.get_docstring(tree(path)) is None and path.read_text().strip()]
    wrong += [
        f"{where(path)}:{node.lineno} {name}"
        for path in FILES
        for name, node in functions(tree(path))
        if ast.get_docstring(node) is None
    ]
    assert wrong == []


@pytest.mark.parametrize("module", ["qlora_kit", "qlora_kit.recipe"])
def test_asking_for_a_recipe_costs_no_torch(module):
    heavy = {"torch", "transformers", "bitsandbytes", "datasets", "accelerate"}
    code = f"import {module}, sys; print(*sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


@pytest.mark.slow
def test_every_verb_of_the_face_can_be_called_whatever_was_imported_before():
    """The room `train` has the name of a verb, and importing it sets an attribute of that name."""
    code = (
        "import qlora_kit as qk; import qlora_kit.train.loop; from qlora_kit.train import pace\n"
        "assert qk.train.loop.train_loop and pace\n"
        "print(*[name for name in qk.__all__ if name != '__version__' and not callable(getattr(qk, name))])\n"
        "try: qk.train(None)\n"
        "except AttributeError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0] == ""
    assert "'NoneType' object has no attribute 'output'" in result.stdout, "it reached the verb"


def test_a_checkout_that_no_installer_has_seen_knows_its_version(monkeypatch):
    """As where a folder is put on PYTHONPATH: what is recorded of a run and of an export must not ask the installer."""
    found = metadata.Distribution.from_name

    def unknown(name):
        if name == "qlora-kit":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(metadata.Distribution, "from_name", unknown)
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("qlora-kit")
    assert library_versions()["qlora-kit"] == qlora_kit.__version__
    assert environment(torch.device("cpu"))["qlora_kit"] == qlora_kit.__version__
