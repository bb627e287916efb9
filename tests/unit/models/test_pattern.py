import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.models.pattern import parse


def test_units_borders_and_text_round_trip():
    pattern = parse("M-M-|*-|M-")
    assert pattern.units == "M-M-*-M-"
    assert pattern.borders == (4, 6)
    assert str(pattern) == "M-M-|*-|M-"


@pytest.mark.parametrize(
    ("text", "letter", "position", "meant"),
    [("M-x-", "'x'", 2, "'*'"), ("m", "'m'", 0, "'M'"), ("M–", "'–'", 1, "'-'")],
)
def test_unknown_letter_is_named_with_its_position_and_the_nearest(text, letter, position, meant):
    with pytest.raises(ConfigError, match=f"unknown letter {letter} at position {position}") as error:
        parse(text)
    assert f"did you mean {meant}?" in str(error.value)


@pytest.mark.parametrize("text", ["", "|", "M||M", "M-|"])
def test_empty_patterns_and_stages_are_refused(text):
    with pytest.raises(ConfigError, match="empty"):
        parse(text)


def test_blocks_are_mixers_with_the_mlps_after_them():
    assert parse("-M--*M-").blocks == [(0,), (1, 2, 3), (4,), (5, 6)]
    assert len(parse("*-" * 32).blocks) == 32


def test_keep_and_drop_are_complements():
    pattern = parse("M-|*-M")
    assert str(pattern.keep([4, 0, 1])) == "M-M"
    assert str(pattern.drop([2, 3])) == "M-M"
    with pytest.raises(ConfigError, match="nothing is left"):
        pattern.drop(range(5))
    with pytest.raises(ConfigError, match="no such sub-layer"):
        pattern.drop([5])


def test_split_is_even_and_does_not_cut_blocks():
    assert str(parse("*-" * 4).split(2)) == "*-*-|*-*-"
    assert str(parse("M-M-*-M-M-*-").split(4)) == "M-|M-|*-M-|M-*-"
    assert str(parse("M---M").split(2)) == "M---|M"  # the even split, 2 + 3, would cut the block
    assert str(parse("M-|M-").split(1)) == "M-M-"


def test_split_cuts_blocks_only_where_there_are_too_few():
    assert str(parse("M---").split(2)) == "M-|--"
    with pytest.raises(ConfigError, match="cannot be split into 5"):
        parse("M---").split(5)
