import pytest
from hypothesis import given
from hypothesis import strategies as st

from remoe_edge.errors import RemoeError
from remoe_edge.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("17B", 17),
        ("880MiB", 880 << 20),
        ("880M", 880 << 20),
        ("880 mib", 880 << 20),
        ("880MB", 880 * 10**6),
        ("1.5G", 3 << 29),
        ("2GB", 2 * 10**9),
        ("0.1KiB", 102),
        (" 3T ", 3 << 40),
    ],
)
def test_parse(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "1.", ".5G", "1e9", "1,5G", "16s", "1PiB", "1 2", "0x10", "\u0661", "1iB"]
)
def test_refused(text: str) -> None:
    with pytest.raises(RemoeError, match="is not a size"):
        parse_size(text)


@given(st.integers(min_value=0, max_value=1 << 50))
def test_formatting_stays_near(size: int) -> None:
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.006)


@given(st.integers(min_value=0, max_value=1023), st.sampled_from([0, 10, 20, 30, 40]))
def test_whole_units_are_exact(number: int, shift: int) -> None:
    assert parse_size(format_size(number << shift)) == number << shift


def test_format() -> None:
    assert format_size(880 << 20) == "880 MiB"
    assert format_size(3 << 29) == "1.50 GiB"
    assert format_size(1023) == "1023 B"
    assert format_size(-17) == "-17 B"
