"""GPT-2's and BERT's kinds beside Llama's: the first goes on with far text, the second tells kinds of files apart.

    python benchmarks/regret/kinds.py       write benchmarks/regret/kinds.jsonl

Both are pretrained here for minutes, with 2.2 M parameters, on the corpus and the tokenizer of the quickstart's base.
The classes are kinds of files in the installed torch package, of each 800 different pieces at most;
whole files are held out.
"""

import json
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from common import RECIPES, arms_with_seeds, each, experiment, record, rows_ready
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

sys.path[:0] = [str(RECIPES), str(RECIPES.parent / "quickstart")]
make_rows, pretraining = import_module("make_rows"), import_module("pretrain")

BASE = RECIPES.parent / "quickstart" / "base"
STEPS, BATCH, TOKENS = 1500, 16, 128
CLASSES = ("py", "pyi", "h", "cuh", "cmake")
RATES = {
    ("GPT-2, far text", "lora"): (2e-3, 4e-3, 8e-3),
    ("GPT-2, far text", "full"): (8e-4, 1.6e-3, 3.2e-3),
    ("BERT, kinds of files", "lora"): (5e-4, 1e-3, 2e-3, 4e-3),
    ("BERT, kinds of files", "full"): (1e-4, 2e-4, 4e-4, 8e-4),
}
"""BERT has its norms behind the sums, and its adapters learn nothing at the rates of the others."""
HIDDEN_SHARE = 0.15
"""Of tokens that BERT is to tell (Devlin et al. 2018, arXiv 1810.04805, section 3.1, without its further cases)."""


def gpt2_loss(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Of the next tokens."""
    return model(input_ids=ids, labels=ids).loss


def bert_loss(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Of hidden tokens; the end token stands in their place."""
    is_hidden = torch.rand(ids.shape) < HIDDEN_SHARE
    return model(input_ids=ids.masked_fill(is_hidden, 0), labels=ids.masked_fill(~is_hidden, -100)).loss


@dataclass(frozen=True)
class Pretraining:
    """What becomes a base in `folder`: `make` gives its random start, `loss_of` what it learns, at rate `lr`."""

    make: Callable[[], PreTrainedModel]
    loss_of: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]
    lr: float
    folder: Path


def pretrain(what: Pretraining) -> Path:
    """A base that has learnt something, with its tokenizer."""
    torch.manual_seed(0)
    model, tokenizer = what.make(), AutoTokenizer.from_pretrained(BASE)
    documents = [document for document in pretraining.gather_corpus() if not document.is_held_out]
    stream = torch.cat(pretraining.encode(tokenizer, documents))
    optimizer = torch.optim.AdamW(model.parameters(), lr=what.lr, weight_decay=0.1)
    for step in range(STEPS):
        starts = torch.randint(0, len(stream) - TOKENS, (BATCH,))
        loss = what.loss_of(model, torch.stack([stream[start : start + TOKENS] for start in starts.tolist()]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = what.lr * min(1.0, (step + 1) / 40, (STEPS - step) / 80)
        optimizer.step()
        optimizer.zero_grad()
    print(f"  {what.folder.name}: loss {loss.item():.3f} after {STEPS} steps", file=sys.stderr, flush=True)
    model.save_pretrained(what.folder)
    tokenizer.save_pretrained(what.folder)
    return what.folder


def labelled(folder: Path) -> tuple[Path, Path]:
    """Pieces of files with their kind, as many of each, to train on and held out."""
    root, rng, seen = Path(torch.__file__).parent, random.Random(0), set[str]()
    sides: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for label in CLASSES:
        own: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
        for path in sorted(root.rglob(f"*.{label}")):
            text = make_rows.body(path.read_text(encoding="utf-8", errors="replace"))
            is_held_out = make_rows.is_held_out(path.relative_to(root).as_posix())
            for piece in make_rows.pieces(text, 200):
                if len(piece.strip()) > 100 and piece not in seen:
                    seen.add(piece)
                    own[is_held_out].append({"text": piece, "label": label})
        for side, rows, count in zip(sides, own, (800, 50), strict=True):
            side += rng.sample(rows, min(count, len(rows)))
    paths = folder / "kinds.jsonl", folder / "kinds-held-out.jsonl"
    for path, rows in zip(paths, sides, strict=True):
        rng.shuffle(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def main() -> None:
    """LoRA of rank 16 and full fine-tuning at three or four rates each, the best with three seeds."""
    rows_ready()
    sizes = {"vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    gpt2 = GPT2Config(n_embd=192, n_layer=4, n_head=4, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0,
                      attn_pdrop=0.0, **sizes)  # fmt: skip
    bert = BertConfig(hidden_size=192, num_hidden_layers=4, num_attention_heads=4, intermediate_size=768,
                      max_position_embeddings=256, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                      **sizes)  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained, held_out = labelled(folder)
        starts = (
            Pretraining(partial(GPT2LMHeadModel, gpt2), gpt2_loss, 2e-3, folder / "gpt2"),
            Pretraining(partial(BertForMaskedLM, bert), bert_loss, 5e-4, folder / "bert"),
        )
        gpt2_base, bert_base = each(pretrain, starts)
        kinds = {
            "GPT-2, far text": (gpt2_base, ("train.steps=120", "train.eval_every=120")),
            "BERT, kinds of files": (
                bert_base,
                (
                    "train.task=classify",
                    f"data.train={trained}",
                    f"data.eval={held_out}",
                    "train.steps=240",
                    "train.eval_every=240",
                    "train.warmup=0.1",
                    "train.max_grad_norm=1.0",
                ),
            ),
        }
        for kind, (base, more) in kinds.items():
            common = (f"base.model={base}", *more)
            for method, setting in (("lora", "lora.rank=16"), ("full", "train.full_finetune=true")):
                rows += arms_with_seeds({"kind": kind, "method": method}, RATES[kind, method], setting, *common)
                record("kinds", rows)


if __name__ == "__main__":
    experiment("kinds", main)
