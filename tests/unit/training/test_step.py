"""The step of any model: Megatron's contract of sums and counts, on a micro-batch of the size that is in use."""

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.models.bootstrap import prepare

prepare()  # before Megatron is imported

from megatron_ext.data.schema import BatchSchema  # noqa: E402
from megatron_ext.training import step  # noqa: E402


class Schema(BatchSchema):
    """Gives what it was asked for instead of reading."""

    def read(self, data: Any, micro_batch: int, vp_stage: int | None = None) -> dict[str, Tensor]:
        return {"asked": torch.tensor([micro_batch, vp_stage]), "x": next(data)}


class Model(torch.nn.Module):
    vp_stage = 3


class Timers:
    def __call__(self, name: str, log_level: int) -> "Timers":
        return self

    def start(self) -> None: ...

    def stop(self) -> None: ...


@pytest.fixture(autouse=True)
def megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "get_args", lambda: Namespace(micro_batch_size=2, eval_micro_batch_size=5))
    monkeypatch.setattr(step, "get_timers", Timers)


@pytest.mark.parametrize(("training", "size"), [(True, 2), (False, 5)])
def test_sums_are_megatrons_pairs_and_the_total_keeps_its_gradient(training: bool, size: int) -> None:
    weight = torch.tensor(2.0, requires_grad=True)

    def losses(batch: Any, output: Tensor) -> Any:
        assert batch["asked"].tolist() == [size, 3]
        total, count = output.sum(), torch.tensor(output.numel())
        return total, count, {"loss": (total, count), "largest": (output.max(), torch.tensor(1))}

    run = step.batch_step(Schema({}), lambda model, batch: weight * batch["x"], losses)
    output, loss = run(iter([torch.tensor([1.0, 4.0])]), Model().train(training))
    total, count, pairs = loss(output)
    total.backward()
    assert weight.grad is not None
    assert (total.item(), count.item(), weight.grad.item()) == (10.0, 2, 5.0)
    assert count.dtype == torch.int32
    assert {name: pair.tolist() for name, pair in pairs.items()} == {"loss": [10.0, 2.0], "largest": [8.0, 1.0]}
    assert not any(pair.requires_grad for pair in pairs.values())


def test_a_language_models_loss_is_over_the_tokens_that_count() -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], dtype=torch.bfloat16)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    total, count, sums = step.masked_sum({"loss_mask": mask}, losses)
    assert (total.item(), count.item()) == (37.0, 3)
    assert sums == {"lm loss": (total, count)}
