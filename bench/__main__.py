"""`python -m bench NAME`: what this project claims to be fast at, measured on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bench import copy, latency, window

BENCHMARKS = {"copy": copy, "latency": latency, "window": window}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark: 0 if the figure is as good as claimed, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="NAME")
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(name, help=module.__doc__, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)


if __name__ == "__main__":
    raise SystemExit(main())
