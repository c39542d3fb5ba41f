"""`accelerate launch train.py ...`: the same as `recap train ...`."""

import sys

from recap_cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
