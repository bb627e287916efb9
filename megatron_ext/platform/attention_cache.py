"""Keys in the cache of a static batch as attention reads them: Megatron-Core 0.19.2 rotates all of them for each token.

`Attention` keeps keys as they were before the rotary embedding and applies it to the whole cache at every step, which
reads and writes several times what the step itself needs. A key's position never changes: it is rotated once, before
it is kept.

Its steps also depend on numbers of the host: where the token is kept, and how much of the cache is attended to. Under
`cache_slot` a tensor says both, so that a CUDA graph of one step serves for every one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_ext.platform.replacements import replace


@dataclass(frozen=True)
class CacheSlot:
    """Where a step's token is kept.

    Attributes:
        position: The place in the cache, (1,) int64, on the device.
        attend: Attention of (b, n, d) queries to caches (l, b, g, d) of keys and values up to that place.
    """

    position: Tensor
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, float | None], Tensor]


_slot: ContextVar[CacheSlot | None] = ContextVar("cache_slot", default=None)


@contextmanager
def cache_slot(slot: CacheSlot) -> Iterator[None]:
    """For steps of one token in static batches: the host's numbers do not count."""
    token = _slot.set(slot)
    try:
        yield
    finally:
        _slot.reset(token)


def current_slot() -> CacheSlot | None:
    """Where the step's token is kept, if a tensor says it."""
    return _slot.get()


def install() -> None:
    """Have keys rotated before they are kept."""
    import megatron.core.transformer.attention as module

    attention: Any = module.Attention
    keep = attention._adjust_key_value_for_inference

    def adjust(
        self: Any, context: Any, query: Tensor, key: Tensor, value: Tensor, rotary: Any, *more: Any, **named: Any
    ) -> tuple[Tensor, Tensor, Tensor, Any, Any, Any]:
        if context is None or not context.is_static_batching() or self.config.flash_decode:
            return keep(self, context, query, key, value, rotary, *more, **named)
        slot = current_slot()
        start = context.sequence_len_offset

        def rotated(t: Tensor, angles: Tensor | None) -> Tensor:
            if angles is None:
                return t
            own = angles[start : start + t.shape[0]] if slot is None else angles.index_select(0, slot.position)
            return module.apply_rotary_pos_emb(
                t, own, config=self.config, cp_group=self.pg_collection.cp, mscale=self._yarn_concentration_factor
            )

        if rotary is not None:
            query, key = map(rotated, (query, key), rotary)
        if slot is None:
            return keep(self, context, query, key, value, None, *more, **named)
        keys, values = context.key_value_memory_dict[self.layer_number]
        keys.index_copy_(0, slot.position, key)
        values.index_copy_(0, slot.position, value)
        return query, keys, values, None, module.AttnMaskType.no_mask, None

    replace(
        attention, "_adjust_key_value_for_inference", adjust, "each key is rotated once, when it is kept (everywhere)"
    )
