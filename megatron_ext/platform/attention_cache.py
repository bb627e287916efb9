"""Keys in the cache of a static batch as attention reads them: Megatron-Core 0.19.2 rotates all of them for each token.

`Attention` keeps keys as they were before the rotary embedding and applies it to the whole cache at every step, which
reads and writes several times what the step itself needs. A key's position never changes: it is rotated once, before
it is kept.
"""

from typing import Any

from torch import Tensor

from megatron_ext.platform.replacements import replace


def install() -> None:
    """Have keys rotated before they are kept."""
    import megatron.core.transformer.attention as module

    attention: Any = module.Attention
    keep = attention._adjust_key_value_for_inference

    def adjust(
        self: Any, context: Any, query: Tensor, key: Tensor, value: Tensor, rotary: Any, *more: Any, **named: Any
    ) -> tuple[Tensor, Tensor, Tensor, Any, Any, Any]:
        if rotary is not None and context is not None and context.is_static_batching() and not self.config.flash_decode:
            start = context.sequence_len_offset

            def rotated(t: Tensor, angles: Tensor | None) -> Tensor:
                if angles is None:
                    return t
                return module.apply_rotary_pos_emb(
                    t, angles[start : start + t.shape[0]], config=self.config, cp_group=self.pg_collection.cp,
                    mscale=self._yarn_concentration_factor,
                )  # fmt: skip

            (query, key), rotary = map(rotated, (query, key), rotary), None
        return keep(self, context, query, key, value, rotary, *more, **named)

    replace(
        attention, "_adjust_key_value_for_inference", adjust, "each key is rotated once, when it is kept (everywhere)"
    )
