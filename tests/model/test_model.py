"""The real decide() in the model world: no violation with all repairs (docs/protocol.md), one once any is gone."""

from __future__ import annotations

import pytest

from tests.model.checker import Checker
from tests.model.mutants import MUTANTS, Mutant
from tests.model.residual import RESIDUALS, Residual
from tests.model.settings import SETTINGS
from tests.model.world import Setting


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_no_interleaving_breaks_an_invariant_and_home_is_always_reached(setting: Setting):
    result = Checker(setting).run()
    print(result)
    assert result.sound, str(result)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.repair}: {mutant.without}")
def test_a_violation_is_found_without(mutant: Mutant):
    with mutant.applied():
        result = Checker(mutant.setting).run(stop_at_first=True)
    print(result)
    assert not result.sound, f"{mutant.repair} taken out ({mutant.without}), and {result.states} states show nothing"


@pytest.mark.parametrize("residual", [each for each in RESIDUALS if not each.large], ids=lambda residual: residual.what)
def test_what_no_agent_can_close_is_this_and_nothing_else(residual: Residual):
    result = Checker(residual.setting).run()
    print(result)
    assert set(result.violations) == residual.breaks


def test_a_violation_is_told_in_a_few_lines():
    mutant = next(mutant for mutant in MUTANTS if mutant.repair == "R3")
    with mutant.applied():
        result = Checker(mutant.setting).run(stop_at_first=True)
    assert next(iter(result.violations.values())).splitlines() == [
        "  KEY the guest can write, and P on disk names another image  [1 disk, 1 fault, 1 write]",
        "    1. agent: settle P, intend-snapshot, suspend",
        "    2. agent asks libvirt: snapshot",
        "    3. libvirt creates the overlays",
        "    4. QEMU switches to the overlays",
        "    5. FAULT: libvirtd is killed",
        "    6. libvirtd starts",
        "    7. agent asks libvirt: resume",
        "    8. QEMU resumes the guest",
        "   => guest running; journal: snapshot intended, guard ours, copy open; the agent would decide: wait",
        "      disk a: QEMU writes overlay, L=base, P=base (durable: base); the overlay holds nothing new",
    ]


def test_every_repair_has_a_mutant():
    assert {mutant.repair for mutant in MUTANTS} >= {f"R{n}" for n in range(1, 8)}
