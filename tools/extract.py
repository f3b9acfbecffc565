"""`python tools/extract.py ...` is `diffperception extract ...`."""

import sys

from diffperception.cli.main import main

sys.exit(main(["extract", *sys.argv[1:]]))
