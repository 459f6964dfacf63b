"""`qlora-kit verify`: whether files still have the bytes that were written, and whether resuming is exact."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_kit.cli.options import AsJson, TrustRemoteCode
from qlora_kit.cli.visible import visible
from qlora_kit.errors import QloraKitError
from qlora_kit.units import counted
from qlora_kit.watch import Watch


class _Steps(Watch):
    """Shows that the short runs go on."""

    def row(self, row: Mapping[str, Any]) -> None:
        if "loss" in row:
            typer.echo(f"step {row['step']}  loss {row['loss']:.4f}", err=True)


def verify(
    folder: Annotated[Path, typer.Argument(help="A run folder, one of its checkpoints, or an export.")],
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Also train the recipe for 6 steps, straight and resumed, and compare both bit for bit.",
        ),
    ] = False,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Check files against their checksums, or that resuming is exact."""
    from qlora_kit.cli.show import import_libraries

    import_libraries()
    from qlora_kit import run

    verified = run.verify(folder)
    differences: list[str] | None = None
    if resume:
        differences = run.verify_resume(folder, _Steps(), trust_remote_code=trust_remote_code)
    if as_json:
        found = {"files": verified.files, "faults": verified.faults, "resume_differences": differences}
        typer.echo(json.dumps({"schema": 1, **found}, indent=2))
    else:
        for place, files in verified.files.items():
            typer.echo(f"{visible(place)}  {counted(files, 'file')}")
        typer.echo("\n".join(_said(sum(verified.files.values()), verified.faults, differences)))
    if verified.faults or differences:
        raise typer.Exit(QloraKitError.exit_code)


def _said(files: int, faults: list[str], differences: list[str] | None) -> list[str]:
    lines = [f"fault: {visible(fault)}" for fault in faults] or [
        f"{counted(files, 'file')}, with the bytes that were written"
    ]
    if differences is not None:
        lines += [f"resumed: {visible(difference)}" for difference in differences] or [
            "a run that is stopped and resumed takes the same steps to the same bytes"
        ]
    return lines
