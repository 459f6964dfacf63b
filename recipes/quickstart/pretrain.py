"""Pretrain the quickstart's small Llama from scratch, on text that every Python installation carries.

What it does: gathers the standard library of the interpreter that runs it (sources without tests, and the reference
text of `pydoc_data.topics`), holds out whole modules by a hash of their name, trains a byte-level BPE tokenizer,
trains a Llama of about 5.3 M parameters in fp32 on the CPU, and writes a folder that
`AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load.

    python recipes/quickstart/pretrain.py --out recipes/quickstart/base --work /tmp/quickstart

Two choices serve what comes after. The tokenizer never merges a space, a digit or a punctuation mark with a letter, so
a name has the same tokens in `(name`, in `, name` and in `self.name`. And in a share of the
training windows a span of the text stands twice, so that the model learns early to copy from its own context.

The learning rate is warmup, constant, then a straight line to zero (WSD), so a run can be stopped, resumed and given
another length before its decay begins. The data of step n depends on the seed and n alone.

It does not use qlora_kit. Legend: B batch, T tokens.
Sources: Hu et al. 2024, arXiv 2404.06395 (WSD); Olsson et al. 2022, arXiv 2209.11895 (induction heads).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import platform
import random
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"
SKIPPED_PARTS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__"})
"""Folders left out: tests, other people's packages, and `encodings`, which is mostly tables of numbers."""
HELD_OUT_PERCENT = 9
PIECES = r"\p{L}+|\p{N}|_+|\s+(?!\S)|\s|[^\s\p{L}\p{N}_]"
"""What the tokenizer may merge: letters, underscores, and white space up to the last one before a word."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus: a module's source, or a page of the language reference."""

    name: str
    text: str

    @property
    def is_held_out(self) -> bool:
        """Whether training must not see it: decided by the name, so it is the same on every machine."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def gather_corpus() -> list[Document]:
    """The standard library of the running interpreter as documents, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_PARTS & set(parts) or parts[0].startswith(("config-", "_sysconfigdata")) or parts[-1] == "topics":
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            documents.append(Document(".".join(parts), text))
    from pydoc_data.topics import topics

    documents += [Document(f"topic {name}", text) for name, text in topics.items()]
    return sorted(documents, key=lambda document: document.name)


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges stay inside `PIECES`.

    The merges are learnt on pieces, but the tokenizer that is saved splits as GPT-2's does. Since no merge crosses a
    piece, both give the same tokens, and programs that know GPT-2's rule (llama.cpp's `gpt-2`) need no rule of ours.
    The exception is GPT-2's rule for English contractions: it cuts `'server'` after `'s`. That changes 29 of 685
    documents of Python 3.11, by 100 of 4.3 M tokens in all. The base is trained on the tokens of the saved one.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> list[torch.Tensor]:
    """Each document as int64 tokens with the end token behind it."""
    backend = tokenizer.backend_tokenizer
    encodings = backend.encode_batch([document.text for document in documents], add_special_tokens=False)
    return [torch.tensor([*encoding.ids, tokenizer.eos_token_id]) for encoding in encodings]


def repeat_spans(window_T: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """The window with one long span, or several short ones, copied over text that stands later in it."""
    window_T = window_T.clone()
    tokens = len(window_T)
    lengths = [rng.randint(tokens // 8, tokens * 7 // 16)] if rng.random() < 0.4 else [rng.randint(3, 24)] * 5
    for length in lengths:
        source = rng.randint(0, tokens - 2 * length)
        target = rng.randint(source + length, tokens - length)
        window_T[target : target + length] = window_T[source : source + length].clone()
    return window_T


class Windows:
    """Batches by step number: shuffled documents, cut into windows, some with repeated spans."""

    def __init__(self, documents: list[torch.Tensor], batch: int, context: int, repeat_share: float, seed: int) -> None:
        self.documents, self.batch, self.context = documents, batch, context
        self.repeat_share, self.seed = repeat_share, seed
        self.epoch, self.windows = -1, torch.empty(0)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass over the documents."""
        return sum(map(len, self.documents)) // (self.context + 1) // self.batch

    def _cut(self, epoch: int) -> None:
        """Shuffle the documents, join them, cut them into windows and shuffle those."""
        rng = random.Random(f"{self.seed}/{epoch}")
        order = rng.sample(range(len(self.documents)), len(self.documents))
        stream = torch.cat([self.documents[i] for i in order])
        count = self.steps_per_epoch * self.batch
        start = rng.randint(0, len(stream) - count * (self.context + 1))
        windows = stream[start : start + count * (self.context + 1)].view(count, self.context + 1)
        self.windows, self.epoch = windows[torch.tensor(rng.sample(range(count), count))], epoch

    def at(self, step: int) -> torch.Tensor:
        """The batch of this step, (B, T + 1)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self._cut(epoch)
        rng = random.Random(f"{self.seed}/step/{step}")
        rows = self.windows[index * self.batch : (index + 1) * self.batch]
        return torch.stack([repeat_spans(row, rng) if rng.random() < self.repeat_share else row for row in rows])


def build_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    """A new Llama in fp32 with its head tied to the embedding."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def build_optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW, or on request Muon for the matrices of the layers.

    Muon multiplies in bf16, which is ten times slower than fp32 on a CPU without bf16 instructions.
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    adam = {"betas": (0.9, 0.95), "fused": True}
    small = torch.optim.AdamW(others, lr=args.lr, weight_decay=0.0, **adam)
    if args.optimizer == "adamw":
        return [small, torch.optim.AdamW(matrices, lr=args.lr, weight_decay=args.weight_decay, **adam)]
    muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [small, muon]


def lr_scale(step: int, args: argparse.Namespace) -> float:
    """Share of the peak learning rate at this step: up, level, then down to zero."""
    decay = max(1, round(args.steps * args.decay))
    return min(1.0, (step + 1) / args.warmup, (args.steps - step) / decay)


def mean_loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy in nats of a (B, T + 1) batch."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: torch.nn.Module, windows: torch.Tensor, batch: int) -> float:
    """Mean loss over windows of held-out documents, without repeated spans."""
    model.eval()
    losses = [mean_loss(model, part).item() * len(part) for part in windows.split(batch)]
    model.train()
    return sum(losses) / len(windows)


def held_out_windows(documents: list[torch.Tensor], context: int, count: int, seed: int) -> torch.Tensor:
    """`count` windows of the joined held-out documents, (count, T + 1)."""
    stream = torch.cat(documents)
    whole = len(stream) // (context + 1)
    windows = stream[: whole * (context + 1)].view(whole, context + 1)
    chosen = random.Random(seed).sample(range(whole), min(count, whole))
    return windows[torch.tensor(sorted(chosen))]


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bf16, its configuration and its tokenizer."""
    stored = copy.deepcopy(model).to(torch.bfloat16)
    stored.config.use_cache = True
    stored.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    stored.save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


class Log:
    """Prints a line and appends it to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, line: str) -> None:
        """Write one line, flushed at once."""
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def save_state(path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """Write what a resumed run needs; the file is complete or absent."""
    state = {"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def load_state(path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Read it back; returns the number of steps that are done."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    windows: Windows,
    held_out: torch.Tensor,
    args: argparse.Namespace,
    log: Log,
) -> None:
    """The loop: log every `--log-every` steps, save a usable base and the state every `--save-every`."""
    optimizers = build_optimizers(model, args)
    state_path = args.work / "state.pt"
    first = load_state(state_path, model, optimizers) if args.resume else 0
    forward = torch.compile(model) if args.compile else model
    tokens_per_step = args.batch * args.context
    recent: list[float] = []
    since = time.perf_counter()
    for step in range(first, args.steps):
        scale = lr_scale(step, args)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * scale
        loss = mean_loss(forward, windows.at(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            rate = len(recent) * tokens_per_step / (time.perf_counter() - since)
            if not math.isfinite(recent[-1]):
                raise SystemExit(f"the loss is not finite at step {done}; try a lower --lr")
            eval_loss = validation_loss(model, held_out, args.batch)
            log(
                f"step {done:5d}  tokens {done * tokens_per_step / 1e6:6.2f} M  train {sum(recent) / len(recent):.4f}  "
                f"validation {eval_loss:.4f}  lr {args.lr * scale:.2e}  {rate:6.0f} tokens/s"
            )
            recent, since = [], time.perf_counter()
        if done % args.save_every == 0 or done == args.steps:
            save_base(model, tokenizer, args.out)
            save_state(state_path, model, optimizers, done)


def parse_args() -> argparse.Namespace:
    """Command line; the defaults are the ones of the shipped base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the base")
    parser.add_argument("--work", type=Path, required=True, help="folder for the state of an unfinished run")
    parser.add_argument("--log", type=Path, default=None, help="text log (default: WORK/pretrain.log)")
    parser.add_argument("--resume", action="store_true", help="go on from the state in WORK")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (rounding differs slightly)")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw", help="of the matrices")
    for name, value, text in [
        ("vocabulary", 2048, "entries of the tokenizer"),
        ("hidden", 256, "hidden size"),
        ("mlp", 704, "size inside the MLP"),
        ("layers", 6, "blocks"),
        ("heads", 4, "attention heads"),
        ("context", 256, "tokens in a window"),
        ("batch", 16, "windows in a step"),
        ("steps", 2750, "optimizer steps"),
        ("warmup", 100, "steps of rising learning rate"),
        ("log-every", 50, "steps between lines of the log"),
        ("save-every", 200, "steps between saved states"),
        ("seed", 0, "seed of the weights and of the data's order"),
        ("threads", 2, "CPU threads"),
    ]:
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default: {value})")
    for name, value, text in [
        ("lr", 3e-3, "peak learning rate"),
        ("decay", 0.2, "share of the steps in which the rate falls to zero"),
        ("weight-decay", 0.1, "weight decay of the layers' matrices"),
        ("repeat-share", 0.4, "share of the windows with repeated spans"),
    ]:
        parser.add_argument(f"--{name}", type=float, default=value, help=f"{text} (default: {value})")
    args = parser.parse_args()
    args.log = args.log or args.work / "pretrain.log"
    return args


def main() -> None:
    """Corpus, tokenizer, model, training."""
    args = parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    log = Log(args.log)
    if not args.resume:
        args.log.write_text("", encoding="utf-8")
    documents = gather_corpus()
    training = [document for document in documents if not document.is_held_out]
    tokenizer = train_tokenizer([document.text for document in training], args.vocabulary)
    train_tokens = encode(tokenizer, training)
    held_out_tokens = encode(tokenizer, [document for document in documents if document.is_held_out])
    windows = Windows(train_tokens, args.batch, args.context, args.repeat_share, args.seed)
    model = build_model(tokenizer, args)
    settings = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
    characters = sum(len(document.text) for document in training)
    tokens, held = sum(map(len, train_tokens)), sum(map(len, held_out_tokens))
    log(f"# Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}")
    log(f"# settings {json.dumps(settings)}")
    log(f"# training {len(training)} documents, {characters} characters, {tokens} tokens")
    log(f"# held out {len(documents) - len(training)} documents, {held} tokens")
    log(f"# model {sum(p.numel() for p in model.parameters())} parameters, {windows.steps_per_epoch} steps an epoch")
    train(model, tokenizer, windows, held_out_windows(held_out_tokens, args.context, 64, args.seed), args, log)


if __name__ == "__main__":
    main()
