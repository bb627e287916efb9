"""A family says what its models can be split over; the rest is refused in words, before any process group."""

from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.families.family import DataclassFamily
from megatron_ext.options.fields import option


@dataclass(frozen=True)
class Line:
    width: int = option(8, "Channels.")

    def num_parameters(self) -> int:
        return self.width

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


FAMILY = DataclassFamily("line", Line, build=lambda *inputs: inputs)
SIZES = {"pipeline": "pipeline_model_parallel_size", "context": "context_parallel_size"}
SIZES["expert"] = "expert_model_parallel_size"


@pytest.mark.parametrize("kind", SIZES)
def test_only_what_a_family_splits_is_allowed(kind: Any) -> None:
    alone = Namespace(line_width=8, **dict.fromkeys(SIZES.values(), 1))
    FAMILY.check(alone, loads=False)
    args = Namespace(**vars(alone) | {SIZES[kind]: 2})
    with pytest.raises(ConfigError) as refused:
        FAMILY.check(args, loads=False)
    assert f"a line model has no {kind} parallelism" in str(refused.value)
    assert f"--{SIZES[kind].replace('_', '-')} 2" in str(refused.value)
    replace(FAMILY, splits=frozenset({kind})).check(args, loads=False)


@pytest.mark.parametrize("pipelines", [False, True])
def test_a_family_with_a_pipeline_builds_a_stage(pipelines: bool) -> None:
    from megatron_ext.models.bootstrap import prepare

    prepare()  # before Megatron is imported
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_ext.models.module_builder import ModuleBuilder, ModuleConfig, Stage

    class Built:
        def __init__(self, *inputs: Any) -> None:
            self.inputs = inputs

    transformer = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    config = ModuleConfig(transformer=transformer, model=Line(), build=Built, pipelines=pipelines)
    built = ModuleBuilder(config).build_model("groups", pre_process=True, post_process=False, vp_stage=1)
    stage = (Stage(True, False, 1),) if pipelines else ()
    assert built.inputs == (transformer, Line(), "groups", *stage)
    assert (built.pg_collection, built.vp_stage) == ("groups", 1)
