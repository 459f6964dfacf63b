"""Preferences: dpo, ipo, orpo and kto are their formulas, agree with other people's code, and hold to the base."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_cli import assert_mistake, call, write_recipe

from qlora_kit.base.formats import Quantization
from qlora_kit.data import Encoded, as_stepped, collate_rows, load_rows, read_row, split_eval, swap_answers
from qlora_kit.data.examples import Chat, Completion, Labelled, Preference
from qlora_kit.errors import DataError
from qlora_kit.lora import REFERENCE, adapter_parameters, add_lora, save_adapter, use_adapter
from qlora_kit.plan import Workload
from qlora_kit.plan.devices import estimated_tokens_per_s
from qlora_kit.plan.dry_run import dry_step
from qlora_kit.recipe import TASKS, Lora, Train, read_recipe
from qlora_kit.run.prepare import prepare
from qlora_kit.run.rows import eval_batches, eval_shapes
from qlora_kit.run.score import answered_rows
from qlora_kit.train.evaluate import evaluate_loss
from qlora_kit.train.forward import sequence_losses
from qlora_kit.train.objectives import dpo_losses, ipo_losses, kto_losses, odds_ratio_losses
from qlora_kit.train.schedule import automatic_rate
from qlora_kit.train.step import accumulate_gradients
from qlora_kit.train.tasks import Dpo, task_of
from qlora_kit.watch import Watch

PAIRS, VERDICTS = ("dpo", "ipo", "orpo"), ("kto",)
WORK = Workload(Quantization("nf4"), Lora(rank=4), torch.float32, "sdpa", 1, 8, 1, "keep", "adamw", "none", task="dpo")
FP32 = 2e-6  # a few roundings of 6e-8, summed in another order, of a difference of sums
WIDE = torch.float64


def sequence(prompt, answer):
    return Encoded([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), list(prompt), "")


def pairs():
    """Three pairs of answers of several lengths."""
    prompts = [5, 6, 7], [8, 9], [3, 4, 5, 6, 7]
    chosen, rejected = ([20, 21, 2], [30, 31, 32, 33, 2], [40, 2]), ([22, 2], [34, 2], [41, 42, 43, 2])
    return [replace(sequence(p, c), other=sequence(p, r)) for p, c, r in zip(prompts, chosen, rejected, strict=True)]


def verdicts():
    """The same answers, of which some are good."""
    answers = [replace(each, other=None) for each in pairs()] + [pair.other for pair in pairs()]
    return [replace(row, is_good=number != 1) for number, row in enumerate(answers[:5])]


def tuned(seed=0, name="default"):
    """A dense frozen model with an adapter that says something else."""
    model = tiny.quantized(tiny.llama(), "none")
    add_lora(model, rank=4, alpha=8, dtype=torch.float32, name=name)
    tiny.wake(model, seed=seed, name=name)
    return model.train()


def trained(model, task, rows, size=8, loss_chunk=None):
    """Loss, measures and gradients of a step over rows, `size` of them at a time."""
    parameters = dict(adapter_parameters(model))
    for parameter in parameters.values():
        parameter.grad = None
    rows = swap_answers(rows) if rows[0].is_good is not None else rows
    batches = [collate_rows([[row] for row in rows[i : i + size]], 0) for i in range(0, len(rows), size)]
    loss = accumulate_gradients(model, batches, sum(batch.count for batch in batches), task, loss_chunk=loss_chunk)
    return loss, {name: parameter.grad.clone() for name, parameter in parameters.items()}


def rows_of(task):
    return verdicts() if task in VERDICTS else pairs()


# --- the formulas -----------------------------------------------------------------------------------------------------


def test_losses_are_the_formulas_of_the_papers():
    chosen, rejected = torch.tensor([-3.0, 2.5, 0.0], dtype=WIDE), torch.tensor([1.0, -2.0, 0.0], dtype=WIDE)

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    for beta in (0.1, 2.0):
        each = list(zip(chosen.tolist(), rejected.tolist(), strict=True))
        assert dpo_losses(chosen, rejected, beta).tolist() == pytest.approx(
            [-math.log(sigmoid(beta * (c - r))) for c, r in each], rel=1e-12
        )
        assert ipo_losses(chosen, rejected, beta).tolist() == pytest.approx(
            [(c - r - 1 / (2 * beta)) ** 2 for c, r in each], rel=1e-12
        )
        is_good, kl = torch.tensor([True, False, True]), torch.tensor(0.3, dtype=WIDE)
        assert kto_losses(chosen, is_good, kl, beta).tolist() == pytest.approx(
            [
                1 - sigmoid(beta * (c - 0.3) * (1 if good else -1))
                for c, good in zip(chosen.tolist(), is_good, strict=True)
            ],
            rel=1e-12,
        )


@given(st.floats(-50, -1e-9), st.floats(-50, -1e-9))
def test_the_odds_ratio_is_right_for_likely_and_unlikely_answers(chosen, rejected):
    def log_odds(log_p):  # 200 bits would do; log1p and expm1 in fp64 do as well
        return log_p - math.log(-math.expm1(log_p))

    wanted = -math.log(1 / (1 + math.exp(log_odds(rejected) - log_odds(chosen)))) if (
        abs(log_odds(rejected) - log_odds(chosen)) < 30) else None  # fmt: skip
    a, b = (torch.tensor([each], dtype=WIDE, requires_grad=True) for each in (chosen, rejected))
    found = odds_ratio_losses(a, b)
    found.backward()
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()
    assert wanted is None or found.item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_the_odds_ratio_is_finite_where_an_answer_is_certain_and_follows_fp64_next_to_it():
    nearest = [0.0, -1e-12, -1.2e-7, -1e-6, -1e-3, -0.5, -20.0]
    pairs = torch.tensor([[c, r] for c in nearest for r in nearest])
    chosen, rejected = (side.clone().requires_grad_() for side in pairs.T)
    losses = odds_ratio_losses(chosen, rejected)
    losses.sum().backward()
    for tensor in (losses, chosen.grad, rejected.grad):
        assert tensor.isfinite().all()
    is_far = (pairs <= -1.2e-7).all(1)
    wanted = odds_ratio_losses(*pairs[is_far].to(WIDE).T)
    torch.testing.assert_close(losses[is_far].to(WIDE), wanted, rtol=2e-6, atol=1e-12)


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_chunk", [None, 3, 64])
def test_the_likelihood_of_a_sequence_is_that_of_its_trained_tokens(loss_chunk):
    model, rows = tuned(), pairs()
    batch = collate_rows([[row] for row in rows], 0)
    found = sequence_losses(model, batch, loss_chunk=loss_chunk)
    for loss, row in zip(found, [*rows, *(row.other for row in rows)], strict=True):
        log_p = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        said = [log_p[i - 1, row.input_ids[i]] for i in range(1, len(row.input_ids)) if row.trained[i]]
        assert loss.item() == pytest.approx(-sum(said).item(), rel=FP32)


@pytest.mark.parametrize("task", PAIRS + VERDICTS)
def test_the_split_into_micro_batches_and_chunks_changes_neither_loss_nor_gradient(task):
    model, rows, objective = tuned(), rows_of(task), task_of(Train(task=task))
    wanted, gradients = trained(model, objective, rows)
    assert all(gradient.norm() > 1e-6 for gradient in gradients.values())
    for size, chunk in ((1, None), (2, 3), (8, 5)):
        found, others = trained(model, objective, rows, size, chunk)
        assert found.value.item() == pytest.approx(wanted.value.item(), rel=FP32)
        for name, measure in wanted.measures.items():
            assert found.measures[name].item() == pytest.approx(measure.item(), rel=20 * FP32, abs=1e-7)
        for name, gradient in gradients.items():
            # differences of sums over answers: what cancels leaves its rounding
            assert tiny.relative(others[name], gradient) < 20 * FP32, (size, chunk, name)


def test_preferences_take_a_tenth_of_the_rate_of_answers_and_say_so():
    answers, preferences = (automatic_rate("llama", 4096, 500, False, task) for task in ("sft", "dpo"))
    assert preferences[0] == pytest.approx(answers[0] / 10)
    assert preferences[1].startswith("a tenth of")


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_what_has_not_moved_is_at_the_loss_of_a_tossed_coin(task):
    model = tiny.quantized(tiny.llama(), "none")
    add_lora(model, rank=4, dtype=torch.float32)
    loss, gradients = trained(model.train(), task_of(Train(task=task)), rows_of(task))
    assert loss.value.item() == pytest.approx({"dpo": math.log(2), "kto": 0.5}[task], rel=1e-6)
    assert any(gradient.norm() > 1e-4 for gradient in gradients.values())


def ratio_to_base(model):
    """How much more likely an answer is to a model than to its base, by the logits of both."""

    def ratio(row):
        ids, first = torch.tensor([row.input_ids]), row.trained.index(True)
        here, there = (each(ids).logits[0].log_softmax(-1) for each in (model, tiny.llama()))
        return sum((here - there)[i - 1, row.input_ids[i]] for i in range(first, len(row.input_ids)))

    return ratio


def mean_log_p(model, rows):
    """Mean log p of the tokens of all chosen answers, then of the others."""
    lengths = torch.tensor([sum(each.trained) for each in (*rows, *(row.other for row in rows))])
    return -sequence_losses(model, collate_rows([[row] for row in rows], 0)) / lengths


def test_dpo_reads_the_base_as_its_reference_and_leaves_the_adapter_in_use():
    model, rows = tuned(seed=5), pairs()
    loss, _ = trained(model, task_of(Train(task="dpo", beta=0.3)), rows)
    assert model.training
    ratio = ratio_to_base(model)
    losses = [-F.logsigmoid(0.3 * (ratio(row) - ratio(row.other))) for row in rows]
    assert abs(loss.value.item() - math.log(2)) > 0.01
    assert loss.value.item() == pytest.approx(sum(losses).item() / 3, rel=FP32)
    margins = [0.3 * (ratio(row) - ratio(row.other)).item() for row in rows]
    assert loss.measures["reward_margin"].item() == pytest.approx(sum(margins) / 3, rel=20 * FP32)
    assert loss.measures["reward_accuracy"].item() == pytest.approx(sum(m > 0 for m in margins) / 3)
    chosen, rejected = mean_log_p(model, rows).chunk(2)
    assert loss.measures["accuracy"].item() == pytest.approx((chosen > rejected).float().mean().item())


@pytest.mark.parametrize(("seed", "sign"), [(4, 1), (5, -1)])
def test_kto_holds_answers_against_what_other_prompts_got_and_never_against_less_than_nothing(seed, sign):
    model, rows = tuned(seed), swap_answers(verdicts())
    loss, _ = trained(model, task_of(Train(task="kto", beta=0.2)), verdicts())
    ratio = ratio_to_base(model)
    moved = sum(ratio(row.other).item() for row in rows) / len(rows)
    assert moved * sign > 0.01
    kl = max(0.0, moved)
    assert loss.measures["kl"].item() == pytest.approx(kl, rel=20 * FP32)
    gains = [0.2 * (ratio(row).item() - kl) * (1 if row.is_good else -1) for row in rows]
    losses = [1 - 1 / (1 + math.exp(-gain)) for gain in gains]
    assert loss.value.item() == pytest.approx(sum(losses) / len(losses), rel=20 * FP32)
    assert loss.measures["reward_accuracy"].item() == pytest.approx(sum(gain > 0 for gain in gains) / len(gains))


@pytest.mark.parametrize("task", ["dpo", "ipo", "kto"])
def test_a_task_holds_to_the_frozen_adapter_where_there_is_one(task):
    found = [task_of(Train(task=task), has_reference=frozen).reference for frozen in (True, False)]
    assert found == [REFERENCE, None]


def test_a_frozen_adapter_can_be_the_reference():
    model = tuned()
    add_lora(model, rank=2, dtype=torch.float32, name="before")
    tiny.wake(model, seed=3, name="before")
    use_adapter(model, "default")
    by_base, _ = trained(model, task_of(Train(task="dpo")), pairs())
    by_adapter, _ = trained(model, Dpo(0.1, reference="before"), pairs())
    assert by_base.value.item() != pytest.approx(by_adapter.value.item(), rel=1e-3)
    assert all(parameter.grad is None for _, parameter in adapter_parameters(model, "before"))
    use_adapter(model, "before")
    batch = collate_rows([[row] for row in pairs()], 0)
    own = evaluate_loss(model, [batch], Dpo(0.1, reference="before"))
    assert own.loss == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("task", PAIRS + VERDICTS)
def test_an_evaluation_says_the_loss_of_a_step(task):
    model, rows, objective = tuned(), rows_of(task), task_of(Train(task=task))
    loss, _ = trained(model, objective, rows)
    rows = swap_answers(rows) if task in VERDICTS else rows
    score = evaluate_loss(model, [collate_rows([[row] for row in part], 0) for part in (rows[:2], rows[2:])], objective)
    assert score.loss == pytest.approx(loss.value.item(), rel=FP32)
    assert score.rows == len(rows)
    assert score.perplexity is None
    assert "perplexity" not in score.as_json()
    assert score.as_json()["reward_accuracy"] == pytest.approx(loss.measures["reward_accuracy"].item())


def test_orpo_needs_no_reference_and_counts_a_chosen_answer_by_its_mean_token():
    model, rows = tuned(), pairs()
    loss, _ = trained(model, task_of(Train(task="orpo", beta=0.5)), rows)
    chosen, rejected = mean_log_p(model, rows).double().chunk(2)
    log_odds = (each - torch.log1p(-each.exp()) for each in (chosen, rejected))
    wanted = (-chosen - 0.5 * F.logsigmoid(next(log_odds) - next(log_odds))).mean()
    assert loss.value.item() == pytest.approx(wanted.item(), rel=FP32)
    margin = 0.5 * (chosen - rejected).mean().item()
    assert loss.measures["reward_margin"].item() == pytest.approx(margin, rel=20 * FP32)
    assert loss.measures["accuracy"].item() == pytest.approx((chosen > rejected).double().mean().item())


def test_what_answers_are_held_against_knows_no_dropout():
    """The frozen adapter of a reference, and how far KTO finds that the model has moved."""

    def told(task, seed, *, own, frozen, rows):
        model = tiny.quantized(tiny.llama(), "none")
        for name, dropout, waking in (("before", frozen, 3), ("default", own, 4)):
            add_lora(model, rank=4, alpha=8, dropout=dropout, dtype=torch.float32, name=name)
            tiny.wake(model, seed=waking, name=name)
        use_adapter(model, "default")
        torch.manual_seed(seed)
        return trained(model.train(), task, rows)[0]

    dpo, kto = Dpo(0.1, reference="before"), task_of(Train(task="kto"))
    assert len({told(dpo, seed, own=0.5, frozen=0.0, rows=pairs()).value.item() for seed in (0, 1)}) == 2, "it is on"
    assert len({told(dpo, seed, own=0.0, frozen=0.5, rows=pairs()).value.item() for seed in (0, 1)}) == 1
    moved = {told(kto, seed, own=0.5, frozen=0.0, rows=verdicts()).measures["kl"].item() for seed in (0, 1)}
    assert len(moved) == 1
    assert moved.pop() > 0


def test_answers_that_are_swapped_follow_other_prompts_and_are_no_longer_than_any_row():
    rows = verdicts()
    swapped = swap_answers(rows)
    for row, after, before in zip(rows, swapped, [rows[-1], *rows[:-1]], strict=True):
        assert replace(after, other=None) == row
        prompt = row.input_ids[: row.trained.index(True)]
        answer = before.input_ids[before.trained.index(True) :]
        assert after.other.input_ids == (prompt + answer)[: max(len(each.input_ids) for each in rows)]
        assert after.other.trained_tokens > 0


def test_an_answer_is_swapped_with_the_nearest_before_it_that_answers_another_prompt():
    rows = [replace(sequence(p, a), is_good=True) for p, a in (([5], [20]), ([5], [21]), ([6], [22]), ([6], [23]))]
    swapped = [row.other.input_ids for row in swap_answers(rows)]
    assert swapped == [[5, 23], [5, 23], [6, 21], [6, 21]]
    assert [row.other.input_ids for row in swap_answers(rows[:2])] == [[5, 21], [5, 20]], "there is no other prompt"


# --- other people's code ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft_side(tmp_path_factory):
    """The adapter of `tuned(4)`, whose answers to other prompts have become likelier, on PEFT's side."""
    from peft import PeftModel

    save_adapter(tuned(4), folder := tmp_path_factory.mktemp("peft") / "adapter")
    return lambda: PeftModel.from_pretrained(tiny.llama(), folder, is_trainable=True)


def trainer_of(kind, model, tmp_path, **settings):
    """One of TRL's trainers around a model, its rows made up: batches are given to it by hand."""
    from datasets import Dataset
    from test_train import tokenizer
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    config, trainer = {
        "sft": (SFTConfig, SFTTrainer),
        "dpo": (DPOConfig, DPOTrainer),
        "kto": (KTOConfig, KTOTrainer),
        "orpo": (ORPOConfig, ORPOTrainer),
    }[kind]
    row = {"prompt": "w5", "chosen": " w6", "rejected": " w7"}
    if kind in ("kto", "sft"):
        row = {"prompt": "w5", "completion": " w6", "label": True}
    args = config(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
                  per_device_train_batch_size=2, **settings)  # fmt: skip
    made = trainer(model=model, args=args, train_dataset=Dataset.from_list([row, row]), processing_class=tokenizer())
    if "ref" in model.peft_config:
        model.delete_adapter("ref")  # a copy of the adapter: now the base is the reference
    return made


def side_by_side(sequences):
    ids = torch.zeros(len(sequences), max(len(each.input_ids) for each in sequences), dtype=torch.int64)
    shape = {"input_ids": ids, "attention_mask": torch.zeros_like(ids), "completion_mask": torch.zeros_like(ids)}
    for b, each in enumerate(sequences):
        length = len(each.input_ids)
        shape["input_ids"][b, :length] = torch.tensor(each.input_ids)
        shape["attention_mask"][b, :length] = 1
        shape["completion_mask"][b, :length] = torch.tensor(each.trained)
    return shape


def assert_same(model, peft_model, loss, theirs, gradients):
    assert theirs.item() == pytest.approx(loss.value.item(), rel=1e-5)
    theirs.backward()
    names = {"a_RI": "lora_A.default.weight", "b_OR": "lora_B.default.weight"}
    found = dict(peft_model.named_parameters())
    for name, gradient in gradients.items():
        layer, _, leaf = name.rpartition(".")
        assert (
            tiny.relative(
                found[f"base_model.model.{layer.removesuffix('.adapters.default')}.{names[leaf]}"].grad, gradient
            )
            < 1e-4
        ), name


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sft", "pretrain"])
def test_answers_and_texts_agree_with_trl_and_with_transformers(task, peft_side, tmp_path):
    rows = [replace(row, other=None) for row in pairs()]
    if task == "pretrain":
        rows = [replace(row, trained=[True] * len(row.trained)) for row in rows]
    model = tuned(4)
    loss, gradients = trained(model, task_of(Train(task=task)), rows, size=2)
    batch = side_by_side(rows)
    batch["labels"] = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    own = peft_side()
    assert own(**batch).loss.item() == pytest.approx(loss.value.item(), rel=1e-5)
    theirs = trainer_of("sft", peft_side(), tmp_path)
    count = (batch["labels"][:, 1:] != -100).sum()
    theirs_loss = theirs.compute_loss(theirs.model, batch, num_items_in_batch=count)
    assert_same(model, theirs.model, loss, theirs_loss, gradients)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "ipo"])
def test_dpo_and_ipo_agree_with_trl(task, peft_side, tmp_path):
    model = tuned(4)
    loss, gradients = trained(model, task_of(Train(task=task, beta=0.2)), pairs())
    theirs = trainer_of("dpo", peft_side(), tmp_path, beta=0.2, loss_type=["sigmoid" if task == "dpo" else "ipo"])
    batch = side_by_side([*pairs(), *(pair.other for pair in pairs())])
    assert_same(model, theirs.model, loss, theirs._compute_loss(theirs.model, batch, False), gradients)


@pytest.mark.slow
def test_kto_agrees_with_trl(peft_side, tmp_path):
    model, rows = tuned(4), swap_answers(verdicts())
    loss, gradients = trained(model, task_of(Train(task="kto", beta=0.2)), verdicts())
    assert loss.measures["kl"] > 0, "or the estimate says nothing"
    theirs = trainer_of("kto", peft_side(), tmp_path, beta=0.2)
    swapped = {f"KL_{key}": value for key, value in side_by_side([row.other for row in rows]).items()}
    batch = side_by_side(rows) | swapped | {"label": torch.tensor([row.is_good for row in rows])}
    assert_same(model, theirs.model, loss, theirs._compute_loss(theirs.model, batch, False), gradients)


def chosen_and_rejected(rows):
    """The batch of TRL's trainer of odds ratios."""
    batch = {}
    for name, sequences in (("chosen", rows), ("rejected", [row.other for row in rows])):
        made = side_by_side(sequences)
        batch |= {f"{name}_input_ids": made["input_ids"], f"{name}_attention_mask": made["attention_mask"]}
        batch[f"{name}_labels"] = made["input_ids"].masked_fill(made["completion_mask"] == 0, -100)
    return batch


@pytest.mark.slow
def test_the_odds_ratio_of_orpo_agrees_with_trl_on_any_pairs(peft_side, tmp_path):
    """Its part of the loss is what twice the weight adds; the other part is counted otherwise, as below."""
    model, batch = tuned(4), chosen_and_rejected(pairs())
    light, heavy = (trained(model, task_of(Train(task="orpo", beta=beta)), pairs())[0] for beta in (0.5, 1.0))
    theirs = trainer_of("orpo", peft_side(), tmp_path, beta=0.5)
    _, metrics = theirs.get_batch_loss_metrics(theirs.model, batch)
    ratio = 2 * (heavy.value - light.value).item()
    assert ratio == pytest.approx(-metrics["log_odds_ratio"], rel=1e-5)
    assert ratio != pytest.approx(math.log(2), rel=1e-3), "that of two answers of one likelihood"
    assert light.measures["reward_margin"].item() == pytest.approx(metrics["rewards/margins"], rel=1e-4)


@pytest.mark.slow
def test_orpo_agrees_with_trl_where_both_count_the_same_tokens(peft_side, tmp_path):
    # TRL counts the chosen likelihood over prompt and answer and over the tokens of all pairs, the paper over answers
    # pair by pair; with prompts of one token, which nothing predicts, and answers of one length they are the same.
    rows = [
        replace(sequence([5], c), other=sequence([5], r))
        for c, r in (([20, 21, 2], [22, 2]), ([30, 31, 2], [7, 8, 9, 2]))
    ]
    model = tuned(4)
    loss, gradients = trained(model, task_of(Train(task="orpo", beta=0.2)), rows)
    theirs = trainer_of("orpo", peft_side(), tmp_path, beta=0.2)

    theirs_loss, _ = theirs.get_batch_loss_metrics(theirs.model, chosen_and_rejected(rows))
    assert_same(model, theirs.model, loss, theirs_loss, gradients)


# --- rows -------------------------------------------------------------------------------------------------------------

QUESTION = {"role": "user", "content": "Where?"}
HERE, THERE = {"role": "assistant", "content": "Here."}, {"role": "assistant", "content": "There."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [QUESTION], "chosen": [HERE], "rejected": [THERE]},
        {"prompt": "Where?", "chosen": [HERE], "rejected": [THERE]},
        {"prompt": [QUESTION], "chosen": "Here.", "rejected": "There."},
        {"chosen": [QUESTION, HERE], "rejected": [QUESTION, THERE]},
        {"prompt": "Where?", "chosen": [QUESTION, HERE], "rejected": [QUESTION, THERE], "score_chosen": 3.0},
    ],
)
def test_every_way_to_write_a_pair_of_chats_is_the_same_pair(row):
    for task in PAIRS:
        assert read_row(row, "x", task=task) == Preference(Chat([QUESTION, HERE]), Chat([QUESTION, THERE]))


def test_a_pair_of_texts_is_a_pair_of_completions():
    found = read_row({"prompt": "a", "chosen": "b", "rejected": "c"}, "x", task="dpo")
    assert found == Preference(Completion("a", "b"), Completion("a", "c"))


def test_all_answers_to_one_prompt_are_on_one_side_of_the_split(rows_of_a_run):
    train, held = split_eval(load_rows(rows_of_a_run, task="kto"), share=0.4)
    assert (len(train), len(held)) == (10, 6)
    assert not {row.answer.prompt for row in train} & {row.answer.prompt for row in held}
    chats = [Chat([{**QUESTION, "content": text}, answer]) for text in "ab" for answer in (HERE, THERE)]
    train, held = split_eval([Labelled(chat, True) for chat in chats])
    assert train[0].answer.messages[0] == train[1].answer.messages[0] != held[0].answer.messages[0]
    train, held = split_eval([Preference(chat, chats[-1]) for chat in chats])
    assert train[0].chosen.messages[0] == train[1].chosen.messages[0] != held[0].chosen.messages[0]


def test_one_held_out_verdict_has_no_other_answer_to_be_held_against_so_two_are_held_out_or_it_is_refused(
    tmp_path, model_folder
):
    answers = [{"prompt": f"say {word} ", "completion": word, "label": True} for word in ("cat", "dog", "owl", "bee")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    (tmp_path / "one.jsonl").write_text(json.dumps(answers[0]) + "\n")
    words = "base.model", "data.train"
    given = [f"{key}={value}" for key, value in zip(words, (model_folder, tmp_path / "rows.jsonl"), strict=True)]
    for task, held in (("sft", 1), ("kto", 2)):
        recipe = read_recipe("default", [*given, f"train.task={task}", "data.max_tokens=64"])
        assert len(prepare(recipe, Watch(), weights=False).eval.rows) == held
    named = read_recipe("default", [*given, "train.task=kto", "data.max_tokens=64", f"data.eval={tmp_path}/one.jsonl"])
    with pytest.raises(DataError, match=r"one row is held out.*data.eval"):
        prepare(named, Watch(), weights=False)


@pytest.mark.parametrize(
    ("label", "is_good"),
    [(True, True), (False, False), (1, True), (0, False), (1.0, True), ("1", True), ("0", False), ("true", True),
     ("False", False), (" TRUE ", True), ("0.0", False)],
)  # fmt: skip
def test_answers_with_a_verdict_are_texts_or_turns(label, is_good):
    text = read_row({"prompt": "a", "completion": "b", "label": label}, "x", task="kto")
    assert text == Labelled(Completion("a", "b"), is_good)
    for row in ({"messages": [QUESTION, HERE]}, {"prompt": [QUESTION], "completion": [HERE]}):
        assert read_row({**row, "label": label}, "x", task="kto") == Labelled(Chat([QUESTION, HERE]), is_good)


def test_verdicts_of_a_csv_file_are_read_and_a_bad_one_is_named_by_its_line(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion,label\na,b,True\na,c,0\n")
    assert [row.is_good for row in load_rows(tmp_path / "rows.csv", task="kto")] == [True, False]
    (tmp_path / "rows.csv").write_text("prompt,completion,label\na,b,1\na,c,yes\n")
    with pytest.raises(DataError, match=r"rows.csv:3: column 'label' is text \('yes'\), wanted true"):
        load_rows(tmp_path / "rows.csv", task="kto")


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("dpo", {"prompt": "a", "completion": "b"}, "missing 'chosen', 'rejected'"),
        ("dpo", {"chosen": "b", "rejected": "c"}, "no column 'prompt'"),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "b"}, "the same"),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": " "}, "rejected is empty"),
        (
            "dpo",
            {"chosen": [QUESTION, HERE], "rejected": [{**QUESTION, "content": "Who?"}, THERE]},
            "do not answer the same",
        ),
        ("dpo", {"chosen": [QUESTION], "rejected": [QUESTION, THERE]}, "chosen ends with a turn by the user"),
        ("kto", {"prompt": "a", "completion": "b", "label": "good"}, "wanted true"),
        ("kto", {"prompt": "a", "completion": "b", "label": 2}, "wanted true"),
        ("kto", {"prompt": "a", "completion": "b", "label": ""}, "wanted true"),
        ("kto", {"prompt": "a", "completion": "b", "label": None}, "wanted true"),
        ("kto", {"prompt": "a", "completion": "b", "label": [1]}, "wanted true"),
        ("kto", {"prompt": "a", "label": True}, "completion or messages"),
        ("kto", {"prompt": "a", "completion": "b"}, "missing 'label'"),
        ("sft", {"prompt": "a", "chosen": "b", "rejected": "c"}, "missing"),
    ],
)
def test_a_bad_row_is_one_sentence_that_says_where(task, row, words):
    with pytest.raises(DataError, match=f"^rows.jsonl:3: .*{words}") as caught:
        read_row(row, "rows.jsonl:3", task=task)
    assert "\n" not in str(caught.value)


def test_a_pair_is_two_verdicts_that_say_where_it_stands(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "say ", "chosen": "cat", "rejected": "dog"}) + "\n")
    rows = load_rows(file, task="kto")
    assert [(row.answer.completion, row.is_good, row.where) for row in rows] == [
        ("cat", True, f"{file}:1"),
        ("dog", False, f"{file}:1"),
    ]


def test_answers_that_are_not_wanted_are_no_reference_for_what_a_model_says():
    good, bad = (replace(sequence([5], a), answer="x", is_good=g) for a, g in (([20], True), ([21], False)))
    assert answered_rows([bad, good, pairs()[0]]) == [good, pairs()[0]]
    assert answered_rows([replace(bad, is_good=None)]) == [replace(bad, is_good=None)]


def test_the_planned_evaluation_is_the_largest_of_those_that_are_made():
    answers = [[place % 90] * (place % 13 + 1) for place in range(40)]
    rows = [replace(sequence([5] * (150 - place), each), is_good=True) for place, each in enumerate(answers)]
    sizes = [tuple(batch.input_ids.shape) for batch in eval_batches(rows, 0, torch.device("cpu"))]
    count, tokens = eval_shapes(rows, "auto")[2048]
    assert (2 * count, tokens) == max(sizes, key=math.prod)


@pytest.mark.parametrize("rows", [pairs(), verdicts()])
def test_an_evaluation_takes_no_more_tokens_at_a_time_than_are_asked_for_both_sequences_of_a_row_counted(rows):
    longest = max(row.longest for row in as_stepped(rows))
    batches = eval_batches(rows, 0, torch.device("cpu"), 4 * longest)
    assert sum(batch.rows for batch in batches) == len(rows)
    assert len(batches[0].input_ids) >= 4
    assert len(batches) > 1
    assert all(batch.input_ids.numel() <= 4 * longest for batch in batches)


def test_a_plan_counts_the_parameters_of_the_base_whatever_adapters_stand_beside_it():
    counts = dry_step(tiny.llama().config, replace(WORK, has_reference=True))["parameters"]
    assert counts["total"] == sum(parameter.numel() for parameter in tiny.llama().parameters())


@pytest.mark.parametrize("task", PAIRS + VERDICTS)
def test_full_fine_tuning_holds_a_second_model_where_a_task_holds_to_the_first(task):
    work = replace(WORK, quantization=Quantization("none"), lora=None, optimizer="adamw_32bit", task=task)
    planned, model = dry_step(tiny.llama().config, work), tiny.llama()
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert planned["by_category"]["base_weights"] == (held if task == "orpo" else 2 * held)
    assert planned["by_category"]["gradients"] <= 4 * count, "the second is not trained"
    assert planned["parameters"]["total"] == planned["parameters"]["trainable"] == count


@pytest.mark.parametrize(("task", "passes"), [("orpo", 2), ("dpo", 3), ("ipo", 3), ("kto", 5)])
def test_an_estimated_speed_counts_the_passes_that_learn_nothing(task, passes):
    # forward and backward of what is learnt, and forward: the reference; of kto twice the other answer, too
    speeds = [estimated_tokens_per_s(10**9, 0, 1e12, passes=TASKS[each].more_passes) for each in ("sft", task)]
    assert speeds[0] / speeds[1] == pytest.approx(passes / 2)


def test_the_tokens_of_a_second_are_those_of_the_rows():
    rows = swap_answers(verdicts())
    assert collate_rows([[row] for row in rows], 0).tokens == sum(len(row.input_ids) for row in rows)
    both = sum(len(row.input_ids) + len(row.other.input_ids) for row in pairs())
    assert collate_rows([[row] for row in pairs()], 0).tokens == both


@pytest.mark.parametrize("task", PAIRS + VERDICTS)
def test_trained_tokens_are_those_of_both_answers_of_a_pair_and_of_a_verdicts_own_alone(task):
    rows = rows_of(task)
    wanted = sum(sequence.trained_tokens for row in rows for sequence in row.sequences)
    assert collate_rows([[row] for row in as_stepped(rows)], 0).trained_tokens == wanted


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows_of_a_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    words = ("cat", "dog", "owl", "bee", "ant", "elk", "hen", "fox")
    pairs = [{"prompt": f"say {a} ", "chosen": a, "rejected": b} for a, b in zip(words, words[::-1], strict=True)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder / "pairs.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", pytest.param("kto", marks=pytest.mark.long), "orpo"])
def test_a_run_prefers_what_it_was_shown_as_planned_and_resumes_bit_for_bit(
    task, rows_of_a_run, tmp_path, model_folder
):
    def recipe(name, steps):
        recipe = write_recipe(tmp_path, model_folder, task=task, steps=steps, lr=3e-2, save_every=3, eval_every=3)
        return recipe, f"data.train={rows_of_a_run}", f"data.eval={rows_of_a_run}", f"output={tmp_path / name}"

    assert call("train", *recipe("whole", 9)).exit_code == 0
    scores = json.loads((tmp_path / "whole" / "scores.json").read_text())
    assert scores["adapter"]["loss"] < scores["base"]["loss"]
    assert not {"reward_accuracy", "perplexity"} & scores["base"].keys()
    memory = json.loads((tmp_path / "whole" / "memory.json").read_text())
    assert abs(memory["error"]["peak"]) < 0.01
    assert call("train", *recipe("parts", 3)).exit_code == 0
    assert call("train", *recipe("parts", 9), "--resume").exit_code == 0
    courses = [
        [
            {key: value for key, value in json.loads(line).items() if key not in ("tokens_per_s", "peak_bytes")}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "parts")
    ]
    assert courses[0] == courses[1]
    assert "reward_accuracy" in courses[0][0]
    assert "eval_reward_accuracy" in courses[0][3]
    evaluated = call("eval", tmp_path / "whole", "--json")
    found = json.loads(evaluated.stdout)
    assert found["loss"] == pytest.approx(scores["adapter"]["loss"])
    assert found["reward_accuracy"] == scores["adapter"]["reward_accuracy"]
    of_base = call("eval", tmp_path / "whole", "--base", "--json")
    assert json.loads(of_base.stdout).keys() - {"schema"} == scores["base"].keys()
    assert "note: rewards are left out" in of_base.stderr
    assumed = json.loads((tmp_path / "whole" / "plan.json").read_text())["methods"]["full_finetune"]["assumes"]
    assert ("reference" in assumed) == (task != "orpo")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.task=dpo", "train.full_finetune=true"], ["train.full_finetune", "orpo"]),
        (["train.task=kto", "train.full_finetune=true", "base.quantization=none"], ["train.full_finetune", "orpo"]),
        (["train.task=orpo", "data.packing=true"], ["data.packing"]),
        (["train.task=dpo", "data.loss_on=all"], ["data.loss_on"]),
        (["train.task=dpo", "data.format=text"], ["data.format=text", "preference"]),
        (["train.task=kto", "train.micro_batch=1", "train.accumulation=1"], ["two rows"]),
        (["train.task=dpo"], ["chosen"]),
    ],
)
def test_what_a_task_cannot_do_is_refused_before_anything_is_read(
    settings, words, rows_of_a_run, tmp_path, model_folder
):
    rows = tmp_path / "answers.jsonl" if settings == ["train.task=dpo"] else rows_of_a_run
    (tmp_path / "answers.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert_mistake(
        call("train", write_recipe(tmp_path, model_folder), f"data.train={rows}", "data.eval=null", *settings), *words
    )


def test_orpo_can_train_all_weights_for_it_holds_to_no_start(rows_of_a_run, tmp_path, model_folder):
    settings = f"data.train={rows_of_a_run}", "data.eval=null", "train.task=orpo", "train.full_finetune=true"
    done = call("plan", write_recipe(tmp_path, model_folder), *settings, "--json")
    assert done.exit_code == 0, done.output
    assert "reference" not in json.loads(done.stdout)["methods"]["full_finetune"]["assumes"]


@pytest.fixture(scope="module")
def answered(tmp_path_factory, model_folder):
    """A run that learnt answers, to go on from."""
    folder = tmp_path_factory.mktemp("answered")
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "say cat ", "completion": "cat"}) + "\n")
    recipe = write_recipe(folder, model_folder, steps=2, lr=0.05)
    assert call("train", recipe, "lora.rank=3", "lora.targets=[q_proj, up_proj]", "lora.scaling=rslora").exit_code == 0
    return folder / "run"


@pytest.mark.slow
def test_preferences_go_on_from_an_adapter_and_hold_to_it(answered, rows_of_a_run, tmp_path, model_folder):
    result = call("train", write_recipe(tmp_path, model_folder, task="dpo", steps=2), f"data.train={rows_of_a_run}",
                  f"data.eval={rows_of_a_run}", f"lora.from={answered}")  # fmt: skip
    assert_mistake(result, "lora.from", "lora.rank=3", "leave out lora.rank")
    recipe = write_recipe(tmp_path, model_folder, task="dpo", steps=2, lr=1e-2)
    recipe.write_text(recipe.read_text().replace("lora:\n  rank: 4\n", f"lora:\n  from: {answered}\n"))
    result = call("train", recipe, f"data.train={rows_of_a_run}", f"data.eval={rows_of_a_run}")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6), "nothing has moved from where it starts"
    memory = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert abs(memory["error"]["peak"]) < 0.01
    assert abs(memory["error"]["adapters"]) < 0.01, "of which two stand there"
    before, after = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (answered, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(tiny.relative(after[key].float(), before[key].float()) < 0.5 for key in before if "lora_A" in key)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"], config["target_modules"]) == (3, True, ["q_proj", "up_proj"])
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    found = json.loads(call("eval", tmp_path / "run", "--json").stdout)
    assert found["loss"] == pytest.approx(scores["adapter"]["loss"], rel=1e-6)
    assert call("train", tmp_path / "run" / "recipe.yaml", "train.steps=3", "--resume").exit_code == 0


@pytest.mark.slow
def test_an_adapter_that_a_run_holds_to_must_be_what_it_was(answered, rows_of_a_run, tmp_path, model_folder):
    start = shutil.copytree(answered / "adapter", tmp_path / "start")
    recipe = write_recipe(tmp_path, model_folder, task="kto", steps=1)
    recipe.write_text(recipe.read_text().replace("lora:\n  rank: 4\n", f"lora:\n  from: {start}\n"))
    run, rows = tmp_path / "run", (f"data.train={rows_of_a_run}", "data.eval=null")
    assert call("train", recipe, *rows).exit_code == 0
    weights = start / "adapter_model.safetensors"
    contents = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in contents.items()}, weights, metadata={"format": "pt"})
    words = str(weights), "is not what it was when the run began", "put it back"
    assert_mistake(call("eval", run, "--data", rows_of_a_run), *words)
    assert_mistake(call("train", run / "recipe.yaml", "train.steps=2", "--resume"), *words)
    shutil.rmtree(start)
    assert_mistake(call("eval", run, "--data", rows_of_a_run), f"lora.from={start}", "neither")


@pytest.mark.parametrize("inside", ["", "adapter"])
def test_a_run_is_not_written_over_the_adapter_that_it_starts_from(inside, answered, tmp_path, model_folder):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    recipe = write_recipe(tmp_path, model_folder)
    recipe.write_text(recipe.read_text().replace("lora:\n  rank: 4\n", f"lora:\n  from: {answered / inside}\n"))
    result = call("train", recipe, f"output={answered}", "--overwrite")
    assert_mistake(result, "lora.from", f"output={answered}", "set output to another folder")
    assert (answered / "adapter").is_dir()


def test_answers_go_on_from_an_adapter(answered, tmp_path, model_folder):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "say cat ", "completion": "cat"}) + "\n")
    recipe = write_recipe(tmp_path, model_folder, steps=1)
    recipe.write_text(recipe.read_text().replace("lora:\n  rank: 4\n", f"lora:\n  from: {answered}\n"))
    assert call("train", recipe).exit_code == 0
    scores = json.loads((answered / "scores.json").read_text())
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(scores["adapter"]["loss"], rel=1e-5)
    assert first["loss"] < scores["base"]["loss"] - 0.01


@pytest.mark.parametrize("start", ["nowhere", "rows"])
def test_a_start_that_is_no_adapter_is_one_line(start, rows_of_a_run, tmp_path, model_folder):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    start = rows_of_a_run.parent if start == "rows" else tmp_path / start
    assert_mistake(call("train", write_recipe(tmp_path, model_folder), f"lora.from={start}"), "lora.from", "neither")
