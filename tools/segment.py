"""`python tools/segment.py ...` is `diffperception segment ...`."""

import sys

from diffperception.cli.main import main

sys.exit(main(["segment", *sys.argv[1:]]))
