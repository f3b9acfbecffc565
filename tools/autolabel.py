"""`python tools/autolabel.py ...` is `diffperception autolabel ...`."""

import sys

from diffperception.cli.main import main

sys.exit(main(["autolabel", *sys.argv[1:]]))
