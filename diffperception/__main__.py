"""`python -m diffperception` is `diffperception`; torchrun needs it as `-m diffperception`."""

import sys

from diffperception.cli.main import main

sys.exit(main())
