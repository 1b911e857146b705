from __future__ import annotations

import argparse
import logging
import secrets
import signal
import sys
from pathlib import Path

from tests.chaos.soak.guests import KINDS
from tests.chaos.soak.soak import soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.chaos.soak", description="Random backups under random faults.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="of an earlier run, for the same choices (default: another one)")
    parser.add_argument("--guests", type=int, default=len(KINDS), help="how many at once (default: one of each kind)")
    parser.add_argument("--only", metavar="GUEST:NUMBER", default="", help="only this plan, again and again")
    parser.add_argument("--log", type=Path, help="where every choice and every end go as JSON lines")
    arguments = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that file systems are unmounted then, too
    logging.getLogger("vmbackup").setLevel(logging.CRITICAL)  # that libvirtd is away is no news here
    tally = soak(seed, arguments.minutes * 60, guests=arguments.guests, only=arguments.only, log=arguments.log)
    print(tally.text)
    return 1 if tally.findings else 0


if __name__ == "__main__":
    sys.exit(main())
