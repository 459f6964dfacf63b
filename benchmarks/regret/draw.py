"""The drawings and tables of docs/without-regret.md, from the experiments' rows.

python benchmarks/regret/draw.py       write docs/without-regret/*.svg, and the tables in docs/without-regret.md
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from common import HERE, read

from qlora_kit import report
from qlora_kit.report import Series, line_chart
from qlora_kit.report.markup import Markup, element

DOCS = HERE.parent.parent / "docs"
PAGE, DRAWINGS = DOCS / "without-regret.md", DOCS / "without-regret"
WIDTH, HEIGHT, LEFT, TOP = 760, 300, 64, 78
Row = dict[str, Any]


def standing_alone(title: str, series: Sequence[Series], **options: Any) -> str:
    """A drawing as a file of its own, with its legend and the report's colours, for light and dark pages."""
    style = Path(report.__file__).with_name("page.css").read_text(encoding="utf-8")
    own = "text { font-family: system-ui, sans-serif; }"
    chart = line_chart(series, title=title, height=HEIGHT, **options)
    names, across = [], LEFT
    for one in series:
        names += [
            element("line", class_=f"line {one.style}", x1=across, x2=across + 18, y1=40, y2=40),
            element("text", one.name, x=across + 24, y=44),
        ]
        across += 44 + round(7.2 * len(one.name))
    return element(
        "svg",
        element("style", Markup(style + own)),
        element("rect", width=WIDTH, height=HEIGHT + TOP + 52, fill="var(--paper)"),
        element("text", title, class_="name", x=LEFT, y=20),
        *names,
        element("svg", chart, x=LEFT, y=TOP, width=WIDTH - LEFT - 24, height=HEIGHT, overflow="visible"),
        xmlns="http://www.w3.org/2000/svg",
        width=WIDTH,
        height=HEIGHT + TOP + 52,
        viewBox=f"0 0 {WIDTH} {HEIGHT + TOP + 52}",
    )


def losses(rows: Iterable[Row], **wanted: Any) -> list[float]:
    """Held-out losses of the arms that have all of `wanted`; nothing where one of them failed."""
    found = [row["held_out_loss"] for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return [] if None in found else found


def over(rows: Sequence[Row], name: str, key: str, places: Sequence[Any], style: str, **wanted: Any) -> Series:
    """A line over the values of `key`: means over the seeds, with the lowest and the highest."""
    found = [(place, values) for place, at in enumerate(places) if (values := losses(rows, **wanted, **{key: at}))]
    means = [(place, fmean(values)) for place, values in found]
    return Series(name, means, style, marked=True, spread=[(place, min(v), max(v)) for place, v in found if len(v) > 1])


def best(rows: Sequence[Row], key: str = "lr", **wanted: Any) -> tuple[Any, list[float]]:
    """The value of `key` with the lowest mean loss, of those with most seeds, and the losses there."""
    values = {row[key] for row in rows if all(row.get(name) == value for name, value in wanted.items())}
    ranked = [(-len(found), fmean(found), at) for at in values if (found := losses(rows, **wanted, **{key: at}))]
    at = min(ranked)[2]
    return at, losses(rows, **wanted, **{key: at})


def spread(values: Sequence[float]) -> str:
    """A mean with half of its span."""
    return f"{fmean(values):.3f}" + (f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else "")


def markdown(head: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _rate() -> str:
    rows, ranks = read("rate"), (1, 4, 16, 128)
    rates = sorted({row["lr"] for row in rows})
    series = [over(rows, f"rank {rank}", "lr", rates, f"run-{place}", method="lora", rank=rank)
              for place, rank in enumerate(ranks)]  # fmt: skip
    series.append(over(rows, "full fine-tuning", "lr", rates, "run-6 broken", method="full"))
    _write("rate", "Held-out loss after 60 steps, by learning rate", series, x_label="learning rate",
           y_label="held-out loss, nats", x_names=[f"{rate:g}" for rate in rates], top=3.4)  # fmt: skip
    return _best_rates(rows, ranks)


def _larger_rate() -> str:
    return _best_rates(read("larger_rate"), (16,))


def _best_rates(rows: Sequence[Row], ranks: Sequence[int]) -> str:
    full, at_full = best(rows, method="full")
    table = [["full fine-tuning", f"{full:g}", spread(at_full), "1"]]
    for rank in ranks:
        lr, values = best(rows, method="lora", rank=rank)
        table.append([f"LoRA, rank {rank}", f"{lr:g}", spread(values), f"{lr / full:g}"])
    return markdown(["", "best rate", "held-out loss there", "rate over full fine-tuning's"], table)


def _capacity() -> str:
    rows = read("capacity")
    series, table = [], []
    arms = [(f"rank {rank}", f"run-{place}", {"method": "lora", "rank": rank})
            for place, rank in enumerate((1, 16, 128))]  # fmt: skip
    for name, style, wanted in (*arms, ("full fine-tuning", "run-6 broken", {"method": "full"})):
        lr, _ = best(rows, **wanted)
        own = [row for row in rows if all(row.get(key) == value for key, value in {**wanted, "lr": lr}.items())]
        curve = _curve(own)
        series.append(Series(name, [(step, fmean(values)) for step, values in curve.items()], style))
        holds = f"{2 * own[0]['trainable'] / 1e3:,.0f} kbit" if "rank" in wanted else ""
        table.append([name, f"{own[0]['trainable']:,}", holds, f"{lr:g}",
                      *(spread(curve[step]) for step in (50, 150, 300))])  # fmt: skip
    _write("capacity", "Held-out loss over steps, by rank", series, x_label="step", y_label="held-out loss, nats")
    return markdown(["", "trained", "holds at 2 bits", "rate", "step 50", "step 150", "step 300"], table)


def _curve(rows: Sequence[Row]) -> dict[int, list[float]]:
    """The held-out losses of some seeds, by step."""
    return {step: [dict(map(tuple, row["curve"]))[step] for row in rows] for step, _ in rows[0]["curve"]}


def _larger() -> str:
    rows = read("larger")
    full = fmean(losses(rows, arm="full fine-tuning"))
    table = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        curve, values = _curve(own), losses(own)
        table.append([arm, f"{own[0]['trainable']:,}", spread(curve[50]), spread(values),
                      f"{100 * (fmean(values) / full - 1):+.1f} %"])  # fmt: skip
    return markdown(["", "trained", "step 50", "step 100", "against full"], table)


def _embedding() -> str:
    rows = read("embedding")
    table = []
    for rank, is_trained in ((16, False), (128, False), (16, True), (128, True)):
        lr, values = best(rows, method="lora", rank=rank, embedding=is_trained)
        row = next(row for row in rows if row.get("rank") == rank and row["embedding"] == is_trained)
        what = f"LoRA, rank {rank}, embedding {'trained' if is_trained else 'frozen'}"
        table.append([what, f"{row['trainable']:,}", f"{lr:g}", spread(values)])
    lr, values = best(rows, method="full")
    table.append(["full fine-tuning", f"{rows[0]['trainable']:,}", f"{lr:g}", spread(values)])
    return markdown(["", "trained", "best rate", "held-out loss"], table)


def _layers() -> str:
    rows = read("layers")
    table = []
    for targets in ("attention", "mlp", "all-linear"):
        lr, values = best(rows, targets=targets)
        row = next(row for row in rows if row["targets"] == targets)
        table.append([targets, row["rank"], f"{row['trainable']:,}", f"{lr:g}", spread(values)])
    return markdown(["layers", "rank", "trained", "best rate", "held-out loss"], table)


def _batch() -> str:
    rows = read("batch")
    table, batches = [], sorted({row["batch"] for row in rows})
    series = []
    for name, method, style in (("LoRA, rank 16", "lora", "run-0"), ("full fine-tuning", "full", "run-6 broken")):
        at_best = [best(rows, method=method, batch=batch)[1] for batch in batches]
        means = [(place, fmean(values)) for place, values in enumerate(at_best)]
        spreads = [(place, min(values), max(values)) for place, values in enumerate(at_best)]
        series.append(Series(name, means, style, marked=True, spread=spreads))
    _write("batch", "Held-out loss after 1,536 rows, by rows a step", series, x_label="rows a step",
           y_label="held-out loss, nats", x_names=[str(batch) for batch in batches])  # fmt: skip
    for batch in batches:
        (lora_lr, lora), (full_lr, full) = (best(rows, method=method, batch=batch) for method in ("lora", "full"))
        steps = next(row["steps"] for row in rows if row["batch"] == batch)
        table.append([batch, steps, f"{spread(lora)} ({lora_lr:g})", f"{spread(full)} ({full_lr:g})",
                      f"{fmean(lora) - fmean(full):+.3f}"])  # fmt: skip
    return markdown(["rows a step", "steps", "LoRA, rank 16 (rate)", "full fine-tuning (rate)", "gap"], table)


def seconds(rows: Sequence[Row]) -> float:
    """Of processor time, the least of some seeds: the first run of a process also warms it up."""
    return min(row["cpu_s"] for row in rows)


def _quantised() -> str:
    rows = read("quantised")
    full = fmean(losses(rows, method="full"))
    whole = [row for row in rows if row["method"] == "full"]
    table = []
    for method, base in (("full", "none"), *(("lora", base) for base in ("none", "nf4", "fp4", "int8"))):
        own = [row for row in rows if row["method"] == method and row["base"] == base]
        values = [row["held_out_loss"] for row in own]
        table.append([
            "full fine-tuning" if method == "full" else f"LoRA on {base if base != 'none' else 'a dense base'}",
            spread(values), f"{100 * (fmean(values) / full - 1):+.1f} %",
            f"{100 * own[0]['trainable'] / whole[0]['parameters']:.1f} %", f"{own[0]['peak_bytes'] / 2**20:.0f} MiB",
            f"{own[0]['trained_bytes'] / 2**20:.1f} MiB", f"{seconds(own) / seconds(whole):.2f}",
        ])  # fmt: skip
    return markdown(["", "held-out loss", "against full", "trained", "peak", "stored", "time"], table)


def _flops() -> str:
    rows = [row for row in read("flops") if row["size"] == 4096]
    return markdown(["rank", "full, a token", "LoRA, a token", "share", "2/3 + 2R/N"],
                    [[row["rank"], f"{row['full']:,}", f"{row['lora']:,}", row["share"], row["formula"]]
                     for row in rows])  # fmt: skip


def _adapters() -> str:
    return markdown(["", "tokens", "ms", "middle half"],
                    [[row["what"], row.get("tokens", ""), row["ms"], f"{row['ms_from']} to {row['ms_to']}"]
                     for row in read("adapters")])  # fmt: skip


def _masters() -> str:
    rows = read("masters")
    kinds, rates = list(dict.fromkeys(row["kind"] for row in rows)), sorted({row["lr"] for row in rows})
    cells: Mapping[tuple[str, float], Row] = {(row["kind"], row["lr"]): row for row in rows}
    return markdown(["", *(f"{rate:g}" for rate in rates)],
                    [[kind, *(f"{cells[kind, lr]['held_out_loss']:.3f} ({cells[kind, lr]['moved']:.0%})"
                              for lr in rates)] for kind in kinds])  # fmt: skip


def _data() -> str:
    rows = [*read("data"), *read("rows")]
    few = [row for row in rows if (row["kind"], row["rows"]) == ("near", 100)]
    arms = {
        "rank 4": [row for row in few if row.get("rank") == 4],
        "rank 64": [row for row in few if row.get("rank") == 64 and not {"dropout", "weight_decay"} & row.keys()],
        "rank 64, dropout 0.3, one seed": [row for row in few if row.get("dropout") == 0.3],
        "full fine-tuning": [row for row in few if row["method"] == "full"],
    }
    series = []
    for (name, own), style in zip(arms.items(), ("run-0", "run-1", "run-2", "run-6 broken"), strict=True):
        curve = {0: [row["base_loss"] for row in own], **_curve(own)}
        series.append(Series(name, [(step, fmean(values)) for step, values in curve.items()], style, marked=True))
    _write("data", "Held-out loss over ten passes of 100 near rows", series, x_label="step",
           y_label="held-out loss, nats")  # fmt: skip
    shrunk, table = ("dropout", "weight_decay"), []
    keys = ("kind", "rows", "method", "rank", *shrunk)
    for arm in sorted({tuple(row.get(key) for key in keys) for row in rows}, key=str):
        own = [row for row in rows if tuple(row.get(key) for key in keys) == arm]
        kind, count, method, rank, dropout, decay = arm
        said = {"full": "full fine-tuning", "lora": f"rank {rank}"}[method]
        said += f", dropout {dropout}" if dropout else f", weight decay {decay}" if decay else ""
        curve = {step: fmean(values) for step, values in _curve(own).items()}
        lowest = min(curve, key=curve.__getitem__)
        table.append((list(dict.fromkeys(row["kind"] for row in rows)).index(kind), count, [
            kind, f"{count:,}", said, f"{own[0]['base_loss']:.3f}", f"{curve[lowest]:.3f} ({lowest})",
            spread(losses(own)), f"{fmean(row['train_loss'] for row in own):.3f}",
        ]))  # fmt: skip
    table.sort(key=lambda line: line[:2])
    head = ["text", "rows", "", "base", "lowest (step)", "last", "last 20 steps of training"]
    return markdown(head, [line for _, _, line in table])


def _continual() -> str:
    rows = read("continual")
    table = []
    for how in dict.fromkeys(row["how"] for row in rows):
        own = [row for row in rows if row["how"] == how]
        table.append([how, *(spread([row[kind] for row in own]) for kind in ("near", "far"))])
    return markdown(["", "loss on A (near)", "loss on B (far)"], table)


def _kinds() -> str:
    rows, table = [*read("kinds"), *read("classes")], []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        for method, words in (("full", "full fine-tuning"), ("lora", "LoRA, rank 16")):
            lr, values = best(rows, kind=kind, method=method)
            own = [row for row in rows if row["kind"] == kind and row["method"] == method and row["lr"] == lr]
            right = [row["accuracy"] for row in own if "accuracy" in row]
            table.append([kind, words, f"{lr:g}", f"{own[0]['base_loss']:.3f}", spread(values),
                          f"{100 * fmean(right):.1f} %" if right else ""])  # fmt: skip
    return markdown(["", "", "best rate", "base", "held-out loss", "accuracy"], table)


def _methods() -> str:
    same = [{**row, "method": "LoRA, rank 16"} for row in read("quantised")
            if row["method"] == "lora" and row["base"] == "none"]  # fmt: skip
    rows, table = [*read("methods"), *({"lr": 4e-3, **row} for row in same)], []
    for method in dict.fromkeys(row["method"] for row in rows):
        lr, values = best(rows, method=method)
        row = next(row for row in rows if row["method"] == method)
        table.append([method, f"{row['trainable']:,}", f"{lr:g}", spread(values)])
    return markdown(["", "trained", "best rate", "held-out loss"], table)


def _minutes() -> str:
    return markdown(["", "minutes"], [[f"{row['experiment']}.py", row["minutes"]] for row in read("minutes")])


def _write(name: str, title: str, series: Sequence[Series], **options: Any) -> None:
    DRAWINGS.mkdir(exist_ok=True)
    (DRAWINGS / f"{name}.svg").write_text(standing_alone(title, series, **options) + "\n", encoding="utf-8")


TABLES = {
    "rate": _rate,
    "capacity": _capacity,
    "embedding": _embedding,
    "layers": _layers,
    "batch": _batch,
    "quantised": _quantised,
    "flops": _flops,
    "adapters": _adapters,
    "masters": _masters,
    "larger_rate": _larger_rate,
    "larger": _larger,
    "data": _data,
    "continual": _continual,
    "kinds": _kinds,
    "methods": _methods,
    "minutes": _minutes,
}


def main() -> None:
    """Every experiment that has rows; its table stands in the page between two comments."""
    text = PAGE.read_text(encoding="utf-8")
    for name in re.findall(r"<!-- table (\w+) -->", text):
        if (HERE / f"{name}.jsonl").exists():
            table = TABLES[name]()
            text = re.sub(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", rf"\1\n{table}\n\n\2", text, flags=re.DOTALL)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
