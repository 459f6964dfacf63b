"""A search for the learning rate as a table and sentences; `search` is what `run.pick_rate` leaves, as JSON has it."""

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_kit.report.text import Table, aligned, wrapped
from qlora_kit.units import counted


def rates_text(search: Mapping[str, Any]) -> str:
    """For a terminal; the last line is the setting to paste, if there is one."""
    best = search["best"]
    setting = [] if best is None else ["", f"train.lr={best:g}"]
    return "\n".join([aligned(rates_table(search)), "", *wrapped(rates_sentences(search)), *setting])


def rates_table(search: Mapping[str, Any]) -> Table:
    """A row a candidate: its rate, the steps that it got, its loss after them, and what became of it."""
    loss = "held-out loss" if search["held_out"] else "training loss"
    return [
        ["rate", "steps", loss, "outcome"],
        *(
            [
                f"{each['rate']:g}",
                str(each["steps"]),
                "-" if each["loss"] is None else f"{each['loss']:.4f}",
                _outcome(each, search["best"]),
            ]
            for each in search["candidates"]
        ),
    ]


def rates_sentences(search: Mapping[str, Any]) -> Iterator[str]:
    """The pick and why, whether better ones may lie beyond, and what is different in a longer run."""
    best, steps, tried = search["best"], search["steps"], search["candidates"]
    if best is None:
        yield "The search was stopped before its end: no rate is picked."
        return
    loss = next(each["loss"] for each in tried if each["rate"] == best)
    rows, asked = search["held_out"], search["asked"]
    others = f"auto means {search['automatic']:g}" + ("" if asked is None else f", and the recipe has {asked:g}")
    what = f"held-out loss on {counted(rows, 'row')}" if rows else "training loss"
    yield (
        f"Of {len(tried)} rates, {tried[0]['rate']:g} to {tried[-1]['rate']:g}, {best:g} has the lowest {what} after "
        f"{counted(steps, 'step')} at a constant rate: {loss:.4f}; {others}."
    )
    if search["at_end"]:
        side = "lower" if best == tried[0]["rate"] else "higher"
        yield f"That is the end of the rates tried: {side} ones may be better still."
    if search["in_longer_run"] is not None:
        yield (
            "In runs of fewer than 100 steps the best rate is about 1.5 times that of longer ones (LoRA Without "
            f"Regret), and this run has {search['run_steps']:,}: {search['in_longer_run']:g} may be better in it."
        )


def _outcome(tried: Mapping[str, Any], best: float | None) -> str:
    if tried["failed"] is not None:
        return f"out: {tried['failed']}"
    if best is None:
        return "stopped"
    return "best" if tried["rate"] == best else f"out at step {tried['steps']}"
