"""The calibration pass: a model runs over data, hooks measure, nothing is trained."""

import torch

from megatron_ext.pruning.importance import Importance
from megatron_ext.training.evaluate import load_model, mean_loss
from megatron_ext.training.launch import Launch


def calibrate(launch: Launch, samples: int) -> tuple[dict[str, torch.Tensor] | None, float]:
    """Score the model of `--load` on the first `samples` sequences of the training split.

    Args:
        launch: The validated command line.
        samples: Sequences; a multiple of `--global-batch-size`.

    Returns:
        The scores on rank 0 (None elsewhere), and the model's mean loss on the samples, nats per token.
    """
    from megatron.core.utils import unwrap_model

    model = load_model(launch)
    importance = Importance(unwrap_model(model), launch.architecture)

    def progress(done: int, total: int) -> None:
        if launch.args.rank == 0:
            print(f"scored {done} of {total} sequences", flush=True)

    loss, _ = mean_loss(launch, model, "train", samples, progress)
    importance.remove()
    return importance.gather(), loss
