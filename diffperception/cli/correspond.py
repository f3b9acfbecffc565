"""`diffperception correspond`."""

from functools import partial
from typing import Annotated

from diffperception.configuration.parser import OptionsOf
from diffperception.echo import echo, echo_left_out, plural
from diffperception.segmentation.correspondence import MatchReport, match_folder
from diffperception.table import format_table


def command(match: Annotated[partial[MatchReport], OptionsOf(match_folder)]) -> None:
    report, within = match(), match.keywords["warp"].within
    echo(format_table([(name, f"{value:.3f}") for name, value in report.pck.items()], ["", f"PCK@{within:g}"]))
    echo(f"on {plural(report.pairs, 'warped picture')}")
    if match.keywords["output"] is not None:
        echo(f"{match.keywords['output']}: these numbers in matches.json, and matches.png")
    echo_left_out(report.broken)
