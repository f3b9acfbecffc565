"""`python tools/predict.py ...` is `diffperception predict ...`."""

import sys

from diffperception.cli.main import main

sys.exit(main(["predict", *sys.argv[1:]]))
