"""`python -m vmbackup`: the command line."""

import sys

from vmbackup.cli import main

sys.exit(main())
