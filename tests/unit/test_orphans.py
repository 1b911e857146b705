"""What the XML of a domain tells of overlays that were left behind, ours and others'."""

from __future__ import annotations

from typing import Any, cast

import pytest

from vmbackup.reconcile.leftovers.reader import Leftovers, OurOverlay

BASE, OURS, OTHER = "/images/web.raw", "/images/web.vmb-01234567-vda.qcow2", "/images/web.snap1"


def xml(*images: str) -> str:
    """A domain whose disk vda writes the first of these images, which is over the second, and so on."""
    below = ""
    for image in reversed(images[1:]):
        below = f"<backingStore type='file'><format type='raw'/><source file='{image}'/>{below}</backingStore>"
    disk = f"<disk type='file'><source file='{images[0]}'/>{below}<target dev='vda'/></disk>"
    return f"<domain><devices>{disk}</devices></domain>"


def leftovers(live: str | None, persistent: str | None) -> Leftovers:
    return Leftovers(cast(Any, None), live, persistent)


@pytest.mark.parametrize(
    ("live", "persistent", "buried"),
    [
        (xml(OURS, BASE), xml(OURS, BASE), False),
        (xml(OURS, BASE), None, False),
        (xml(OURS, BASE), xml(BASE), False),
        (xml(BASE), xml(OURS, BASE), False),
        (None, xml(OURS), False),
        (xml(OTHER, OURS, BASE), xml(OTHER), True),
    ],
)
def test_an_overlay_of_ours_is_found_wherever_the_domain_names_it(
    live: str | None, persistent: str | None, buried: bool
) -> None:
    assert leftovers(live, persistent).overlays == [OurOverlay(OURS, "01234567", buried)]


def test_a_domain_on_its_own_images_has_none() -> None:
    assert leftovers(xml(BASE), xml(BASE)).overlays == []


def test_somebody_elses_overlay_is_one_that_the_definition_does_not_know() -> None:
    assert leftovers(xml(OTHER, BASE), xml(BASE)).foreign_overlays == {OTHER: "vda"}


@pytest.mark.parametrize(
    ("live", "persistent"),
    [
        (xml(OTHER, BASE), xml(OTHER, BASE)),  # over a template, perhaps: it may be meant to stay
        (xml(BASE), xml(OTHER)),  # another image from the next start on: the user's request
        (xml(OURS, BASE), xml(BASE)),  # ours
        (xml(OTHER, BASE), None),  # transient: nothing to compare with
        (None, xml(OTHER)),
    ],
)
def test_what_may_be_meant_so_is_no_foreign_overlay(live: str | None, persistent: str | None) -> None:
    assert leftovers(live, persistent).foreign_overlays == {}
