"""Where Megatron reads a step into model, optimizer and schedule: what it does not expect of a run that goes on.

It finds a group of parameters again by all that the optimizer does with it, learning rate included, and stops at
another one; it asks for the moments of an optimizer that has not taken a step yet; and where it finds nothing to load
it ends with exit status 0.
"""

from dataclasses import dataclass
from typing import Any

from megatron_ext.errors import CheckpointError
from megatron_ext.platform.replacements import replace

SCHEDULED = ("max_lr", "min_lr", "start_wd", "end_wd")
"""What the command line says of a group, and not what the group is."""

STATE = ("params", "step")
"""What is not a setting in a group of an optimizer."""


@dataclass
class Resume:
    """How the next step is to be loaded.

    Attributes:
        keep_settings: Whether the optimizer's settings are the checkpoint's, and not those of this run.
        stepped: Whether the optimizer had taken a step.
    """

    keep_settings: bool = False
    stepped: bool = True


_resume = Resume()


def prepare_resume(keep_settings: bool, stepped: bool) -> None:
    """Say how Megatron is to load a step from now on.

    Args:
        keep_settings: Whether learning rate, betas, weight decay and the like are those of the checkpoint.
        stepped: Whether its optimizer had taken a step; if not, there are no moments to load.
    """
    import megatron.core.optimizer.distrib_optimizer as distributed
    import megatron.core.optimizer.optimizer as plain
    import megatron.training.training as training

    _resume.keep_settings, _resume.stepped = keep_settings, stepped
    if getattr(training.load_checkpoint, "resumes", False):
        return
    load: Any = training.load_checkpoint
    keys: tuple[str, ...] = plain.param_group_identifier_keys
    structure = tuple(key for key in keys if key not in SCHEDULED)

    def load_checkpoint(ddp_model: Any, optimizer: Any, opt_param_scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        parts = [] if optimizer is None else [part for part in _parts(optimizer) if not part.is_stub_optimizer]
        groups = [list(part.param_groups) for part in parts]
        known = structure if all(_differ(own, structure) for own in groups) else keys
        plain.param_group_identifier_keys = distributed.param_group_identifier_keys = known  # type: ignore[misc]
        if not _resume.stepped:
            for part in parts:
                part.init_state_fn = lambda *_: None
        settings = [[{k: v for k, v in group.items() if k not in STATE} for group in own] for own in groups]
        try:
            found = load(ddp_model, optimizer, opt_param_scheduler, *args, **kwargs)
        except SystemExit as end:
            raise CheckpointError("Megatron found nothing that it could load", legal="see its last lines") from end
        if not _resume.keep_settings:
            for part, own in zip(parts, settings, strict=True):
                for group, setting in zip(part.param_groups, own, strict=True):
                    group.update(setting)
            if parts and opt_param_scheduler is not None:
                opt_param_scheduler.step(0)  # the learning rate of now
        return found

    load_checkpoint.resumes = True  # type: ignore[attr-defined]
    reason = "a run goes on with other settings of its optimizer, and never ends silently (everywhere)"
    replace(training, "load_checkpoint", load_checkpoint, reason)
    for module in (plain, distributed):
        replace(module, "param_group_identifier_keys", keys, "groups are known by their structure (everywhere)")


def _parts(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _differ(groups: list[dict[str, Any]], keys: tuple[str, ...]) -> bool:
    """Whether these keys tell the groups apart."""
    found = [tuple(group.get(key, group.get(f"pre_{key}")) for key in keys) for group in groups]
    return len(set(found)) == len(found)
