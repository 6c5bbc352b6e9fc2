"""`python -m mdiff`: the command line."""

import sys

from mdiff.cli import main

if __name__ == "__main__":
    sys.exit(main())
