"""Packing: rows share sequences and nothing else, so that a step computes the same and less of it is padding."""

import itertools
import json
import random
import re
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import hypothesis
import pytest
import tiny
import torch
from hypothesis import strategies as st
from test_plan import WORK as STEP
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    Qwen3Config,
    masking_utils,
)

from qlora_kit.base import Quantization, load_base
from qlora_kit.base.attention import check_attention, reads_apart
from qlora_kit.data import (
    Encoded,
    Packing,
    Room,
    arrange,
    best_fit,
    collate,
    collate_packs,
    efficiency,
    full_packs,
    longest_pack,
    side_by_side,
)
from qlora_kit.errors import DeviceError, ModelError
from qlora_kit.lora import adapter_parameters, add_lora
from qlora_kit.memory import PeakCounter
from qlora_kit.plan import dry_run
from qlora_kit.recipe import Train, layout_of, read_recipe
from qlora_kit.run import plan_memory, preview, train
from qlora_kit.train.checkpoint import load_checkpoint, newest_checkpoint
from qlora_kit.train.isolation import check_isolation, leaked_gradient
from qlora_kit.train.loop import Job, train_loop
from qlora_kit.train.metrics import MetricsLog
from qlora_kit.train.optim import AdapterOptimizer
from qlora_kit.train.pace import Pace, gradients_stand, room_of
from qlora_kit.train.step import accumulate_gradients

FP32_RTOL = 1e-6  # a few roundings of 6e-8 each, summed in another order
SHARP = {"initializer_range": 0.2}  # with small weights attention is flat, and a leak would hardly be seen
LENGTHS = (3, 40, 5, 17, 9, 33, 4, 12)
ROOM = 48  # of a sequence; the model has 64 positions
PACKED = Packing(2, ROOM)

ISOLATING = {
    "llama": lambda: tiny.llama(**SHARP),
    "qwen3": lambda: dense(Qwen3Config(**{**tiny.LLAMA, **SHARP}, head_dim=12)),
    "gpt2": lambda: tiny.gpt2(**SHARP),
    "mixtral": tiny.mixtral,
    "gemma3": lambda: dense(
        Gemma3TextConfig(
            **{**tiny.LLAMA, **SHARP},
            head_dim=12,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
}  # fmt: skip
LEAKING = {
    "opt": OPTConfig(vocab_size=97, hidden_size=48, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
                     word_embed_proj_dim=48),
    "falcon": FalconConfig(vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4),
    "mamba": MambaConfig(vocab_size=97, hidden_size=48, num_hidden_layers=2),
}  # fmt: skip
EACH = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def dense(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny.spread(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()


def rows(lengths=LENGTHS, seed=0):
    """Random rows of which the latter half is trained, and the first token marked that nothing predicts."""
    draw = random.Random(seed)
    return [
        Encoded([draw.randrange(3, 97) for _ in range(n)], [i == 0 or i >= min(n // 2, n - 1) for i in range(n)])
        for n in lengths
    ]


def packed(data, micro_batch=2):
    return [
        collate_packs([[data[row] for row in pack] for pack in packs], 0)
        for packs in arrange([len(row.input_ids) for row in data], micro_batch, ROOM)
    ]


def laid_out(lengths, micro_batch, packed_tokens):
    """A step's rows packed, or side by side on a card."""
    if packed_tokens is None:
        return side_by_side(lengths, Room(micro_batch, 2048, overhead=200))
    return arrange(lengths, micro_batch, packed_tokens)


def adapted(model, attention="sdpa"):
    model.set_attn_implementation(attention)
    model = tiny.quantized(model)
    add_lora(model, rank=4, alpha=8, dtype=torch.float32)
    tiny.wake(model)
    return model.train()


def gradients(model, batches):
    parameters = dict(adapter_parameters(model))
    for parameter in parameters.values():
        parameter.grad = None
    loss = accumulate_gradients(model, batches, sum(batch.trained_tokens for batch in batches)).value.item()
    return loss, torch.cat([parameter.grad.flatten() for parameter in parameters.values()])


def job_of(folder, *, steps=4, packing=PACKED, accumulation=3):
    model = adapted(tiny.llama(**SHARP))
    parameters = dict(adapter_parameters(model))
    folder.mkdir(exist_ok=True)
    return Job(
        model=model,
        parameters=parameters,
        optimizer=AdapterOptimizer(list(parameters.items()), "adamw"),
        rows=rows(),
        eval_batches=[],
        pad_id=0,
        pace=Pace(steps, 2, accumulation, 1000, 1000, 1e-2, "the test", 0, 0),
        train=Train(warmup=0.0),
        folder=folder,
        packing=packing,
    )


def run(job, resume_from=None):
    metrics = MetricsLog(job.folder / "metrics.jsonl", resume_from)
    train_loop(job, metrics, PeakCounter(torch.device("cpu")))
    metrics.close()
    return [(row["step"], row["loss"], row["grad_norm"], row["tokens"]) for row in metrics.rows]


# --- where rows go ----------------------------------------------------------------------------------------------------


@hypothesis.given(st.lists(st.integers(2, 70), min_size=1, max_size=60), st.integers(2, 64))
@hypothesis.settings(max_examples=200, deadline=None)
def test_every_row_is_packed_once_whole_and_no_sequence_is_too_long(lengths, room):
    packs = best_fit(lengths, room)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    totals = [sum(lengths[row] for row in pack) for pack in packs]
    assert max(totals) <= longest_pack(lengths, room, len(lengths)) <= max(room, *lengths)
    # Best fit opens a sequence only where no other has room: so no two could be one.
    if len(totals) > 1:
        assert sum(sorted(totals)[:2]) > max(room, *lengths)
    assert best_fit(list(lengths), room) == packs, "lengths alone decide"


def test_a_row_goes_where_it_leaves_the_least_room():
    """By hand: 60 and 50 open a sequence each; 41 fits only beside 50 and leaves 9 there; 40 fills up 60; so does 9."""
    assert best_fit([40, 60, 9, 50, 41], 100) == [[1, 0], [3, 4, 2]]
    assert best_fit([60, 70, 25], 100) == [[1, 2], [0]]


def test_rows_of_realistic_lengths_leave_hardly_a_place_empty():
    """Over all rows best fit leaves 0.1 %; in a step of 16, one row of 2,048 may be all that fills its sequence."""
    draw = random.Random(0)
    lengths = [min(2048, max(8, round(draw.lognormvariate(5.5, 0.9)))) for _ in range(2000)]
    assert sum(lengths) / (2048 * len(best_fit(lengths, 2048))) > 0.995
    for rows_a_step, micro_batch, wanted in ((16, 1, 1.0), (16, 2, 0.98), (64, 4, 0.975)):
        steps = [lengths[start : start + rows_a_step] for start in range(0, 2000, rows_a_step)]
        padded, full = (
            sum(map(sum, steps)) / sum(sum(step) / efficiency(step, way) for step, way in zip(steps, ways, strict=True))
            for ways in ([laid_out(step, micro_batch, room) for step in steps] for room in (None, 2048))
        )
        assert full >= wanted
        assert padded < 0.95 or micro_batch == 1
        fewer = sum(len(laid_out(step, micro_batch, 2048)) for step in steps)
        assert fewer < 0.7 * sum(len(laid_out(step, micro_batch, None)) for step in steps)


@hypothesis.given(st.lists(st.integers(2, 70), min_size=1, max_size=24), st.integers(1, 5), st.integers(2, 64))
@hypothesis.example([2, 2, 3, 3, 6, 10], 2, 12)  # full sequences, the last alone, leave no padding
@hypothesis.settings(max_examples=200, deadline=None)
def test_micro_batches_are_no_more_and_no_longer_than_best_fit_would_have_them(lengths, micro_batch, room):
    plain = best_fit(lengths, room)
    found = arrange(lengths, micro_batch, room)
    assert sorted(row for packs in found for pack in packs for row in pack) == list(range(len(lengths)))
    assert len(found) == -(-len(plain) // micro_batch)
    assert all(len(packs) == micro_batch for packs in found[:-1])
    totals = [sum(lengths[row] for row in pack) for packs in found for pack in packs]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] <= max(room, *lengths)
    full = sorted((sum(lengths[row] for row in pack) for pack in plain), reverse=True)
    places = sum(len(full[at : at + micro_batch]) * full[at] for at in range(0, len(full), micro_batch))
    assert efficiency(lengths, found) >= sum(lengths) / places - 1e-12


def time_of(lengths, micro_batches, overhead):
    return sum(len(packs) * max(lengths[row] for (row,) in packs) + overhead for packs in micro_batches)


@hypothesis.given(
    st.lists(st.integers(2, 70), min_size=1, max_size=9), st.integers(1, 4), st.integers(0, 60), st.booleans()
)
@hypothesis.settings(max_examples=200, deadline=None)
def test_rows_stand_side_by_side_in_the_way_that_takes_least_time(lengths, micro_batch, overhead, is_bounded):
    room = Room(micro_batch, 70, micro_batch if is_bounded else None, overhead)
    found = side_by_side(lengths, room)
    assert sorted(row for packs in found for (row,) in packs) == list(range(len(lengths)))
    for packs in found:
        assert len(packs) * max(lengths[row] for (row,) in packs) <= micro_batch * 70
        assert not is_bounded or len(packs) <= micro_batch
    longest = [max(lengths[row] for (row,) in packs) for packs in found]
    assert longest == sorted(longest, reverse=True), "the first is the largest, of which a rehearsal tells"
    rows = sorted(lengths, reverse=True)
    least = min(  # of all ways to cut the rows, by length, into neighbours
        sum((end - begin) * rows[begin] + overhead for begin, end in pairwise([0, *cuts, len(rows)]))
        for count in range(len(rows))
        for cuts in combinations(range(1, len(rows)), count)
        if all(room.holds(end - begin, rows[begin]) for begin, end in pairwise([0, *cuts, len(rows)]))
    )
    assert time_of(lengths, found, overhead) == least


def test_short_rows_go_together_and_a_long_one_goes_alone():
    lengths = [2048, 60, 50, 55, 64, 2000, 45, 58]
    found = side_by_side(lengths, Room(1, 2048, overhead=200))
    assert found == [[[0]], [[5]], [[4], [1], [7], [3], [2], [6]]]
    assert [len(packs) for packs in side_by_side(lengths, Room(4, 2048, most=4, overhead=200))] == [2, 4, 2]
    assert time_of(lengths, found, 200) < 0.85 * time_of(lengths, [[[row]] for row in range(8)], 200)


def test_looking_for_leaks_draws_no_number_though_the_model_has_dropout():
    model = tiny.gpt2(resid_pdrop=0.5).train()
    before = torch.get_rng_state()
    assert leaked_gradient(model) == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_a_pass_takes_as_many_rows_as_the_recipe_says_and_without_a_word_of_it_as_many_as_have_the_places():
    pace = Pace(4, 3, 1, 4, 4, 1e-3, "the test", 0, 0)
    assert room_of(Train(micro_batch=3), pace, 10, tiny.CPU) == Room(3, 10, 3, 20)
    assert room_of(Train(), pace, 10, tiny.CPU) == Room(3, 10, None, 20)


def test_gradients_stand_where_a_step_may_have_a_second_micro_batch():
    asked = [(1, 1, False), (2, 1, False), (2, 1, True), (1, 2, True)]
    assert [gradients_stand(rows, parts, is_packed=packed) for rows, parts, packed in asked] == [0, 1, 0, 1]


def test_a_row_that_is_longer_than_a_pass_may_be_goes_alone():
    assert side_by_side([4, 9, 4], Room(1, 8)) == [[[1]], [[0], [2]]]


def test_a_rehearsal_has_several_documents_in_a_sequence_though_the_first_row_would_fill_it():
    (documents,) = full_packs(rows((ROOM, 3, 4)), 1, ROOM)
    assert len(documents) > 1


def test_a_rehearsal_fills_its_sequences_to_the_last_place():
    batch = collate_packs(full_packs(rows(), 3, ROOM), 0)
    assert batch.lengths == (ROOM,) * 3
    assert batch.trained_tokens > 0
    assert (batch.position_ids == 0).sum() > 3, "several documents in a sequence"
    assert longest_pack(LENGTHS, 1000, 3) == 40 + 33 + 17
    assert longest_pack(LENGTHS, 20, 3) == 40


# --- what a model sees ------------------------------------------------------------------------------------------------


def test_positions_begin_anew_and_no_document_predicts_the_next_ones_first_token():
    a, b, c = rows((3, 4, 5))
    batch = collate_packs([[a, b], [c]], pad_id=0)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]]
    assert batch.input_ids.tolist() == [a.input_ids + b.input_ids, [*c.input_ids, 0, 0]]
    assert a.trained[0]
    assert b.trained[0]
    assert batch.labels[0, 0] == batch.labels[0, 3] == -100
    assert batch.trained_tokens == (batch.labels != -100).sum() == sum(row.trained_tokens for row in (a, b, c))
    assert batch.lengths == (7, 5)
    assert collate_packs([[a], [b]], 0).position_ids is None


@EACH
@pytest.mark.parametrize("family", ISOLATING)
def test_a_packed_step_has_the_loss_and_gradients_of_the_plain_one(family, attention):
    model, data = adapted(ISOLATING[family](), attention), rows()
    alone, wanted = gradients(model, [collate([row], 0) for row in data])
    batches = packed(data)
    assert sum(len(batch.lengths) for batch in batches) < len(data)
    assert any(batch.position_ids is not None for batch in batches)
    together, found = gradients(model, batches)
    assert alone > 1
    assert wanted.norm() > 0.1
    assert together == pytest.approx(alone, rel=FP32_RTOL)
    assert tiny.relative(found, wanted) < FP32_RTOL
    _, mixed = gradients(model, [replace(batch, position_ids=None, documents=None) for batch in batches])
    assert tiny.relative(mixed, wanted) > 0.1, "without the positions documents see each other"


@EACH
@pytest.mark.parametrize("family", ISOLATING)
def test_changing_one_document_changes_nothing_in_the_next(family, attention):
    model = ISOLATING[family]()
    model.set_attn_implementation(attention)
    first, other, second = rows((19, 19, 23), seed=1)

    def logits(one):
        batch = collate_packs([[one, second]], 0)
        with torch.no_grad():
            return model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]

    found, wanted = logits(other), logits(first)
    assert tiny.relative(found[:19], wanted[:19]) > 0.1
    assert tiny.relative(found[19:], wanted[19:]) < FP32_RTOL  # zero but for Mixtral, whose experts share products
    assert tiny.relative(wanted[19:], tiny.logits(model, torch.tensor([second.input_ids]))[0]) < FP32_RTOL
    assert leaked_gradient(model) == 0.0


@pytest.mark.parametrize("family", ["opt", "falcon", pytest.param("mamba", marks=pytest.mark.slow)])
def test_a_family_that_mixes_documents_is_refused_in_one_line(family):
    model = dense(LEAKING[family]).train()
    assert leaked_gradient(model) > 0
    for refuse in (
        lambda: check_isolation(model),
        lambda: dry_run(
            LEAKING[family],
            replace(WORK, layout="packed", attention="eager", lora=None, quantization=Quantization("none")),
        ),
    ):
        with pytest.raises(ModelError, match=f"a {family} lets .* see each other.*data.packing=false") as caught:
            refuse()
        assert "\n" not in str(caught.value)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attention_that_keeps_documents_apart_in_one_sequence_alone_is_refused_where_several_stand_together(
    monkeypatch,
):
    ask = masking_utils.find_packed_sequence_indices
    alone = lambda positions: ask(positions) if len(positions) == 1 else None  # noqa: E731  # as flash attention does
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", alone)
    model = ISOLATING["llama"]()
    model.set_attn_implementation("eager")
    check_isolation(model, sequences=1)
    with pytest.raises(ModelError, match=r"eager keeps .* where it is alone in a micro-batch .*train.micro_batch=1"):
        check_isolation(model, sequences=4)


@pytest.mark.parametrize("asked", ["flex", "flash"])
def test_attention_that_trains_on_cards_alone_is_refused_on_a_cpu_and_what_it_trained_is_used_there_through_sdpa(
    asked, model_folder
):
    device = torch.device("cpu")
    with pytest.raises(DeviceError, match=f"base.attention={asked} has a backward pass on CUDA devices only.*sdpa"):
        check_attention(asked, device, torch.bfloat16)
    words = [f"base.model={model_folder}", "data.train=/missing", "data.max_tokens=64", f"base.attention={asked}"]
    recipe = read_recipe("default", words)
    for starts in (plan_memory, train):
        with pytest.raises(DeviceError, match=asked):
            starts(recipe)
    if asked == "flash":
        plan_memory(recipe, gpu="4090")
    assert load_base(model_folder, attention=asked, device="cpu").config._attn_implementation == "sdpa"


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex", "flash"])
@pytest.mark.parametrize("task", ["sft", "pretrain", "dpo", "classify"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_rows_lie_end_to_end_unasked_where_attention_reads_each_document_alone_and_the_task_learns_every_row_by_itself(
    attention, task, family
):
    words = ["base.model=x", "data.train=y", f"base.attention={attention}", f"train.task={task}"]
    config = LlamaConfig() if family == "llama" else OPTConfig()

    def layout(*more):
        return layout_of(read_recipe("default", [*words, *more]), reads_apart=reads_apart(attention, config))

    is_apart = attention == "eager" or family == "opt" or task in ("dpo", "classify")
    assert layout() == ("apart" if is_apart else "joined")
    assert [layout(f"data.packing={said}") for said in ("true", "false")] == ["packed", "apart"]


def test_rows_lie_unasked_as_takes_least_time_in_the_benchmarks_rows():
    root = Path(__file__).parent.parent
    lines = (root / "benchmarks" / "results" / "packing.jsonl").read_text().splitlines()
    taken = {}
    for row in map(json.loads, lines):
        if row["what"] == "time":
            taken.setdefault((row["machine"], row["half_below"], row["attention"]), {})[row["layout"]] = row["cpu_s"]
    text = " ".join((root / "docs" / "measurements.md").read_text().split())
    assert {key[1:] for key in taken} == set(itertools.product((60, 245), ("sdpa", "sdpa with a mask", "eager")))
    for (_, half, attention), times in taken.items():
        if attention in ("sdpa", "eager"):
            recipe = read_recipe("default", ["base.model=x", "data.train=y", f"base.attention={attention}"])
            assert layout_of(recipe, reads_apart=reads_apart(attention, LlamaConfig())) == min(times, key=times.get)
        if attention == "sdpa":
            ratio = f"{times['apart'] / times['joined']:.2f}"
            assert re.search(rf"{ratio} times (as long )?where half (of the rows )?have up to {half}\b", text)


@pytest.mark.slow
def test_a_run_whose_rows_are_packed_unasked_is_previewed_and_planned_so(model_folder, tmp_path):
    text = "".join(f'{{"prompt": "{"ab " * n}", "completion": " c"}}\n' for n in range(1, 21))
    (tmp_path / "rows.jsonl").write_text(text)
    words = [f"base.model={model_folder}", f"data.train={tmp_path / 'rows.jsonl'}", "data.max_tokens=64"]
    dense, alone = (read_recipe("default", [*words, f"base.attention={name}"]) for name in ("eager", "sdpa"))
    assert [preview(recipe).layout for recipe in (dense, alone)] == ["apart", "joined"]
    asked = read_recipe("default", [*words, "data.packing=true"])
    row, end_to_end, full = (plan_memory(recipe, gpu="4090")["tokens"] for recipe in (dense, alone, asked))
    assert row == end_to_end < 64 == full


def test_attention_whose_package_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("qlora_kit.base.attention.is_flash_attn_2_available", lambda: False)
    with pytest.raises(DeviceError, match=r"needs the package flash-attn, .* not installed; set base.attention=sdpa"):
        check_attention("flash", torch.device("cuda"), torch.bfloat16)


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_a_packed_run_takes_the_course_of_the_plain_one_in_fewer_micro_batches(tmp_path):
    plain, fewer = job_of(tmp_path / "plain", packing=None), job_of(tmp_path / "packed")
    forwards = {}
    for name, job in (("plain", plain), ("packed", fewer)):
        job.model.register_forward_pre_hook(lambda *_, name=name: forwards.update({name: forwards.get(name, 0) + 1}))
    wanted, found = run(plain), run(fewer)
    assert forwards["packed"] < forwards["plain"] <= 4 * 3
    assert len({loss for _, loss, _, _ in wanted}) == 4
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)  # AdamW's first steps are signs: roundings grow
    assert found[0] == pytest.approx(wanted[0], rel=FP32_RTOL)


def test_a_packed_run_resumes_bit_for_bit(tmp_path):
    whole = job_of(tmp_path / "whole")
    course = run(whole)
    stopped = job_of(tmp_path / "stopped")
    stopped.stop_requested = lambda: stopped.progress.step == 2
    run(stopped)
    resumed = job_of(tmp_path / "stopped")
    folder, _ = newest_checkpoint(resumed.folder / "checkpoints")
    resumed.progress = load_checkpoint(folder, resumed.kept, resumed.optimizer)
    assert resumed.progress.rows == 2 * 6
    assert run(resumed, resume_from=2)[-2:] == course[-2:]
    assert all(torch.equal(resumed.parameters[name], whole.parameters[name]) for name in whole.parameters)


# --- the plan ---------------------------------------------------------------------------------------------------------

WORK = replace(STEP, tokens=ROOM, eval_shape=None)
