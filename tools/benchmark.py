"""`python tools/benchmark.py ...` is `diffperception benchmark ...`."""

import sys

from diffperception.cli.main import main

sys.exit(main(["benchmark", *sys.argv[1:]]))
