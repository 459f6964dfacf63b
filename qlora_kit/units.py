"""Bytes, tokens and seconds: how numbers with units are read and written. GiB is 2**30 bytes, GB is 10**9."""

import math
import re
import sys

KIB, MIB, GIB = 2**10, 2**20, 2**30
_FACTORS = {
    "B": 1,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def format_bytes(count: float, *, is_enough: bool = False) -> str:
    """`count` bytes with three significant digits and a binary unit.

    Args:
        count: of bytes.
        is_enough: round up, so that what is read there is not less than `count`.

    >>> format_bytes(5_368_709_120), format_bytes(1536), format_bytes(12)
    ('5.00 GiB', '1.50 KiB', '12 B')
    >>> format_bytes(20_913_800), format_bytes(20_913_800, is_enough=True)
    ('19.9 MiB', '20.0 MiB')
    """
    for unit, factor in (("TiB", 2**40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= factor:
            value = count / factor
            digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
            return f"{math.ceil(value * 10**digits) / 10**digits if is_enough else value:.{digits}f} {unit}"
    return f"{count:.0f} B"


def parse_bytes(text: str) -> int:
    """Read `24GiB`, `512 MiB` or `8GB` as bytes.

    Raises:
        ValueError: if there is no number, no unit, an unknown unit, or the size is not above zero.

    >>> parse_bytes("24GiB")
    25769803776
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _FACTORS:
        raise ValueError(f"{text!r} is not a size: write a number and a unit, such as 24GiB or 512MiB")
    count = int(float(match[1]) * _FACTORS[match[2].upper()])
    if count <= 0:
        raise ValueError(f"{text!r} is not a usable size: it must be above zero")
    return count


def format_count(count: float) -> str:
    """`count` things with a decimal suffix.

    >>> format_count(41_943_040), format_count(950), format_count(6_476_005_376)
    ('41.9 M', '950', '6.48 B')
    """
    for suffix, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if abs(count) >= factor:
            value = count / factor
            return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f} {suffix}"
    return f"{count:.0f}"


def format_bits(count: float) -> str:
    """`count` bits with three significant digits and a decimal unit.

    >>> format_bits(83_886_080), format_bits(950), format_bits(0)
    ('83.9 Mbit', '950 bit', '0 bit')
    """
    number, _, suffix = format_count(count).partition(" ")
    return f"{number} {suffix.replace('B', 'G')}bit"


def counted(count: float, thing: str) -> str:
    """`count` things, as one says it.

    >>> counted(1, "row"), counted(1200, "row")
    ('1 row', '1,200 rows')
    """
    return f"{count:,.0f} {thing}{'' if count == 1 else 's'}"


def format_seconds(seconds: float) -> str:
    """`seconds` as a person says it.

    >>> format_seconds(8.4), format_seconds(95), format_seconds(7260)
    ('8.4 s', '1 min 35 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def is_number(value: object) -> bool:
    """Whether this is a finite number, no larger than a float can be, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
