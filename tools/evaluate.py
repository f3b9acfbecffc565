"""`python tools/evaluate.py ...` is `diffperception evaluate ...`."""

from diffperception.cli.main import tool

if __name__ == "__main__":
    tool("evaluate")
