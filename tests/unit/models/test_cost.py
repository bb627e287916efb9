"""What serving costs, where it depends on the experts."""

from dataclasses import replace

import pytest

from megatron_ext.models.cost import BYTES, Workload, decode_bytes_per_token, kv_bytes, memory_bytes, read_experts
from megatron_ext.models.presets import PRESETS
from megatron_ext.models.training_cost import forward_flops_per_token

DENSE = replace(PRESETS["tiny-hybrid"].architecture, pattern="*")
EXPERTS = replace(DENSE, pattern="*E", num_experts=8, moe_ffn_hidden_size=48, moe_router_topk=2)


def test_one_sequence_reads_the_experts_it_is_sent_to():
    one = Workload(batch=1, context=0)
    table = DENSE.padded_vocab_size * DENSE.hidden_size if DENSE.untie_embeddings_and_output_weights else 0
    expected = BYTES * (EXPERTS.num_active_parameters() - table)
    assert decode_bytes_per_token(EXPERTS, one) == pytest.approx(expected)
    assert memory_bytes(EXPERTS, one) == BYTES * EXPERTS.num_parameters()


def test_a_large_batch_reads_all_experts():
    assert read_experts(EXPERTS, 1) == pytest.approx(2 / 8)
    assert read_experts(EXPERTS, 2) == pytest.approx(2 / 8 + 6 / 8 * 2 / 8)
    assert read_experts(EXPERTS, 200) == pytest.approx(1)


def test_a_window_bounds_what_is_cached_and_multiplied() -> None:
    """Counted query by query: of 10 tokens those within 4 of each, itself among them."""
    arch = replace(PRESETS["tiny-transformer"].architecture, pattern="*-*", attention_windows=(4, 0))
    per_token = 2 * 2 * arch.num_query_groups * arch.kv_channels
    assert kv_bytes(arch, 10) == per_token * (4 + 10)
    assert kv_bytes(arch, 3) == per_token * 2 * 3
    seen = sum(min(4, query + 0.5) for query in range(10)) / 10  # a causal square counts half of its diagonal
    width = arch.num_attention_heads * arch.kv_channels
    whole = forward_flops_per_token(replace(arch, attention_windows=()), 10)
    assert whole - forward_flops_per_token(arch, 10) == pytest.approx(4 * width * (10 / 2 - seen))
