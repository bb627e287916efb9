"""Learning rates by depth: timm's own factors of every parameter, and Megatron's overrides."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from timm.optim import param_groups_layer_decay
from vision_oracle import SMALL

from megatron_ext.models.bootstrap import prepare
from megatron_ext.vision.layer_decay import factors, overrides
from megatron_ext.vision.timm_models import TimmMambaVision

prepare()  # before Megatron is imported


@pytest.mark.parametrize("pattern", ["C/CCC/MMS/MS", "/C//M"])
def test_factors_are_those_of_timm(pattern: str) -> None:
    """And each parameter has one."""
    model = TimmMambaVision(replace(SMALL, pattern=pattern))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = factors(model.model, 0.5)
    seen = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        for parameter in group["params"]:
            seen[names[id(parameter)]] = group["lr_scale"]
    for name in names.values():
        (own,) = [factor for prefix, factor in found.items() if name.startswith(prefix)]
        assert own == seen[name], name


def test_megatron_is_told_of_all_layers_but_the_last() -> None:
    config = SimpleNamespace(lr=0.4, min_lr=0.04)
    found = overrides(SMALL, 0.5, config)
    names = {
        "module.module.backbone.stem.0.weight": 0.5**7,
        "module.module.backbone.stages.3.blocks.1.norm1.bias": 0.5,
        "module.module.backbone.head.weight": None,
    }
    for name, factor in names.items():
        own = [value for key, value in found.items() if key.matches(SimpleNamespace(shape=(1,)), name)]
        expected = [] if factor is None else [{"max_lr": 0.4 * factor, "min_lr": 0.04 * factor, "lr_mult": factor}]
        assert own == expected
