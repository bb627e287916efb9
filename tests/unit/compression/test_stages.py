from argparse import ArgumentTypeError
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.compression.options import number, whole
from megatron_ext.compression.stages import Request, batch_of, learning_rate, split_flags, stages
from megatron_ext.workflow import Stage

REQUEST = Request(Path("llama"), Path("out"), 0.5, 1_000_000, (), (), "95,5,0", 1024, 4, 135_000_000)


def named(request: Request) -> dict[str, Stage]:
    return {stage.title: stage for stage in stages(request)}


@pytest.mark.parametrize(
    ("text", "expected"), [("0.5", 0.5), ("4B", 4e9), ("1.5b", 1.5e9), ("200K", 2e5), ("3e8", 3e8), ("12", 12)]
)
def test_numbers_are_read_as_people_write_them(text: str, expected: float) -> None:
    assert number(text) == expected


@pytest.mark.parametrize("text", ["", "half", "-1", "0", "nan", "inf", "B", "1e999"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="a number above 0"):
        whole(text)


@pytest.mark.parametrize(
    ("tokens", "sequence", "ranks", "expected"),
    [
        (1_000_000, 1024, 1, 4),
        (1_000_000, 1024, 2, 4),
        (1_000_000, 1024, 3, 3),
        (100, 1024, 2, 2),
        (10**12, 4096, 8, 256),
    ],
)
def test_a_step_is_what_makes_about_200_of_them(tokens: int, sequence: int, ranks: int, expected: int) -> None:
    assert batch_of(tokens, sequence, ranks) == expected


def test_smaller_models_take_longer_steps() -> None:
    assert [learning_rate(size) for size in (70 * 10**9, 8 * 10**9, 2 * 10**9, 135 * 10**6, 10**6)] == [
        1e-4, 1e-4, 2e-4, 8e-4, 1e-3,
    ]  # fmt: skip


def test_each_flag_goes_to_whom_it_concerns() -> None:
    words = ["--bf16", "--prune-samples", "64", "--lr=3e-4", "--distill-loss", "jsd", "--micro-batch-size", "2"]
    assert split_flags(words) == {
        "all": ("--bf16", "--micro-batch-size", "2"),
        "prune": ("--prune-samples", "64"),
        "distill": ("--lr=3e-4", "--distill-loss", "jsd"),
        "layout": (),
    }


def test_every_stage_begins_with_what_one_before_it_makes() -> None:
    made = {"llama"}
    for stage in stages(REQUEST):
        for word in stage.words:
            path = Path(word)
            if path.parts[:1] == ("out",) and path != stage.directory:
                assert any(path.is_relative_to(each) for each in made), f"{stage.title}: {word}"
        made.add(str(stage.directory))
    assert [stage.title for stage in stages(REQUEST)] == [
        "convert the model", "make the data set", "measure original", "score, plan and cut", "measure pruned",
        "distil the original into the rest", "measure distilled", "convert it back",
    ]  # fmt: skip


def test_flags_reach_the_jobs_and_ours_come_before_the_users() -> None:
    words = ("--bf16", "--prune-num-layers", "3", "--lr", "7e-4")
    found = named(replace(REQUEST, flags=words, to=None))
    cut, distilled, measured = (
        found[title].words for title in ("score, plan and cut", "distil the original into the rest", "measure pruned")
    )
    assert cut[-2:] == ("--prune-num-layers", "3")
    assert "--prune-target-params" not in cut
    assert distilled[-2:] == ("--lr", "7e-4")
    assert distilled.index("--lr") < len(distilled) - 2, "the last of two counts"
    for job in (cut, distilled, measured):
        assert "--bf16" in job
    assert found["distil the original into the rest"].steps == 1_000_000 // 4096


def test_a_number_of_parameters_keeps_its_digits() -> None:
    words = named(replace(REQUEST, to=93_750_552.0))["score, plan and cut"].words
    assert float(words[words.index("--prune-target-params") + 1]) == 93_750_552


def test_a_data_set_that_is_there_is_not_made() -> None:
    found = named(replace(REQUEST, data_path=("0.7", "a", "0.3", "b")))
    assert "make the data set" not in found
    words = found["measure original"].words
    assert words[words.index("--data-path") + 1 : words.index("--split")] == ("0.7", "a", "0.3", "b")


def test_tasks_are_asked_before_and_after_on_the_same_layout() -> None:
    flags = ("--bf16", "--tensor-model-parallel-size", "2", "--micro-batch-size", "4")
    found = named(replace(REQUEST, tasks=("arc_easy",), flags=flags))
    for name in ("original", "distilled"):
        words = found[f"ask {name}"].words
        assert words[:2] == ("evaluate", f"out/{name}")
        assert words[-4:] == ("--tasks", "arc_easy", "--tensor-model-parallel-size", "2")
