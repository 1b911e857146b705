"""Explore the model world: one setting, or (without arguments) the large settings, one after the other.

python -m tests.model [run -d DISKS -f FAULTS -w WRITES [--orphan] [--live] [--quiesce] [--paused] [--limit N] …]
"""

from __future__ import annotations

import argparse
import sys

from tests.model.checker import Checker
from tests.model.residual import RESIDUALS
from tests.model.world import EXTRAS, Setting

LARGE = (
    Setting(disks=2, faults=3, writes=3),
    Setting(disks=2, faults=2, writes=2, orphan=True),
    Setting(disks=2, faults=2, writes=1, quiesce=True),
    Setting(disks=2, faults=2, writes=1, paused=True, pauses=True),
    Setting(disks=2, faults=2, writes=2, live=True),
    Setting(disks=2, faults=2, writes=1, limit=1),
    Setting(disks=2, faults=2, writes=1, config_full=True),
    Setting(disks=2, faults=2, writes=1, config_stuck=True),
    Setting(disks=2, faults=2, writes=1, foreign=True),
    Setting(disks=2, faults=2, writes=1, edits=True),
    Setting(disks=2, faults=2, writes=1, migration=True),
    Setting(disks=2, faults=2, writes=1, clock=True),
    Setting(disks=2, faults=2, writes=1, offline=True, room=True),
    Setting(disks=2, faults=2, writes=1, stall=True),
    Setting(disks=2, faults=2, writes=1, cancel=True),
    Setting(disks=1, faults=2, writes=1, orphan=True, quiesce=True, offline=True, cancel=True),
    Setting(
        disks=1, faults=3, writes=2, foreign=True, migration=True, pauses=True, clock=True, offline=True, room=True
    ),
    Setting(disks=1, faults=2, writes=2, edits=True),
    Setting(disks=1, faults=3, writes=2, orphan=True, quiesce=True, offline=True, limit=1),
)


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
