"""`python -m tests.model run -d DISKS -f FAULTS -w WRITES [--orphan] …`: explore one setting."""

from __future__ import annotations

import argparse
import sys

from tests.model.checker import Checker
from tests.model.world import Setting


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("what", choices=["run"])
    parser.add_argument("-d", dest="disks", type=int, default=1)
    parser.add_argument("-f", dest="faults", type=int, default=2)
    parser.add_argument("-w", dest="writes", type=int, default=2)
    for name in ("orphan", "live", "quiesce", "paused", "config-full"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--limit", type=int)
    options = vars(parser.parse_args())
    del options["what"]
    result = Checker(Setting(**options)).run()
    print(result)
    return 0 if result.sound else 1


if __name__ == "__main__":
    sys.exit(main())
