"""`python tools/sample.py ...` is `diffperception sample ...`."""

import sys

from diffperception.cli.main import main

sys.exit(main(["sample", *sys.argv[1:]]))
