"""Places of Megatron's that have no door: around its saves, its micro-batches, its data and its scalars.

A feature that needs one opens it; `install` alone is for all.
"""

import importlib
import queue
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ext.errors import CheckpointError
from megatron_ext.platform.replacements import replace


def install() -> None:
    """Skip the compilation of index helpers that the megatron-core wheel ships compiled, and without a Makefile.

    `megatron.training` calls `make` unconditionally and exits when it fails, on every platform.
    """
    import megatron.core.datasets.utils as datasets

    importlib.import_module("megatron.core.datasets.helpers_cpp")  # fail here, loudly, if the helpers are absent

    replace(datasets, "compile_helpers", lambda: None, "the wheel ships helpers_cpp.so and no Makefile (everywhere)")


def know_layer(name: str, letter: str) -> None:
    """Let layer patterns have a letter that Megatron does not know, wherever it checks and counts them."""
    from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

    reason = f"a kind of layer of ours ({name.lower()}; everywhere)"
    replace(Symbols, name, letter, reason)
    replace(Symbols, "VALID_LAYERS", Symbols.VALID_LAYERS | {letter}, reason)


def keep_write_results() -> None:
    """Let saves of this process, which must not be asynchronous, note here what they have written.

    Megatron notes it, until the checkpoint's index is written, in a process of its own, which imports torch and
    Megatron again: some seconds at the first save, and several hundred MB from then on, on each rank. Only
    `--async-save`, where another process writes, needs that.
    """
    import megatron.core.dist_checkpointing.strategies.filesystem_async as writer

    reason = "a save in this process needs no other process to note what it wrote (everywhere, unless --async-save)"
    if not isinstance(writer._results_queue, queue.Queue):
        replace(writer, "_results_queue", queue.Queue(), reason)


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


def after_validation(measure: Callable[[], Mapping[str, float]]) -> None:
    """Call `measure()` on every rank after a validation's last batch, and log what it gives beside the metrics."""
    import megatron.training.training as training

    inner: Any = training.evaluate

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        losses, collected, over_time = inner(*args, **kwargs)
        if losses is not None:
            losses |= {name: torch.tensor(value) for name, value in measure().items()}
        return losses, collected, over_time

    reason = "metrics that are no ratio of sums are logged like the others (tasks that have such)"
    replace(training, "evaluate", evaluate, reason)


def around_saves(before: Callable[[Path], None], after: Callable[[Path], None]) -> None:
    """Call `before(step)` and `after(step)` on every rank when Megatron writes a step, which then is its directory.

    An asynchronous save ends when Megatron finalises it, on all ranks at once; the tracker file is written later.
    """
    from megatron.core import dist_checkpointing

    save: Any = dist_checkpointing.save

    def saving(state: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        step = Path(checkpoint_dir)
        before(step)
        try:
            request = save(state, checkpoint_dir, *args, **kwargs)
        except CheckpointException as error:
            raise _not_saved(step, error) from error
        if request is None:
            after(step)
        else:
            request.finalize_fns.append(lambda: after(step))
        return request

    replace(dist_checkpointing, "save", saving, "a step is saved with its checksums (everywhere)")


def _not_saved(step: Path, error: CheckpointException) -> CheckpointError:
    """What rank 0 knows of the ranks that could not write their part; the others know that there is one."""
    causes = [f"rank {rank}: {str(cause).splitlines()[-1]}" for rank, (cause, _) in error.failures.items()]
    return CheckpointError(
        "the checkpoint cannot be saved: a rank cannot write its part", got="; ".join([str(step), *causes]),
        legal="room on that rank's disk; the same command goes on from the step before",
    )  # fmt: skip


def before_schedule(action: Callable[[Any, int, int], Any]) -> None:
    """Call `action(data, micro_batches, micro_batch_size)` on every rank before each step, of training and evaluation.

    Args:
        action: Takes the data iterator (a list of them with a virtual pipeline), the number of micro-batches and the
            sequences of each; gives back the iterator that the schedule is to read.
    """
    import megatron.training.training as training

    choose: Any = training.get_forward_backward_func

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        schedule = choose(*args, **kwargs)

        def run(*, data_iterator: Any, num_microbatches: int, micro_batch_size: int, **rest: Any) -> Any:
            data = action(data_iterator, num_microbatches, micro_batch_size)
            sizes = {"num_microbatches": num_microbatches, "micro_batch_size": micro_batch_size}
            return schedule(data_iterator=data, **sizes, **rest)

        return run

    reason = "a teacher on another layout runs before its student (distillation with one)"
    replace(training, "get_forward_backward_func", get_forward_backward_func, reason)


def override_parameters(overrides: Callable[[Any], dict[Any, Any]]) -> None:
    """Give some parameters other settings of the optimizer than the run's, such as a learning rate of their own.

    Args:
        overrides: From Megatron's `OptimizerConfig` to its `ParamKey`s and what is other for them.
    """
    import megatron.training.training as training

    standard: Any = training.get_standard_config_overrides

    def get_standard_config_overrides(config: Any) -> dict[Any, Any]:
        return {**standard(config), **overrides(config)}

    reason = "layers have learning rates of their own (vision)"
    replace(training, "get_standard_config_overrides", get_standard_config_overrides, reason)


def pipeline_widths(known: Callable[[], tuple[int, int] | None]) -> None:
    """Let pipeline stages exchange tensors of other widths than the model's, of which both sides know.

    Megatron's own way, `variable_seq_lengths`, has them tell each other the shapes at each transfer, and a GPU waits.

    Args:
        known: Asked before each step: channels that this rank's stage receives and sends, or None for the model's.
    """
    import megatron.training.training as training

    choose: Any = training.get_forward_backward_func

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        schedule = choose(*args, **kwargs)

        def run(**rest: Any) -> Any:
            widths = known()
            if widths is not None:
                rest["adjust_tensor_shapes_fn"] = partial(_widened, widths)
            return schedule(**rest)

        return run

    reason = "pipeline stages hand on what a student learns from, too (distillation)"
    replace(training, "get_forward_backward_func", get_forward_backward_func, reason)


def _widened(widths: tuple[int, int], *shapes: list[tuple[int, int, int]]) -> tuple[list[tuple[int, int, int]], ...]:
    """The shapes (s, b, h) that are received and sent, with other widths."""
    return tuple([(s, b, width) for s, b, _ in each] for width, each in zip(widths, shapes, strict=True))


def keep_random_state() -> None:
    """Let the making of data iterators draw nothing from torch's generator.

    Each draws a seed, after a checkpoint's random state has been loaded. Where the host stands in for a GPU, dropout
    draws from the same generator, and a run that goes on would have other masks than one that was never stopped.
    """
    import megatron.training.training as training

    build: Any = training.build_train_valid_test_data_iterators

    def build_train_valid_test_data_iterators(*args: Any, **kwargs: Any) -> Any:
        state = torch.get_rng_state()
        iterators = build(*args, **kwargs)
        torch.set_rng_state(state)
        return iterators

    reason = "a run that goes on has the dropout of one that was never stopped (everywhere)"
    replace(training, "build_train_valid_test_data_iterators", build_train_valid_test_data_iterators, reason)


def divert_scalars(wrap: Callable[[Any], Any]) -> Any:
    """Put `wrap(writer)` in the place of Megatron's TensorBoard writer (`None` where the user asked for none).

    It is the one place where Megatron hands out the loss, gradient norm and learning rate of a step in full precision.

    Returns:
        The new writer.
    """
    import megatron.training.global_vars as global_vars

    writer = wrap(global_vars._GLOBAL_TENSORBOARD_WRITER)
    replace(global_vars, "_GLOBAL_TENSORBOARD_WRITER", writer, "every scalar also goes to metrics.jsonl (everywhere)")
    return writer
