"""Write the rows of the experiments: real text that is on every machine that has PyTorch, in two kinds.

    near    Python of the installed torch package: the base has learnt Python, of the standard library
    far     C++ headers of the same package: another language, which the base has hardly seen

    python recipes/without-regret/make_rows.py --out recipes/without-regret

Each file is cut into pieces of whole lines, of `--characters` at most. Whole files are held out, by a hash of their
name, so that no held-out piece comes from a file that was trained on. Licence texts at the head of a file, which stand
in thousands of them, are left out, and so is a piece that was there before.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch

KINDS = {"near": "*.py", "far": "*.h"}
HELD_OUT_PERCENT = 10
COMMENTS = ("#", "//", "/*", " *", "*/")


def pieces(text: str, characters: int) -> Iterator[str]:
    """Runs of whole lines; a single line that is longer is left out."""
    kept: list[str] = []
    for line in text.splitlines():
        if sum(map(len, kept)) + len(kept) + len(line) > characters:
            yield "\n".join(kept)
            kept = []
        if len(line) <= characters:
            kept.append(line.rstrip())
    yield "\n".join(kept)


def body(text: str) -> str:
    """A file without the comment that it opens with."""
    lines = text.splitlines()
    first = next((place for place, line in enumerate(lines) if line.strip() and not line.startswith(COMMENTS)), 0)
    return "\n".join(lines[first:])


def is_held_out(name: str) -> bool:
    """Whether training must not see a file."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def gather(kind: str, characters: int, seed: int) -> tuple[list[str], list[str]]:
    """Pieces to train on and pieces to hold out, each in an order of its own."""
    root, found, seen = Path(torch.__file__).parent, ([], []), set[str]()
    for path in sorted(root.rglob(KINDS[kind])):
        name = path.relative_to(root).as_posix()
        for piece in pieces(body(path.read_text(encoding="utf-8", errors="replace")), characters):
            if len(piece.strip()) >= characters // 2 and piece not in seen:
                seen.add(piece)
                found[is_held_out(name)].append(piece)
    for side in found:
        random.Random(seed).shuffle(side)
    return found


def main() -> None:
    """Both kinds, a file of rows to train on and one of held-out rows each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--rows", type=int, default=10_000, help="rows to train on (default: 10000)")
    parser.add_argument("--held-out", type=int, default=128, help="held-out rows (default: 128)")
    parser.add_argument("--characters", type=int, default=200, help="of a row at most (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: 0)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        trained, held = gather(kind, args.characters, args.seed)
        for name, rows in ((f"{kind}.jsonl", trained[: args.rows]), (f"{kind}-held-out.jsonl", held[: args.held_out])):
            lines = (json.dumps({"text": row}) + "\n" for row in rows)
            (args.out / name).write_text("".join(lines), encoding="utf-8")
            print(f"{args.out / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
