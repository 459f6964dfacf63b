"""A run's model is a plain transformers model to lm-eval: its harness scores it as plain torch does. Needs lm-eval, the
extra `eval`; without it there is nothing to test."""

import json

import pytest
import tiny
import torch
from test_use import WORDS, trained

import qlora_kit as qk

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: make extras")
huggingface = pytest.importorskip("lm_eval.models.huggingface")

PAIRS = [("say", " cat"), ("say", " dog"), ("say say", "elk"), ("", "bee")]  # lm-eval moves spaces that end a context


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps on a quantised base."""
    model = tiny.save_model(tmp_path_factory.mktemp("model"))
    rows = [{"prompt": f"say {word} ", "completion": word} for word in WORDS]
    return trained(tmp_path_factory.mktemp("texts"), model, rows, evals=None)


@torch.no_grad()
def by_hand(model, tokenizer, context, continuation):
    """Log-probability of the continuation, and whether it is the likeliest; for no context the end token stands."""
    before = tokenizer(context)["input_ids"] or [tokenizer.eos_token_id]
    after = tokenizer(continuation)["input_ids"]
    logits = model(torch.tensor([before + after]), use_cache=False).logits[0, len(before) - 1 : -1]
    chosen = torch.log_softmax(logits, -1)[range(len(after)), after]
    return chosen.sum().item(), bool((logits.argmax(-1) == torch.tensor(after)).all())


def test_the_harness_scores_a_run_as_plain_torch_does(run):
    requests = pytest.importorskip("lm_eval.api.instance")
    scores = []
    for bare_base in (False, True):
        model, tokenizer, _ = qk.load_run(str(run), bare_base=bare_base)
        frozen = tiny.stored(model)
        harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
        asked = [
            requests.Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=place)
            for place, pair in enumerate(PAIRS)
        ]
        found = harness.loglikelihood(asked, disable_tqdm=True)
        wanted = [by_hand(model, tokenizer, *pair) for pair in PAIRS]
        # fp32, rows padded and side by side: the same terms in another order
        assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], rel=1e-5)
        assert [bool(is_greedy) for _, is_greedy in found] == [is_greedy for _, is_greedy in wanted]
        assert tiny.stored(model) == frozen
        scores.append(found)
    assert scores[0] != scores[1], "the adapter counts"


def test_a_task_of_ones_own_runs_without_a_network(run, tmp_path):
    (tmp_path / "task.jsonl").write_text("".join(json.dumps({"ask": f"say {w} ", "answer": w}) + "\n" for w in WORDS))
    task = {
        "task": "say",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "task.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{ask}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match"}],
    }
    model, tokenizer, _ = qk.load_run(run)
    harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer)
    result = lm_eval.simple_evaluate(harness, tasks=[task], bootstrap_iters=0)
    said = [sample["resps"][0][0] for sample in result["samples"]["say"]]
    assert len(said) == len(WORDS)
    share = sum(text == word for text, word in zip(said, WORDS, strict=True)) / len(WORDS)
    assert result["results"]["say"]["exact_match,none"] == pytest.approx(share)
