"""`python -m recap_cli`: the `recap` command where the console script is not on the PATH."""

import sys

from recap_cli import main

sys.exit(main())
