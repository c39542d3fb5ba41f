"""`python -m recap_hf.cli`: the `recap` command where the console script is not on the PATH."""

import sys

from recap_hf.cli import main

sys.exit(main())
