import pytest

from megatron_ext.inference.request import Request, plan


@pytest.mark.parametrize(
    ("lengths", "new", "size", "expected"),
    [
        ([3, 9, 4, 9], 20, 2, [[1, 3], [2, 0]]),  # longest first, as many as fit
        ([100, 81, 79, 1], 20, 8, [[0, 1], [2], [3]]),  # what is much shorter begins a batch
        ([5], 1, 8, [[0]]),
        ([], 1, 8, []),
        ([9, 2], 1, 8, [[0, 1]]),  # a few tokens are no reason
    ],
)
def test_prompts_of_about_one_length_go_together(
    lengths: list[int], new: int, size: int, expected: list[list[int]]
) -> None:
    assert plan([Request([0] * length, new) for length in lengths], size) == expected


def test_a_continuation_ends_with_a_stop_token_at_its_length_or_when_told() -> None:
    request = Request([1], 3, frozenset({7}), stop=lambda new: new[-2:] == [5, 5])
    assert [request.ended(new) for new in ([], [1], [7], [5, 5], [1, 2], [1, 2, 3])] == [
        False, False, True, True, False, True,
    ]  # fmt: skip
