"""The selective scan of elementary operations alone, for `torch.export` and ONNX: no custom operator, no token loop.

Steps compose: h -> a h + u after h -> b h + v is h -> a b h + (a v + u). So the state after each token, of the last 1,
2, 4, ... tokens, doubles its reach with each pass: log2(l) passes over (b, l, d, n). Only sums are taken, and products
of decays, which are at most one; nothing is divided, so that no decay is too strong. The length is fixed when the graph
is made, the batch is not.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from megatron_ext.ops.ssd.step_sizes import NO_LIMIT, step_sizes


def selective_scan(
    x: Float[Tensor, "b l d"],
    dt: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    D: Float[Tensor, "d"] | None = None,
    z: Float[Tensor, "b l d"] | None = None,
    dt_bias: Float[Tensor, "d"] | None = None,
    initial_states: Float[Tensor, "b d n"] | None = None,
    dt_softplus: bool = False,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n"]]:
    """The scan of `naive.selective_scan`, in float32 (float64 for float64 inputs); see there for the arguments."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    steps, xs = step_sizes(dt, dt_bias, dt_softplus, NO_LIMIT).to(dtype), x.to(dtype)
    decay = torch.exp(steps.unsqueeze(-1) * A.to(dtype))
    states = (steps * xs).unsqueeze(-1) * B.to(dtype).unsqueeze(2)
    if initial_states is not None:
        first = states[:, :1] + decay[:, :1] * initial_states.to(dtype).unsqueeze(1)
        states = torch.cat([first, states[:, 1:]], 1)
    length, reach = x.shape[1], 1
    while reach < length:
        states = states + decay * _delayed(states, reach)
        decay = decay * _delayed(decay, reach)  # of what begins before the first token nothing is left
        reach *= 2
    y = (states * C.to(dtype).unsqueeze(2)).sum(-1)
    if D is not None:
        y = y + D.to(dtype) * xs
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), states[:, -1]


def _delayed(t: Float[Tensor, "b l d n"], tokens: int) -> Float[Tensor, "b l d n"]:
    """What was so many tokens before each, zero before the first."""
    return F.pad(t[:, : t.shape[1] - tokens], (0, 0, 0, 0, tokens, 0))
