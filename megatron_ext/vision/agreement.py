"""MESA: the network is to agree with what the average of its weights makes of the same images.

The average's prediction costs a second forward pass and no backward pass, and leads to flatter minima (Du et al.,
"Sharpness-Aware Training for Free", arXiv 2205.14083, section 4). Both are softened by a temperature of 3, and the
divergence counts 50 times, as in MambaVision's published recipe, whose weights are stated for that form.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

TEMPERATURE, FACTOR = 3.0, 50.0


def disagreement(logits: Float[Tensor, "b classes"], average: Float[Tensor, "b classes"]) -> Float[Tensor, ""]:
    """The divergence KL(average || network) of softened predictions, in nats, summed over images."""
    own, goal = (F.log_softmax(each.float() / TEMPERATURE, -1) for each in (logits, average))
    return F.kl_div(own, goal, reduction="sum", log_target=True)
