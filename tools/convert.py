"""`python tools/convert.py ...` is `diffperception convert ...`."""

import sys

from diffperception.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
