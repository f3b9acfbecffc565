"""`python tools/compare.py ...` is `diffperception compare ...`."""

from diffperception.cli.main import tool

if __name__ == "__main__":
    tool("compare")
