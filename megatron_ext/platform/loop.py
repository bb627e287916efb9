"""The two places of Megatron's loop that have no door: before it saves, and before a step's first micro-batch."""

from collections.abc import Callable
from typing import Any

from megatron_ext.platform.replacements import replace


def before_saving(action: Callable[[int], None]) -> None:
    """Call `action(iteration)` on every rank before a checkpoint is written.

    What is trained beside Megatron's own model is saved then, so that a checkpoint that is complete has it.
    """
    import megatron.training.training as training

    save: Any = training.save_checkpoint

    def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> Any:
        action(iteration)
        return save(iteration, *args, **kwargs)

    replace(
        training, "save_checkpoint", save_checkpoint, "what is trained beside the model is saved first (everywhere)"
    )


def before_schedule(action: Callable[[Any, int], Any]) -> None:
    """Call `action(data, micro_batches)` on every rank before a step's forward passes, in training and in evaluation.

    Args:
        action: Takes the data iterator (a list of them with a virtual pipeline) and the number of micro-batches; gives
            back the iterator that the schedule is to read.
    """
    import megatron.training.training as training

    choose: Any = training.get_forward_backward_func

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        schedule = choose(*args, **kwargs)

        def run(*, data_iterator: Any, num_microbatches: int, **rest: Any) -> Any:
            data_iterator = action(data_iterator, num_microbatches)
            return schedule(data_iterator=data_iterator, num_microbatches=num_microbatches, **rest)

        return run

    reason = "a teacher on another layout runs before its student (distillation with one)"
    replace(training, "get_forward_backward_func", get_forward_backward_func, reason)
