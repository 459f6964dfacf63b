"""A sweep: every run of it is the run that it would be alone; what is common is made once; nothing is lost."""

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from qlora_kit.cli.app import app
from qlora_kit.errors import RecipeError, RunError, TrainingError
from qlora_kit.recipe import dump_recipe, read_grid, read_recipe
from qlora_kit.report import read_sweep, sweep_facts, sweep_text, write_sweep
from qlora_kit.report.sweep import Point, _is_at_edge, _peak, sweep_chart, sweep_sentences
from qlora_kit.run import Result, sweep, train
from qlora_kit.units import GIB
from qlora_kit.watch import Watch

build, prepare, sweeping = (import_module(f"qlora_kit.run.{name}") for name in ("build", "prepare", "sweep"))


@pytest.fixture
def recipe(tmp_path, model_folder):
    rows = [
        {"prompt": f"say {word} ", "completion": word} for word in ("cat", "dog", "owl", "bee", "ant", "elk", "hen")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "base": {"model": str(model_folder), "compute_dtype": "float32", "device": "cpu"},
        "lora": {"rank": 2},
        "data": {"train": "rows.jsonl", "eval": "rows.jsonl", "max_tokens": 32},
        "train": {"steps": 2, "micro_batch": 2, "accumulation": 1, "lr": 1e-2, "eval_every": 2, "optimizer": "adamw"},
        "output": str(tmp_path / "runs"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def counted(monkeypatch, module, name):
    """How often a function is called."""
    calls, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(name) or real(*args, **kwargs))
    return calls


@pytest.fixture
def pretended(monkeypatch):
    """Runs that take no time: each leaves the files of a run whose held-out loss is told by its recipe."""

    def pretend(loss_of):
        def run(recipe, *, watch, resume, overwrite, **_):
            folder, loss = Path(recipe.output), loss_of(recipe)
            folder.mkdir(parents=True, exist_ok=True)
            peak = {"peak_bytes": 1, "by_category": {}}
            for name, content in (
                ("plan", {"methods": {"qlora": peak}}),
                ("scores", {"base": {}, "adapter": {"loss": loss}}),
            ):
                (folder / f"{name}.json").write_text(json.dumps({"schema": 1, **content}))
            (folder / "recipe.yaml").write_text(dump_recipe(recipe))
            (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 9.0, "eval_loss": loss}) + "\n")
            (folder / "adapter").mkdir(exist_ok=True)
            return Result(folder, True, 1, None, 1.0)

        monkeypatch.setattr(sweeping, "train", run)

    return pretend


def left_by(folder):
    """All that a run leaves of what it computed."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [(row.get("loss"), row.get("grad_norm"), row.get("eval_loss")) for row in metrics]
    trained = next(path for name in ("adapter", "model") for path in (folder / name).glob("*.safetensors"))
    return numbers, json.loads((folder / "scores.json").read_text()), load_file(trained)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", ["nf4", pytest.param("nf4,none,int8", marks=pytest.mark.long)])
def test_every_run_of_a_sweep_is_bit_for_bit_the_run_that_it_would_be_alone(recipe, tmp_path, monkeypatch, kinds):
    fixed = ["lora.dropout=0.2", "lora.also_train=[lm_head]"]
    loads, reads = counted(monkeypatch, build, "load_recipe_base"), counted(monkeypatch, prepare, "read_rows")
    grid = read_grid(recipe, [*fixed, "train.seed=0,1", f"base.quantization={kinds}", f"output={tmp_path / 'swept'}"])
    assert {outcome.failed for outcome in sweep(grid)} == {None}
    bases = len(kinds.split(","))
    assert (len(loads), len(reads)) == (bases, bases), "the seed is the inner axis"
    adapters = []
    for cell in grid.cells:
        alone = tmp_path / "alone" / cell.name
        train(read_recipe(recipe, [*fixed, *(f"{k}={v}" for k, v in cell.settings.items()), f"output={alone}"]))
        (numbers, scores, trained), (own_numbers, own_scores, own) = left_by(Path(cell.recipe.output)), left_by(alone)
        assert numbers == own_numbers
        assert scores == own_scores
        assert all(torch.equal(trained[name], own[name]) for name in own)
        adapters.append(own)
    assert not any(torch.equal(adapters[0][name], adapters[1][name]) for name in own if "lora_A" in name)


@pytest.mark.slow
def test_full_fine_tuning_in_a_sweep_leaves_the_other_runs_their_base(recipe, tmp_path):
    axis = "train.full_finetune=false,true"
    grid = read_grid(recipe, ["base.quantization=none", axis, "train.seed=0,1", f"output={tmp_path / 'swept'}"])
    order = [grid.cells[place] for place in (2, 0, 3, 1)]  # whole, adapter, whole, adapter
    sweep(type(grid)(grid.recipe, grid.folder, grid.axes, order))
    bases = [json.loads((Path(cell.recipe.output) / "scores.json").read_text())["base"]["loss"] for cell in order]
    tuned = [json.loads((Path(cell.recipe.output) / "scores.json").read_text())["adapter"]["loss"] for cell in order]
    assert len(set(bases)) == 1
    assert bases[0] not in tuned
    assert len(set(tuned)) == 4


def test_an_axis_is_cut_at_its_top_level_commas_and_its_values_are_yaml(recipe):
    grid = read_grid(recipe, ["lora.targets=[q_proj,v_proj],all-linear", "train.lr=1e-4,0.002", "lora.rank=4"])
    assert grid.axes == {"lora.targets": ["[q_proj,v_proj]", "all-linear"], "train.lr": ["1e-4", "0.002"]}
    targets = [cell.recipe.lora.targets for cell in grid.cells]
    assert targets == [["q_proj", "v_proj"], ["q_proj", "v_proj"], "all-linear", "all-linear"]
    assert [cell.recipe.train.lr for cell in grid.cells] == [1e-4, 0.002] * 2
    assert {cell.recipe.lora.rank for cell in grid.cells} == {4}
    assert grid.cells[1].name == "targets=q_proj-v_proj,lr=0.002"
    assert Path(grid.cells[1].recipe.output) == Path(f"{read_recipe(recipe).output}-sweep") / grid.cells[1].name


def test_runs_that_share_a_base_come_one_after_another(recipe):
    grid = read_grid(recipe, ["train.seed=0,1", "base.quantization=nf4,int8"])
    assert [cell.settings["base.quantization"] for cell in grid.cells] == ["nf4", "nf4", "int8", "int8"]
    assert [*grid.cells[0].settings] == ["train.seed", "base.quantization"]


def test_names_of_runs_differ_though_their_values_look_alike(recipe):
    grid = read_grid(recipe, ["lora.targets=[q_proj],'re:q_proj',re:[q]_proj", "lora.rank_pattern={},{q_proj: 3}"])
    assert len({cell.name for cell in grid.cells}) == 6
    assert not any("/" in cell.name or cell.name.startswith(".") for cell in grid.cells)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lora.rank=4"], "nothing to sweep over"),
        ([], "nothing to sweep over"),
        (["lora.rank=4,8", "lora.rank=16,32"], "lora.rank is given twice"),
        (["lora.rank=4,8,4"], "lora.rank=4,8,4 has 4 twice"),
        (["lora.rank=4,,8"], "has nothing between two commas"),
        (["output=a,b"], "output cannot be an axis"),
        (["train.seed=" + ",".join(map(str, range(501))), ], "the grid has 501 runs"),
        (["lora.rnak=4,8"], "lora.rnak"),
        (["lora.rank=4,many"], "lora.rank"),
    ],
)  # fmt: skip
def test_a_grid_that_is_wrong_is_told_before_anything_is_made(recipe, words, said):
    with pytest.raises(RecipeError, match=said.replace("[", r"\[")):
        read_grid(recipe, words)
    assert not Path(f"{read_recipe(recipe).output}-sweep").exists()


def test_a_run_that_breaks_off_is_recorded_and_the_others_go_on(recipe, pretended):
    def loss_of(checked):
        if checked.train.lr >= 0.5:
            raise TrainingError(f"loss is not finite at rate {checked.train.lr:g}\nand more")
        return checked.train.lr

    pretended(loss_of)
    grid = read_grid(recipe, ["train.lr=1e-3,0.5,1e-2"])
    assert [outcome.failed for outcome in sweep(grid)] == [None, "loss is not finite at rate 0.5", None]
    swept = read_sweep(grid.folder)
    assert [point.loss for point in swept.points] == [1e-3, None, 1e-2]
    assert "1 of the runs failed, first lr=0.5: loss is not finite at rate 0.5." in sweep_sentences(swept)
    with pytest.raises(TrainingError, match=r"at rate 0\.5"):
        sweep(read_grid(recipe, ["train.lr=0.5,0.7", f"output={grid.folder}-2"]))
    assert not Path(f"{grid.folder}-2", "sweep.json").exists()


def test_a_point_has_a_mean_of_all_its_seeds_or_none_and_the_last_loss_on_the_way_where_nothing_was_scored():
    scored = SimpleNamespace(scores={"adapter": {"loss": 1.0}}, rows=[])
    on_the_way = SimpleNamespace(scores=None, rows=[{"step": 1, "eval_loss": 2.0}, {"step": 2, "eval_loss": 3.0}])
    unknown = SimpleNamespace(scores=None, rows=[])
    assert Point({}, [scored, on_the_way], []).loss == 2.0
    assert Point({}, [scored, unknown], []).loss is None
    assert Point({}, [scored], ["seed 1: broke off"]).loss is None


def test_the_peak_of_a_point_is_that_of_its_hungriest_seed():
    runs = [SimpleNamespace(memory={"measured": {"peak_bytes": peak * GIB}}) for peak in (1, 3, 2)]
    assert _peak(Point({}, [*runs, SimpleNamespace(memory=None)], [])) == "3.00 GiB"


def test_the_end_of_a_grid_is_one_of_numbers_that_can_go_further_and_none_of_seeds():
    for best, is_edge in (("1e-4", True), ("3e-4", False), ("1e-3", True)):
        assert _is_at_edge("train.lr", ["1e-4", "3e-4", "1e-3"], best) == is_edge
    assert not _is_at_edge("train.lr", ["1e-4", "1e-3"], "1e-3"), "of two values one is at every end"
    assert not _is_at_edge("train.seed", ["0", "1", "2"], "2")
    assert not _is_at_edge("lora.targets", ["attention", "mlp", "head"], "head")


class Stops(Watch):
    """Stops the sweep in its second run."""

    begun = 0

    def run_begins(self, name, number, runs):
        self.begun += 1

    def stop_requested(self):
        return self.begun == 2


@pytest.mark.slow
def test_a_sweep_that_was_stopped_goes_on_where_it_was(recipe, tmp_path):
    axis = ["train.seed=0,1,2", "train.steps=4"]
    grid, whole = read_grid(recipe, axis), read_grid(recipe, [*axis, f"output={tmp_path / 'whole'}"])
    assert len(sweep(grid, watch=Stops())) == 1
    assert read_sweep(grid.folder).missing == 2
    sweep(whole)
    watch = Stops()
    watch.begun = 2
    assert len(sweep(grid, resume=True, watch=watch)) == 3
    assert watch.begun == 4, "the finished one is left out"
    for own, other in zip(grid.cells, whole.cells, strict=True):
        mine, theirs = left_by(Path(own.recipe.output)), left_by(Path(other.recipe.output))
        assert mine[:2] == theirs[:2]
        assert all(torch.equal(mine[2][name], theirs[2][name]) for name in theirs[2])
    assert sweep(grid, resume=True, watch=watch)
    assert watch.begun == 4


def test_a_sweep_that_stands_is_lost_only_when_that_is_asked_for(recipe, pretended):
    pretended(lambda checked: 1.0)
    grid = read_grid(recipe, ["train.seed=0,1"])
    sweep(grid)
    before = (grid.folder / "sweep.json").read_text()
    with pytest.raises(RunError, match="already holds a sweep; continue it with --resume"):
        sweep(grid)
    with pytest.raises(RunError, match=r"another sweep: train.seed was \['0', '1'\], is \['0', '2'\]\. Resume"):
        sweep(read_grid(recipe, ["train.seed=0,2"]), resume=True)
    with pytest.raises(RunError, match=r"another sweep: lora.alpha was 32, is 8; train.steps was 2, is 3\. Resume"):
        sweep(read_grid(recipe, ["train.seed=0,1", "lora.alpha=8", "train.steps=3"]), resume=True)
    for spoiled in (
        "[]",
        "{",
        before.replace('"runs"', '"rums"'),
        before.replace('"seconds": 1.0', '"seconds": "long"'),
    ):
        (grid.folder / "sweep.json").write_text(spoiled)
        with pytest.raises(RunError, match=r"sweep\.json"):
            sweep(grid, resume=True)
    (grid.folder / "sweep.json").write_text(before)
    assert (grid.folder / "sweep.json").read_text() == before
    other = read_grid(recipe, ["train.seed=0,2"])
    sweep(other, overwrite=True)
    assert json.loads((grid.folder / "sweep.json").read_text())["axes"] == {"train.seed": ["0", "2"]}


def test_seeds_are_one_point_with_their_spread(recipe, pretended):
    pretended(lambda checked: 1.0 / checked.lora.rank + checked.train.seed / 8)
    grid = read_grid(recipe, ["lora.rank=1,2", "train.seed=0,1"])
    sweep(grid)
    swept = read_sweep(grid.folder)
    assert [dict(point.settings) for point in swept.points] == [{"lora.rank": "1"}, {"lora.rank": "2"}]
    facts = sweep_facts(swept)
    means = [(point["losses"], point["loss"]) for point in facts["points"]]
    assert means == [([1, 1.125], 1.0625), ([0.5, 0.625], 0.5625)]
    assert facts["best"] == {"lora.rank": "2"}
    text, drawn = sweep_text(swept), str(sweep_chart(swept))
    assert "lowest at rank=2: 0.5625 (0.5000 to 0.6250 over 2 seeds)" in text
    assert drawn.count("<circle") == 2
    assert drawn.count('class="spread') == 2
    page = write_sweep(grid.folder).read_text()
    assert "<svg" in page
    assert "lowest at rank=" in page


def test_a_best_at_the_end_of_the_grid_is_told(recipe, pretended):
    pretended(lambda checked: 1 - checked.train.lr)
    grid = read_grid(recipe, ["train.lr=1e-5,1e-3,1e-2"])
    sweep(grid)
    swept = read_sweep(grid.folder)
    assert swept.best.settings == {"train.lr": "1e-2"}
    assert "That is the end of the grid over lr: try values beyond it, too." in sweep_sentences(swept)


def test_losses_of_several_tasks_have_no_best_and_ipo_s_have_no_unit(recipe, pretended):
    pretended(lambda checked: 1.0)
    grid = read_grid(recipe, ["train.task=dpo,ipo"])
    sweep(grid)
    swept = read_sweep(grid.folder)
    assert [point.loss for point in swept.points] == [1.0, 1.0]
    assert swept.best is None
    assert "of different tasks measure different things" in sweep_text(swept)
    dpo, ipo = sorted(swept.runs, key=lambda run: run.task)
    assert [(run.task, run.loss_words) for run in (dpo, ipo)] == [("dpo", "loss, nats"), ("ipo", "loss")]
    assert "nats" not in str(sweep_chart(swept))


@pytest.mark.parametrize("name", ["../runs", "a/b", ""])
def test_a_sweep_file_reaches_nothing_outside_of_its_folder(tmp_path, name):
    run = {"name": name, "settings": {"train.lr": "1"}, "failed": None, "seconds": 1}
    content = {"schema": 1, "recipe": "x", "axes": {"train.lr": ["1", "2"]}, "fixed": {}, "runs": [run]}
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match="is not part of this sweep"):
        read_sweep(tmp_path)


@pytest.mark.slow
def test_the_verb_prints_a_table_or_one_json_object(recipe):
    shown = CliRunner().invoke(app, ["sweep", str(recipe), "lora.rank=1,2"])
    assert shown.exit_code == 0, shown.output
    assert "run 2  rank=2  held-out loss" in shown.output
    assert "The held-out loss is lowest at rank=" in shown.output
    again = CliRunner().invoke(app, ["sweep", str(recipe), "lora.rank=1,2", "--resume", "--json"])
    facts = json.loads(again.stdout)
    assert [point["settings"] for point in facts["points"]] == [{"lora.rank": "1"}, {"lora.rank": "2"}]
