"""`qlora-kit export`: weights for other programs, and a table of what each kind costs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_kit.cli.options import AsJson, RunFolder, TrustRemoteCode
from qlora_kit.cli.visible import visible
from qlora_kit.errors import RunError
from qlora_kit.units import format_bytes


def export(
    run: RunFolder,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder for the export; required unless --compare is given.", show_default=False),
    ] = None,
    to: Annotated[
        str, typer.Option(help="Kind of export: merged, quantized, adapter, gguf or gguf-adapter.")
    ] = "merged",
    onto: Annotated[
        str, typer.Option(help="Weights to merge into: dequantized (those it was trained on) or original (16-bit).")
    ] = "dequantized",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the weights that are not quantised: bfloat16 (default), float16 or float32. For a GGUF: f32, "
            "f16, bf16, q8_0, q4_0, q4_k_m (default), q5_k_m or q6_k.",
            show_default=False,
        ),
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(help="With --to quantized: nf4, fp4 or int8; default: that of the base.", show_default=False),
    ] = None,
    calibration_rows: Annotated[
        int,
        typer.Option(min=0, help="With --to quantized: number of training rows to calibrate on; 0 rounds to nearest."),
    ] = 128,
    max_kl: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Refuse an export whose mean KL from the trained model is above this, in nats per token (for a "
            "classifier, per text); default: 0.01 for a merge onto dequantized, no limit otherwise.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Make every kind and print a table of them; they are kept only if --out is given."
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Export even if the adapter was trained on a different base or the export differs too much."
        ),
    ] = False,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write weights for other programs, and compare them with the trained model."""
    from qlora_kit.cli.show import audit_lines, import_libraries

    if out is None and not compare:
        raise RunError("--out is missing: name the folder for the export, or use --compare")
    import_libraries()
    from qlora_kit.run import Asked, compare_exports, export_run

    asked = Asked(to, onto, dtype, quantization, calibration_rows, max_kl, force)
    if compare:
        rows = compare_exports(run, out, asked, trust_remote_code=trust_remote_code)
        typer.echo(json.dumps({"schema": 1, "exports": rows}, indent=2) if as_json else comparison_lines(rows))
        return
    assert out is not None
    exported = export_run(run, out, asked, trust_remote_code=trust_remote_code)
    typer.echo(json.dumps(exported, indent=2) if as_json else audit_lines(exported, out))


def comparison_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line an export: its size, and how it compares with the model as trained."""
    unit, same = ("text", "same label") if any("texts" in row for row in rows) else ("token", "same top token")
    head = ("export", "size", "mean KL", "largest KL", same, "loss as trained", "loss")
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    lines = ["  ".join(each.ljust(width) for each, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines += [f"{row['name']}: {visible(row['refused'])}" for row in rows if "refused" in row]
    return "\n".join([*lines, f"KL in nats a {unit}, of the model as trained to the export, on the held-out rows"])


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    if "refused" in row:
        return (row["name"], "-", "-", "-", "-", "-", "-")
    if "mean_kl" not in row:
        return (row["name"], format_bytes(row["bytes"]), "not audited", "-", "-", "-", "-")
    return (
        row["name"],
        format_bytes(row["bytes"]),
        f"{row['mean_kl']:.2e}",
        f"{row['max_kl']:.2e}",
        f"{row['top1_agreement']:.2%}",
        f"{row['loss_as_trained']:.4f}",
        f"{row['loss_export']:.4f}",
    )
