"""What trains a model beside the run's own: Megatron's optimizer for a split one, AdamW for one that is nowhere split.

Both step when Megatron has reduced the gradients of the run's own model, save before its checkpoints, and go on bit for
bit.
"""

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.utils import unwrap_model
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.checkpointing import save_checkpoint
from megatron.training.global_vars import get_args, set_args
from megatron.training.training import get_optimizer_param_scheduler, setup_model_and_optimizer
from torch import Tensor

from megatron_ext.checkpoint.atomic import atomic_write
from megatron_ext.checkpoint.parameters import read_parameter, write_parameter
from megatron_ext.checkpoint.resume import own_resume_point
from megatron_ext.errors import CheckpointError
from megatron_ext.models.module_builder import ModuleConfig

AGAIN = "all that the run saved, in the directory that is resumed; or --finetune and a new --save to begin anew"
STATE = "state.json"


Load = Callable[[list[Any]], None]


class Saved(NamedTuple):
    """What an earlier start of the run has left of a model beside its own: one step in a folder."""

    folder: Path
    iteration: int

    @property
    def path(self) -> Path:
        """The step."""
        return self.folder / f"iter_{self.iteration:07d}"

    def error(self) -> CheckpointError:
        """That it, or a part of it, is not there."""
        return CheckpointError("what was trained beside the model is not there", got=self.path, legal=AGAIN)


class ExtraOptimizer(Protocol):
    """Trains the chunks of one model.

    It is made of them, of Megatron's arguments for them (`save` is their folder), of the process groups of the run's
    own model, and of what reads their first weights, or of what the run goes on from: `CheckpointError` if it is lost.
    """

    modules: list[Any]
    """The chunks as a step calls them."""

    def __init__(self, modules: list[Any], args: Namespace, groups: Any, weights: Load | Saved) -> None: ...

    def step(self, tokens: Tensor | None, divisor: Tensor | float, samples: int) -> None:
        """One step, after the last micro-batch.

        Args:
            tokens: Tokens (or samples) of this data-parallel rank, if Megatron divides by them.
            divisor: What the sum of gradients over data-parallel ranks is divided by.
            samples: Samples of the step, by which the learning rate goes on.
        """
        ...

    def save(self, iteration: int) -> None:
        """Write what `Saved` finds, on every rank."""
        ...


class ShardedOptimizer:
    """Megatron's optimizer, distributed or not, for Megatron modules on the run's own layout (see `ExtraOptimizer`).

    What is saved are ordinary checkpoints, which `convert` exports and another run may load.
    """

    def __init__(self, modules: list[Any], args: Namespace, groups: Any, weights: Load | Saved) -> None:
        self._args = args
        if isinstance(weights, Saved):
            if own_resume_point(weights.folder) is None or not weights.path.is_dir():
                raise weights.error()
            args.load, args.ckpt_step = str(weights.folder), weights.iteration
        built = iter(modules)
        config = ModuleConfig(transformer=modules[0].config, model=None, build=lambda *_: next(built))
        container = pretrain_cfg_container_from_args(args, config)
        found: Any = setup_model_and_optimizer(
            ModelType.encoder_or_decoder, cfg_container=container, pg_collection=groups
        )
        self.modules, self._optimizer, self._scheduler = found  # with `--skip-train` the modules alone
        if not isinstance(weights, Saved):
            weights(unwrap_model(self.modules))
        if self._optimizer is not None:
            if not isinstance(weights, Saved):
                self._optimizer.reload_model_params()  # its own, which may be of another type
            self._zero()

    def step(self, tokens: Tensor | None, divisor: Tensor | float, samples: int) -> None:
        """Reduce the gradients as Megatron does, and step."""
        finalize_model_grads(self.modules, tokens)
        self._optimizer.step()
        self._scheduler.step(increment=samples)
        self._zero()

    def save(self, iteration: int) -> None:
        """Write a checkpoint."""
        run: Any = get_args()
        self._args.consumed_train_samples, self._args.iteration = run.consumed_train_samples, iteration
        with as_global(self._args):
            save_checkpoint(iteration, self.modules, self._optimizer, self._scheduler, 0)

    def _zero(self) -> None:
        for chunk in self.modules:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()


class ReplicatedOptimizer:
    """AdamW in fp32 for a small module that every rank of its pipeline stage has whole (see `ExtraOptimizer`).

    It has parameters only, whose names differ from stage to stage; numbers beside them are the `get_extra_state` of the
    last stage's module, a dictionary. Each gradient is clipped by itself. What is saved, a file for each parameter and
    `state.json`, does not depend on the layout.
    """

    def __init__(self, modules: list[Any], args: Namespace, groups: Any, weights: Load | Saved) -> None:
        self.modules = [module.to(torch.cuda.current_device(), torch.float32) for module in modules]
        self._args, self._groups, self._samples = args, groups, 0
        named = [pair for module in modules for pair in module.named_parameters()]
        self._weights: dict[str, torch.nn.Parameter] = dict(named)
        assert len(self._weights) == len(named), "two stages have parameters of one name"
        assert not any(list(module.buffers()) for module in modules), "buffers are not saved"
        # An optimizer wants parameters; a rank without any has a learning rate all the same.
        self._optimizer = torch.optim.AdamW(list(self._weights.values()) or [torch.nn.Parameter(torch.zeros(1))])
        self._scheduler: Any = None if args.skip_train else get_optimizer_param_scheduler(self._optimizer)
        if isinstance(weights, Saved):
            self._load(weights)
        else:
            weights(self.modules)

    def step(self, tokens: Tensor | None, divisor: Tensor | float, samples: int) -> None:
        """Sum over data-parallel ranks, and over tensor ranks that have had a part of the sequence each; and step."""
        for weight in self._weights.values():
            gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
            dist.all_reduce(gradient, group=self._groups.dp_cp)
            if self._args.sequence_parallel:
                dist.all_reduce(gradient, group=self._groups.tp)
            weight.grad = gradient.div_(divisor)
            if self._args.clip_grad:
                torch.nn.utils.clip_grad_norm_([weight], self._args.clip_grad)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._scheduler.step(increment=samples)
        self._samples += samples

    def save(self, iteration: int) -> None:
        """Write each parameter with its moments, on the first rank of its stage."""
        folder = Saved(Path(self._args.save), iteration).path
        if self._groups.dp_cp.rank() == 0 and self._groups.tp.rank() == 0:
            for name, weight in self._weights.items():
                write_parameter(folder / f"{name}.safetensors", weight, self._optimizer.state[weight])
            if self._groups.pp.rank() == self._groups.pp.size() - 1:
                with atomic_write(folder / STATE) as temporary:
                    temporary.write_text(json.dumps({**_numbers(self.modules[-1]), "samples": self._samples}) + "\n")
        dist.barrier()

    def _load(self, saved: Saved) -> None:
        try:
            numbers = json.loads((saved.path / STATE).read_text())
            self._samples = int(numbers.pop("samples"))
            for module in self.modules:
                if _numbers(module):
                    module.set_extra_state(numbers)
            for name, weight in self._weights.items():
                self._optimizer.state[weight] = read_parameter(saved.path / f"{name}.safetensors", weight)
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise saved.error() from error
        if self._scheduler is not None:
            self._scheduler.step(increment=self._samples)


def _numbers(module: torch.nn.Module) -> dict[str, float]:
    """What a module remembers beside its parameters."""
    return module.state_dict().get("_extra_state", {})


@contextmanager
def as_global(args: Namespace) -> Iterator[Namespace]:
    """Let these be the arguments that Megatron reads from a global."""
    before = get_args()
    set_args(args)
    try:
        yield args
    finally:
        set_args(before)
