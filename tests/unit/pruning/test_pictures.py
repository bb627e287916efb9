import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_ext.pruning import pictures
from megatron_ext.pruning.report import title


def test_a_bar_far_above_the_others_leaves_the_picture() -> None:
    """Otherwise it flattens all of them, as the first layer's does."""
    tops = []
    for heights in ([9.0, 1.0, 0.8], [2.0, 1.0, 0.8], [9.0], [0.0, 0.0]):
        ax = Figure().subplots()
        pictures._bars(ax, np.array(heights), 0.75, np.array(["#000000"] * len(heights)))
        pictures._cut_off(ax, np.array(heights))
        tops.append(ax.get_ylim()[1])
    assert tops[0] == pytest.approx(1.25)
    assert tops[1] > 2
    assert tops[2] > 9


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hidden", "hidden channels"),
        ("layers.12.ffn", "12: FFN neurons"),
        ("layers.0.mamba_head", "0: Mamba-2 heads"),
        ("depth.block_influence", "block influence of sub-layers"),
        ("depth.shapley_loss.blocks", "shapley loss of layers"),
        ("depth.loss.mlp", "loss of mlp sub-layers"),
    ],
)
def test_panels_have_titles_for_people(name: str, expected: str) -> None:
    assert title(name) == expected
