"""What the documents say of the repository is so: the tests that they name exist, and the tables are whole."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
CASES = ROOT / "docs" / "failure-cases.md"


@cache
def tests_in(file):
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
    missing = [name for name in named if name.split("::")[1] not in tests_in(name.split("::")[0])]
    assert missing == []
