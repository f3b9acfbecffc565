"""`python tools/compare.py ...` is `diffperception compare ...`."""

import sys

from diffperception.cli.main import main

sys.exit(main(["compare", *sys.argv[1:]]))
