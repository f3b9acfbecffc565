"""`python tools/probe.py ...` is `diffperception probe ...`."""

from diffperception.cli.main import tool

if __name__ == "__main__":
    tool("probe")
