"""`Mamba2ForCausalLM`: pure Mamba-2, as transformers has it."""

from collections.abc import Callable
from math import inf
from typing import Any

from megatron_ext.checkpoint.huggingface.config_mappings import Fixed, Layers, Renamed, Required, Tied
from megatron_ext.checkpoint.huggingface.entries import whole
from megatron_ext.checkpoint.huggingface.family import Config, Family
from megatron_ext.checkpoint.huggingface.mappings import ParamMapping, unpadded
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import CONV_KERNEL, Architecture


def _row_offset(*names: str) -> Callable[[Architecture], int]:
    """Rows of these parts of the input projection or the convolution."""

    def rows(arch: Architecture) -> int:
        states = arch.mamba_num_groups * arch.mamba_state_dim
        sizes = {"z": arch.mamba_inner_size, "x": arch.mamba_inner_size, "B": states, "C": states}
        return sum(sizes[name] for name in names)

    return rows


MIXER = [
    ParamMapping("M", "norm.weight", "mixer.in_proj.layer_norm_weight"),
    ParamMapping("M", "mixer.in_proj.weight", "mixer.in_proj.weight.z"),
    ParamMapping("M", "mixer.in_proj.weight", "mixer.in_proj.weight.x", row_offset=_row_offset("z")),
    ParamMapping("M", "mixer.in_proj.weight", "mixer.in_proj.weight.B", row_offset=_row_offset("z", "x")),
    ParamMapping("M", "mixer.in_proj.weight", "mixer.in_proj.weight.C", row_offset=_row_offset("z", "x", "B")),
    ParamMapping("M", "mixer.in_proj.weight", "mixer.in_proj.weight.dt", row_offset=_row_offset("z", "x", "B", "C")),
    ParamMapping("M", "mixer.conv1d.weight", "mixer.conv1d.weight.x"),
    ParamMapping("M", "mixer.conv1d.weight", "mixer.conv1d.weight.B", row_offset=_row_offset("x")),
    ParamMapping("M", "mixer.conv1d.weight", "mixer.conv1d.weight.C", row_offset=_row_offset("x", "B")),
    ParamMapping("M", "mixer.conv1d.bias", "mixer.conv1d.bias.x"),
    ParamMapping("M", "mixer.conv1d.bias", "mixer.conv1d.bias.B", row_offset=_row_offset("x")),
    ParamMapping("M", "mixer.conv1d.bias", "mixer.conv1d.bias.C", row_offset=_row_offset("x", "B")),
    ParamMapping("M", "mixer.dt_bias", "mixer.dt_bias"),
    ParamMapping("M", "mixer.A_log", "mixer.A_log"),
    ParamMapping("M", "mixer.D", "mixer.D"),
    ParamMapping("M", "mixer.norm.weight", "mixer.norm.weight"),
    ParamMapping("M", "mixer.out_proj.weight", "mixer.out_proj.weight"),
]
OUTER = [
    ParamMapping("", "backbone.embeddings.weight", "embedding.word_embeddings.weight", unpadded),
    ParamMapping("", "backbone.norm_f.weight", "decoder.final_norm.weight"),
    ParamMapping("", "lm_head.weight", "output_layer.weight", unpadded),
]


class _Expand:
    """The inner width is a whole multiple of the hidden size."""

    def read(self, config: Config) -> dict[str, Any]:
        """Nothing; the heads say it."""
        inner = whole(config, "expand", 2) * whole(config, "hidden_size")
        wide = whole(config, "num_heads", 128) * whole(config, "head_dim", 64)
        if inner != wide:
            raise CheckpointError(
                "config.json: expand * hidden_size is not num_heads * head_dim", got=f"{inner} and {wide}"
            )
        return {}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """`expand`, and the rank that transformers derives from the hidden size."""
        if arch.mamba_inner_size % arch.hidden_size:
            raise CheckpointError(
                "Mamba2ForCausalLM needs an inner width that is a whole multiple of the hidden size",
                got=f"{arch.mamba_inner_size} (heads * channels) and {arch.hidden_size}",
                legal="HybridForCausalLM has no such condition: --hf-class HybridForCausalLM",
            )
        entries = {"expand": arch.mamba_inner_size // arch.hidden_size}
        return entries | ({"time_step_rank": -(-arch.hidden_size // 16)} if "time_step_rank" in like else {})


def is_unlimited(limit: Any) -> bool:
    """Whether limits of the recurrence's step, lower and upper, leave it as it is."""
    try:
        low, high = (float(end["__float__"]) if isinstance(end, dict) else float(end) for end in limit)
    except (TypeError, ValueError, KeyError):
        return False
    return low <= 0 and high == inf


class NoLimit:
    """The step of the recurrence is not clamped."""

    def read(self, config: Config) -> dict[str, Any]:
        """Nothing, but refuses a limit."""
        for name in ("time_step_limit", "mamba_dt_limit"):
            if (limit := config.get(name)) is not None and not is_unlimited(limit):
                raise CheckpointError(f"config.json: {name!r} is not supported", got=limit, legal="[0.0, Infinity]")
        return {}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """Nothing; it is transformers' own default."""
        return {}


MIXER_CONFIG: list[Any] = [
    Renamed("layer_norm_epsilon", "norm_epsilon", 1e-5),
    # Megatron's norm inside the mixer has no other
    Required("layer_norm_epsilon", 1e-5),
    Required("conv_kernel", CONV_KERNEL),
    Required("use_bias", False),
    Required("use_conv_bias", True),
    NoLimit(),
    Renamed("n_groups", "mamba_num_groups", 8),
    Fixed(normalization="RMSNorm"),
]


class _Heads:
    """Attention heads of a model without attention: what Megatron wants to divide by the tensor parallel size."""

    def read(self, config: Config) -> dict[str, Any]:
        """As many as there are groups."""
        groups = whole(config, "n_groups", 8)
        return {"num_attention_heads": groups, "num_query_groups": groups}

    def write(self, arch: Architecture, like: Config) -> dict[str, Any]:
        """Nothing."""
        return {}


MAMBA2 = Family(
    "Mamba2ForCausalLM", "mamba2", "backbone.layers.{}", "M",
    [*OUTER, *MIXER],
    [Layers("M", default=64), Renamed("vocab_size", "padded_vocab_size"), Renamed("hidden_size", "hidden_size"),
     Renamed("num_heads", "mamba_num_heads", 128), Renamed("head_dim", "mamba_head_dim", 64),
     Renamed("state_size", "mamba_state_dim", 128), *MIXER_CONFIG, Required("hidden_act", "silu"), Tied(), _Expand(),
     _Heads(), Fixed(max_position_embeddings=2**20, position_embedding_type="none", add_bias_linear=False)],
    ignored_fields=("max_position_embeddings",),
)  # fmt: skip
