"""The start of the zipapp. Only this file must be readable by any Python 3."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 — an older Python gets this message, not a SyntaxError
    sys.exit("kubectl vmbackup needs Python 3.11 or later, and python3 is %d.%d" % sys.version_info[:2])  # noqa: UP031

from kubectl_vmbackup.cli import main

if __name__ == "__main__":
    sys.exit(main())
