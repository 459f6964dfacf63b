"""`lora.rank: auto`: what the rows tell in bits, what an adapter holds, and the least rank that holds it."""

import json
import math
import random

import pytest
import tiny
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig

from qlora_kit.data import Classes, Encoded, EncodedSet, Part, bits_to_learn
from qlora_kit.lora import add_lora, add_recipe_lora, save_adapter, shaped
from qlora_kit.plan import Workload, capacity, plan_methods
from qlora_kit.plan.capacity import with_rank
from qlora_kit.plan.sizes import adapter_size
from qlora_kit.recipe import dump_recipe, read_recipe
from qlora_kit.run import plan_memory, train
from qlora_kit.run.prepare import note_large_steps
from qlora_kit.train.pace import Pace, set_pace
from qlora_kit.units import format_bits
from qlora_kit.watch import Watch

# ---- what the rows tell --------------------------------------------------------------------------------------------

VOCABULARY = 30_000


def row(seed, asked=5, trained=7, **more):
    """A row of `asked` and then `trained` random tokens."""
    ids = random.Random(seed).choices(range(VOCABULARY), k=asked + trained)
    return Encoded(ids, [place >= asked for place in range(asked + trained)], **more)


def rows_of(*parts, weights=(), classes=None):
    found = EncodedSet(classes=classes)
    for part, weight in zip(parts, weights or [1.0] * len(parts), strict=True):
        found.parts.append(Part(weight=weight))
        for each in part:
            found.add(each)
    return found


def test_text_tells_a_bit_a_trained_token_and_no_more_in_further_epochs():
    rows = rows_of([row(seed) for seed in range(40)])
    assert rows.counts.trained_tokens == 280
    told = {epochs: bits_to_learn(rows, "sft", epochs) for epochs in (0.25, 1, 2, 10.5)}
    assert told == {0.25: 70, 1: 280, 2: 280, 10.5: 280}
    first = rows_of([row(1, asked=0)])
    assert bits_to_learn(first, "pretrain", 1) == 6, "nothing predicts the first token"


def test_rows_that_repeat_others_tell_nothing_new():
    some = [row(seed) for seed in range(40)]
    once = bits_to_learn(rows_of(some), "sft", 1)
    assert bits_to_learn(rows_of(some * 3), "sft", 1) == once
    assert bits_to_learn(rows_of(some, some[:10]), "sft", 1) == once, "nor do those of another source"
    assert bits_to_learn(rows_of([*some, row(99)]), "sft", 1) == once + 7


def test_answers_that_are_all_alike_tell_less_than_a_bit_a_token():
    same = row(0, asked=0, trained=300).input_ids
    alike = [Encoded([*row(seed).input_ids, *same], [False] * 12 + [True] * 300) for seed in range(200)]
    differ = [row(seed, 12, 300) for seed in range(200)]
    assert bits_to_learn(rows_of(differ), "sft", 1) == 60_000
    assert bits_to_learn(rows_of(alike), "sft", 1) < 0.5 * 60_000


def test_of_many_tokens_the_first_say_how_much_the_others_tell(monkeypatch):
    same = row(0, asked=0, trained=300).input_ids
    alike = [Encoded([*row(seed).input_ids, *same], [False] * 12 + [True] * 300) for seed in range(200)]
    told = []
    for most in (60_000, 30_000, 10_000):
        monkeypatch.setattr("qlora_kit.data.information.COMPRESSED", most)
        told.append(bits_to_learn(rows_of(alike), "sft", 1))
    assert told == sorted(told)
    assert told[0] < told[2] < 60_000


def test_a_source_is_seen_by_its_weight():
    parts = [row(seed) for seed in range(10)], [row(seed) for seed in range(50, 60)]
    for weights, epochs, told in [((2, 1), 0.5, 70 + 35), ((0.5, 1), 1, 35 + 70), ((0.5, 1), 2, 140), ((1, 1), 1, 140)]:
        assert bits_to_learn(rows_of(*parts, weights=weights), "sft", epochs) == told


@pytest.mark.parametrize(
    ("task", "bits"), [("dpo", 1), ("ipo", 1), ("kto", 1), ("orpo", 1 + 7)], ids=["dpo", "ipo", "kto", "orpo"]
)
def test_a_preference_tells_a_bit_and_orpo_the_better_answer_as_well(task, bits):
    if task == "kto":
        rows = [row(seed, is_good=seed % 2 == 0) for seed in range(40)]
    else:
        rows = [row(seed, other=row(1000 + seed, trained=9)) for seed in range(40)]
    assert bits_to_learn(rows_of(rows), task, 1) == 40 * bits


def test_a_row_of_a_class_tells_log2_of_the_classes_however_long_it_is():
    texts = [Encoded(row(seed, 20 + seed).input_ids, [False] * (27 + seed), target=seed % 3) for seed in range(12)]
    assert bits_to_learn(rows_of(texts, classes=Classes(("a", "b", "c"), False)), "classify", 1) == 12 * math.log2(3)
    several = [Encoded(row(seed).input_ids, [False] * 12, target=(1.0, 0.0, 0.0)) for seed in range(12)]
    assert bits_to_learn(rows_of(several, classes=Classes(("a", "b", "c"), True)), "classify", 1) == 12 * 3


# ---- what an adapter holds -----------------------------------------------------------------------------------------


def asked(*overrides):
    return read_recipe("default", ["base.model=x", "data.train=x", "base.device=cpu", *overrides])


def work_of(recipe):
    return Workload.of(recipe, micro_batch=1, accumulation=1, tokens=1, activations="recompute")


SETTINGS = {
    "llama": (tiny.llama, []),
    "gpt2": (tiny.gpt2, []),
    "mixtral": (tiny.mixtral, ["lora.rank=3"]),
    "dora": (tiny.llama, ["lora.dora=true", "lora.targets=attention"]),
    "pattern": (tiny.llama, ["lora.rank_pattern={q_proj: 5}"]),
    "modules": (tiny.llama, ["lora.also_train=[model.norm]"]),
    "pissa": (tiny.llama, ["lora.init=pissa"]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_adapter_is_counted_without_weights_as_it_is_injected_into_them(name):
    make, overrides = SETTINGS[name]
    recipe = asked("lora.rank=8", "base.block_size=32", *overrides)
    model = make()
    trained, widths = adapter_size(model.config, work_of(recipe))
    report = add_recipe_lora(tiny.quantized(model, block_size=32), recipe.lora)
    assert trained == report.trainable
    assert len(widths) == len(report.matched)


WIDE = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, vocab_size=97)


@pytest.fixture(scope="module")
def held():
    """Bits that the adapter of each rank holds, by a real injection into real weights."""
    model = LlamaForCausalLM(WIDE).requires_grad_(False)
    ranks = [2**power for power in range(9)]
    return {rank: 2 * add_lora(model, rank=rank, name=f"rank {rank}").trainable for rank in ranks}


def test_auto_is_the_least_power_of_two_that_holds_the_data_from_16_to_256(held):
    recipe, before = asked("lora.rank=auto"), 0
    bits = [None, 0, 1, held[8], *(held[rank] + more for rank in (16, 32, 64, 128, 256) for more in (0, 1)), 1e12]
    for data_bits in bits:
        wanted = next((rank for rank in (16, 32, 64, 128, 256) if held[rank] >= (data_bits or 0)), 256)
        found = with_rank(recipe, WIDE, data_bits).lora.rank
        assert found == wanted, data_bits
        assert found >= before, "more to learn never takes less"
        before = found
    assert with_rank(asked("lora.rank=7"), WIDE, 1e12).lora.rank == 7, "what is written stays"


def test_a_part_of_the_layers_wants_a_higher_rank_for_the_same_data(held):
    ranks = [with_rank(asked("lora.rank=auto", f"lora.targets={targets}"), WIDE, held[32]).lora.rank
             for targets in ("all-linear", "mlp", "attention", "[v_proj]")]  # fmt: skip
    assert ranks == [32, 64, 128, 256]


def test_auto_is_no_higher_than_the_layers_are_wide():
    grouped = LlamaConfig(**WIDE.to_dict() | {"num_key_value_heads": 1, "head_dim": 72})
    assert with_rank(asked("lora.rank=auto"), grouped, 1e12).lora.rank == 64
    narrow = LlamaConfig(**WIDE.to_dict() | {"hidden_size": 12, "intermediate_size": 24, "head_dim": 6})
    assert with_rank(asked("lora.rank=auto"), narrow, 1e12).lora.rank == 8
    assert with_rank(asked("lora.rank=auto"), narrow, None).lora.rank == 8
    gate = Qwen2MoeConfig(**tiny.EXPERTS | {"hidden_size": 64}, intermediate_size=64, moe_intermediate_size=64,
                          shared_expert_intermediate_size=64, num_experts=2)  # fmt: skip
    recipe = asked("lora.rank=auto")
    assert min(adapter_size(gate, work_of(asked("lora.rank=16")))[1]) == 1, "a gate with one output"
    assert with_rank(recipe, gate, 1e12).lora.rank == 16


# ---- what is said of it --------------------------------------------------------------------------------------------

PACE = Pace(200, 2, 2, 20, None, 2e-4, "the test", 5000, 1000)


def said(rank, data_bits, trained=1_000_000):
    recipe = asked(f"lora.rank={rank}")
    return capacity.capacity_of(recipe, rank, trained, data_bits)


def test_the_reason_has_both_numbers_and_a_warning_only_where_the_data_are_too_much():
    fits, full, over = said(16, 500_000), said(16, 2_000_000), said(16, 2_000_001)
    assert fits.reason == "rank 16 holds about 2.00 Mbit, your data about 500 kbit"
    assert (fits.warning, full.warning) == (None, None)
    assert over.warning.startswith("the data hold more information than the adapter can")
    chosen = [capacity.capacity_of(asked(f"lora.rank={rank}"), "auto", 1_000_000, 9) for rank in (16, 64)]
    assert [each.reason.partition(": ")[2] for each in chosen] == ["the least that auto takes",
                                                                   "more than rank 32 would hold"]  # fmt: skip
    assert said(16, None).reason == "rank 16 holds about 2.00 Mbit, there are no rows to look at"
    assert [format_bits(bits) for bits in (0, 7, 1234, 5e9)] == ["0 bit", "7 bit", "1.23 kbit", "5.00 Gbit"]


@pytest.mark.slow
def test_a_plan_holds_the_rank_and_two_bits_of_each_parameter_that_it_trains():
    config = LlamaConfig(**tiny.LLAMA)
    plan = plan_methods(asked("lora.rank=auto"), config, PACE, 24, data_bits=1e12)
    assert plan["rank"] == 16
    assert plan["capacity"]["held_bits"] == 2 * plan["parameters"]["trainable"]
    assert plan["capacity"]["warning"] is not None
    written = plan_methods(asked("lora.rank=16"), config, PACE, 24, data_bits=1e12)
    assert plan["methods"] == written["methods"], "to the byte"
    assert plan["capacity"]["reason"].startswith(written["capacity"]["reason"])


@pytest.fixture
def recipe(tmp_path, model_folder, monkeypatch):
    """A run of seconds whose adapter holds so little that `auto` is not the least."""
    monkeypatch.setattr(capacity, "LEAST_RANK", 2)
    monkeypatch.setattr(capacity, "BITS_A_PARAMETER", 0.005)
    rows = [{"prompt": f"say {word} ", "completion": word} for word in ("cat", "dog", "owl", "bee", "ant", "elk")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (tmp_path / "recipe.yaml").write_text(json.dumps({
        "base": {"model": str(model_folder), "compute_dtype": "float32", "device": "cpu"},
        "lora": {"rank": "auto"},
        "data": {"train": "rows.jsonl", "max_tokens": 32, "eval": "rows.jsonl"},
        "train": {"steps": 3, "micro_batch": 2, "accumulation": 1},
        "output": str(tmp_path / "run"),
    }))  # fmt: skip
    return tmp_path / "recipe.yaml"


@pytest.mark.slow
def test_plan_run_and_resume_have_one_rank_and_the_folder_holds_it_as_a_number(recipe):
    planned = plan_memory(read_recipe(recipe))
    assert 2 < planned["rank"] < 16
    result = train(read_recipe(recipe))
    tokens = json.loads((result.folder / "data.json").read_text())["train"]["trained_tokens"]
    assert planned["capacity"]["data_bits"] == tokens
    kept = read_recipe(result.folder / "recipe.yaml")
    assert kept.lora.rank == planned["rank"]
    assert "rank: auto" not in dump_recipe(kept)
    adapter = json.loads((result.folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == planned["rank"]
    sentence = planned["capacity"]["reason"].partition(" holds")[0].capitalize()
    assert f"{sentence} holds about" in (result.folder / "report.html").read_text()
    capacity.LEAST_RANK = 8  # other rows, or another version, would choose another
    assert plan_memory(read_recipe(recipe))["rank"] == 8
    longer = train(read_recipe(recipe, ["train.steps=5"]), resume=True)
    assert longer.step == 5
    assert json.loads((result.folder / "plan.json").read_text())["rank"] == planned["rank"]


@pytest.mark.slow
def test_without_rows_auto_is_the_least(recipe):
    (recipe.parent / "rows.jsonl").unlink()
    planned = plan_memory(read_recipe(recipe))
    assert planned["rank"] == 2
    assert planned["capacity"]["data_bits"] is None


def test_an_adapter_to_go_on_from_brings_the_rank_that_auto_leaves_open(tmp_path):
    model = tiny.quantized(tiny.llama())
    add_lora(model, rank=5)
    save_adapter(model, tmp_path / "adapter")
    lora = asked("lora.rank=auto", f"lora.from={tmp_path / 'adapter'}").lora
    assert shaped(lora).rank == 5


class Notes(Watch):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.mark.parametrize(
    ("overrides", "is_warned"),
    [(["train.accumulation=4"], False), (["train.accumulation=5"], True),
     (["train.accumulation=5", "train.full_finetune=true"], False)],
    ids=["32 rows", "40 rows", "every weight"],
)  # fmt: skip
def test_steps_of_more_than_32_rows_are_told_of_where_adapters_are_trained(overrides, is_warned):
    watch, recipe = Notes(), asked("train.micro_batch=8", *overrides)
    config = LlamaConfig(**tiny.LLAMA)
    pace = set_pace(recipe.train, rows=9000, longest=9, tokens=81_000, trained_tokens=9000, config=config)
    note_large_steps(recipe, pace, watch)
    assert len(watch.notes) == is_warned
    if is_warned:
        assert watch.notes[0].startswith("40 rows a step")
        assert watch.notes[0].endswith("lower train.accumulation (now 5)")
