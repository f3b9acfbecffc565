"""`python tools/extract.py ...` is `diffperception extract ...`."""

from diffperception.cli.main import tool

if __name__ == "__main__":
    tool("extract")
