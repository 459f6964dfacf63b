"""Fuzz: whatever bytes a file holds, its reader gives a result or an error of the kit, a line for each fault.

Each file starts sound. Then it is cut, bytes of it are flipped, values of its JSON become other values, or it is all
something else: `damaged` draws one of these.
"""

import json
import math
import os
from types import SimpleNamespace

import gguf
import hypothesis
import pytest
import tiny
import torch
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from test_report import full_documents, write_run

from qlora_kit.base.architecture import read_config as read_model_config
from qlora_kit.base.files import check_model_folder, weight_files
from qlora_kit.base.header import read_header
from qlora_kit.data import Encoded, EncodedSet, cache, load_rows
from qlora_kit.data.faults import Faults
from qlora_kit.errors import QloraKitError, RunError
from qlora_kit.export.gguf.writer import write_gguf
from qlora_kit.export.trained_against import read_classes, read_trained_against
from qlora_kit.lora import add_lora, delete_adapter, load_adapter, lora_layers, save_adapter
from qlora_kit.report import compare_runs, comparison_text, read_run, render, report_facts
from qlora_kit.run.verify import verify
from qlora_kit.train.checkpoint import Progress, load_checkpoint, load_parameters, newest_checkpoint, save_checkpoint
from qlora_kit.train.metrics import MetricsLog
from qlora_kit.train.optim import AdapterOptimizer

NASTY = st.sampled_from(("", "\0", "\x1b[2J", "\u202etxt.exe", "a\nb", "../../etc/passwd", "/etc/passwd", "__class__",
                         "<script>", "\ud800", "nan", "(a+)+$", "a{99999999999999}", "*" * 300))  # fmt: skip
NUMBERS = st.sampled_from((0, -1, 1, 2**31, 2**63, -(2**64), 10**30, 10**400, 0.5, -0.0, 1e308, math.nan, math.inf))
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | NASTY | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NASTY | st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
STRANGE = {
    "nothing": b"", "null": b"null", "a list": b"[]", "an object": b"{}", "lists in lists": b"[" * 100_000,
    "objects in objects": b'{"a":' * 100_000, "a long number": b"9" * 5000, "infinity": b'{"a": 1e999}',
    "UTF-16": b"\xff\xfe{", "no UTF-8": b"\x80", "a name twice": b'{"a": NaN, "a": 1}', "a BOM": b"\xef\xbb\xbf{}",
    "two objects": b"{}\n{}", "half a character": b'"\\ud800"',
}  # fmt: skip


@st.composite
def damaged(draw, whole):
    """The bytes of a file that is not as `whole` any more, and of its JSON another tree."""
    kind = draw(st.sampled_from(("tree", "tree", "tree", "flip", "cut", "strange", "any")))
    if kind == "tree" and (changed := draw(other_tree(whole))) is not None:
        return changed
    if kind == "cut":
        return whole[: draw(st.integers(0, max(0, len(whole) - 1)))]
    if kind == "any":
        return draw(st.binary(max_size=40))
    if kind == "strange" or not whole:
        return STRANGE[draw(st.sampled_from(sorted(STRANGE)))]
    flipped = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        flipped[draw(st.integers(0, len(whole) - 1))] = draw(st.integers(0, 255))
    return bytes(flipped)


@st.composite
def other_tree(draw, whole):
    """A JSON document with one or two of its values another, or gone; None where it is none."""
    try:
        tree = [json.loads(whole)]
    except ValueError:
        return None
    for _ in range(draw(st.integers(1, 2))):
        place, key = tree, 0
        while isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 3)):
            place = place[key]
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(keys))
        if isinstance(place, dict) and draw(st.integers(0, 4)) == 0:
            del place[key]
        else:
            place[key] = draw(VALUES)
    return json.dumps(tree[0] if tree else None).encode()


def fuzz(examples):
    """So many examples of one test, times QLORA_KIT_FUZZ; what it is given lives as long as its module."""
    return hypothesis.settings(max_examples=examples * int(os.environ.get("QLORA_KIT_FUZZ", "1")), deadline=None)


def result_or_line(read, *arguments):
    """What a reader gives, or None where it refuses in a line, and a further one for each further fault."""
    try:
        return read(*arguments)
    except QloraKitError as error:
        told = str(error)
    first, *more = told.split("\n")
    assert first
    assert all(line.startswith("  ") for line in more), told
    return None


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


class Quiet(SimpleNamespace):
    """What hypothesis need not print of a failure."""

    def __repr__(self):
        return "..."


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


# --- a model's folder -------------------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model(place):
    """A model in two shards, and beside it a file of weights that is nobody's business."""
    folder = place / "model"
    folder.mkdir()
    (folder / "config.json").write_text(tiny.llama().config.to_json_string())
    save_file({"a": torch.ones(3)}, place / "secret.safetensors")
    save_file({"a": torch.ones(5)}, folder / "1.safetensors")
    save_file({"b": torch.zeros(3, 7), "c": torch.zeros(0)}, folder / "2.safetensors")
    weight_map = {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    check_model_folder(folder)
    return folder


WHOLE_INDEX = json.dumps({"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}).encode()
NAMES = st.sampled_from(("1.safetensors", "2.safetensors", "../secret.safetensors", "x/../../secret.safetensors",
                         "/etc/passwd", ".", "..", "", "1.safetensors/", "./1.safetensors", "1.safetensors\0",
                         "..\\secret"))  # fmt: skip
MAPS = st.dictionaries(st.text(max_size=3), NAMES | VALUES, max_size=3)


@fuzz(100)
@hypothesis.given(damaged(WHOLE_INDEX) | MAPS.map(lambda weight_map: json.dumps({"weight_map": weight_map}).encode()))
def test_no_index_leads_out_of_its_folder(model, content):
    (model / INDEX).write_bytes(content)
    result_or_line(check_model_folder, model)
    for file in result_or_line(weight_files, model) or ():
        assert file.resolve().parent == model.resolve()


def header_of(tensors):
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            for name, (dtype, shape, begin, end) in tensors.items()}  # fmt: skip


WHOLE_HEADER = json.dumps(header_of({"a": ("F32", [2], 0, 8), "b": ("BF16", [2, 2], 8, 16)})).encode()


@fuzz(200)
@hypothesis.given(damaged(WHOLE_HEADER), st.integers(0, 20) | st.just(16), st.integers(-2, 2) | st.just(2**40))
def test_a_header_describes_exactly_the_bytes_of_its_file_or_is_refused(place, header, data, off):
    file = place / "one.safetensors"
    file.write_bytes(max(0, len(header) + (off if off != 1 else 0)).to_bytes(8, "little") + header + bytes(data))
    entries = result_or_line(read_header, file)
    if entries:
        ends = [8 + len(header), *(entry.end for entry in entries.values())]
        assert [entry.begin for entry in entries.values()] == ends[:-1]
        assert ends[-1] == file.stat().st_size


@fuzz(150)
@hypothesis.given(damaged(tiny.llama().config.to_json_string().encode()))
def test_a_models_config_is_a_config_or_a_line(place, content):
    folder = place / "config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(content)
    result_or_line(lambda: check_model_folder(folder, weights=False))
    result_or_line(read_model_config, folder)


# --- an adapter -------------------------------------------------------------------------------------------------------


SIZES = st.integers(0, 2000)


@pytest.fixture(scope="module")
def base():
    return tiny.quantized(tiny.llama())


def tuned():
    made = tiny.quantized(tiny.llama())
    add_lora(made, rank=2, alpha=4, targets=["q_proj"])
    return made


@pytest.fixture(scope="module")
def adapter(place):
    folder = save_adapter(tuned(), place / "adapter")
    return Quiet(
        path=folder,
        config=(folder / "adapter_config.json").read_bytes(),
        weights=(folder / "adapter_model.safetensors").read_bytes(),
    )


def damaged_header(draw, whole):
    """A safetensors file with another header before the same data."""
    end = 8 + int.from_bytes(whole[:8], "little")
    header = draw(damaged(whole[8:end]))
    return len(header).to_bytes(8, "little") + header + whole[end:]


@fuzz(150)
@hypothesis.given(st.data())
def test_an_adapter_is_loaded_or_a_line_and_leaves_the_base_alone(adapter, base, data):
    config, weights = adapter.config, adapter.weights
    if data.draw(st.booleans()):
        config = data.draw(damaged(config))
    else:
        weights = damaged_header(data.draw, weights) if data.draw(st.booleans()) else weights[: data.draw(SIZES)]
    (adapter.path / "adapter_config.json").write_bytes(config)
    (adapter.path / "adapter_model.safetensors").write_bytes(weights)
    if result_or_line(load_adapter, base, adapter.path) is not None:
        delete_adapter(base, "default")
    result_or_line(read_trained_against, adapter.path, {})
    result_or_line(read_classes, adapter.path)
    assert not list(lora_layers(base))


# --- rows -------------------------------------------------------------------------------------------------------------

CALL = {"role": "assistant", "content": "b", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
CHAT = [{"role": "user", "content": "a"}, CALL]
ROWS = {
    "sft": (
        {"messages": CHAT, "tools": [{"type": "function"}]},
        {"prompt": "a", "completion": "b"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "input": "", "output": "b"},
    ),
    "pretrain": ({"text": "a"},),
    "dpo": ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": CHAT, "rejected": CHAT}),
    "kto": ({"prompt": "a", "completion": "b", "label": True},),
    "classify": ({"text": "a", "label": "b"}, {"text": "a", "label": ["b"]}),
}


@fuzz(200)
@hypothesis.given(st.data(), st.sampled_from(sorted(ROWS)), st.sampled_from((".jsonl", ".json", ".csv", ".txt")))
def test_rows_are_examples_or_faults_with_their_place(place, data, task, suffix):
    file = place / f"rows{suffix}"
    sound = st.sampled_from(ROWS[task]).map(lambda row: json.dumps(row).encode())
    lines = data.draw(st.lists(sound.flatmap(damaged), min_size=1, max_size=3))
    file.write_bytes(b"\n".join(lines))
    faults = Faults()
    rows = result_or_line(lambda: load_rows(file, task=task, faults=faults))
    assert all(str(file) in fault for fault in faults.shown)
    assert all("\n" not in fault for fault in faults.shown)
    assert all(row.where.startswith(str(file)) for row in rows or ())


# --- what a run leaves ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(place):
    folder = write_run(place / "run", full_documents())
    (folder / "result.json").write_text('{"schema": 1, "step": 3, "folder": "adapter", "files": {}}')
    (folder / "samples.jsonl").write_text('{"step": 1, "prompt": "a", "answer": "b"}\n')
    (folder / "adapter").mkdir()
    return Quiet(path=folder, files=contents(folder))


@fuzz(100)
@hypothesis.given(st.data())
def test_a_run_folder_is_a_report_or_a_line(run, data):
    name = data.draw(st.sampled_from(sorted(run.files)))
    whole = run.files[name]
    if name.endswith(".jsonl"):
        first, rest = whole.split(b"\n", 1)
        content = data.draw(damaged(first)) + b"\n" + rest
    else:
        content = data.draw(damaged(whole))
    (run.path / name).write_bytes(content)
    try:
        if result_or_line(read_run, run.path) is not None:
            assert "<script" not in render(run.path)
            json.dumps(report_facts(read_run(run.path)), allow_nan=False)
        result_or_line(lambda: comparison_text(compare_runs([run.path])))
        result_or_line(verify, run.path)
    finally:
        (run.path / name).write_bytes(whole)


@fuzz(100)
@hypothesis.given(st.data())
def test_the_metrics_of_an_earlier_run_are_gone_on_with_or_a_line(place, data):
    file = place / "metrics.jsonl"
    lines = data.draw(st.lists(damaged(b'{"step": 3, "loss": 1.5}'), max_size=3))
    file.write_bytes(b"\n".join(lines))
    log = result_or_line(MetricsLog, file, 5)
    if log is not None:
        log.close()


@pytest.fixture(scope="module")
def checkpoint(place):
    made = tuned()
    named = [(name, parameter) for name, parameter in made.named_parameters() if parameter.requires_grad]
    parameters, optimizer = dict(named), AdapterOptimizer(named, "adamw")
    tiny.train_step(made)
    optimizer.step(0.1)
    folder = place / "checkpoints"
    save_checkpoint(folder, parameters, optimizer, Progress(step=1), keep=2)
    one = folder / "step-000001"
    return Quiet(path=one, parameters=parameters, optimizer=optimizer, files=contents(one))


@fuzz(100)
@hypothesis.given(st.data())
def test_a_checkpoint_is_the_run_or_a_line(checkpoint, data):
    name = data.draw(st.sampled_from(sorted(checkpoint.files)))
    whole = checkpoint.files[name]
    is_tensors = name.endswith(".safetensors")
    content = damaged_header(data.draw, whole) if is_tensors else data.draw(damaged(whole))
    (checkpoint.path / name).write_bytes(content)
    try:
        if content != whole:
            result_or_line(verify, checkpoint.path)
            result_or_line(load_parameters, checkpoint.path, checkpoint.parameters)
            assert result_or_line(newest_checkpoint, checkpoint.path.parent) is None, "whatever byte was changed"
            result_or_line(load_checkpoint, checkpoint.path, checkpoint.parameters, checkpoint.optimizer)
    finally:
        (checkpoint.path / name).write_bytes(whole)


STATES = (
    *({"rows": rows} for rows in (-5, "x", 2.5, 10**30)),
    *({"newer": 1}, {"tokens": None}, {"numbers": []}, {"best_loss": "x"}),
)


@pytest.mark.parametrize("state", STATES)
def test_a_checkpoint_that_says_something_else_under_a_checksum_of_its_own_is_a_line(checkpoint, state):
    """Of another version, or changed by hand."""
    said = json.loads(checkpoint.files["state.json"])
    with pytest.raises(
        RunError, match=r"state.json does not record the run's position in the form of this version; continue"
    ):
        resealed(checkpoint, "state.json", json.dumps(said | state).encode())
    with pytest.raises(RunError, match="holds invalid random states"):
        resealed(checkpoint, "random.safetensors", save({"torch": torch.zeros(3, dtype=torch.uint8)}))


def resealed(checkpoint, name, content):
    """Read a checkpoint with another file in it."""
    (checkpoint.path / name).write_bytes(content)
    try:
        load_checkpoint(checkpoint.path, checkpoint.parameters, checkpoint.optimizer)
    finally:
        (checkpoint.path / name).write_bytes(checkpoint.files[name])


@fuzz(60)
@hypothesis.given(damaged(b'{"schema": 1, "files": {"config.json": "00", "model.safetensors": "11"}}'))
def test_the_manifest_of_an_export_is_verified_or_a_line(place, content):
    folder = place / "export"
    folder.mkdir(exist_ok=True)
    (folder / "export.json").write_bytes(content)
    result_or_line(verify, folder)


# --- the cache of rows ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def entry(place):
    """An entry of the cache with a row on each side."""

    def make(train):
        train.rows.append(Encoded([1, 2, 3], [False, True, True], None, None, "a:1"))
        return EncodedSet(rows=[Encoded([4, 5], [False, True], [4], "b", "a:2")])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        sets = cache.cached("key", make)
        (path,) = (place / "cache" / "qlora_kit" / "data").iterdir()
        yield Quiet(path=path, make=make, files=contents(path), rows=rows_of(sets))


def rows_of(sets):
    return [(list(each.rows), vars(each.faults), each.places, each.classes, each.lengths_given) for each in sets]


@fuzz(40)
@hypothesis.given(st.data())
def test_the_rows_of_a_damaged_cache_are_those_that_it_was_made_of(entry, data):
    name = data.draw(st.sampled_from(sorted(entry.files)))
    content = data.draw(damaged(entry.files[name]))
    (entry.path / name).write_bytes(content)
    assert rows_of(cache.cached("key", entry.make)) == entry.rows


KEYS = st.dictionaries(
    st.sampled_from(("general.name", "tokenizer.chat_template", "tokenizer.ggml.tokens", "llama.context_length")),
    st.text(max_size=20) | NASTY | NUMBERS.filter(lambda n: isinstance(n, int)) | st.lists(st.text(), min_size=1),
)


@hypothesis.settings(max_examples=100, deadline=None, suppress_health_check=[*hypothesis.HealthCheck])
@hypothesis.given(KEYS)
def test_what_a_gguf_says_is_what_its_reader_finds_or_is_refused_in_a_line(tmp_path, keys):
    path = tmp_path / "model.gguf"
    path.unlink(missing_ok=True)
    odd = [value for value in keys.values() if value == "\ud800" or (type(value) is int and not 0 <= value < 2**32)]
    if odd:
        with pytest.raises(QloraKitError, match=r"\Ano GGUF file can hold [^\n]+\Z"):
            write_gguf(path, "llama", keys, [])
        return
    write_gguf(path, "llama", keys, [])
    found = gguf.GGUFReader(path).fields
    told = {key: value for key, value in keys.items() if value != ""}  # the library leaves an empty text out
    assert {key: found[key].contents() for key in told} == told
