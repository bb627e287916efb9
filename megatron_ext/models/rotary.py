"""Rotary positions that Megatron's `HybridModel` has no arguments for: scaled, or of neighbours that turn together."""

from dataclasses import replace
from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megatron_ext.models.architecture import Architecture
from megatron_ext.models.rope_frequencies import attention_factor, inverse_frequencies


class ArchitectureRotaryEmbedding(RotaryEmbedding):
    """The rotary positions of an architecture.

    Args:
        architecture: The model.
        cpu: Whether the frequencies begin on the CPU.
        cp_group: Ranks that share a sequence.
        local: Whether it is that of layers with a window.
    """

    def __init__(self, architecture: Architecture, cpu: bool, cp_group: Any, local: bool = False) -> None:
        if local:
            base = architecture.local_rotary_base or architecture.rotary_base
            architecture = replace(architecture, rotary_base=base, rope_scaling={}, rope_scaling_factor=None)
        super().__init__(
            kv_channels=architecture.kv_channels,
            rotary_percent=architecture.rotary_percent,
            rotary_interleaved=architecture.rotary_interleaved,
            rotary_base=architecture.rotary_base,
            rope_scaling=architecture.rope_scaling_factor is not None,
            rope_scaling_factor=architecture.rope_scaling_factor or 1.0,
            use_cpu_initialization=cpu,
            cp_group=cp_group,
        )
        self._architecture = architecture

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Radians (length, pairs) of each position; some scalings depend on how long the sequence is."""
        own = self._architecture
        if own.rope_scaling:
            channels = int(own.kv_channels * own.rotary_percent)
            found = inverse_frequencies(own.rope_scaling, own.rotary_base, channels, max_seq_len + offset)
            self.inv_freq = found.to(self.inv_freq.device)
        return super().get_freqs_non_repeated(max_seq_len, offset)


def is_stock(architecture: Architecture) -> bool:
    """Whether `HybridModel` makes these positions itself."""
    own = architecture
    return not (own.rope_scaling or own.rotary_interleaved or own.rope_scaling_factor is not None)


def is_local(architecture: Architecture, layer: int) -> bool:
    """Whether an attention layer has rotary positions that are not those of the model."""
    return architecture.local_rotary_base is not None and architecture.window(layer) > 0


def scale_attention(layers: Any, architecture: Architecture) -> None:
    """Multiply the rotated channels of queries and keys, as some scalings do, in attention layers that are scaled."""
    factor = attention_factor(architecture.rope_scaling)
    for layer in layers:
        attention = getattr(layer, "self_attention", None)
        if factor != 1 and attention is not None and not is_local(architecture, layer.layer_number - 1):
            attention._yarn_concentration_factor = factor
