"""`python tools/benchmark.py ...` is `diffperception benchmark ...`."""

from diffperception.cli.main import tool

if __name__ == "__main__":
    tool("benchmark")
