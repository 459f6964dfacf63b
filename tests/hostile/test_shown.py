"""Text from elsewhere where it is shown: nothing in it acts on a terminal, on a page or in a card."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from test_report import Page, full_documents, write_run
from typer.testing import CliRunner

from qlora_kit.cli.app import app
from qlora_kit.cli.export import comparison_lines
from qlora_kit.cli.show import Screen, audit_lines
from qlora_kit.export.folder import model_card

ACTS = "\x1b[2J\x1b]0;title\x07\u202efdp.exe\u2066\r"
TAG = "<img src=x onerror=alert(1)>"


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def run(tmp_path):
    """A run whose folder, model, settings and numbers bear names that would act where they are shown."""
    documents, name = full_documents(), f"run {ACTS} {TAG}"
    documents["scores.json"]["base"][name] = documents["scores.json"]["adapter"][name] = 1.0
    documents["env.json"][name] = documents["plan.json"]["planned_on"] = name
    recipe = yaml.safe_dump({"base": {"model": f"a/{name}"}, name: {name: name}})
    return write_run(tmp_path / name, documents, recipe=recipe)


def test_names_in_a_report_act_on_no_terminal(run, tmp_path):
    other = write_run(tmp_path / "plain")
    page, lost = tmp_path / "page.html", run / "there is none"
    verbs = [("report", run), ("report", run, other, "--out", page), ("report", run, other, "--out", page, "--json"),
             ("report", lost), ("verify", lost), ("train", lost), ("plan", f"{run}.yaml"),
             ("generate", lost, "--prompt", "x"), ("export", lost, "--out", lost)]  # fmt: skip
    for verb in verbs:
        told = call(*verb)
        assert type(told.exception) in (type(None), SystemExit), verb
        shown = told.output
        assert "2J" in shown, verb
        assert all(character.isprintable() for character in shown.replace("\n", "")), (verb, shown)


def test_names_of_folders_and_of_values_are_text_on_pages(run, tmp_path):
    other = write_run(tmp_path / "plain")
    assert call("report", run).exit_code == 0
    assert call("report", run, other, "--out", tmp_path / "page.html").exit_code == 0
    for file in (run / "report.html", tmp_path / "page.html"):
        page = Page(file.read_text())
        assert page.text.count(TAG) >= 2
        assert "img" not in page.tags
        assert not any(name.startswith("on") for name, _ in page.attributes)


@pytest.mark.parametrize(
    "base", ["a/b\nlicense: mit", "a/b\n---\n# x", "a/b: {c: d}", "a/b\u2028c: d", "a/b # c", "!!x a/b"]
)
def test_no_name_of_a_base_adds_to_the_front_of_a_card(base):
    _, front, body = model_card("t", base, "peft", ["x"], {"Base": {"base": base + TAG}}).split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "peft", "tags": ["x"]}
    assert len(body.split("\n- ")) == 2
    assert re.search(r"\n- base: `[^`\n]*`\n$", body)


def test_where_a_run_lies_is_told_without_acting(tmp_path, capsys):
    folder = tmp_path / f"{ACTS}[red]"
    folder.mkdir()
    for finished in (True, False):
        (folder / "memory.json").write_text(
            (write_run(tmp_path / "plain", full_documents()) / "memory.json").read_text()
        )
        Screen().ended(SimpleNamespace(folder=folder, finished=finished, step=3, seconds=1.0), "sft")
        told = capsys.readouterr().out
        assert "[red]" in told
        assert all(character.isprintable() for character in told.replace("\n", ""))


def test_what_an_export_tells_acts_on_no_terminal():
    refused = {"name": "merged", "refused": f"{ACTS} cannot be"}
    for told in (audit_lines({"files": {}}, Path(ACTS)), comparison_lines([refused])):
        assert "2J" in told
        assert all(character.isprintable() for character in told.replace("\n", ""))
