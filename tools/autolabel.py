"""`python tools/autolabel.py ...` is `diffperception autolabel ...`."""

from diffperception.cli.main import tool

if __name__ == "__main__":
    tool("autolabel")
