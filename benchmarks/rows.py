"""How long chats take to become token ids with what is trained on, beside TRL.

    python benchmarks/rows.py    write benchmarks/results/rows.jsonl

Chats of one to three answers, of sentences from the standard library's documentation; the quickstart's tokenizer with
a ChatML template that marks answers; TRL with `assistant_only_loss=True`, its constructor with all rows less that with
eight. `one process`: CPU seconds, the two in turn, median of five. `all cores`: seconds by the clock of more rows; the
kit as it comes (one process for ten seconds, then a crew) and kept to one process, TRL with `dataset_num_proc` as many
as there are cores; median of three.
"""

import importlib
import inspect
import json
import pkgutil
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from qlora_kit import crew
from qlora_kit.data import EncodedSet, encode_rows, read_row

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "rows.jsonl"
BASE = HERE.parent / "recipes" / "quickstart" / "base"
FEW, MANY, LONGEST = 2000, 20_000, 100_000
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sentences() -> list[str]:
    """From the documentation of modules that every Python has."""
    found = []
    for name in sorted(module.name for module in pkgutil.iter_modules() if module.name.isalpha()):
        if name in ("json", "email", "logging", "argparse", "decimal", "datetime", "statistics", "typing", "unittest"):
            module = importlib.import_module(name)
            texts = [inspect.getdoc(thing) or "" for thing in (module, *vars(module).values())]
            found += [part.strip() for text in texts for part in text.split(". ") if 40 < len(part) < 400]
    return sorted(set(found))


def chats(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with messages."""
    draw, said = random.Random(seed), sentences()

    def turn(role: str, length: int) -> dict[str, str]:
        return {"role": role, "content": ". ".join(draw.choices(said, k=length))}

    return [
        {
            "messages": [
                turn(*each) for _ in range(draw.choice((1, 1, 2, 3))) for each in (("user", 2), ("assistant", 4))
            ]
        }
        for _ in range(count)
    ]


def chat_tokenizer() -> PreTrainedTokenizerBase:
    """The quickstart's, with ChatML."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def timed(work: Callable[[], Any], clock: Callable[[], float]) -> tuple[float, Any]:
    """Seconds, and what is made."""
    begun = clock()
    made = work()
    return clock() - begun, made


def ours(rows: list[dict[str, Any]], patience: float) -> Callable[[], EncodedSet]:
    """Encodes the rows."""

    def encode() -> EncodedSet:
        crew.PATIENCE_S = patience
        examples = (read_row(row, where=f"chats.jsonl:{number}") for number, row in enumerate(rows, 1))
        return encode_rows(examples, chat_tokenizer(), max_tokens=LONGEST)

    return encode


def theirs(rows: list[dict[str, Any]], folder: str, processes: int | None) -> Callable[[], Dataset]:
    """Makes TRL's trainer, which encodes the rows."""
    data = Dataset.from_list(rows)
    config = LlamaConfig(vocab_size=8192, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip

    def make() -> Dataset:
        settings = SFTConfig(folder, assistant_only_loss=True, max_length=LONGEST, dataset_num_proc=processes,
                             report_to=[], use_cpu=True, bf16=False)  # fmt: skip
        trainer = SFTTrainer(LlamaForCausalLM(config), settings, train_dataset=data, processing_class=chat_tokenizer())
        return trainer.train_dataset

    return make


def trained_tokens(made: EncodedSet | Dataset) -> int:
    """How many tokens the loss counts."""
    if isinstance(made, EncodedSet):
        return made.counts.trained_tokens
    return sum(label != -100 for labels in made["labels"] for label in labels)


def spread(seconds: list[float]) -> dict[str, Any]:
    """Median and range."""
    return {
        "median_s": round(statistics.median(seconds), 2),
        "range_s": [round(min(seconds), 2), round(max(seconds), 2)],
    }


def main() -> None:
    """Both measurements."""
    cores, alone, usual = psutil.cpu_count() or 1, float("inf"), crew.PATIENCE_S
    facts = {"benchmark": "rows", "trl": version("trl"), "cores": cores}
    written = []
    with tempfile.TemporaryDirectory() as folder:
        few, many, eight = chats(FEW), chats(MANY), chats(8)
        cases = {
            "one process": (few, 5, time.process_time, {"kit": ours(few, alone), "TRL": theirs(few, folder, None)}),
            "all cores": (many, 3, time.monotonic, {
                "kit": ours(many, usual),
                "kit, one process": ours(many, alone),
                "TRL": theirs(many, folder, cores),
            }),
        }  # fmt: skip
        for what, (rows, repeats, clock, tools) in cases.items():
            seconds: dict[str, list[float]] = {name: [] for name in tools}
            trained = {}
            for _ in range(repeats):
                for name, work in tools.items():
                    took, made = timed(work, clock)
                    trained[name] = trained_tokens(made)
                    if name == "TRL":
                        took -= timed(theirs(eight, folder, None), clock)[0]
                    seconds[name].append(took)
            for name, each in seconds.items():
                row = {**facts, "what": what, "tool": name, "rows": len(rows), "trained_tokens": trained[name]}
                written.append(row | spread(each))
                print(json.dumps(written[-1]), flush=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")


if __name__ == "__main__":
    main()
