"""A run goes on with what it was begun with, or says what has changed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.data import cache
from qlora_kit.errors import RunError
from qlora_kit.recipe import read_recipe
from qlora_kit.run import train, verify
from qlora_kit.train.checkpoint import newest_checkpoint
from qlora_kit.watch import Watch

WORDS = ("cat", "dog", "owl", "bee", "ant", "elk", "fox", "hen")


@pytest.fixture
def recipe(tmp_path, model_folder):
    """Makes the recipe of a run of some steps, on rows and a base of its own."""
    base = shutil.copytree(model_folder, tmp_path / "base")
    rows = "".join(json.dumps({"prompt": f"say {word} ", "completion": word}) + "\n" for word in WORDS)
    for name in ("rows", "held"):
        (tmp_path / f"{name}.jsonl").write_text(rows)
    settings = ["data.max_tokens=32", "train.micro_batch=2", "train.accumulation=1", "train.save_every=2"]

    def made(steps, output="run", *more):
        paths = f"base.model={base}", f"data.train={tmp_path}/rows.jsonl", f"data.eval={tmp_path}/held.jsonl"
        return read_recipe("default", [*paths, *settings, f"train.steps={steps}", f"output={tmp_path}/{output}", *more])

    return made


@pytest.fixture
def begun(recipe):
    """The same, of a run that stands after two steps."""
    train(recipe(2))
    return recipe


@pytest.mark.slow
def test_rows_of_a_resumed_run_lie_as_they_lay(recipe, tmp_path):
    plan = tmp_path / "run" / "plan.json"
    layouts = []
    for steps, is_old in ((2, False), (4, False), (6, True)):
        if is_old:  # of a version in which rows did not lie end to end
            old = json.loads(plan.read_text())
            del old["layout"]
            plan.write_text(json.dumps(old))
        train(recipe(steps), resume=steps > 2)
        data = json.loads((tmp_path / "run" / "data.json").read_text())
        layouts.append((json.loads(plan.read_text())["layout"], "packing" in data))
    assert layouts == [("joined", True), ("joined", True), ("apart", False)]


def change_a_row(name):
    def change(folder):
        path = folder / name
        path.write_text(path.read_text().replace("owl", "own"))

    return change


def change_a_weight(name):
    def change(folder):
        path = folder / "base" / "model.safetensors"
        tensors = load_file(path)
        tensors[name] += 0.5
        save_file(tensors, path, {"format": "pt"})

    return change


def change_a_setting(folder):
    path = folder / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_a_row("rows.jsonl"), "training rows"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (change_a_weight("lm_head.weight"), "weights of the base"),
                (change_a_row("held.jsonl"), "held-out rows"),
                (change_a_weight("model.layers.0.mlp.up_proj.weight"), "weights of the base"),
                (change_a_setting, "weights of the base"),
            )
        ),
    ],
)
def test_a_run_does_not_go_on_with_other_rows_or_weights_unless_it_is_forced(change, said, begun, tmp_path):
    change(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*") if path.is_file()}
    with pytest.raises(RunError, match=f"with different {said} than are there now; put the files back .*--force"):
        train(begun(4), resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*") if path.is_file()} == before
    assert train(begun(4), resume=True, force=True).step == 4
    assert train(begun(6), resume=True).step == 6, "what was forced is what the run has now"


def test_a_base_and_rows_that_only_moved_are_the_same_and_the_run_notes_where_they_are(recipe, begun, tmp_path):
    assert train(recipe(4, "alone")).finished
    for name in ("rows.jsonl", "held.jsonl", "base"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    places = f"base.model={tmp_path}/moved-base", f"data.train={tmp_path}/moved-rows.jsonl"
    moved = begun(4, "run", *places, f"data.eval={tmp_path}/moved-held.jsonl")
    assert train(moved, resume=True).step == 4
    assert read_recipe(tmp_path / "run" / "recipe.yaml").base.model == f"{tmp_path}/moved-base"
    assert verify(tmp_path / "run").faults == []
    alone, resumed = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("alone", "run"))
    assert resumed.keys() == alone.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in alone.items())


def test_another_base_in_the_place_of_one_that_moved_is_refused(begun, tmp_path):
    other = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "base", other / "base")
    change_a_weight("lm_head.weight")(other)
    with pytest.raises(RunError, match="with different weights of the base than are there now"):
        train(begun(4, "run", f"base.model={other}/base"), resume=True)


def as_it_is_stored_in_nf4(folder):
    """Another body, in a form whose marks the run does not know."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=nf4)
    kept = {name: (folder / "base" / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    shutil.rmtree(folder / "base")
    model.save_pretrained(folder / "base")
    for name, content in kept.items():
        (folder / "base" / name).write_bytes(content)


def without_fingerprints(folder):
    path = folder.parent / "run" / "data.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprints": {}}))


@pytest.mark.slow
@pytest.mark.parametrize("change", [as_it_is_stored_in_nf4, without_fingerprints])
def test_a_base_elsewhere_of_which_less_is_known_is_not_taken_for_the_same(change, begun, tmp_path):
    other = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "base", other / "base")
    change(other)
    with pytest.raises(RunError, match=r"with different weights of the base|base.model was"):
        train(begun(4, "run", f"base.model={other}/base"), resume=True)


def test_sources_that_moved_keep_their_weights(recipe, tmp_path):
    def sources(place, weight):
        each = (f"{{path: {tmp_path}/{name}.jsonl, weight: {n}}}" for name, n in ((place, 1), ("held", weight)))
        return f"data.train=[{', '.join(each)}]"

    train(recipe(2, "run", sources("rows", 1)))
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    with pytest.raises(RunError, match=r"made with another recipe: data.train was"):
        train(recipe(4, "run", sources("moved", 3)), resume=True)
    assert train(recipe(4, "run", sources("moved", 1)), resume=True).step == 4


def test_a_resume_without_anything_to_resume_is_one_line(tmp_path):
    recipe = read_recipe("default", ["base.model=a/b", "data.train=c/d", f"output={tmp_path}/run"])
    with pytest.raises(RunError, match="run holds no run to resume; start it without --resume"):
        train(recipe, resume=True)
    with pytest.raises(RunError, match="no complete checkpoint to resume from; start again with --overwrite"):
        newest_checkpoint(tmp_path)


class StopAfter(Watch):
    """Asks for a stop when a step is done, as a signal does."""

    def __init__(self, step):
        self.last, self.now = step, 0

    def row(self, row):
        self.now = row["step"]

    def stop_requested(self):
        return self.now >= self.last


@pytest.mark.parametrize(("optimizer", "masters"), [
    pytest.param("adamw", "fp32", marks=pytest.mark.long), pytest.param("adamw_8bit", "fp32", marks=pytest.mark.slow),
    pytest.param("paged_adamw_8bit", "fp32", marks=pytest.mark.long),
    pytest.param("lion_8bit", "fp32", marks=pytest.mark.long),
    pytest.param("adamw_8bit", "stochastic", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_run_that_is_resumed_twice_at_any_step_is_the_run_that_went_through(optimizer, masters, recipe, tmp_path):
    more = ["lora.rank=128", "lora.dropout=0.1", "train.accumulation=2", f"train.optimizer={optimizer}",
            "train.eval_every=2", "train.sample_every=3", "train.save_every=1", "train.keep_checkpoints=9",
            "train.schedule=cosine", f"train.master_weights={masters}"]  # fmt: skip
    train(recipe(7, "whole", *more))
    for index, step in enumerate((1, 4, 7)):
        train(recipe(7, "parts", *more), resume=index > 0, watch=StopAfter(step))
    assert_same(tmp_path / "parts", tmp_path / "whole", 7)
    if "8bit" in optimizer:
        assert_8_bit(tmp_path / "whole" / "checkpoints" / "step-000007")


ROWS_OF = {
    "pretrain": lambda n, word: {"text": f"say {word} {word} {n}"},
    "classify": lambda n, word: {"text": f"say {word} {n}", "label": "bird" if word in ("owl", "hen") else "other"},
    "pairs": lambda n, word: {"prompt": f"say {word} ", "chosen": word, "rejected": word[::-1] + "!" * (n % 3)},
    "kto": lambda n, word: {"prompt": f"say {word} ", "completion": word, "label": n % 2 == 0},
    "sft": lambda n, word: {"prompt": f"say {word} ", "completion": word},
}
WHOLE = ["train.full_finetune=true", "base.compute_dtype=bfloat16"]  # rounded stochastically
TASKS = {
    "pretrain": ("pretrain", ["data.over_length=split", "data.max_tokens=12", "data.packing=true"]),
    "classify": ("classify", ["lora.dropout=0.1", "train.optimizer=ademamix_8bit"]),
    "dpo": ("pairs", ["lora.dropout=0.1", "train.beta=0.5"]),
    "orpo": ("pairs", ["train.accumulation=2"]),
    "kto": ("kto", ["base.compute_dtype=bfloat16", "train.master_weights=stochastic"]),
    "sft": ("sft", ["lora.dora=true", "lora.added_tokens=[cat]", "train.early_stopping=9", "train.sample_every=2"]),
    "all weights": ("sft", WHOLE),
}


@pytest.mark.parametrize(
    "task",
    [pytest.param(task, marks=pytest.mark.slow if task in ("kto", "sft") else pytest.mark.long) for task in TASKS],
)
def test_a_run_of_any_task_goes_on_to_the_bit(task, recipe, tmp_path):
    kind, settings = TASKS[task]
    rows = tmp_path / "task.jsonl"
    rows.write_text("".join(json.dumps(ROWS_OF[kind](n, word)) + "\n" for n, word in enumerate(WORDS * 2)))
    more = [f"train.task={'sft' if task == 'all weights' else task}", f"data.train={rows}", f"data.eval={rows}",
            "train.eval_every=2", "train.save_every=1", "train.keep_checkpoints=9", "train.schedule=cosine",
            "train.lr=1e-3", "memory.activations=keep", "memory.loss_chunk=64", *settings]  # fmt: skip
    train(recipe(5, "whole", *more))
    for index, step in enumerate((3, 5)):
        train(recipe(5, "parts", *more), resume=index > 0, watch=StopAfter(step))
    assert_same(tmp_path / "parts", tmp_path / "whole", 5)
    trained = [sorted((tmp_path / run).glob("[am]*/*.safetensors")) for run in ("parts", "whole")]
    assert trained[0]
    for ours, theirs in zip(*trained, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
    assert (tmp_path / "parts" / "scores.json").read_text() == (tmp_path / "whole" / "scores.json").read_text()


def assert_same(parts, whole, steps):
    """Every row of metrics, and every tensor of every checkpoint, are the same to the bit."""
    ours, theirs = ([json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (parts, whole))
    assert seen(ours) == seen(theirs)
    for step in range(1, steps + 1):
        for name in ("parameters", "optimizer", "random"):
            ours, theirs = (
                load_file(run / "checkpoints" / f"step-{step:06d}" / f"{name}.safetensors") for run in (parts, whole)
            )
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(as_bytes(ours[key]), as_bytes(theirs[key])) for key in ours)


def assert_8_bit(checkpoint):
    states = load_file(checkpoint / "optimizer.safetensors").values()
    assert any(tensor.dtype == torch.uint8 for tensor in states), "every state is below the 8-bit minimum"


@pytest.fixture
def mixed(tmp_path, model_folder, monkeypatch):
    """Makes the recipe of a packed run of three sources in other shares than they have, with all that goes between."""
    for index, (count, words) in enumerate([(12, 1), (5, 4), (7, 2), (2, 1)]):
        rows = [{"prompt": f"say {n} ", "completion": " ".join(WORDS[:words])} for n in range(count)]
        (tmp_path / f"{index}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shares = [{"path": f"{tmp_path}/{index}.jsonl", "weight": weight} for index, weight in enumerate((0.5, 2, 1))]
    memory = "memory.activations=keep", "memory.loss_chunk=64"  # one plan is enough
    settings = [
        f"base.model={model_folder}", f"data.train={json.dumps(shares)}", f"data.eval={tmp_path}/3.jsonl",
        *memory, "data.max_tokens=64", "data.packing=true", "lora.rank=128", "lora.dropout=0.1", "train.micro_batch=2",
        "train.accumulation=2", "train.optimizer=adamw_8bit", "train.schedule=cosine", "train.eval_every=2",
        "train.sample_every=3", "train.save_every=1", "train.keep_checkpoints=99",
    ]  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda steps, output: read_recipe("default", [*settings, f"train.steps={steps}", f"output={output}"])


@pytest.mark.slow
def test_a_packed_run_of_several_sources_goes_on_to_the_bit(mixed, tmp_path):
    whole, parts = mixed(9, tmp_path / "whole"), mixed(9, tmp_path / "parts")
    train(whole, watch=StopAfter(4))
    packing = json.loads((tmp_path / "whole" / "data.json").read_text())["packing"]
    assert packing["sequences"] < 6 + 10 + 7, "rows share a sequence"
    train(parts, watch=StopAfter(3))
    train(parts, resume=True, watch=StopAfter(4))
    assert_same(tmp_path / "parts", tmp_path / "whole", 4)
    assert_8_bit(tmp_path / "whole" / "checkpoints" / "step-000004")


@pytest.mark.long
def test_a_packed_run_of_several_sources_goes_on_to_the_bit_from_any_step(mixed, tmp_path, monkeypatch):
    """Over an epoch's end, begun with rows in memory and gone on with rows read off a file one by one, as a large set's
    are. No processes load rows beside the run: what is read is what is trained on, and nothing is ahead of it."""
    steps = 9
    train(mixed(steps, tmp_path / "whole"))
    rows = seen([json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").open()])
    assert {int(row["epoch"]) for row in rows if "epoch" in row} == {0, 1}, "an epoch ends on the way"
    for step in range(1, steps):
        output = tmp_path / f"parts-{step}"
        train(mixed(steps, output), watch=StopAfter(step))
        with monkeypatch.context() as patch:
            patch.setattr(cache, "LARGE_BYTES", 1)
            train(mixed(steps, output), resume=True)
        assert_same(output, tmp_path / "whole", steps)
    assert list((tmp_path / "cache").rglob("train.rows")), "rows were read off a file"


def seen(rows):
    return [{key: value for key, value in row.items() if key not in ("tokens_per_s", "peak_bytes")} for row in rows]


def as_bytes(tensor):
    return tensor.reshape(-1).view(torch.uint8)
