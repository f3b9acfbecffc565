"""`python tools/sample.py ...` is `diffperception sample ...`."""

from diffperception.cli.main import tool

if __name__ == "__main__":
    tool("sample")
