"""A trained checkpoint as a plain network, whatever layout saved it."""

from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.errors import CheckpointError
from megatron_ext.vision.family import FAMILY
from megatron_ext.vision.network import Network

PREFIX = "backbone."  # of a network in Megatron's module


def read_network(path: Path) -> Network:
    """The network of a step, or of the newest step in a directory, in evaluation mode.

    Raises:
        CheckpointError: There is none, it holds another kind of model, or it is damaged.
    """
    step = layout.find(path)
    args: Any = layout.common(step.path).get("args")
    if (held := getattr(args, "ext_family", None)) != FAMILY.name:
        raise CheckpointError("no image network", got=f"{step.path}: {held or 'a language model'}", legal=FAMILY.name)
    network, reader = Network(FAMILY.from_args(args)).eval(), CheckpointReader(step.path)
    network.load_state_dict({name: reader.read(PREFIX + name) for name in network.state_dict()})
    return network
