"""A hybrid model in plain formulas and float64, straight from a checkpoint's tensors: nothing of Megatron's, no layout.

To read, from `forward` up, and to test against. Shapes: b batch, s sequence, h hidden, g groups, n heads, d channels,
e experts, f neurons, v vocabulary.

What is not kept can be masked: its activations are zero, and norms count the others only. So a masked model is the
smaller one, found without slicing a weight.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.axes import KeptIndices
from megatron_ext.models.pattern import ATTENTION, LINEAR, MLP, MOE
from megatron_ext.models.rope_frequencies import attention_factor, inverse_frequencies
from megatron_ext.ops.causal_conv1d.naive import causal_conv1d
from megatron_ext.ops.ssd.naive import ssd

WHOLE = KeptIndices()
LLAMA3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0,
}  # fmt: skip
"""Llama 3.1's scaling, but for its factor."""


def mask(kept: Sequence[int] | None, size: int) -> Float[Tensor, " size"]:
    """1.0 at what is kept, 0.0 elsewhere; `None` keeps all."""
    if kept is None:
        return torch.ones(size, dtype=torch.float64)
    result = torch.zeros(size, dtype=torch.float64)
    result[list(kept)] = 1
    return result


def rms_norm(x: Float[Tensor, "*b h"], weight: Tensor, eps: float, counted: Tensor) -> Float[Tensor, "*b h"]:
    """x / sqrt(mean of x^2 + eps) * weight, over the positions that are `counted` (1; 0 elsewhere)."""
    x = x * counted
    mean_square = x.square().sum(-1, keepdim=True) / counted.sum(-1, keepdim=True)
    return x / (mean_square + eps).sqrt() * weight


def rotate(arch: Architecture, x: Float[Tensor, "b s d"], window: int) -> Float[Tensor, "b s d"]:
    """A query or key head with rotary positions: pairs of its first channels turn, each at a speed of its own."""
    if arch.position_embedding_type == "none":
        return x
    channels = int(arch.kv_channels * arch.rotary_percent)
    base, scaling = arch.rotary_base, arch.rope_scaling
    if arch.rope_scaling_factor is not None:
        scaling = LLAMA3 | {"factor": arch.rope_scaling_factor}
    if window and arch.local_rotary_base is not None:
        base, scaling = arch.local_rotary_base, {}
    speeds = inverse_frequencies(scaling, base, channels, x.shape[1], torch.float64)
    angles = torch.arange(x.shape[1])[:, None] * speeds
    sin, cos = (attention_factor(scaling) * wave for wave in (angles.sin(), angles.cos()))
    turned, rest = x[..., :channels], x[..., channels:]
    if arch.rotary_interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned, rest], dim=-1)


def attention(
    arch: Architecture, w: dict[str, Tensor], x: Float[Tensor, "b s h"], kept: KeptIndices, window: int = 0
) -> tuple[Float[Tensor, "b s h"], Float[Tensor, "b s n d"]]:
    """The update of an attention layer, and its heads' outputs; with a window a token sees so many, with itself."""
    b, s, _ = x.shape
    groups, d = arch.num_query_groups, arch.kv_channels
    per_group = arch.num_attention_heads // groups
    qkv = x @ w["self_attention.linear_qkv.weight"].T + w.get("self_attention.linear_qkv.bias", 0.0)
    qkv = qkv.view(b, s, groups, per_group + 2, d)
    if arch.qk_layernorm_of_all_heads:
        keys = mask(kept.kv_groups, groups)[:, None].expand(-1, d)
        stay = keys.repeat_interleave(per_group, 0) * mask(kept.query_heads, groups * per_group)[:, None]
        queries, key, value = qkv.split([per_group, 1, 1], dim=3)
        scales = (w[f"self_attention.{name}_layernorm.heads_weight"] for name in "qk")
        parts = zip((queries, key), scales, (stay, keys), strict=True)
        normed = [rms_norm(x.flatten(2), gamma, arch.norm_epsilon, own.flatten()) for x, gamma, own in parts]
        qkv = torch.cat([normed[0].view_as(queries), normed[1].view_as(key), value], dim=3)
    heads = torch.empty(b, s, groups, per_group, d, dtype=x.dtype)
    seen = torch.ones(s, s, dtype=torch.bool).tril()
    if window:
        seen = seen.triu(1 - window)
    scale = d**-0.5 if arch.softmax_scale is None else arch.softmax_scale

    def positioned(head: Float[Tensor, "b s d"], name: str) -> Float[Tensor, "b s d"]:
        if arch.qk_layernorm:
            weight = w[f"self_attention.{name}_layernorm.weight"]
            head = rms_norm(head, weight, arch.norm_epsilon, torch.ones(d, dtype=x.dtype))
        return rotate(arch, head, window)

    for group in range(groups):
        key, value = positioned(qkv[:, :, group, per_group], "k"), qkv[:, :, group, per_group + 1]
        for head in range(per_group):
            logits = positioned(qkv[:, :, group, head], "q") @ key.mT * scale
            logits = softcapped(logits, arch.attention_softcap)
            heads[:, :, group, head] = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value
    inner = heads.reshape(b, s, -1, d)
    stay = mask(kept.kv_groups, groups).repeat_interleave(per_group) * mask(kept.query_heads, groups * per_group)
    return (inner * stay[:, None]).flatten(2) @ w["self_attention.linear_proj.weight"].T, inner


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """cap tanh(logits / cap), where there is a cap."""
    return logits if cap is None else cap * (logits / cap).tanh()


def mlp(
    arch: Architecture, w: dict[str, Tensor], x: Float[Tensor, "b s h"], kept: KeptIndices
) -> tuple[Float[Tensor, "b s h"], Float[Tensor, "b s f"]]:
    """The update of a gated MLP, whose gate is SiLU or GELU, and its neurons."""
    gate, up = (x @ w["mlp.linear_fc1.weight"].T).chunk(2, dim=-1)
    neurons = (F.silu(gate) if arch.activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    return neurons * mask(kept.ffn, neurons.shape[-1]) @ w["mlp.linear_fc2.weight"].T, neurons


def linear(w: dict[str, Tensor], x: Float[Tensor, "b s h"]) -> Float[Tensor, "b s h"]:
    """The update of a linear sub-layer, of the residual stream as it is."""
    return (x @ w["down"].T @ w["up"].T if "down" in w else torch.zeros_like(x)) + w["bias"]


def experts(
    arch: Architecture, w: dict[str, Tensor], x: Float[Tensor, "b s h"], kept: KeptIndices
) -> tuple[Float[Tensor, "b s h"], dict[str, Tensor]]:
    """The update of a mixture of experts, and what is inside it.

    That is `probability` (b, s, e), 0 for experts that a token is not sent to; `neurons` (b, s, e, f) and `outputs`
    (b, s, e, h), before they are weighted; `shared` (b, s, f), the neurons of the shared expert.
    """
    logits = x @ w["mlp.router.weight"].T
    stay = mask(kept.experts, arch.num_experts) > 0
    logits = logits.masked_fill(~stay, -torch.inf)
    sigmoid = arch.moe_router_score_function == "sigmoid"
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1) if arch.moe_router_pre_softmax else logits
    # A dropped expert is not chosen, whatever its bias.
    choice = (scores + w.get("mlp.router.expert_bias", torch.zeros(()))).masked_fill(~stay, -torch.inf)
    chosen = torch.zeros_like(logits).scatter(-1, choice.topk(arch.moe_router_topk).indices, 1.0) > 0
    if sigmoid:
        probability = scores * chosen
        if arch.moe_router_topk > 1:
            probability = probability / probability.sum(-1, keepdim=True)
    elif arch.moe_router_pre_softmax:
        probability = scores * chosen
    else:
        probability = scores.masked_fill(~chosen, -torch.inf).softmax(-1)
    probability = probability * (arch.moe_router_topk_scaling_factor or 1.0)

    fc1, fc2 = (w[f"mlp.experts.experts.linear_fc{n}.weight"] for n in (1, 2))
    gate, up = torch.einsum("bsh,efh->bsef", x, fc1).chunk(2, dim=-1)
    neurons = F.silu(gate) * up
    stays = mask(kept.expert_ffn, arch.num_experts * arch.moe_ffn_hidden_size).view(arch.num_experts, -1)
    outputs = torch.einsum("bsef,ehf->bseh", neurons * stays, fc2)
    update = (probability[..., None] * outputs).sum(2)
    seen = {"probability": probability, "neurons": neurons, "outputs": outputs}
    if arch.moe_shared_expert_intermediate_size:
        gate, up = (x @ w["mlp.shared_experts.linear_fc1.weight"].T).chunk(2, dim=-1)
        seen["shared"] = F.silu(gate) * up
        columns = mask(kept.shared_ffn, arch.moe_shared_expert_intermediate_size)
        update = update + seen["shared"] * columns @ w["mlp.shared_experts.linear_fc2.weight"].T
    return update, seen


def mamba(
    arch: Architecture, w: dict[str, Tensor], u: Float[Tensor, "b s h"], kept: KeptIndices
) -> tuple[Float[Tensor, "b s h"], dict[str, Tensor]]:
    """The update of a Mamba-2 layer, and the parts x (b, s, n, d), B and C (b, s, g, state) of its input projection.

    Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060, section 7), with the norm after the gate.
    """
    groups = arch.mamba_num_groups
    group = mask(kept.mamba_groups, groups)
    head = group.repeat_interleave(arch.mamba_num_heads // groups) * mask(kept.mamba_heads, arch.mamba_num_heads)
    inner = (head[:, None] * mask(kept.head_channels, arch.mamba_head_dim)).flatten()
    states = mask(kept.states, groups * arch.mamba_state_dim).view(groups, -1)
    z, x, B, C, dt = (u @ w[f"mixer.in_proj.weight.{name}"].T for name in ("z", "x", "B", "C", "dt"))
    convolved = []
    for name, value in (("x", x), ("B", B), ("C", C)):
        taps, bias = w[f"mixer.conv1d.weight.{name}"].squeeze(1), w[f"mixer.conv1d.bias.{name}"]
        convolved.append(causal_conv1d(value, taps, bias, activation="silu")[0])
    cx, cB, cC = convolved
    y, _ = ssd(
        cx.unflatten(-1, (-1, arch.mamba_head_dim)),
        F.softplus(dt + w["mixer.dt_bias"]),
        -w["mixer.A_log"].exp(),
        cB.unflatten(-1, (groups, -1)) * states,
        cC.unflatten(-1, (groups, -1)),
        w["mixer.D"],
    )
    gated = (y.flatten(2) * F.silu(z)).unflatten(-1, (groups, -1))
    # A group that is dropped has nothing to count; what its norm gives does not matter.
    counted = inner.view(groups, -1) + (1 - group[:, None])
    normed = rms_norm(gated, torch.ones((), dtype=u.dtype), 1e-5, counted).flatten(2) * w["mixer.norm.weight"]
    parts = {"out": normed, "x": x.unflatten(-1, (-1, arch.mamba_head_dim)), "B": B.unflatten(-1, (groups, -1))}
    return (normed * inner) @ w["mixer.out_proj.weight"].T, parts | {"C": C.unflatten(-1, (groups, -1))}


def forward(
    arch: Architecture,
    weights: Mapping[str, Tensor],
    tokens: Int[Tensor, "b s"],
    *,
    skip: Collection[int] = (),
    kept: Mapping[int, KeptIndices] | None = None,
) -> tuple[Float[Tensor, "b s v"], list[dict[str, Tensor]]]:
    """Logits, and for each sub-layer that is not left out its `input`, `norm`, inner activations and `output`.

    Args:
        arch: The model.
        weights: Its tensors by checkpoint key.
        tokens: Of each sequence.
        skip: Sub-layers that are left out.
        kept: Of each sub-layer that stays what is kept of it; all of all by default.

    Raises:
        ConfigError: The model has what these formulas have not.
    """
    _check(arch)
    weights = {key: value.double() + (arch.zero_centered_norm and _is_norm(key)) for key, value in weights.items()}
    kept = dict.fromkeys(range(len(arch.pattern)), WHOLE) if kept is None else kept
    channels = mask(next((own.hidden for own in kept.values()), None), arch.hidden_size)
    hidden = weights["embedding.word_embeddings.weight"][tokens] * channels * arch.embedding_multiplier
    seen = []
    for i, kind in enumerate(arch.pattern):
        if i in skip or i not in kept:
            continue
        sizes = arch.at(i)
        prefix = f"decoder.layers.{i}."
        w = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        if kind == LINEAR:
            before, hidden = hidden, hidden + linear(w, hidden) * channels
            seen.append({"input": before, "output": hidden})
            continue
        normed = hidden
        if arch.pre_norm:
            (norm,) = (value for key, value in w.items() if key.endswith(("layer_norm_weight", "mlp_layernorm.weight")))
            normed = rms_norm(hidden, norm, arch.norm_epsilon, channels)
        parts: dict[str, Tensor] = {}
        if kind == ATTENTION:
            update, inner = attention(sizes, w, normed, kept[i], arch.window(i))
        elif kind == MLP:
            update, inner = mlp(arch, w, normed, kept[i])
        elif kind == MOE:
            update, parts = experts(sizes, w, normed, kept[i])
            inner = parts["neurons"]
        else:
            update, parts = mamba(sizes, w, normed, kept[i])
            inner = parts["x"]
        inputs = {"input": hidden, "norm": normed, "inner": inner}
        if arch.post_norm:
            update = rms_norm(update, w["post_norm.weight"], arch.norm_epsilon, channels)
        hidden = hidden + update * channels * arch.residual_multiplier
        seen.append(inputs | {"output": hidden} | parts)
    final = rms_norm(hidden, weights["decoder.final_norm.weight"], arch.norm_epsilon, channels)
    output_layer = weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"])
    return softcapped(final @ output_layer.T / arch.logits_scaling, arch.logits_softcap), seen


def _is_norm(key: str) -> bool:
    """Whether it is the weight of a norm that `zero_centered_norm` speaks of; Mamba-2's own norm is another."""
    return key.endswith(("layer_norm_weight", "layernorm.weight", "_norm.weight", "heads_weight"))


def _check(arch: Architecture) -> None:
    plain = {
        "normalization": "RMSNorm", "add_bias_linear": False, "gated_linear_unit": True,
    }  # fmt: skip
    other = {name: getattr(arch, name) for name, value in plain.items() if getattr(arch, name) != value}
    if other:
        raise ConfigError("the reference model has no such thing", got=other, legal=plain)
