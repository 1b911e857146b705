"""`python -m vmbackup`: the command line."""

import sys

from vmbackup.cli import main

if __name__ == "__main__":
    sys.exit(main())
