"""What serving costs, where it depends on the experts."""

from dataclasses import replace

import pytest

from megatron_ext.models.cost import BYTES, Workload, decode_bytes_per_token, memory_bytes, read_experts
from megatron_ext.models.presets import PRESETS

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
