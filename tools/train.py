"""`python tools/train.py ...` is `diffperception train ...`."""

from diffperception.cli.main import tool

if __name__ == "__main__":
    tool("train")
