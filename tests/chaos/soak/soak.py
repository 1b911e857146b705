"""The whole of a soak: its guests, a thread for each, its end."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path

from tests.chaos.soak.campaign import Campaign
from tests.chaos.soak.choices import plan
from tests.chaos.soak.guests import KINDS, MOST_RECORDS, LostError, Subject
from tests.chaos.soak.host import Host
from tests.chaos.soak.tally import Tally

GUESTS_OF_A_LIBVIRTD = 2  # more of them would wait most of the time: each death of it takes the barrier of PROTOCOL R4


def soak(
    seed: int, seconds: float, *, guests: int = len(KINDS), only: str = "", plans: int = 0, log: Path | None = None
) -> Tally:
    """Run for so long (a plan that was begun is carried out), or until each guest has had so many plans.

    `only` is a plan as it is named in the log. What a guest that something is wrong with leaves stays in the directory
    that the log names.
    """
    directory = Path(tempfile.mkdtemp(prefix="vmb-"))
    tally = Tally(log or directory.with_suffix(".jsonl"))
    tally.note("begin", seed=seed, directory=directory)
    names = [f"{KINDS[n % len(KINDS)]}-{n // len(KINDS) + 1}" for n in range(guests)]
    ordinals: list[int] = []
    if only:
        names, ordinals = [only.partition(":")[0]], [int(only.partition(":")[2])]
    with ExitStack() as stack:
        subjects: list[Subject] = []
        for number, neighbours in enumerate(_neighbours(names)):
            durable = neighbours[0].startswith("cut-")
            host = stack.enter_context(Host(directory / f"host-{number}", durable=durable))
            subjects += [Subject(host, name) for name in neighbours]
        until = time.monotonic() + seconds
        threads = [
            threading.Thread(target=_guest, args=(seed, Campaign(subject, tally), until, plans, ordinals), daemon=True)
            for subject in subjects
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        crashes = sum(host.crashes for host in {subject.host for subject in subjects})
        tally.helped += Counter({"libvirtd started again after a crash of its own": crashes})
        tally.records = sum(sum(subject.acknowledged().values()) for subject in subjects)
    if not tally.findings:
        shutil.rmtree(directory, ignore_errors=True)
    return tally


def _neighbours(names: Sequence[str]) -> list[Sequence[str]]:
    """Who is on one host: a power cut is one for all there."""
    together = [name for name in names if not name.startswith("cut-")]
    pairs = [together[first : first + GUESTS_OF_A_LIBVIRTD] for first in range(0, len(together), GUESTS_OF_A_LIBVIRTD)]
    return [*pairs, *([name] for name in names if name not in together)]


def _guest(seed: int, campaign: Campaign, until: float, plans: int, ordinals: list[int]) -> None:
    subject, tally = campaign.subject, campaign.tally
    try:
        subject.start()
        for number in count(1):
            enough = plans and number > plans
            if enough or time.monotonic() > until or max(subject.acknowledged().values()) > MOST_RECORDS - 2000:
                break
            campaign.carry_out(plan(seed, subject.name, ordinals[0] if ordinals else number))
    except LostError as lost:
        tally.found(f"{campaign.plan.name}: {lost}", lost=lost.records)
    except Exception as error:  # whatever it is, it ends this guest, and no other
        tally.found(f"{campaign.plan.name}: {type(error).__name__}: {error}")
        tally.note("traceback", plan=campaign.plan.name, text=traceback.format_exc())
    finally:
        with suppress(Exception):
            campaign.abandon()
