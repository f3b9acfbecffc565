"""`python tools/check.py ...` is `diffperception check ...`."""

import sys

from diffperception.cli.main import main

sys.exit(main(["check", *sys.argv[1:]]))
