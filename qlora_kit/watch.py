"""What a run tells while it goes: hooks that do nothing, for the command line and for notebooks to fill in."""

from collections.abc import Mapping, Sequence
from typing import Any


class Watch:
    """Override what you want to see."""

    def note(self, text: str) -> None:
        """Something that a person should know: one line."""

    def encoded(self, done: int, total: int) -> None:
        """So many of all rows are token ids: told of sets that take longer, after 5, 10, 20, ... seconds."""

    def prepared(self, prepared: Any) -> None:
        """Rows are read and counted: a `run.Prepared`."""

    def planned(self, plan: Mapping[str, Any]) -> None:
        """plan.json is known."""

    def adapted(self, report: Any) -> None:
        """The base is loaded and carries its adapter: a `lora.LoraReport`."""

    def loaded_whole(self, parameters: int) -> None:
        """The base is loaded, and all of its parameters train."""

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl."""

    def sampled(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of samples.jsonl: what the model says to a few held-out prompts after a step."""

    def scored(self, scores: Mapping[str, Any]) -> None:
        """scores.json is known."""

    def run_begins(self, name: str, number: int, runs: int) -> None:
        """Of a sweep's `runs` the one `number`, counted from 1."""

    def run_ended(self, outcome: Any) -> None:
        """What became of it: a `run.Outcome`."""

    def stop_requested(self) -> bool:
        """Whether to save and end after this step."""
        return False
