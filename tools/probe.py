"""`python tools/probe.py ...` is `diffperception probe ...`."""

import sys

from diffperception.cli.main import main

sys.exit(main(["probe", *sys.argv[1:]]))
