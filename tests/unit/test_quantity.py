"""Quantities mean what they mean to Kubernetes."""

from __future__ import annotations

import pytest

from vmbackup.api.quantity import parse_quantity


@pytest.mark.parametrize(
    ("quantity", "number"),
    [
        (0, 0),
        (1048576, 1048576),
        ("1048576", 1048576),
        ("1k", 1000),
        ("1Ki", 1024),
        ("200Mi", 200 * 2**20),
        ("200M", 200 * 10**6),
        ("1Gi", 2**30),
        ("1T", 10**12),
        ("1Ei", 2**60),
        ("1E", 10**18),
        ("1E3", 1000),
        ("1e9", 10**9),
        ("2.5e1", 25),
        ("1e-1", 0),
        ("1.5Gi", 3 * 2**29),
        (".5Ki", 512),
        ("3.", 3),
        ("+3Mi", 3 * 2**20),
        ("-5Mi", -5 * 2**20),
        ("2000m", 2),
        ("1999m", 1),
        ("5000000u", 5),
        ("5000000000n", 5),
        ("8Ei", 2**63 - 1),
        ("1e999", 2**63 - 1),
        ("-1e999", -(2**63 - 1)),
    ],
)
def test_a_quantity_is_a_whole_number_rounded_down(quantity: object, number: int) -> None:
    assert parse_quantity(quantity) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Mi",
        "1K",
        "1mi",
        "1MiB",
        "1 Mi",
        "1Mi ",
        "1Mi\n",
        "1e3Mi",
        "1e",
        "--1",
        "1,5",
        "0x10",
        "nan",
        "1٣",
        ".",
    ],
)
def test_what_kubernetes_does_not_read_is_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match="not a quantity"):
        parse_quantity(text)


@pytest.mark.parametrize("value", [True, None, 1.5, ["1Mi"], {}])
def test_neither_is_anything_but_a_string_or_a_whole_number(value: object) -> None:
    with pytest.raises(ValueError, match="not a quantity"):
        parse_quantity(value)
