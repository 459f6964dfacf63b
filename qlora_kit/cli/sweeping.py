"""What a person sees of a sweep: a line a run, and one bar."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from qlora_kit.cli.show import Screen
from qlora_kit.cli.visible import visible
from qlora_kit.units import counted, format_seconds

if TYPE_CHECKING:
    from qlora_kit.lora import LoraReport
    from qlora_kit.recipe import Grid
    from qlora_kit.run import Outcome, Prepared


class SweepScreen(Screen):
    """Shows the runs of a sweep by what tells them apart; what they have in common is said once."""

    def __init__(self, to_stderr: bool = False) -> None:
        super().__init__(to_stderr)
        self._said = set[str]()
        self._name, self._number, self._loss = "", 0, None

    def opened(self, grid: "Grid") -> None:
        """What the grid is."""
        axes = "  x  ".join(f"{key} {', '.join(values)}" for key, values in grid.axes.items())
        self.console.print(f"[bold]sweep[/]  {counted(len(grid.cells), 'run')}: {escape(visible(axes))}")

    def note(self, text: str) -> None:
        """A note that was not told before."""
        if text not in self._said:
            self._said.add(text)
            super().note(text)

    def prepared(self, prepared: "Prepared") -> None:
        """The rows, once."""
        self._steps = prepared.pace.steps
        if self._number <= 1:
            super().prepared(prepared)

    def planned(self, plan: Mapping[str, Any]) -> None:
        """A plan a run would bury the results: each is in its folder."""

    def adapted(self, report: "LoraReport") -> None:
        """Likewise; a signal now waits for the step."""
        self._is_training = True

    def loaded_whole(self, parameters: int) -> None:
        """Likewise."""
        self._is_training = True

    def run_begins(self, name: str, number: int, runs: int) -> None:
        """The bar, one step a run."""
        self._name, self._number, self._loss = name, number, None
        if self._progress is None:
            self._begin_bar("sweep", runs)
        if self._progress is not None:
            self._progress.update(self._task, completed=number - 1, total=runs, status=escape(visible(name)))

    def row(self, row: Mapping[str, Any]) -> None:
        """How far the run is."""
        self._loss = row.get("eval_loss", self._loss)
        if self._progress is not None and row.get("loss") is not None:
            status = f"{escape(visible(self._name))}  step {row['step']}/{self._steps}  loss {row['loss']:.3f}"
            self._progress.update(self._task, status=status)

    def scored(self, scores: Mapping[str, Any]) -> None:
        """The loss that the line of the run tells."""
        self._loss = scores["adapter"]["loss"]

    def run_ended(self, outcome: "Outcome") -> None:
        """One line."""
        if outcome.failed is not None:
            told = f"[red]failed[/]: {escape(visible(outcome.failed))}"
        else:
            loss = "" if self._loss is None else f"held-out loss {self._loss:.4f}, "
            told = f"{loss}{format_seconds(outcome.seconds)}"
        self.console.print(f"[bold]run {self._number}[/]  {escape(visible(outcome.name))}  {told}")
