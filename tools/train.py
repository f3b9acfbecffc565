"""`python tools/train.py ...` is `diffperception train ...`."""

import sys

from diffperception.cli.main import main

sys.exit(main(["train", *sys.argv[1:]]))
