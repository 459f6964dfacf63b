"""What the documents say of the repository is so: the tests that they name exist, and the tables are whole."""

import ast
import json
import re
import tomllib
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement
from test_house import FILES, imports, where

from qlora_kit.recipe.words import SLOTS, nearest
from qlora_kit.units import format_bytes

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


DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*/README.md")]
NO_KEYS = {"json", "jsonl", "yaml", "md", "py", "gguf", "sh", "log", "safetensors", "svg"}
"""What stands behind the dot in names of files."""


def written_in(path):
    return path.read_text(encoding="utf-8")


def test_links_lead_to_files_and_headings_that_exist():
    lost, count = [], 0
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", written_in(path)):
            if target.startswith("http"):
                continue
            name, _, heading = target.partition("#")
            led, count = (path.parent / name).resolve() if name else path, count + 1
            titles = re.findall(r"^#+ (.*)$", written_in(led), re.MULTILINE) if heading and led.is_file() else []
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            if not led.exists() or (heading and heading not in slugs):
                lost.append(f"{path.name}: {target}")
    assert count > 30
    assert lost == []


def test_keys_and_options_that_documents_name_exist():
    options = {
        option
        for path in (ROOT / "qlora_kit" / "cli").glob("*.py")
        for option in re.findall(r'"(--[a-z-]+)"', written_in(path))
    }
    options |= {f"--{name.replace('_', '-')}" for name in parameters_of_verbs()}
    strange = []
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        text = written_in(path)
        keys = re.findall(r"\b((?:base|lora|data|train|memory)\.[a-z_]+)\b(?!/)", text)
        named = {key for key in keys if key.partition(".")[2] not in NO_KEYS}
        strange += [f"{path.name}: {key}" for key in sorted(named - SLOTS.keys())]
        asked = {
            option for line in text.splitlines() if "qlora-kit" in line for option in re.findall(r"--[a-z-]+", line)
        }
        strange += [f"{path.name}: {option}" for option in sorted(asked - options)]
    assert strange == []


def parameters_of_verbs():
    """The names of the parameters of every function of the command line: typer makes options of them."""
    for path in (ROOT / "qlora_kit" / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(written_in(path))):
            if isinstance(node, ast.FunctionDef):
                yield from (argument.arg for argument in node.args.args)


def test_names_of_other_tools_lead_to_the_keys_that_stand_beside_them():
    table = [row for row in rows_of(ROOT / "docs" / "faq.md") if len(row) == 2 and row[0].startswith("`")]
    assert len(table) > 20
    for names, keys in table:
        for name in re.findall(r"`([^`]*)`", names):
            assert f"`{nearest((name,))}`" in keys, name


def test_the_readmes_tables_are_rows_of_the_benchmarks():
    found = {cells[0].strip("`"): cells for cells in rows_of(ROOT / "README.md")}
    plans = results("plans")
    assert len(plans) == 6
    for plan in plans:
        peaks = (plan[f"{name}peak_bytes"] for name in ("", "lora_16bit_", "full_finetune_"))
        assert found[plan["recipe"]][1] == f"{plan['micro_batch']} x {plan['tokens']:,} tokens"
        assert found[plan["recipe"]][2:] == [f"{peak / 2**30:.2f} GiB" for peak in peaks]
    less = [plan["savings_vs_full"] for plan in plans]
    text = written_in(ROOT / "README.md")
    assert f"plan {100 * min(less):.0f} to {100 * max(less):.0f} % less than full" in " ".join(text.split())
    lines = text.splitlines()
    for row in results("exports"):
        said = next(line.split() for line in lines if line.startswith(f"{row['name']}  "))
        assert said[1:3] == format_bytes(row["bytes"]).split()
        if "mean_kl" in row:
            numbers = (f"{row['mean_kl']:.2e}", f"{row['max_kl']:.2e}", f"{row['top1_agreement']:.2%}")
            losses = (f"{row[name]:.4f}" for name in ("loss_as_trained", "loss_export"))
            assert said[3:] == [*numbers, *losses]


def results(name):
    lines = written_in(ROOT / "benchmarks" / "results" / f"{name}.jsonl").splitlines()
    return [json.loads(line) for line in lines]
