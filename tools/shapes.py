"""`python tools/shapes.py ...` is `diffperception shapes ...`."""

import sys

from diffperception.cli.main import main

if __name__ == "__main__":  # processes that draw import this file where they cannot be forked
    sys.exit(main(["shapes", *sys.argv[1:]]))
