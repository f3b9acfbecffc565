"""`python tools/shapes.py ...` is `diffperception shapes ...`."""

from diffperception.cli.main import tool

if __name__ == "__main__":
    tool("shapes")
