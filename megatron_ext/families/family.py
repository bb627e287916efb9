"""A model family: from flags to a description of a model, and from that to Megatron's module.

The layer pattern (`families.language_model`) is one; a family of a wing derives from `DataclassFamily`, whose
models are frozen dataclasses of flags.
"""

from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.start import Start
from megatron_ext.errors import ConfigError, nearest
from megatron_ext.models import megatron_args
from megatron_ext.models.argument_mappings import Argument
from megatron_ext.models.training_cost import Layout, state_bytes
from megatron_ext.options.early_flags import read_early
from megatron_ext.options.fields import add_options, read_options, to_flags

if TYPE_CHECKING:
    from megatron_ext.ops.autotune import Shape


@runtime_checkable
class Model(Protocol):
    """What a model is, as one frozen value."""

    def num_parameters(self) -> int:
        """Parameters in all, before any parallel split."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `config.yaml`, `results.json` and checkpoints."""
        ...


class ModelFamily(ABC):
    """Flags to models of one kind.

    Attributes:
        name: Written into checkpoints and results.
        reads_text: Whether a job of this family needs a tokenizer and reads Megatron's data sets of tokens.
    """

    name: str
    reads_text: ClassVar[bool] = False

    @abstractmethod
    def flags(self, early: Namespace, start: Start | None) -> tuple[list[str], str]:
        """Flags of the model that `--preset` or the step to load names, and where they came from, for people."""

    @abstractmethod
    def add_flags(self, parser: ArgumentParser) -> None:
        """Flags of our own that describe a model."""

    def early_arguments(self) -> Sequence[Argument]:
        """Megatron's that describe a model; they are known before Megatron's own parser can be made."""
        return ()

    def ssm_shape(self, early: Namespace) -> "Shape | None":
        """The state-space layer of a model, to choose kernels by; None if it has none.

        Args:
            early: The early flags, those of the model among them.
        """
        return None

    @abstractmethod
    def check(self, args: Namespace, loads: bool) -> None:
        """Find what is wrong with the model before Megatron does.

        Args:
            args: Parsed, not validated.
            loads: Whether the job can only load a model, not describe one.

        Raises:
            ConfigError: Says what.
        """

    @abstractmethod
    def from_args(self, args: Namespace) -> Model:
        """The model that Megatron's arguments and ours describe."""

    @abstractmethod
    def with_model(self, args: Namespace, model: Any) -> Namespace:
        """A copy of validated arguments that describes another model on the same layout."""

    @abstractmethod
    def check_layout(self, args: Namespace, model: Any) -> None:
        """Find what the parallel layout does not divide.

        Raises:
            ConfigError: Says what.
        """

    @abstractmethod
    def config(self, args: Namespace, model: Any) -> Any:
        """Megatron's `ModelConfig`, which builds the model."""

    @abstractmethod
    def rows(self, args: Namespace, model: Any) -> dict[str, str]:
        """What `--dry-run` says of a model, beside where it came from."""

    @abstractmethod
    def memory(self, model: Any, layout: Layout) -> dict[str, float]:
        """Bytes that training takes on the fullest rank, by component."""

    def share_of_peak(self, model: Any, args: Namespace) -> float | None:
        """What one token a second is of all GPUs' peak; None where operations, or the GPUs' peak, are not known."""
        return None


@dataclass(frozen=True)
class DataclassFamily(ModelFamily):
    """A family whose models are a frozen dataclass of flags (`options.option`), `--{name}-{field}`.

    Attributes:
        name: Also the prefix of the flags.
        model: The dataclass; it has `num_parameters()` and may have `check_layout(tp)`, which raises `ConfigError`.
        build: From Megatron's `TransformerConfig` (layout, precision, initialisation), the model and the process groups
            to the module, a `MegatronModule`; of a family that splits into a pipeline also from the
            `models.module_builder.Stage` that it is to be.
        presets: Named models.
        splits: What its models can be split over beside tensor and data parallelism; anything else is refused.
        megatron_flags: What Megatron's parser insists on, of a model that it does not know.
    """

    name: str
    model: type
    build: Callable[..., Any]
    presets: Mapping[str, Any] = field(default_factory=dict)
    splits: frozenset[Literal["pipeline", "context", "expert"]] = frozenset()
    megatron_flags: tuple[str, ...] = (
        "--num-layers", "1", "--hidden-size", "64", "--num-attention-heads", "64", "--seq-length", "1",
        "--max-position-embeddings", "1", "--position-embedding-type", "none", "--tokenizer-type", "NullTokenizer",
        "--vocab-size", "1",
    )  # fmt: skip

    def add_flags(self, parser: ArgumentParser) -> None:
        """The fields of the dataclass."""
        add_options(parser, self.model, self.name)

    def flags(self, early: Namespace, start: Start | None) -> tuple[list[str], str]:
        """Of a preset's name, or of what a checkpoint says that it holds."""
        front = list(self.megatron_flags)
        if early.preset in self.presets:
            return [*front, *self.model_flags(self.presets[early.preset])], early.preset
        if early.preset is not None and not Path(early.preset).is_dir():
            raise ConfigError(f"unknown preset {early.preset!r}", legal=nearest(early.preset, self.presets))
        step = layout.find(early.preset) if early.preset is not None else start.step if start is not None else None
        if step is None:
            return front, "flags"
        return [*front, *self.model_flags(self.on_disk(step))], str(step.path)

    def model_flags(self, model: Any) -> list[str]:
        """A model as a command line."""
        return to_flags(model, self.name)

    def check(self, args: Namespace, loads: bool) -> None:
        """What the dataclass itself refuses, flags of a language model, and what the family does not split."""
        self.from_args(args)
        set_here = read_early(self.megatron_flags, {}, megatron_args.arguments())
        for argument in megatron_args.arguments():
            own, value = getattr(set_here, argument.name), getattr(args, argument.name, None)
            if value not in (None, argument.default if own is None else own):
                what = f"this describes a language model, and would do nothing to a {self.name} model"
                raise ConfigError(what, got=" ".join(argument.to_flags(value)), legal=f"flags --{self.name}-*")
        flags = {"pipeline": "pipeline-model-parallel-size", "context": "context-parallel-size"}
        flags["expert"] = "expert-model-parallel-size"
        for kind, flag in flags.items():
            if (size := getattr(args, flag.replace("-", "_"))) != 1 and kind not in self.splits:
                raise ConfigError(f"a {self.name} model has no {kind} parallelism", got=f"--{flag} {size}", legal="1")

    def from_args(self, args: Namespace) -> Any:
        """The dataclass with the values of its flags."""
        return read_options(args, self.model, self.name)

    def with_model(self, args: Namespace, model: Any) -> Namespace:
        """Its fields as the values of its flags."""
        saved = {"ext_family": self.name, "ext_model": model.to_dict() | {"num_parameters": model.num_parameters()}}
        return Namespace(**vars(args) | self._values(model) | saved)

    def check_layout(self, args: Namespace, model: Any) -> None:
        """What the model itself says."""
        if hasattr(model, "check_layout"):
            model.check_layout(args.tensor_model_parallel_size)

    def config(self, args: Namespace, model: Any) -> Any:
        """A configuration that carries the model to `build`."""
        from megatron.training.argument_utils import core_transformer_config_from_args

        from megatron_ext.models.module_builder import ModuleConfig

        return ModuleConfig(
            transformer=core_transformer_config_from_args(args), model=model, build=self.build,
            pipelines="pipeline" in self.splits,
        )  # fmt: skip

    def rows(self, args: Namespace, model: Any) -> dict[str, str]:
        """Every field, and the parameters."""
        fields = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in model.to_dict().items())
        return {"sizes": fields, "parameters": f"{model.num_parameters():,}"}

    def memory(self, model: Any, layout: Layout) -> dict[str, float]:
        """Weights, gradients and optimizer; activations are not known."""
        return state_bytes(model.num_parameters() / layout.tp, layout)

    def on_disk(self, step: layout.Step) -> Any:
        """The model that a step's arguments describe; what it does not say, as of before there was such a flag.

        Raises:
            ConfigError: It holds another kind of model.
        """
        args: Any = layout.common(step.path).get("args")
        if getattr(args, "ext_family", None) != self.name:
            held = getattr(args, "ext_family", None) or "a language model"
            raise ConfigError("the checkpoint holds another kind of model", got=f"{step.path}: {held}", legal=self.name)
        defaults = {f"{self.name}_{each.name}": each.default for each in fields(self.model)}
        return self.from_args(Namespace(**defaults | vars(args)))

    def _values(self, model: Any) -> dict[str, Any]:
        """The fields of a model by the names that parsed arguments have."""
        return {f"{self.name}_{each.name}": getattr(model, each.name) for each in fields(self.model)}
