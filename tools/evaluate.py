"""`python tools/evaluate.py ...` is `diffperception evaluate ...`."""

import sys

from diffperception.cli.main import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
