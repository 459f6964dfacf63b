"""Write the quickstart's rows: the head of a function as prompt, a call of that function as completion.

    python recipes/quickstart/make_rows.py --out recipes/quickstart

    def get_code(self, fullname):  ->  get_code(fullname)
    def copy2(src, dst, *, follow_symlinks=True):  ->  copy2(src, dst, follow_symlinks=follow_symlinks)

The rule: the name, then every parameter. `self` and `cls`, annotations and defaults are left out, a parameter that only
a keyword can reach is written `name=name`, and the stars of `*args` and `**options` stay.

The functions are those of the standard library of the interpreter that runs this. Evaluation rows come only from the
modules that `pretrain.py` holds out, so neither the base nor the adapter has seen their source. Of equal heads one is
kept, and an evaluation row is left out if a training row has the same head or the same call.

A head is left out if it is `async`, a magic method (`__enter__`: nobody calls it by name), has no parameter beside
`self` or `cls`, or has more than `MAX_CHARACTERS` characters. No row is chosen by how well a model does on it.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pretrain import Document, gather_corpus

MAX_CHARACTERS = 50
RECEIVERS = ("self", "cls")


@dataclass(frozen=True, slots=True)
class Row:
    """One example."""

    prompt: str
    completion: str

    def as_json(self) -> str:
        """The row as a line of a JSON Lines file."""
        return json.dumps({"prompt": self.prompt, "completion": self.completion}, ensure_ascii=False) + "\n"


def head_of(function: ast.FunctionDef) -> str:
    """The `def` line, as `ast` writes it: on one line, whatever its layout in the source."""
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"def {function.name}({ast.unparse(function.args)}){returns}:"


def arguments_of(function: ast.FunctionDef) -> list[str]:
    """What a call passes that forwards every parameter under its own name."""
    parameters = function.args
    names = [parameter.arg for parameter in (*parameters.posonlyargs, *parameters.args)]
    arguments = names[1:] if names[:1] and names[0] in RECEIVERS else names
    if parameters.vararg:
        arguments.append(f"*{parameters.vararg.arg}")
    arguments += [f"{parameter.arg}={parameter.arg}" for parameter in parameters.kwonlyargs]
    if parameters.kwarg:
        arguments.append(f"**{parameters.kwarg.arg}")
    return arguments


def rows_of(document: Document) -> list[Row]:
    """A row for each function of a module that the rules of this file keep."""
    if document.name.startswith("topic "):
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(document.text)
    rows = []
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        head, arguments = head_of(function), arguments_of(function)
        is_magic = function.name.startswith("__") and function.name.endswith("__")
        if arguments and not is_magic and len(head) <= MAX_CHARACTERS and head.isprintable():
            rows.append(Row(head, f" {function.name}({', '.join(arguments)})"))
    return rows


def gather_rows(documents: Iterable[Document]) -> list[Row]:
    """The rows of all documents, each once, in order."""
    return list(dict.fromkeys(row for document in documents for row in rows_of(document)))


def split_rows(documents: list[Document], train_rows: int, eval_rows: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows from the modules of the pretraining, evaluation rows from the others, both shuffled."""
    known = gather_rows(document for document in documents if not document.is_held_out)
    new = gather_rows(document for document in documents if document.is_held_out)
    heads, calls = {row.prompt for row in known}, {row.completion for row in known}
    new = [row for row in new if row.prompt not in heads and row.completion not in calls]
    rng = random.Random(seed)
    return rng.sample(known, min(train_rows, len(known))), rng.sample(new, min(eval_rows, len(new)))


def main() -> None:
    """Write both files and say what is in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and eval.jsonl")
    parser.add_argument("--train-rows", type=int, default=8000, help="most training rows (default: 8000)")
    parser.add_argument("--eval-rows", type=int, default=200, help="most evaluation rows (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice and of the order (default: 0)")
    args = parser.parse_args()
    train, held_out = split_rows(gather_corpus(), args.train_rows, args.eval_rows, args.seed)
    for name, rows in [("train", train), ("eval", held_out)]:
        text = "".join(row.as_json() for row in rows)
        (args.out / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        answer, count = Counter(row.completion for row in rows).most_common(1)[0]
        print(f"{name}: {len(rows)} rows, {len(text.encode())} bytes; commonest answer {answer} in {count}")


if __name__ == "__main__":
    main()
