"""`python tools/check.py ...` is `diffperception check ...`."""

from diffperception.cli.main import tool

if __name__ == "__main__":
    tool("check")
