"""The report says what the run folder says, escapes what it quotes, and needs nothing but itself."""

import json
import math
import random
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from qlora_kit.cli.app import app
from qlora_kit.errors import RunError
from qlora_kit.report import (
    GradientWatch,
    LossWatch,
    PhaseBar,
    Series,
    card_groups,
    cards_sentence,
    compare_runs,
    comparison_facts,
    comparison_text,
    judge_curve,
    line_chart,
    memory_check_table,
    memory_check_text,
    memory_table,
    phase_bars,
    plan_text,
    read_run,
    render,
    render_comparison,
    report_facts,
    scores_text,
    stacked_bars,
    timeline,
    write_comparison,
    write_report,
)
from qlora_kit.report.curve import smooth, thin
from qlora_kit.report.judge import judge_explosion
from qlora_kit.report.methods import CATEGORIES, METHODS
from qlora_kit.units import GIB, MIB

HOSTILE = "</title><script>alert(1)</script><img src=x onerror='alert(2)'>\"&"
WIDTHS = (320, 390, 1280)
VOID = {"meta", "br", "img", "link", "input", "hr"}


def method(*gib):
    by_category = dict.fromkeys(CATEGORIES, 0) | {
        name: int(GIB * size) for name, size in zip(CATEGORIES, gib, strict=False)
    }
    peak = sum(by_category.values())
    return {
        "peak_bytes": peak,
        "resident_bytes": peak // 2,
        "by_category": by_category,
        "peak_by_phase": {"load": peak},
    }


def example_plan():
    full = method(15.25, 0, 0, 15.25, 61, 2.5) | {"assumes": {"optimizer": "adamw", "loss": "chunked"}}
    methods = {"qlora": method(5, 0.125, 0.1, 0.1, 0.2, 2.5, 0.25), "lora_16bit": method(15.25, 0, 0.1, 0.1, 0.2, 2.5)}
    return {
        "schema": 1,
        "parameters": {"total": 8_190_735_360, "trainable": 43_646_976, "quantized": 6_945_767_424},
        "bits_per_quantized_parameter": 4.127,
        "methods": methods | {"full_finetune": full},
        "savings_vs_full": 1 - methods["qlora"]["peak_bytes"] / full["peak_bytes"],
        "budget": 24 * GIB,
        "planned_on": "cpu",
        "device_profile": "RTX 4090",
        "steps": 60,
        "tokens_per_s": 3000.0,
        "hours": 1.5,
    }


def example_rows(steps=60):
    rows = []
    for step in range(1, steps + 1):
        loss = 1 + math.exp(-step / 20)
        rows.append({"step": step, "loss": loss, "lr": 1e-4, "tokens": 512 * step, "tokens_per_s": 3000.0})
        if step % 10 == 0:
            rows.append({"step": step, "eval_loss": loss + 0.1})
    return rows


def example_documents():
    plan = example_plan()
    measured = method(5, 0.125, 0.1, 0.1, 0.2, 2.6, 0.25)
    return {
        "plan.json": plan,
        "memory.json": {
            "schema": 1,
            "planned": plan["methods"]["qlora"],
            "measured": measured,
            "error": {"peak": -0.012, "activations": -0.038},
            "device_counter": {"name": "anonymous resident bytes", "peak_bytes": 9 * GIB},
            "file_backed_bytes": 412 * MIB,
        },
        "scores.json": {
            "schema": 1,
            "rows": 200,
            "base": {"loss": 1.914, "perplexity": 6.78, "exact_match": 0.115},
            "adapter": {"loss": 1.187, "perplexity": 3.277, "exact_match": 0.438},
            "samples": [{"prompt": "Which queue?", "reference": "billing", "base": "I am sorry", "adapter": "billing"}],
        },
        "data.json": {"schema": 1, "train": {"rows": 9412, "tokens": 18_655_100}, "eval": {"rows": 192}},
        "env.json": {"schema": 1, "torch": "2.11.0", "seed": 0},
    }


PHASES = ("load", "forward", "loss", "backward", "optimizer", "evaluate", "save", "export")
USABLE = {"RTX 4060": 7.4, "RTX 3060": 11.4, "RTX 4070": 11.39, "RTX 4090": 23.4, "H100 80GB": 79.1}


def moments():
    """Two micro-batches and a step: 40 moments whose fullest is in the backward phase."""
    phases = [*["load"] * 6, *(["forward"] * 6 + ["loss"] + ["backward"] * 6) * 2, *["optimizer"] * 2, "evaluate"]
    phases += [*["evaluate"] * 3, "save"]
    held = {"forward": 1.0, "loss": 2.0, "backward": 2.85}
    return [
        {"phase": phase, "bytes": {"base_weights": 5 * GIB, "activations": int(GIB * held.get(phase, 0)), "other": 0}}
        for phase in phases
    ]


def full_documents():
    """A run folder with every key that there is."""
    documents = example_documents()
    plan, memory = documents["plan.json"], documents["memory.json"]
    for method, factor in zip(plan["methods"].values(), (1, 2, 9), strict=True):
        method["peak_by_phase"] = {phase: factor * (5 * GIB + 100 * MIB * index) for index, phase in enumerate(PHASES)}
    plan["methods"]["qlora"] |= {"host_peak_bytes": 2 * GIB, "paged_bytes": 256 * MIB}
    plan |= {"activations": "recompute 30, keep 2", "blocks": {"keep": 2, "recompute": 30, "offload": 0}}
    plan |= {"loss_chunk": 1024, "micro_batch": 2, "accumulation": 8, "floor": {"bytes": 6 * GIB, "ratio": 1.38}}
    plan |= {"rank": 16, "capacity": {"held_bits": 9e7, "reason": "rank 16 holds", "warning": "the data hold more"}}
    plan["allocator"] = {"rounding_bytes": 64 * MIB, "library_bytes": 96 * MIB, "context_bytes": 480 * MIB}
    plan["cards"] = [
        {"name": name, "usable_bytes": int(usable * GIB), "qlora": usable > 9, "lora_16bit": usable > 20,
         "full_finetune": False}
        for name, usable in USABLE.items()
    ]  # fmt: skip
    memory["measured"]["peak_by_phase"] = {phase: 5 * GIB + 101 * MIB * index for index, phase in enumerate(PHASES[:5])}
    memory["measured"]["peak_by_phase"]["backward"] = int(7.85 * GIB)
    memory |= {"timeline": moments(), "paged_bytes": 256 * MIB}
    memory["largest"] = [
        {"bytes": (20 - index) * MIB, "category": "workspace", "phase": "backward", "operator": "aten.mm",
         "module": f"model.layers.{index}.mlp" if index else "", "shape": [2048, 4096], "dtype": "bfloat16"}
        for index in range(10)
    ]  # fmt: skip
    return documents


def write_run(folder, documents=None, rows=None, recipe="base:\n  model: Qwen/Qwen3-8B\n  quantization: nf4\n"):
    folder.mkdir(exist_ok=True)
    for name, document in (example_documents() if documents is None else documents).items():
        (folder / name).write_text(json.dumps(document))
    lines = [json.dumps(row) for row in (example_rows() if rows is None else rows)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    if recipe is not None:
        (folder / "recipe.yaml").write_text(recipe)
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is not closed where it should be."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)


def drawings(page):
    """The outermost SVG elements of a page, parsed as XML."""
    kinds = "bars|chart|phases|chart timeline"
    found = re.findall(rf"<svg class=\"(?:{kinds})\".*?</svg>(?=<(?:/figure|table|/section))", page, re.DOTALL)
    return [ElementTree.fromstring(one) for one in found]


# The page


def test_page_is_well_formed_and_holds_every_section(run):
    page = render(run)
    parsed = Page(page)
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Scores",
        "Samples",
        "Memory",
        "Planned and measured",
        "Training",
        "Data",
        "Recipe",
        "Environment",
    ]
    assert [drawing.get("role") for drawing in drawings(page)] == ["img"] * 6
    assert all(drawing.find("title").text for drawing in drawings(page))
    assert "Qwen/Qwen3-8B" in parsed.text


def test_preferences_have_curves_of_what_they_are_rewarded_by(run):
    assert "reward" not in render(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = {"reward_accuracy": 0.75, "reward_margin": -0.2}
    for row in rows:
        kind = "eval_" if "eval_loss" in row else ""
        row |= {f"{kind}{name}": value + row["step"] / 1000 for name, value in told.items()}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = render(run)
    for title in ("reward accuracy over steps", "reward margin over steps"):
        chart = page[page.index(f"<title>{title}") :].partition("</figure>")[0]
        assert 'class="line train"' in chart
        assert chart.count('class="dot eval"') == 6
    assert "evaluation at 10: -0.19" in page
    assert "KL from" not in page
    assert page.index("Loss over steps") < page.index("reward margin over steps") < page.index("Throughput over steps")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1, "reward_margin": "high"}) + "\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 1: reward_margin is \"high\", wanted a number or null"):
        render(run)


def test_headline_gives_the_savings_and_the_measured_peak(run):
    figures = re.findall(r'<div class="figure"><strong>(.*?)</strong><span>(.*?)</span>', render(run))
    assert figures == [
        ("91 %", "less memory than full fine-tuning"),
        ("54 %", "less memory than LoRA 16-bit"),
        ("8.37 GiB", "peak memory, measured"),
        ("30.7 k", "tokens trained in 60 steps"),
    ]


def test_page_loads_nothing_and_runs_nothing(run):
    page = render(run)
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(parsed.tags)
    assert not {"src", "href", "xlink:href", "srcset", "action"} & {name for name, _ in parsed.attributes}
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_whatever_the_run_says_stays_text(tmp_path):
    documents = full_documents()
    plan, memory = documents["plan.json"], documents["memory.json"]
    plan["cards"][0]["name"] = plan["activations"] = HOSTILE
    plan["blocks"] = {HOSTILE: 1, "keep": 1}
    memory["timeline"][3] = {"phase": HOSTILE, "bytes": {HOSTILE: GIB}}
    memory["largest"][0] |= dict.fromkeys(("category", "phase", "module", "operator", "dtype"), HOSTILE)
    memory["measured"]["peak_by_phase"][HOSTILE] = 1
    plan["planned_on"] = plan["methods"]["full_finetune"]["assumes"][HOSTILE] = HOSTILE
    plan["methods"]["qlora"]["by_category"][HOSTILE] = 1
    plan["methods"]["qlora"]["peak_by_phase"][HOSTILE] = 1
    memory["device_counter"]["name"] = HOSTILE
    documents["scores.json"]["base"][HOSTILE] = 1.0
    documents["scores.json"]["samples"] = [dict.fromkeys(("prompt", "reference", "base", "adapter"), HOSTILE)]
    documents["data.json"]["train"][HOSTILE] = HOSTILE
    documents["env.json"][HOSTILE] = HOSTILE
    page = render(write_run(tmp_path / "run", documents, recipe=f"base:\n  model: {HOSTILE}\n"))
    parsed = Page(page)
    assert parsed.text.count("<script>alert(1)</script>") >= 18
    assert not {"script", "img"} & set(parsed.tags)
    assert not any(name.startswith("on") for name, _ in parsed.attributes)
    assert len(drawings(page)) == 7


def test_characters_that_xml_and_utf8_cannot_hold_are_replaced(tmp_path):
    documents = example_documents()
    documents["scores.json"]["samples"][0]["prompt"] = "bell \x07, null \0, half \ud800, whole \U0001f600"
    path = write_report(write_run(tmp_path / "run", documents))
    assert "bell \ufffd, null \ufffd, half \ufffd, whole \U0001f600" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "heading"),
    [
        ("memory.json", "Planned and measured"),
        ("scores.json", "Scores"),
        ("scores.json", "Samples"),
        ("data.json", "Data"),
        ("recipe.yaml", "Recipe"),
        ("env.json", "Environment"),
    ],
)
def test_a_missing_optional_file_leaves_its_section_out(run, name, heading):
    assert f"<h2>{heading}</h2>" in render(run)
    (run / name).unlink()
    page = render(run)
    Page(page)
    assert f"<h2>{heading}</h2>" not in page
    assert "<h2>Memory</h2>" in page


def test_without_measurement_the_headline_is_the_planned_peak(run):
    (run / "memory.json").unlink()
    assert "<strong>8.27 GiB</strong><span>peak memory, planned</span>" in render(run)


def test_the_model_is_named_without_the_folders_above_it(tmp_path):
    page = render(
        write_run(tmp_path / "run", recipe="lora:\n  model: no\nbase:\n  model: '/home/anna/my model'  # local\n")
    )
    assert "<h1>run</h1>" in page
    assert "a LoRA adapter for my model<" in page
    (tmp_path / "run" / "recipe.yaml").unlink()
    assert "a LoRA adapter for an unknown model<" in render(tmp_path / "run")


def test_a_folder_with_every_key_has_every_section(tmp_path):
    page = render(write_run(tmp_path / "run", full_documents()))
    text = Page(page).text
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings[2:7] == [
        "Memory",
        "Planned and measured",
        "Timeline",
        "Largest allocations",
        "Which card it fits on",
    ]
    for said in (
        "Setting: activations kept in 2, recomputed in 30 blocks; 2 rows at a time, 8 times per step; the loss in "
        "chunks",
        "The step takes 1.38 times the least that its mathematics needs (6.00 GiB), with nothing offloaded and logits "
        "of 256 tokens at once.",
        "Rank 16 holds.",
        "The data hold more.",
        "CUDA adds about 480 MiB for the driver's context, 96.0 MiB for libraries, 64.0 MiB for rounding (estimates",
        "256 MiB of the optimizer's state is paged",
        "Host memory holds up to 2.00 GiB: offloaded activations",
        "the peak, 7.85 GiB, was in the backward phase",
        "less the driver's context; a tenth is left to the allocator",
    ):
        assert said in text


@pytest.mark.parametrize("document", ["plan.json", "memory.json"])
def test_what_is_null_reads_as_what_is_not_there(run, document):
    before = render(run)
    new = full_documents()[document].keys() - example_documents()[document].keys()
    assert len(new) >= 3
    (run / document).write_text(json.dumps(example_documents()[document] | dict.fromkeys(new)))
    assert render(run) == before


@pytest.mark.parametrize(
    ("document", "change", "said"),
    [
        ("plan.json", {"cards": [{"name": "T4"}]}, "cards[0].usable_bytes is missing"),
        ("plan.json", {"cards": [{"name": "T4", "usable_bytes": 1, "qlora": 1}]}, "wanted true, false or null"),
        ("plan.json", {"capacity": {"reason": "", "warning": 1}}, "capacity.warning is 1, wanted text or null"),
        ("memory.json", {"timeline": [{"phase": "load"}]}, "timeline[0].bytes is missing"),
        ("memory.json", {"largest": [{"bytes": -1}]}, "largest[0].bytes is -1, wanted"),
        ("memory.json", {"largest": {}}, "largest is {}, wanted a list"),
    ],
)
def test_a_wrong_new_value_is_named(run, document, change, said):
    (run / document).write_text(json.dumps(example_documents()[document] | change))
    with pytest.raises(RunError, match=re.escape(said)):
        render(run)


def test_the_largest_allocations_are_ten_rows_with_the_module_that_made_them(tmp_path):
    documents = full_documents()
    documents["memory.json"]["largest"] *= 2
    page = render(write_run(tmp_path / "run", documents))
    listing = page[page.index('<table class="listing">') :].split("</table>")[0]
    modules = re.findall(r"<code>(.*?)</code>", listing)
    assert modules == ["outside of any module", *(f"model.layers.{index}.mlp" for index in range(1, 10))]
    assert "aten.mm, 2048x4096 bfloat16, backward" in listing


def test_a_run_that_trains_every_weight_is_called_so(tmp_path):
    documents = full_documents()
    plan = documents["plan.json"]
    plan["method"] = "full_finetune"
    run = write_run(tmp_path / "run", documents)
    assert "full fine-tuning of Qwen/Qwen3-8B" in Page(render(run)).text
    assert "as trained" in render(run)
    assert report_facts(read_run(run))["method"] == "full_finetune"
    assert cards_sentence(plan).startswith("Fits on: no card in the table; ")
    assert plan_text(plan).endswith("This run is full fine-tuning; QLoRA would need 0.09 times its memory: 91 % less.")


# What is wrong with a folder


@pytest.mark.parametrize("name", ["plan.json", "metrics.jsonl"])
def test_a_missing_required_file_is_one_line_that_names_it(run, name):
    (run / name).unlink()
    with pytest.raises(RunError, match=re.escape(name)) as caught:
        render(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["plan.json", "memory.json", "scores.json", "data.json", "env.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b'{"schema": 1,', b"[]", b"null", b"\xff\xfe", b'{"schema": 9}', b"[" * 100_000])
def test_a_damaged_file_is_one_line_that_names_it(run, name, content):
    (run / name).write_bytes(content)
    with pytest.raises(RunError, match=re.escape(name)) as caught:
        render(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plan: plan["methods"].pop("qlora"), "methods.qlora is missing"),
        (lambda plan: plan["methods"]["qlora"].update(peak_bytes=-1), "methods.qlora.peak_bytes is -1, wanted"),
        (lambda plan: plan["methods"]["qlora"]["by_category"].update(other="1"), 'by_category.other is "1", wanted'),
        (lambda plan: plan.update(budget=math.nan), None),
        (lambda plan: plan["methods"]["qlora"].update(peak_bytes=math.inf), "peak_bytes is null, wanted"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_wanted(run, change, said):
    plan = example_plan()
    change(plan)
    (run / "plan.json").write_text(json.dumps(plan))
    if said is None:
        Page(render(run))
    else:
        with pytest.raises(RunError, match=re.escape(said)):
            render(run)


def test_a_report_is_there_whole_or_not_at_all(run, monkeypatch):
    path = write_report(run)
    assert path == run / "report.html"
    assert path.read_text(encoding="utf-8") == render(run)
    path.write_text("older")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(RunError, match="No space left on device"):
        write_report(run)
    assert path.read_text() == "older"
    assert not list(run.glob(".report*"))


# Text


def test_memory_table_rows_are_the_categories_and_sum_to_the_peak():
    header, *rows = memory_table(example_plan())
    assert header == ["", *METHODS.values()]
    assert [row[0] for row in rows] == [*(name.replace("_", " ") for name in CATEGORIES), "peak", "saving vs full"]
    sizes = {"B": 1, "MiB": MIB, "GiB": GIB}
    for column in (1, 2, 3):
        read = [float(row[column].split()[0]) * sizes[row[column].split()[1]] for row in rows[:-1]]
        assert sum(read[:-1]) == pytest.approx(read[-1], rel=0.01)
    assert rows[-1][1:] == ["91 %", "81 %", "-"]


def test_plan_text_fits_a_terminal_and_ends_with_the_saving():
    lines = plan_text(example_plan()).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "QLoRA needs 0.09 times the memory of full fine-tuning: 91 % less."
    assert len({len(line) for line in lines if "  " in line}) == 1


def test_a_plan_that_needs_more_says_so():
    plan = example_plan() | {"savings_vs_full": -0.1, "budget": GIB}
    assert plan_text(plan).endswith("QLoRA needs 1.10 times the memory of full fine-tuning: 10 % more.")
    assert "Budget 1.00 GiB (RTX 4090): the plan is 7.27 GiB above it." in plan_text(plan)


def test_memory_check_gives_the_recorded_error_and_works_out_the_others():
    memory = example_documents()["memory.json"]
    lines = {line[:18].strip(): line.split()[-2:] for line in memory_check_text(memory).splitlines()[2:12]}
    assert lines["peak"] == ["-1.2", "%"]
    assert lines["activations"] == ["-3.8", "%"]
    assert lines["base weights"] == ["0.0", "%"]
    assert "The planned peak is 1.2 % below the measured one." in memory_check_text(memory)


def test_scores_text_shows_before_after_and_change():
    scores = example_documents()["scores.json"]
    scores["base"]["perplexity"] = 1e30
    text = scores_text(scores | {"adapter": scores["adapter"] | {"f1": 0.5}})
    assert [line.split() for line in text.splitlines()[4:]] == [
        ["loss", "1.914", "1.187", "-0.727"],
        ["perplexity", "1e+30", "3.277", "-1e+30"],
        ["exact", "match", "11.5", "%", "43.8", "%", "+32.3", "points"],
        ["f1", "-", "50.0", "%", "-"],
    ]


def test_terminal_text_says_phases_setting_cards_and_the_largest_allocations():
    documents = full_documents()
    plan, memory = documents["plan.json"], documents["memory.json"]
    planned = plan_text(plan, cards_sentence(plan)).splitlines()
    assert max(map(len, planned)) <= 80
    assert any(line.startswith("Peak by phase: load 5.00 GiB, forward 5.10 GiB") for line in planned)
    assert any(line.startswith("Setting: activations kept in 2, recomputed in 30 blocks") for line in planned)
    assert any(line.startswith("Fits on: RTX 3060 and larger; LoRA 16-bit: RTX 4090 and larger") for line in planned)
    checked = memory_check_text(memory).splitlines()
    assert max(map(len, checked)) <= 80
    assert checked[-4] == "Largest at the peak:"
    assert checked[-2] == "  19.0 MiB model.layers.1.mlp, aten.mm, 2048x4096 bfloat16"
    assert len(checked) - len(memory_check_text(example_documents()["memory.json"]).splitlines()) <= 5


def test_a_plan_of_one_phase_says_nothing_of_phases_in_the_terminal():
    assert "Peak by phase" not in plan_text(example_plan())


def test_cards_are_grouped_by_memory_and_none_is_lost():
    plan = full_documents()["plan.json"]
    groups = card_groups(plan)
    assert [group.names for group in groups] == [["RTX 4060"], ["RTX 3060", "RTX 4070"], ["RTX 4090"], ["H100 80GB"]]
    assert groups[1].usable_bytes == int(11.39 * GIB)
    assert [group.fits["qlora"] for group in groups] == [False, True, True, True]
    plan["cards"][2]["qlora"] = False
    assert [group.names for group in card_groups(plan)][1:3] == [["RTX 4070"], ["RTX 3060"]]


@pytest.mark.parametrize(
    ("fits", "said"),
    [
        ("00000", "no card in the table"),
        ("11111", "every card in the table"),
        ("01111", "RTX 3060 and larger"),
        ("00001", "only H100 80GB"),
        ("01110", "3 cards, the smallest RTX 3060"),
    ],
)
def test_the_cards_sentence_names_the_smallest_that_fits(fits, said):
    cards = [
        {"name": name, "usable_bytes": int(usable * GIB), "qlora": fit == "1"}
        for (name, usable), fit in zip(USABLE.items(), fits, strict=True)
    ]
    assert cards_sentence({"cards": cards, "methods": {}}) == f"Fits on: {said}."
    assert cards_sentence({"cards": [], "methods": {}}) == cards_sentence({"methods": {}}) == ""


def test_facts_are_the_numbers_of_the_report(tmp_path):
    documents = full_documents()
    plan, memory = documents["plan.json"], documents["memory.json"]
    facts = report_facts(read_run(write_run(tmp_path / "run", documents)))
    assert json.loads(json.dumps(facts)) == facts
    full, own = (plan["methods"][name]["peak_bytes"] for name in ("full_finetune", "qlora"))
    assert facts["savings"]["full_finetune"] == pytest.approx(1 - own / full)
    assert facts["error"]["peak"] == -0.012  # as recorded
    planned, measured = (memory[kind]["peak_by_phase"]["backward"] for kind in ("planned", "measured"))
    assert facts["error"]["by_phase"]["backward"] == pytest.approx(planned / measured - 1)
    assert facts["error"]["by_phase"].keys() == set(PHASES[:5])
    assert facts["fits"] == {
        "qlora": ["RTX 3060", "RTX 4070", "RTX 4090", "H100 80GB"],
        "lora_16bit": ["RTX 4090", "H100 80GB"],
        "full_finetune": [],
    }
    assert facts["best_evaluation"] == {"step": 60, "loss": pytest.approx(1.1 + math.exp(-3)), "is_kept": False}
    assert facts["verdict"] in Page(render(tmp_path / "run")).text


# Drawings


def test_bars_are_as_long_as_their_bytes():
    bars = {name: example_plan()["methods"][key]["by_category"] for key, name in METHODS.items()}
    drawing = ElementTree.fromstring(stacked_bars(bars, title="memory", budget=24 * GIB))
    parts = [rect for rect in drawing.iter("rect") if "part" in rect.get("class")]
    assert len(parts) == len(METHODS) * len(CATEGORIES)
    counts = [count for by_category in bars.values() for count in by_category.values()]
    longest = max(sum(by_category.values()) for by_category in bars.values())
    for rect, count in zip(parts, counts, strict=True):
        assert float(rect.get("width").rstrip("%")) == pytest.approx(100 * count / longest, abs=6e-4)
    ends = [float(rect.get("x").rstrip("%")) + float(rect.get("width").rstrip("%")) for rect in parts]
    starts = [float(rect.get("x").rstrip("%")) for rect in parts]
    assert all(ends[i] == pytest.approx(starts[i + 1], abs=2e-3) for i in range(len(parts) - 1) if starts[i + 1])
    assert float(drawing.find("g/line").get("x1").rstrip("%")) == pytest.approx(100 * 24 * GIB / longest, abs=1e-3)


def test_what_was_planned_and_not_measured_at_all_has_no_error():
    held = ({"peak_bytes": GIB, "by_category": {"workspace": count, "other": 0}} for count in (MIB, 0))
    table = {
        name: error for name, *_, error in memory_check_table(dict(zip(("planned", "measured"), held, strict=True)))
    }
    assert (table["workspace"], table["other"], table["peak"]) == ("-", "0.0 %", "0.0 %")


def lengths(*values):
    return [float(value.rstrip("%")) for value in values]


def test_phase_bars_are_as_long_as_their_bytes_and_the_stroke_stands_at_the_plan():
    bars = {"load": PhaseBar({"": 2 * GIB}, mark=3 * GIB), "loss": PhaseBar({"activations": GIB, "other": 3 * GIB})}
    drawing = ElementTree.fromstring(phase_bars(bars, title="phases"))
    assert lengths(*(rect.get("width") for rect in drawing.iter("rect"))) == [50, 25, 75]
    assert [lengths(line.get("x1"), line.get("x2")) for line in drawing.iter("line")] == [[75, 75]]
    assert [node.text for node in drawing.iter("text")] == ["load", "2.00 GiB", "loss", "4.00 GiB"]
    ElementTree.fromstring(phase_bars({}, title="none"))


def test_a_phase_is_shown_by_category_only_where_the_timeline_comes_near_its_peak(tmp_path):
    documents = full_documents()
    documents["memory.json"]["measured"]["peak_by_phase"]["forward"] = 7 * GIB  # the fullest moment holds 6 GiB
    page = render(write_run(tmp_path / "run", documents))
    measured = next(one for one in drawings(page) if one.find("title").text == "Measured peak by phase, by category")
    said = [node.text for node in measured.iterfind("rect/title")]
    assert "forward: 7.00 GiB" in said
    assert "backward: activations 2.85 GiB (36.3%)" in said


def corners(path):
    return [tuple(map(float, pair.split())) for pair in re.split("[MLZ]", path.get("d")) if pair]


def test_the_areas_of_the_timeline_lie_on_each_other_and_reach_the_totals():
    samples = moments()
    drawing = ElementTree.fromstring(timeline(samples, title="memory"))
    layers = [node for node in drawing.iter("path") if "layer" in node.get("class")]
    assert [node.get("class") for node in layers] == ["layer base-weights", "layer activations"]
    ticks = [node for node in drawing.iter("text") if node.get("text-anchor") == "end" and node.get("x") == "-10"]
    top = max(float(node.text) for node in ticks) * GIB
    upper = corners(layers[1])
    for index, sample in enumerate(samples):
        middle = 1000 * (index + 0.5) / len(samples)
        heights = [y for (x0, y), (x1, y1) in pairwise(upper) if x0 <= middle < x1 and y == y1]
        assert heights == [pytest.approx(1000 * (1 - sum(sample["bytes"].values()) / top), abs=0.06)]
    level = pytest.approx(1000 * (1 - 5 * GIB / top), abs=0.06)
    assert corners(layers[0])[:2] == [(0, level), (1000, level)]


def test_each_phase_of_the_timeline_is_named_once_and_no_name_runs_into_another():
    """Letters are taken to be 7 px wide and the frame 280 px, as on a phone."""
    drawing = ElementTree.fromstring(timeline(moments(), title="memory"))
    names = [node for node in drawing.iter("text") if node.get("class") == "phase"]
    assert sorted(node.text for node in names) == sorted({moment["phase"] for moment in moments()})
    rows = {}
    for node in names:
        width, x = 7 * len(node.text), 2.8 * lengths(node.get("x"))[0]
        start = x - {"start": 0, "middle": width / 2, "end": width}[node.get("text-anchor")]
        rows.setdefault(node.get("y"), []).append((start, start + width))
    assert len(rows) > 1
    for spans in rows.values():
        spans.sort()
        assert spans[0][0] >= 0
        assert spans[-1][1] <= 280
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_the_name_of_a_phase_stands_over_its_longest_stretch():
    phases = [*["forward"] * 6, *["loss"] * 12, *["forward"] * 2]
    drawing = ElementTree.fromstring(timeline([{"phase": each, "bytes": {"other": GIB}} for each in phases], title="x"))
    threads = [line.get("x1") for line in drawing.iter("line") if line.get("class") == "thread"]
    assert sorted(lengths(*threads)) == [15, 60], "the middle of 0 to 6 of 20, and of 6 to 18"


@pytest.mark.parametrize("samples", [[{"bytes": {}}], [{"phase": None, "bytes": {"other": 0}}] * 3, moments()[:1]])
def test_a_timeline_of_hardly_anything_stays_drawable(samples):
    ElementTree.fromstring(timeline(samples, title="memory"))


def test_bars_of_nothing_and_of_long_names_stay_drawable():
    drawing = ElementTree.fromstring(stacked_bars({"<" * 300: {"other": 0}}, title="none", budget=GIB))
    assert drawing.find("rect").get("width") == "0.000%"
    assert drawing.find("text").text == "<" * 25 + "…"
    assert drawing.find("g") is None
    ElementTree.fromstring(stacked_bars({}, title="no bars"))


def test_a_chart_breaks_its_line_at_gaps_and_dots_what_stands_alone():
    points = [(1, 2.0), (2, 1.5), (3, None), (4, 1.2), (5, None), (6, 1.1), (7, 1.0)]
    drawing = chart(points)
    assert drawing.find("svg/path").get("d").count("M") == 2
    assert [circle.find("title").text for circle in drawing.iter("circle")] == ["training at 4: 1.2"]


@pytest.mark.parametrize(
    "points", [[], [(1, None)], [(1, 2.0)], [(1, 0.0), (2, 0.0)], [(5, 1e-9), (6, 1e30)], [(1, -3.0), (1_000_000, 4e5)]]
)
def test_a_chart_of_any_values_stays_inside_its_frame(points):
    drawing = chart(points)
    numbers = [
        float(value.rstrip("%")) for node in drawing.iter("circle") for value in (node.get("cx"), node.get("cy"))
    ]
    for path in drawing.iter("path"):
        numbers += [float(value) / 10 for value in re.findall(r"[-\d.]+", path.get("d"))]
    assert len(numbers) == 2 * sum(value is not None for _, value in points)
    assert all(0 <= number <= 100 for number in numbers)
    labels = [node.text for node in drawing.iter("text")]
    assert len(labels) == len(set(labels))
    assert all(label == "no finite value" or len(label) <= 9 for label in labels)


def test_one_spike_does_not_flatten_the_curve():
    points = [(step, 1e6 if step == 500 else 2.0 + step % 2) for step in range(1, 1001)]
    raw = Series("each step", points, "train-raw", faint=True)
    drawing = ElementTree.fromstring(line_chart([raw], title="loss", x_label="step", y_label="loss"))
    ticks = [float(node.text) for node in drawing.iter("text") if node.get("text-anchor") == "end"]
    assert (min(ticks), max(ticks)) == (2.0, 3.0)


def test_ten_thousand_points_are_thinned_and_keep_their_spikes():
    points = [(step, 9.0 if step == 7777 else 1 + 0.1 * (step % 7)) for step in range(10_000)]
    points[5000] = (5000, None)
    kept = thin(points)
    assert len(kept) <= 900
    assert (7777, 9.0) in kept
    assert any(value is None for _, value in kept)
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    assert len(chart(points).find("svg/path").get("d")) < 20_000


def test_smoothing_with_a_window_of_one_changes_nothing_and_gaps_stay():
    points = [(1, 3.0), (2, None), (3, 1.0), (4, 2.0)]
    assert smooth(points, 1) == points
    assert smooth(points, 3) == [(1, 3.0), (2, None), (3, 1.5), (4, 1.5)]


def chart(points):
    drawn = line_chart([Series("training", points, "train")], title="a chart", x_label="x", y_label="y")
    return ElementTree.fromstring(drawn)


# The sentence


def evaluated(*losses):
    return [{"step": 10 * (index + 1), "eval_loss": loss} for index, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        (
            (2.0, 1.5, 1.2, 1.0),
            "Improving: the evaluation loss fell from 2.000 to 1.000 and was still falling at the end.",
        ),
        (
            (2.0, 1.2, 1.0, 1.0, 1.0),
            "Improving, then flat since step 30: the evaluation loss fell from 2.000 to 1.000.",
        ),
        (
            (2.0, 1.7, 1.5, 1.2, 1.0, 1.0),  # of six the last two: too few to call it settled
            "Improving: the evaluation loss fell from 2.000 to 1.000 and was still falling at the end.",
        ),
        ((1.5, 1.501, 1.499, 1.5), "Flat: the evaluation loss went from 1.500 to 1.500."),
        ((2.0, 1.4, 1.5, 1.6), "Overfitting since step 20: the evaluation loss has risen from 1.400 to 1.600."),
    ],
)
def test_the_evaluation_curve_is_judged(losses, sentence):
    assert judge_curve(evaluated(*losses)) == sentence


def test_a_model_whose_training_loss_rises_too_does_not_overfit():
    trained = [{"step": step, "loss": 1 + abs(step - 20) / 10} for step in range(1, 41)]
    assert judge_curve([*evaluated(2.0, 1.4, 1.5, 1.6), *trained]).startswith("Getting worse since step 20")


@pytest.mark.parametrize(
    ("slope", "verdict"),
    [(-0.01, "Improving: the training loss"), (0.0, "Flat"), (0.01, "Getting worse since step")],
)
def test_noise_does_not_hide_the_trend_of_the_training_loss(slope, verdict):
    for seed in range(50):
        noise = random.Random(seed)
        rows = [{"step": step, "loss": 5 + slope * step + noise.gauss(0, 0.3)} for step in range(1, 201)]
        assert judge_curve(rows).startswith(verdict)


def test_the_noise_of_a_few_steps_is_no_trend():
    rows = [{"step": step, "loss": 4.9 if step % 2 else 5.1} for step in range(1, 9)]
    assert judge_curve(rows) == "Flat: the training loss went from 5.000 to 5.000."


def test_losses_that_are_not_finite_are_told():
    rows = [{"step": 3, "loss": None, "nonfinite": True}, *evaluated(2.0, 1.5, 1.0)]
    assert judge_curve(rows).endswith("; the loss was not finite at 1 step, first at step 3.")


@pytest.mark.parametrize(
    ("losses", "kept", "said"),
    [
        ((2.0, 1.4, 1.0), {30}, "the best evaluation, 1.000 at step 30, is the run's last and is kept"),
        (
            (2.0, 1.4, 1.6),
            {20, 30},
            "the best evaluation, 1.400 at step 20, is kept as a checkpoint; training ended at step 30",
        ),
        ((2.0, 1.4, 1.6), {30}, "the best evaluation, 1.400 at step 20, is not kept: only the last, step 30, is"),
        ((2.0, 1.4, 1.42), {30}, "the best evaluation, 1.400 at step 20, is not kept: only the last, step 30, is"),
        ((2.0, 1.4, 1.405), {30}, "is not kept, but the last, step 30, is within 1 % of it"),
        ((2.0, 1.4, 1.6), set(), "is not kept, nor is the last"),
        ((2.0, 1.4, 1.4), {30}, "the best evaluation, 1.400 at step 30, is the run's last and is kept"),
    ],
)
def test_the_sentence_says_what_is_left_of_the_best_evaluation(losses, kept, said):
    assert judge_curve(evaluated(*losses), kept).endswith(f"{said}.")


def test_the_sentence_says_that_a_run_leaves_its_best_and_not_its_end():
    said = judge_curve(evaluated(2.0, 1.4, 1.6), {20, 30}, left=20)
    assert said.endswith("the best evaluation, 1.400 at step 20, is the run's result; training ended at step 30.")
    assert judge_curve(evaluated(2.0, 1.4, 1.0), {30}, left=30).endswith("is the run's last and is kept.")
    said = judge_curve(evaluated(2.0, 1.4, 1.6), {20, 30}, left=30)
    assert said.endswith("the best evaluation, 1.400 at step 20, is kept as a checkpoint; training ended at step 30.")
    said = judge_curve(evaluated(2.0, 1.4, 1.6), {10, 30}, left=10)
    assert said.endswith("at step 20, is not the run's result: that is step 10, and training ended at step 30.")


def test_a_run_that_ended_worse_than_its_base_or_early_says_so_first(run):
    scores = {"base": {"loss": 1.0}, "adapter": {"loss": 1.5}}
    (run / "scores.json").write_text(json.dumps(scores))
    verdict = report_facts(read_run(run))["verdict"]
    assert verdict.startswith("Worse than the base on the held-out rows: a loss of 1.500 against 1.000.")
    scores["adapter"]["loss"] = 1.0
    (run / "scores.json").write_text(json.dumps(scores))
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps(plan | {"steps": 90}))
    assert report_facts(read_run(run))["verdict"].startswith("Stopped early, at step 60 of 90.")
    (run / "scores.json").unlink()
    assert report_facts(read_run(run))["verdict"].startswith("Not finished: the last is step 60 of 90.")


def test_what_is_kept_is_read_from_the_folder(run):
    assert read_run(run).kept_steps == frozenset()
    (run / "checkpoints" / "step-000040").mkdir(parents=True)
    assert read_run(run).kept_steps == frozenset()  # a folder without a manifest is not complete
    (run / "checkpoints" / "step-000040" / "manifest.json").write_text("{}")
    (run / "adapter").mkdir()
    assert read_run(run).kept_steps == {40, 60}
    assert read_run(run).left_step == 60
    (run / "result.json").write_text(json.dumps({"step": 20}))
    assert (read_run(run).left_step, read_run(run).kept_steps) == (20, {20, 40})


@pytest.mark.parametrize("count", [256, None, "x", [1]])
def test_a_plan_says_of_how_many_logits_its_floor_speaks_or_is_refused(run, count):
    plan = json.loads((run / "plan.json").read_text())
    plan["floor"] = {"bytes": 10, "ratio": 1.0, "logits_tokens": count}
    (run / "plan.json").write_text(json.dumps(plan))
    if count == 256:
        assert "logits of 256 tokens at once" in plan_text(plan)
        return
    with pytest.raises(RunError, match="floor"):
        read_run(run)


def test_gradients_that_become_zero_are_told_once_and_a_single_zero_is_not():
    watch = GradientWatch()
    told = [
        watch.see(step, norm) for step, norm in enumerate([1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0], 1)
    ]
    assert [bool(each) for each in told] == [False] * 5 + [True] + [False] * 5
    assert "zero since step 4" in told[5]


def told_by(losses):
    """The explosions that a watch tells of."""
    watch = LossWatch()
    return [told for step, loss in enumerate(losses, 1) if (told := watch.see(step, loss)) is not None]


def noise(mean, spread, count, seed=0):
    draw = random.Random(seed)
    return [max(0.0, draw.gauss(mean, spread)) for _ in range(count)]


@pytest.mark.parametrize(
    ("losses", "earliest", "latest"),
    [
        (noise(1.0, 0.1, 60) + noise(9.0, 0.5, 40), 62, 80),
        (noise(9.0, 0.5, 20) + noise(2.0, 0.2, 40) + noise(7.0, 0.5, 40), 62, 80),  # below where it began
        ([2.0] * 20 + [11.0] * 20, 22, 40),
        ([1.0] * 20 + [1.8] * 20 + [2.9] * 20, 42, 60),  # no stretch is twice the one before it
        ([0.8, 2.5, *noise(5.0, 0.3, 60)], 20, 25),  # there was no calm stretch
    ],
)
def test_a_loss_that_explodes_is_told_once_and_within_twenty_steps(losses, earliest, latest):
    (told,) = told_by(losses)
    assert earliest <= told.step <= latest
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    assert judge_explosion(rows) == str(told)
    assert f"by step {told.step}" in str(told)
    assert "train.lr" in str(told)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("mean", "spread"),
    [(1.0, 0.1), (3.0, 1.0), (0.02, 0.02), (10.0, 0.1)],
    ids=["usual", "wild", "learnt", "untrained"],
)
def test_noise_is_no_explosion(mean, spread, seed):
    losses = noise(mean, spread, 2000, seed)
    assert max(losses) > mean + 2 * spread, "single steps are high"
    assert told_by(losses) == []


def test_overfitting_spikes_and_short_runs_are_no_explosion():
    assert told_by([3.0] * 30 + [30.0] + [2.9] * 30) == []
    assert told_by([2.0 + 0.01 * step for step in range(100)]) == []
    assert told_by([0.001] * 40 + [0.4] * 40) == []
    assert told_by([1.0] * 20 + [0.5, 5.0] * 20) == [], "a mean of 2.75 of such numbers may be chance"
    assert told_by([1.0] * 10 + [20.0] * 10) == []
    assert told_by([0.5, *noise(3.0, 1.0, 500)]) == [], "a first row may be easy"
    assert told_by([0.1, *noise(2.0, 0.1, 500)]) == []
    assert told_by([0.9, 2.60, 2.62, 2.64, *[2.2] * 300]) == []
    assert told_by([*[0.9] * 5, *noise(6.0, 3.0, 500)]) == [], "a mean of such numbers says little"
    assert judge_explosion([]) == ""


def test_a_curve_of_no_or_one_point_is_not_judged():
    assert judge_curve([]) == "No loss has been recorded."
    assert judge_curve([{"step": 1, "loss": 2.3}]) == "Too few points to judge: the training loss at step 1 is 2.300."


# Rows


@pytest.mark.parametrize("rows", [[], [{"step": 1, "loss": 2.0}], [{"step": 1, "loss": None, "nonfinite": True}]])
def test_a_run_of_hardly_any_steps_has_a_page(tmp_path, rows):
    Page(render(write_run(tmp_path / "run", rows=rows)))


def test_rows_after_a_resume_replace_those_they_repeat(tmp_path):
    first = [{"step": step, "loss": 2.0} for step in (1, 2, 3, 4)] + [{"step": 4, "eval_loss": 9.0}]
    again = [{"step": 3, "loss": 1.0}, {"step": 3, "eval_loss": 1.5}]
    rows = read_run(write_run(tmp_path / "run", rows=first + again)).rows
    assert [(row["step"], row["loss"], row.get("eval_loss")) for row in rows] == [
        (1, 2.0, None),
        (2, 2.0, None),
        (3, 1.0, 1.5),
    ]
    rows = read_run(write_run(tmp_path / "other", rows=[*first, {"step": 3, "eval_loss": 8.0}, again[0]])).rows
    assert [row.get("eval_loss") for row in rows] == [None] * 3, "of the step that is trained again, too"


def test_answers_on_the_way_are_those_of_the_first_and_the_last_step(run):
    rows = [{"step": step, "prompt": "Where?", "answer": f"answer {step}"} for step in (10, 20, 30)]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = Page(render(run)).text
    assert all(word in shown for word in ("step 10", "answer 10", "step 30", "answer 30"))
    assert "answer 20" not in shown


def test_the_models_name_is_read_beside_remarks(tmp_path):
    text = "base: # of this run\n  model: org/name # the small one\ntrain:\n  lr: 1e-4\n"
    assert read_run(write_run(tmp_path / "run", recipe=text)).model == "org/name"


def test_nan_in_a_row_is_a_gap(tmp_path):
    rows = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": 1.0}]
    assert [row["loss"] for row in read_run(write_run(tmp_path / "run", rows=rows)).rows] == [None, None, 1.0]


# Several runs


def recipe(model="Qwen/Qwen3-8B", rank=16, lr="2e-4", output="runs/a"):
    return f"base:\n  model: {model}\nlora:\n  rank: {rank}\ntrain:\n  lr: {lr}\noutput: {output}\n"


@pytest.fixture
def three(tmp_path):
    """Runs that differ in rank and learning rate; the second has the lowest loss, the third the smallest peak."""
    folders = []
    for index, (rank, lr) in enumerate([(16, "2e-4"), (64, "2e-4"), (16, "5e-5")]):
        documents = full_documents()
        documents["scores.json"]["adapter"]["loss"] = (1.3, 1.1, 1.2)[index]
        documents["memory.json"]["measured"]["peak_bytes"] = (9 - index) * GIB
        text = recipe(rank=rank, lr=lr, output=f"runs/{index}")
        folders.append(write_run(tmp_path / f"run-{index}", documents, recipe=text))
    return folders


def test_a_comparison_holds_the_scores_the_differences_and_every_curve(three):
    runs = compare_runs(three)
    page = render_comparison(runs)
    parsed = Page(page)
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Scores and memory", "Recipes", "Training", "Memory at the peak"]
    assert re.findall(r"<strong>(.*?)</strong><span>(.*?)</span>", page) == [
        ("1.100", "lowest held-out loss: run-1"),
        ("43.8 %", "most exact matches: run-0"),
        ("7.00 GiB", "smallest measured peak: run-2"),
    ]
    charts = {drawing.find("title").text: drawing for drawing in drawings(page)}
    assert len(charts) == 4
    for title in ("Evaluation loss over steps", "Training loss over steps, smoothed"):
        curves = [node.get("class") for node in charts[title].iter("path")]
        assert curves == ["line run-0", "line run-1", "line run-2"]
    assert parsed.text.count("Improving") == 3
    assert not {"script", "img", "link"} & set(parsed.tags)
    assert "default-src 'none'" in page


def test_recipe_differences_are_those_keys_that_differ_and_not_the_output(three):
    runs = compare_runs(three)
    assert comparison_facts(runs)["differences"] == {
        "lora.rank": ["16", "64", "16"],
        "train.lr": ["2e-4", "2e-4", "5e-5"],
    }
    lines = comparison_text(runs).splitlines()
    assert lines[6].split() == ["lora.rank", "train.lr"]  # fewer keys than runs: a row a run
    assert lines[8].split() == ["run-0", "16", "2e-4"]
    assert comparison_text(runs[1:]).splitlines()[5].split() == ["run-1", "run-2"]
    assert max(map(len, lines)) <= 80


def test_runs_of_the_same_recipe_and_of_other_rows_are_told(three):
    for folder in three:
        (folder / "recipe.yaml").write_text(recipe())
    assert comparison_text(compare_runs(three)).endswith("The recipes are the same.")
    (three[0] / "recipe.yaml").write_text(recipe(model="gpt2"))
    assert "compare losses with care" in " ".join(comparison_text(compare_runs(three)).split())


def test_losses_are_compared_within_a_task_and_memory_among_all(three):
    assert comparison_text(compare_runs(three)).split()[0] == "loss"
    assert "lowest held-out loss: run-1" in render_comparison(compare_runs(three))
    for folder in three[:2]:
        text = (folder / "recipe.yaml").read_text().partition("train:")[0]
        (folder / "recipe.yaml").write_text(f"{text}train:\n  task: dpo\n  lr: 2e-4\n")
    page, text = (make(compare_runs(three)) for make in (render_comparison, comparison_text))
    assert re.findall(r"<strong>(.*?)</strong><span>(.*?)</span>", page) == [
        ("1.100", "lowest held-out loss of dpo: run-1"),
        ("43.8 %", "most exact matches: run-0"),
        ("7.00 GiB", "smallest measured peak: run-2"),
    ]
    curves = {
        drawing.find("title").text: [node.get("class") for node in drawing.iter("path")] for drawing in drawings(page)
    }
    assert curves["Evaluation loss of dpo over steps"] == ["line run-0", "line run-1"]
    assert curves["Evaluation loss of sft over steps"] == ["line run-2"]
    assert curves["Throughput over steps, smoothed"] == ["line run-0", "line run-1", "line run-2"]
    said = "The losses of dpo and sft measure different things: compare each only with its own kind."
    assert said in page
    assert said in " ".join(text.split())
    assert [line.split()[1] for line in text.splitlines()[:5] if line.startswith("run")] == ["dpo", "dpo", "sft"]


def test_runs_of_one_name_are_told_apart_and_a_run_is_given_once(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        write_run(tmp_path / parent / "run")
    text = comparison_text(compare_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"]))
    assert text.splitlines()[2].startswith("a/run ")
    assert text.splitlines()[3].startswith("b/run ")
    with pytest.raises(RunError, match="given twice"):
        compare_runs([tmp_path / "a" / "run", tmp_path / "a" / ".." / "a" / "run"])


def test_old_folders_compare_too(tmp_path):
    folders = [write_run(tmp_path / name, {"plan.json": example_plan()}, rows=[], recipe=None) for name in ("a", "b")]
    Page(render_comparison(compare_runs(folders)))
    assert "tok/s" not in comparison_text(compare_runs(folders))


def test_whatever_runs_say_stays_text_in_a_comparison(three, tmp_path):
    named = "<img src=x onerror=alert(2)>"
    three[0].rename(tmp_path / named)
    (tmp_path / named / "recipe.yaml").write_text(f"base: {{'{named}': '{named}'}}\n'{named}': 1\n")
    parsed = Page(render_comparison(compare_runs([tmp_path / named, *three[1:]])))
    assert parsed.text.count("<img src=x") >= 6
    assert "img" not in parsed.tags


def test_a_recipe_that_is_no_yaml_is_one_line(three):
    (three[1] / "recipe.yaml").write_text("base: [")
    with pytest.raises(RunError, match=r"run-1/recipe\.yaml:\d+: this is not YAML"):
        render_comparison(compare_runs(three))


def test_nothing_but_an_older_comparison_is_overwritten(three, tmp_path):
    runs, mine = compare_runs(three), tmp_path / "mine.html"
    assert write_comparison(runs, mine) == mine
    write_comparison(runs[:2], mine)
    assert mine.read_text(encoding="utf-8") == render_comparison(runs[:2])
    report = write_report(three[0])
    before = report.read_text(encoding="utf-8")
    for path in (report, three[0] / "plan.json", three[0]):
        with pytest.raises(RunError, match="is not a comparison by qlora-kit; give another name with --out"):
            write_comparison(runs, path)
    assert report.read_text(encoding="utf-8") == before
    with pytest.raises(RunError, match="is not a report by qlora-kit"):
        write_report(three[0], mine)


def test_the_verb_writes_one_report_or_a_comparison_and_prints_json(three, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = CliRunner().invoke
    assert call(app, ["report", "run-0"]).stdout.strip() == str(Path("run-0/report.html"))
    assert call(app, ["report", "run-0", "--out", "one.html"]).stdout.strip() == "one.html"
    facts = json.loads(call(app, ["report", "run-0", "--json"]).stdout)
    assert (facts["schema"], facts["report"], facts["steps"]) == (1, "run-0/report.html", 60)
    text = call(app, ["report", "run-0", "run-1"]).stdout
    assert text.splitlines()[-1] == "report.html"
    assert "lora.rank" in text
    together = json.loads(call(app, ["report", "run-0", "run-1", "--json", "--out", "two.html"]).stdout)
    assert [run["run"] for run in together["runs"]] == ["run-0", "run-1"]
    assert (tmp_path / "two.html").exists()
    (tmp_path / "report.html").write_text("my own")
    refused = call(app, ["report", "run-0", "run-1"])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: report.html already exists and is not a comparison")
    assert (tmp_path / "report.html").read_text() == "my own"


# In a browser


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_draws_the_page(run, tmp_path):
    blank = tmp_path / "blank.html"
    blank.write_text("<!doctype html><title>nothing</title>")
    drawn, empty = (len(picture(page, tmp_path)) for page in (write_report(run), blank))
    # A PNG of one colour is nearly nothing; text and drawings do not compress.
    assert drawn > 5 * empty


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_no_page_is_wider_than_a_phone_or_a_desk(three, tmp_path):
    """Each page stands in frames of three widths; a script around them, not in them, measures what sticks out."""
    names = ["x" * 200, "model.layers.0." + "very_long_name." * 12]
    documents = full_documents()
    documents["memory.json"]["largest"][0]["module"] = names[1]
    documents["plan.json"]["cards"].append({"name": names[0], "usable_bytes": 0, "qlora": False})
    report = render(write_run(tmp_path / "long", documents, recipe=recipe(model=names[0])))
    pages = {"report": report, "comparison": render_comparison(compare_runs(three))}
    pages["too wide"] = "<!doctype html><div style='width: 1300px'>wide</div>"
    frames = [
        f'<iframe title="{name}" style="border: 0; height: 400px; width: {width}px" srcdoc="{escape(text)}"></iframe>'
        for name, text in pages.items()
        for width in WIDTHS
    ]
    script = """addEventListener("load", () => { document.title = JSON.stringify(
        [...document.querySelectorAll("iframe")].map(
            frame => [frame.title, frame.contentDocument.documentElement.scrollWidth - frame.clientWidth])) })"""
    around = tmp_path / "around.html"
    around.write_text(f"<!doctype html><title>not run</title>{''.join(frames)}<script>{script}</script>")
    dumped = chromium(tmp_path, "--dump-dom", around.as_uri()).decode()
    found = json.loads(re.search(r"<title>(.*?)</title>", dumped)[1])
    assert found == [
        [name, max(0, 1300 + 8 - width) if name == "too wide" else 0] for name in pages for width in WIDTHS
    ]


def picture(page, folder):
    """A screenshot of `page`, as the bytes of a PNG."""
    path = folder / f"{page.stem}.png"
    chromium(folder, f"--screenshot={path}", page.as_uri())
    return path.read_bytes()


def chromium(folder, *arguments):
    """What a headless browser writes to standard output."""
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=900,3200", *arguments]
    return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
