"""`python tools/search.py ...` is `diffperception search ...`."""

import sys

from diffperception.cli.main import main

sys.exit(main(["search", *sys.argv[1:]]))
