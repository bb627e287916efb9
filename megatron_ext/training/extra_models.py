"""Models beside the one that a job trains: frozen (a teacher, an encoder), or trained too (projections, a router).

A task declares them (`Task.extra_models`), and its step finds them by `beside(model)["name"]`. They are built when the
trained model is, for each of its pipeline stages, and are no part of it: none of its checkpoints, exports, optimizers
and gradient buffers knows of them. What is frozen is read again at each start. What is trained has an optimizer of its
own (`extra_optimizers`), is saved in `--save`/NAME before each checkpoint of the trained model, and goes on with it bit
for bit; a run that begins from `--pretrained-checkpoint` begins with it anew.

Distillation's teacher beside the student, its projections and its corrected teacher are three such models. A teacher on
another layout or on ranks of its own (`distillation.teachers.remote`) is not: its stages and process groups are not the
student's, it runs a whole step ahead of the student's schedule, and its own ranks run no training loop at all.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import get_attr_wrapped_model

from megatron_ext.checkpoint.start import Start
from megatron_ext.errors import ConfigError
from megatron_ext.training.extra_optimizers import ExtraOptimizer, Saved, as_global


@dataclass(frozen=True)
class ExtraModel:
    """A model beside the trained one.

    Attributes:
        name: Its own, and that of its folder in the run directory if it is trained.
        build: From this rank's chunks of the trained model and Megatron's arguments to as many modules of this one
            (`module_builder.build_beside` makes them of a Megatron configuration).
        load: Reads the first weights into the modules (`module_builder.read_weights` does, of a checkpoint); by default
            they are those that `build` has given.
        optimizer: What trains it; None if it is frozen.
        args: Megatron's arguments where they are not the run's: learning rate, type of the parameters, dropout.
    """

    name: str
    build: Callable[[list[Any], Namespace], list[Any]]
    load: Callable[[list[Any]], None] = lambda modules: None
    optimizer: type[ExtraOptimizer] | None = None
    args: Namespace | None = None


class Beside(NamedTuple):
    """The extra models on one chunk of the trained model, by name."""

    frozen: dict[str, Any]
    trained: dict[str, Any]


class ExtraModels:
    """All extra models of a run.

    Args:
        declared: Them.
        args: Megatron's validated namespace.
        start: The step from which those that are trained go on, or with `--skip-train` are measured; None if they
            begin.

    Raises:
        ConfigError: One that is trained would not see the loss scale of the run's own optimizer.
    """

    def __init__(self, declared: Sequence[ExtraModel], args: Namespace, start: Start | None) -> None:
        self._declared, self._args, self._start = declared, args, start
        self._trained: list[ExtraOptimizer] = []
        self._groups: Any = None
        names = [extra.name for extra in declared if extra.optimizer is not None]
        if names and args.fp16:
            raise ConfigError("models that are trained beside another do not go with --fp16", got=names, legal="--bf16")

    def build(self, chunks: list[Any]) -> list[Any]:
        """A `pre_wrap_hook`: build them beside the trained model's chunks, which come back as they were.

        Raises:
            CheckpointError: What an earlier start has saved of one of them is not there.
        """
        if not self._declared:
            return chunks
        self._groups = chunks[0].pg_collection
        for chunk in chunks:
            chunk.extra_models = Beside({}, {})
        for extra in self._declared:
            with as_global(self._own_args(extra)) as args:
                modules = self._build(extra, chunks, args)
            for chunk, module in zip(chunks, modules, strict=True):
                getattr(chunk.extra_models, "frozen" if extra.optimizer is None else "trained")[extra.name] = module
        if self._trained:
            chunks[0].config.finalize_model_grads_func = self._finalize
        return chunks

    def save(self, iteration: int) -> None:
        """Write those that are trained, on every rank, before the trained model's checkpoint."""
        for optimizer in self._trained:
            optimizer.save(iteration)

    def _build(self, extra: ExtraModel, chunks: list[Any], args: Namespace) -> list[Any]:
        modules = extra.build(chunks, args)
        if extra.optimizer is None:
            for module in modules:
                module.to(torch.cuda.current_device(), args.params_dtype).requires_grad_(False).eval()
            extra.load(modules)
            return modules
        start, weights = self._start, extra.load
        if start is not None:
            weights = Saved(start.directory / extra.name, start.step.iteration)
        optimizer = extra.optimizer(modules, args, self._groups, weights)
        self._trained.append(optimizer)
        return optimizer.modules

    def _own_args(self, extra: ExtraModel) -> Namespace:
        """A copy of Megatron's arguments for one of them, which is to be loaded from nowhere yet."""
        args = Namespace(**vars(extra.args or self._args))
        args.save = str(Path(self._args.save) / extra.name) if self._args.save else None
        args.load = args.pretrained_checkpoint = args.ckpt_step = None
        args.finetune, args.no_load_optim, args.no_load_rng = False, args.skip_train, args.skip_train
        # The schedule does not know of this model: no communication may wait for it.
        args.overlap_grad_reduce = args.overlap_param_gather = False
        return args

    def _finalize(self, model: list[Any], num_tokens: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> None:
        """Megatron's `finalize_model_grads_func`: the end of a step's backward passes."""
        own = None if num_tokens is None else num_tokens.clone()  # Megatron sums it in place
        finalize_model_grads(model, num_tokens, *args, **kwargs)
        divisor = self._groups.dp_cp.size() if num_tokens is None else num_tokens.clamp(min=1)
        samples = get_num_microbatches() * self._args.micro_batch_size * self._args.data_parallel_size
        for optimizer in self._trained:
            optimizer.step(own, divisor, samples)


def beside(model: Any) -> dict[str, Any]:
    """The extra models beside a chunk of the trained model, by name; those that are trained are in its mode."""
    own: Beside = get_attr_wrapped_model(model, "extra_models")
    for module in own.trained.values():
        if module.training != model.training:
            module.train(model.training)
    return own.frozen | own.trained
