"""A trained checkpoint as a plain network, whatever layout saved it."""

from pathlib import Path

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.errors import CheckpointError
from megatron_ext.vision.architecture import MambaVision
from megatron_ext.vision.average import buffer_name
from megatron_ext.vision.family import FAMILY
from megatron_ext.vision.network import Network


def model_of(step: Path) -> MambaVision:
    """The network that a step holds.

    Raises:
        CheckpointError: It holds another kind of model, or cannot be read.
    """
    if (held := layout.family(step)) != FAMILY.name:
        raise CheckpointError("no image network", got=f"{step}: {held or 'a language model'}", legal=FAMILY.name)
    return FAMILY.from_args(layout.common(step)["args"])


def read_network(path: Path, averaged: bool = False) -> Network:
    """The network of a step, or of the newest step in a directory, in evaluation mode.

    Args:
        path: The checkpoint.
        averaged: Whether its weights are to be their moving average.

    Raises:
        CheckpointError: There is none, it holds another kind of model, or it is damaged.
    """
    step = layout.find(path)
    network, reader = Network(model_of(step.path)).eval(), CheckpointReader(step.path)
    if averaged and "average.step" not in reader.shapes:
        raise CheckpointError("the checkpoint has no average of its weights", got=step.path, legal="averaged=False")
    state = {}
    for name, value in network.state_dict().items():
        of_average = averaged and value.is_floating_point()
        state[name] = reader.read(f"average.{buffer_name(name)}" if of_average else f"backbone.{name}")
    network.load_state_dict(state)
    return network
