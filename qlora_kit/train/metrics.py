"""metrics.jsonl and samples.jsonl: rows of steps, on disk as soon as they are known; what is not finite is null and
says so."""

import json
import math
from pathlib import Path
from typing import Any

from qlora_kit.errors import RunError
from qlora_kit.storage import write_text
from qlora_kit.units import is_number


class MetricsLog:
    """Appends rows to a file and keeps them.

    Args:
        path: of the file; made anew unless `resume_from` is given.
        resume_from: the last step that counts; rows after it are dropped, since they will come again.
    """

    def __init__(self, path: Path, resume_from: int | None = None) -> None:
        kept = []
        if resume_from is not None and path.exists():
            kept = [row for row in _read_rows(path) if row["step"] <= resume_from]
        self.rows: list[dict[str, Any]] = kept
        write_text(path, "".join(_line(row) for row in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - `close` ends it

    def add(self, row: dict[str, Any]) -> None:
        """Write one row, flushed at once."""
        finite = {key: _finite(value) for key, value in row.items()}
        if any(value is None and row[key] is not None for key, value in finite.items()):
            finite["nonfinite"] = True
        self.rows.append(finite)
        self._file.write(_line(finite))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _read_float(digits: str) -> float | None:
    """What `add` writes of such a number."""
    value: float | None = _finite(float(digits))
    return value


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run; a last line that was cut off by a crash is left out.

    Raises:
        RunError: another line is no row.
    """
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, parse_float=_read_float, parse_constant=_read_float)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and is_number(row.get("step")):
            rows.append(row)
        elif number < len(lines):
            raise RunError(
                f"{path}:{number} is not the row of a step; remove that line, or start again with --overwrite"
            )
    return rows
