"""`diffperception segment`."""

from functools import partial
from typing import Annotated

from diffperception.configuration.parser import OptionsOf
from diffperception.echo import echo, echo_left_out, plural
from diffperception.segmentation.zero_shot import CutReport, cut_folder


def command(cut: Annotated[partial[CutReport], OptionsOf(cut_folder)]) -> None:
    found = cut()
    count = plural(sum(found.segments.values()), "segment")
    echo(f"{cut.keywords['output']}: {count} in {plural(len(found.segments), 'image')}")
    echo_left_out(found.broken)
