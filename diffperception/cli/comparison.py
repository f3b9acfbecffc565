"""The results of `compare`: kept from run to run, and made into a table and pictures."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffperception.configuration.settings import differences, read_settings
from diffperception.files import write_text

TITLES = {
    "diffusion": "diffusion features",
    "untrained": "untrained UNet's features",
    "rgb": "colours",
    "scratch": "UNet from scratch",
}


class Results:
    """compare.json: settings, and a row for each method, number of labelled images and seed that is finished.

    Args:
        path: the file; it is read if there is one.
        settings: on which all rows depend.
        overwrite: begin anew even if there is a file.

    Raises:
        ValueError: the file is of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
        self.path, self.settings = path, dict(settings)
        self.rows: list[dict[str, Any]] = []
        if path.exists() and not overwrite:
            kept = read_settings(path)
            changed = differences(kept["settings"], self.settings)
            if changed:
                raise ValueError(
                    f"{path} holds results of other settings ({', '.join(changed)}): choose another --output, or"
                    " replace them with --overwrite"
                )
            self.rows = kept["results"]

    def missing(
        self, methods: Sequence[str], labels: Sequence[int], seeds: Sequence[int]
    ) -> list[tuple[str, int, int]]:
        """What is still to be done: methods with numbers of labelled images and seeds."""
        done = {(row["method"], row["labels"], row["seed"]) for row in self.rows}
        runs = [(method, count, seed) for method in methods for count in labels for seed in seeds]
        return [run for run in runs if run not in done]

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a finished row, on disk too."""
        self.rows.append(dict(row))
        self.write()

    def write(self) -> None:
        content = {"settings": self.settings, "summary": summarise(self.rows), "results": self.rows}
        write_text(self.path, json.dumps(content, indent=2) + "\n")


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread (sample standard deviation; null for one seed) of the mIoU over the seeds."""
    cells: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        cells.setdefault((row["method"], row["labels"]), []).append(row["miou"])
    return [
        {
            "method": method,
            "labels": labels,
            "miou": statistics.fmean(values),
            "spread": statistics.stdev(values) if len(values) > 1 else None,
            "seeds": len(values),
        }
        for (method, labels), values in sorted(
            cells.items(), key=lambda cell: (list(TITLES).index(cell[0][0]), cell[0][1])
        )
    ]


def markdown(summary: Sequence[Mapping[str, Any]]) -> str:
    """The mIoU in percent, a row a method and a column a number of labelled images."""
    counts = sorted({cell["labels"] for cell in summary})
    cells = {(cell["method"], cell["labels"]): cell for cell in summary}
    methods = list(dict.fromkeys(cell["method"] for cell in summary))
    lines = [["labelled images", *map(str, counts)], ["---", *["---:"] * len(counts)]]
    lines += [[TITLES[method], *(_cell(cells.get((method, count))) for count in counts)] for method in methods]
    widths = [max(len(line[i]) for line in lines) for i in range(len(counts) + 1)]
    return "\n".join(
        "| " + " | ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    return f"{100 * cell['miou']:.1f}" + ("" if cell["spread"] is None else f" ± {100 * cell['spread']:.1f}")


def lead_sentence(summary: Sequence[Mapping[str, Any]]) -> str:
    """How far the diffusion features are above or below the best of the others, for each number of labelled images."""
    parts = []
    for count in sorted({cell["labels"] for cell in summary}):
        means = {cell["method"]: cell["miou"] for cell in summary if cell["labels"] == count}
        ours = means.pop("diffusion", math.nan)
        if means and not math.isnan(ours):
            best = max(means, key=lambda method: means[method])
            parts.append(f"{100 * (ours - means[best]):+.1f} at {count} ({TITLES[best]})")
    return "mIoU of diffusion features over the best of the others, in points: " + ", ".join(parts) if parts else ""
