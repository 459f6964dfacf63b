"""What the documents say of the repository is so: the tests that they name exist, and the tables are whole."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement
from test_house import FILES, imports, where

ROOT = Path(__file__).parent.parent
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
CASES = ROOT / "docs" / "failure-cases.md"


@cache
def defined_in(file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def rows_of(file):
    """The cells of every row of every table."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_every_failure_case_names_tests_that_exist():
    cases = {int(row[0]): row for row in rows_of(CASES) if row[0].isdigit()}
    assert list(cases) == list(range(1, 69))
    assert not [number for number, (_, wrong, here, tests) in cases.items() if not (wrong and here and "::" in tests)]
    named = re.findall(r"`(tests/[^`]*)`", CASES.read_text(encoding="utf-8"))
    named.remove("tests/test_docs.py")
    missing = [name for name in named if name.split("::")[1] not in defined_in(name.split("::")[0])]
    assert missing == []


MODULES = {"pyyaml": "yaml"}
"""Packages that are imported under another name than their own."""


def dependencies():
    """What CONTRIBUTING says of every package: what for, why, and where it may be imported."""
    rows = [row for row in rows_of(CONTRIBUTING) if len(row) == 4 and row[0] != "package" and "---" not in row[0]]
    return {name.strip(): row[1:] for row in rows for name in re.sub(r"\(.*\)", "", row[0]).split(",")}


def test_every_dependency_is_justified_and_no_other_is():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [project["dependencies"], *project["optional-dependencies"].values()]
    told = dependencies()
    assert sorted(told) == sorted({Requirement(line).name for group in declared for line in group})
    assert [name for name, cells in told.items() if not all(cells)] == []


def test_packages_are_imported_where_contributing_says():
    wrong = []
    for name, (_, _, places) in dependencies().items():
        listed, is_closed = tuple(re.findall(r"`([^`]*)`", places)), places.startswith("not in")
        assert listed or places == "nowhere", name
        module = MODULES.get(name, name.replace("-", "_"))
        files = {where(path) for path in FILES for _, found in imports(path) if found.split(".")[0] == module}
        wrong += [f"{name} in {file}" for file in files if file.startswith(listed) == is_closed]
    assert wrong == []
