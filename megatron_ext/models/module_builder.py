"""Megatron's configuration and builder for modules that it has none of its own for, and for models beside another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from megatron.core import dist_checkpointing
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.base import ModelBuilder, ModelConfig, compose_hooks
from megatron.training.models.dist_utils import unimodal_build_distributed_models


class Stage(NamedTuple):
    """Which part of a model a pipeline rank builds.

    Attributes:
        pre_process: Whether it is the first, which reads the data.
        post_process: Whether it is the last, whose output the losses are of.
        vp_stage: Its number in a virtual pipeline; None without one.
    """

    pre_process: bool
    post_process: bool
    vp_stage: int | None


@dataclass(kw_only=True)
class ModuleConfig(ModelConfig):
    """What builds a module.

    Attributes:
        transformer: Layout, precision and initialisation.
        model: The family's description of the model.
        build: From these and the process groups to the module, or with a `Stage` to that part of it.
        pipelines: Whether `build` takes a `Stage`.
    """

    builder: ClassVar[str] = "megatron_ext.models.module_builder.ModuleBuilder"
    transformer: TransformerConfig
    model: Any
    build: Callable[..., Any]
    pipelines: bool = False

    def __getattr__(self, name: str, /) -> Any:
        # Megatron asks the whole configuration for fields of the transformer's.
        if name.startswith("__") or name == "transformer":
            raise AttributeError(name)
        return getattr(self.transformer, name)


class ModuleBuilder(ModelBuilder[Any, ModuleConfig]):
    """Builds the module, or a pipeline rank's stages of it."""

    def build_model(
        self,
        pg_collection: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> Any:
        """The module, on `pg_collection`'s groups."""
        config: Any = self._model_config
        stage = [Stage(bool(pre_process), bool(post_process), vp_stage)] if config.pipelines else []
        module = config.build(config.transformer, config.model, pg_collection, *stage)
        module.pg_collection, module.vp_stage = pg_collection, vp_stage  # what Megatron's loop asks every model for
        for own in stage:
            module.pre_process, module.post_process = own.pre_process, own.post_process
        return module

    def build_distributed_models(self, pg_collection: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """The module in Megatron's wrappers."""
        config: Any = self._model_config
        before, after = compose_hooks(config.pre_wrap_hooks), compose_hooks(config.post_wrap_hooks)
        return after(
            unimodal_build_distributed_models(
                self.build_model, config.transformer, pg_collection, *args, pre_wrap_hook=before, **kwargs
            )
        )


def build_beside(config: Any, chunks: Sequence[Any]) -> list[Any]:
    """A model of a Megatron `ModelConfig`, on the process groups and pipeline stages of another one's chunks."""
    builder = config.get_builder_cls()(config)
    return [
        builder.build_model(
            chunk.pg_collection,
            pre_process=getattr(chunk, "pre_process", True),
            post_process=getattr(chunk, "post_process", True),
            vp_stage=chunk.vp_stage,
        )
        for chunk in chunks
    ]


def read_weights(chunks: Sequence[Any], step: Path) -> None:
    """Read the weights of a checkpoint's step into chunks of its model, whatever layout saved them."""
    metadata = dist_checkpointing.load_content_metadata(str(step)) or {}
    wanted = {str(i): chunk.sharded_state_dict(metadata=dict(metadata)) for i, chunk in enumerate(chunks)}
    found: Any = dist_checkpointing.load(wanted, str(step))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(found[str(i)])
