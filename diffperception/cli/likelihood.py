"""`diffperception likelihood`."""

from functools import partial
from pathlib import Path
from typing import Annotated

from diffperception.configuration.parser import Flat, OptionsOf
from diffperception.echo import echo, echo_left_out, plural
from diffperception.generation.likelihood import LikelihoodOptions, LikelihoodReport, likelihood_folder
from diffperception.table import format_table


def command(
    model: Path,
    measure: Annotated[partial[LikelihoodReport], OptionsOf(likelihood_folder, "model", "options")],
    options: Flat[LikelihoodOptions],
) -> None:
    report = measure(model, options=options)
    kinds = list(dict.fromkeys(row["set"] for row in report.rows))
    counts = {kind: sum(row["set"] == kind for row in report.rows) for kind in kinds}
    rows = [(kind, str(counts[kind]), f"{report.mean(kind):.4f}") for kind in kinds]
    echo(format_table(rows, ["", "images", "bits per dimension"]))
    if report.auroc:
        echo("")
        echo(
            format_table([(n, f"{a:.3f}") for n, a in report.auroc.items()], ["score", "AUROC, images from reference"])
        )
    echo(f"{measure.keywords['output']}: likelihood.csv, {plural(len(report.rows), 'image')}")
    echo_left_out(report.broken)
