"""The commands: `diffperception NAME` and `tools/NAME.py` are the same function."""
