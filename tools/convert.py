"""`python tools/convert.py ...` is `diffperception convert ...`."""

from diffperception.cli.main import tool

if __name__ == "__main__":
    tool("convert")
