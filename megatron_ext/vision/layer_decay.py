"""Learning rates by depth: each layer's is smaller by a factor than that of the layer after it (arXiv 2003.10555).

The stem is the first layer, each block one, and norm and classifier are the last, whose rate is `--lr`. What leads from
a stage to the next belongs to the next one's first block. Those are timm's layers of this network, too.
"""

from typing import Any

from megatron_ext.vision.architecture import MambaVision


def depths(model: MambaVision) -> dict[str, int]:
    """The number of each layer, by the first part of its weights' names."""
    places = {(stage, block) for stage, blocks in enumerate(model.stages) for block in range(len(blocks))}
    places |= {(stage, 0) for stage in (1, 2, 3)}
    order = {place: number for number, place in enumerate(sorted(places), start=1)}
    found = {f"stages.{stage}.blocks.{block}.": number for (stage, block), number in order.items()}
    found |= {f"downsamples.{stage - 1}.": order[stage, 0] for stage in (1, 2, 3)}
    return {"stem.": 0, **found, "norm.": len(order) + 1, "head.": len(order) + 1}


def factors(model: MambaVision, decay: float) -> dict[str, float]:
    """What each layer's learning rate is multiplied by, by the first part of its weights' names."""
    numbers = depths(model)
    return {name: decay ** (max(numbers.values()) - number) for name, number in numbers.items()}


def overrides(model: MambaVision, decay: float, config: Any) -> dict[Any, Any]:
    """Megatron's overrides of its optimizer's parameter groups; none for the last layer, whose rate is the run's.

    Args:
        model: The network.
        decay: From a layer to the one before it.
        config: Megatron's `OptimizerConfig`.
    """
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    found = {}
    for prefix, factor in factors(model, decay).items():
        if factor == 1:
            continue
        # `lr_mult` is only noted: by it groups are known again in a checkpoint, whatever the rate is by then.
        own = {"max_lr": factor * config.lr, "min_lr": factor * (config.min_lr or 0.0), "lr_mult": factor}
        of_layer = ParamWithNamePredicate(prefix, lambda _, name, start=f"backbone.{prefix}": start in name)
        found[ParamKey(with_name_predicate=of_layer)] = own
    return found
