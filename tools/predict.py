"""`python tools/predict.py ...` is `diffperception predict ...`."""

from diffperception.cli.main import tool

if __name__ == "__main__":
    tool("predict")
