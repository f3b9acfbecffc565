"""The commands: `diffperception NAME` and `tools/NAME.py` are the same function."""

from diffperception.echo import echo as say
from diffperception.echo import plural as counted

__all__ = ["counted", "say"]
