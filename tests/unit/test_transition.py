"""What an act leaves in the record, where a row of the decision table does not show it."""

from __future__ import annotations

from tests.unit.decisions import TO_BASE, TO_OVERLAY, pivoting
from vmbackup.protocol.record import Image
from vmbackup.protocol.terms import Action, Do
from vmbackup.protocol.transition import compared
from vmbackup.reconcile.steps.actions import STEPS


def compare(images: tuple[tuple[str, Image], ...]) -> Action:
    return Action(Do.COMPARE, "vda", images=images, reason="they differ")


def test_p_names_base_and_the_overlay_shows_the_same_so_it_is_as_if_merged():
    """Not as if settled: libvirt may name base though its file on disk does not, and then both would go on for ever."""
    after = compared(pivoting(), compare(TO_BASE), "1.2.3")
    assert after.disk("vda").merged == "1.2.3"
    assert after.disk("vda").settled is None
    assert after.disk("vda").pivot_intended
    assert not after.quarantined


def test_p_names_base_and_the_overlay_shows_more_so_the_intent_proves_nothing_any_more():
    after = compared(pivoting(), compare(TO_BASE), "")
    assert after.quarantined == "they differ"
    assert not after.disk("vda").pivot_intended


def test_p_names_the_overlay_and_it_shows_the_same_so_it_is_as_if_never_pivoted():
    after = compared(pivoting(), compare(TO_OVERLAY), "1.2.3")
    assert not after.disk("vda").pivot_intended
    assert not after.quarantined


def test_p_names_the_overlay_and_both_were_written():
    assert compared(pivoting(), compare(TO_OVERLAY), "").quarantined == "they differ"


def test_every_action_has_a_step():
    assert set(STEPS) == set(Do)
