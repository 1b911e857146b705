"""Pauses between attempts double, up to a limit that any number of failures keeps."""

from __future__ import annotations

import pytest

from vmbackup.backoff import Backoff


def test_pauses_double_up_to_the_longest():
    backoff = Backoff(first=0.5, longest=3.0)
    assert [backoff.after(failures) for failures in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]


@pytest.mark.parametrize("failures", [64, 1025, 2**40])
def test_however_often_it_fails_there_is_a_pause(failures: int):
    assert Backoff().after(failures) == 300.0
