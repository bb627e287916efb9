"""A trained checkpoint as a plain network, whatever layout saved it."""

from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.errors import CheckpointError
from megatron_ext.vision.average import buffer_name
from megatron_ext.vision.family import FAMILY
from megatron_ext.vision.network import Network


def read_network(path: Path, averaged: bool = False) -> Network:
    """The network of a step, or of the newest step in a directory, in evaluation mode.

    Args:
        path: The checkpoint.
        averaged: Whether its weights are to be their moving average.

    Raises:
        CheckpointError: There is none, it holds another kind of model, or it is damaged.
    """
    step = layout.find(path)
    args: Any = layout.common(step.path).get("args")
    if (held := getattr(args, "ext_family", None)) != FAMILY.name:
        raise CheckpointError("no image network", got=f"{step.path}: {held or 'a language model'}", legal=FAMILY.name)
    network, reader = Network(FAMILY.from_args(args)).eval(), CheckpointReader(step.path)
    if averaged and "average.step" not in reader.shapes:
        raise CheckpointError("the checkpoint has no average of its weights", got=step.path, legal="averaged=False")
    state = {}
    for name, value in network.state_dict().items():
        of_average = averaged and value.is_floating_point()
        state[name] = reader.read(f"average.{buffer_name(name)}" if of_average else f"backbone.{name}")
    network.load_state_dict(state)
    return network
