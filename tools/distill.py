"""`python tools/distill.py ...` is `diffperception distill ...`."""

import sys

from diffperception.cli.main import main

sys.exit(main(["distill", *sys.argv[1:]]))
