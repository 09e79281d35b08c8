"""Byte counts as people write them."""

import re
from fractions import Fraction

from remoe_edge.errors import RemoeError

_PREFIXES = "KMGT"
_PATTERN = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGT])(I?B)?|B)?", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes in a size such as ``4096``, ``880MiB``, ``1.5G`` or ``2GB``.

    K, M, G, T and KiB ... TiB are powers of 1024; KB ... TB are powers of 1000. Case does not matter. A fraction of a
    byte is dropped. Raises RemoeError for anything else.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise RemoeError(f"{text!r} is not a size; write for example 880MiB, 1.5G or a number of bytes")
    number, prefix, suffix = match.groups()
    base = 1000 if suffix is not None and suffix.upper() == "B" else 1024
    scale = base ** (_PREFIXES.index(prefix.upper()) + 1) if prefix is not None else 1
    return int(Fraction(number) * scale)


def format_size(size: int) -> str:
    """A byte count for people, in binary units with at most two decimals: ``880 MiB``, ``1.50 GiB``, ``17 B``.

    Whole multiples of a unit print without decimals, so that ``parse_size(format_size(n)) == n`` for them.
    """
    if size < 0:
        return f"-{format_size(-size)}"
    unit, scale = "B", 1
    for prefix in _PREFIXES:
        if size < scale * 1024:
            break
        unit, scale = f"{prefix}iB", scale * 1024
    return f"{size // scale} {unit}" if size % scale == 0 else f"{size / scale:.2f} {unit}"
