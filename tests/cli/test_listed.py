"""Options that name several things."""

from slipstream.cli.listed import listed


def test_each_is_named_once() -> None:
    assert listed(" a, b,,a ") == ["a", "b"]
    assert listed("") == []
