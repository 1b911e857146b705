"""Explore the model world: one setting, or (without arguments) the large settings, one after the other.

python -m tests.model [run -d DISKS -f FAULTS -w WRITES [--orphan] [--live] [--quiesce] [--paused] [--limit N] …]
"""

from __future__ import annotations

import argparse
import sys

from tests.model.checker import Checker
from tests.model.residual import RESIDUALS
from tests.model.settings import LARGE
from tests.model.world import EXTRAS, Setting


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["large", "run"], nargs="?", default="large")
    parser.add_argument("-d", dest="disks", type=int, default=1)
    parser.add_argument("-f", dest="faults", type=int, default=2)
    parser.add_argument("-w", dest="writes", type=int, default=2)
    for name in EXTRAS:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
    parser.add_argument("--residual", default="")
    parser.add_argument("--limit", type=int)
    options = vars(parser.parse_args())
    settings = LARGE if options.pop("what") == "large" else (Setting(**options),)
    sound = True
    for setting in settings:
        result = Checker(setting).run()
        print(result, flush=True)
        sound = sound and result.sound
    for residual in RESIDUALS if len(settings) > 1 else ():
        result = Checker(residual.setting).run()
        print(f"Cannot be closed: {residual.what}. {result}", flush=True)
        sound = sound and set(result.violations) == residual.breaks
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
