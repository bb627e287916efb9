"""The L2 norm of the weights on a position, against sums written out."""

from pathlib import Path

import torch
from vision_oracle import SMALL, random_network, write_checkpoint

from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.vision.pruning.magnitude import magnitudes


def test_magnitudes_are_sums_over_all_that_lies_on_a_position(tmp_path: Path) -> None:
    network = random_network(SMALL)
    write_checkpoint(tmp_path / "network", network)
    found, state = magnitudes(CheckpointReader(tmp_path / "network"), SMALL), network.state_dict()
    mixer = "stages.2.blocks.1.mixer."  # four heads of eight channels
    for head in range(4):
        total = state[f"{mixer}qkv.weight"][24 * head : 24 * head + 24].square().sum()
        total = total + state[f"{mixer}proj.weight"][:, 8 * head : 8 * head + 8].square().sum()
        torch.testing.assert_close(found["blocks.3.heads"][head], total.sqrt())
    block, channel = "stages.2.blocks.0.", 5
    pair = slice(2 * channel, 2 * channel + 2)
    parts = [state[f"{block}mixer.{name}"][pair] for name in ("in_proj.weight", "conv_weight")]
    parts += [state[f"{block}mixer.x_proj.weight"][:, channel], state[f"{block}mixer.dt_proj.weight"][channel]]
    parts += [state[f"{block}mixer.out_proj.weight"][:, pair]]
    torch.testing.assert_close(found["blocks.2.inner"][channel], torch.cat([p.flatten() for p in parts]).norm())
    both = state["stages.1.blocks.0.conv1.weight"][3].square().sum(), state["stages.1.blocks.0.conv2.weight"][:, 3]
    torch.testing.assert_close(found["blocks.1.conv"][3], (both[0] + both[1].square().sum()).sqrt())
