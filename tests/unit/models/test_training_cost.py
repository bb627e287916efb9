"""What training costs on paper: against Megatron's own count, published figures, and sums done by hand."""

from argparse import Namespace
from dataclasses import replace

import pytest

from megatron_ext.models.bootstrap import prepare

prepare()  # before Megatron is imported

from megatron.training.training import num_floating_point_operations  # noqa: E402

from megatron_ext.models import cost  # noqa: E402
from megatron_ext.models.presets import PRESETS  # noqa: E402
from megatron_ext.models.training_cost import (  # noqa: E402
    GPUS,
    Layout,
    TeacherSetup,
    forward_flops_per_token,
    kept_per_token,
    memory,
    scaled,
    step_seconds,
    training_flops_per_token,
)

HYBRID = PRESETS["mamba2-hybrid-8b"].architecture
TRANSFORMER = PRESETS["llama3.1-8b"].architecture
MIXTURE = replace(TRANSFORMER, pattern="*E" * 4, num_experts=8, moe_ffn_hidden_size=1024, moe_router_topk=2)


class Absent(Namespace):
    """Megatron's arguments, of which it reads many that are about other models."""

    def __getattr__(self, name: str) -> None:
        return None


@pytest.mark.parametrize("arch", [HYBRID, TRANSFORMER, PRESETS["mamba2-8b"].architecture, MIXTURE])
def test_operations_are_those_megatron_counts(arch) -> None:
    """Megatron leaves out routers, which are small."""
    fields = arch.to_args() | {"hybrid_layer_pattern": arch.pattern, "seq_length": 4096}
    more = {"group_query_attention": True, "swiglu": arch.gated_linear_unit, "linear_conv_kernel_dim": 4}
    args = Absent(**fields | more)
    expected = num_floating_point_operations(args, 3) / (3 * 4096)
    assert training_flops_per_token(arch, 4096) == pytest.approx(expected, rel=1e-3)


def test_published_operations() -> None:
    """6 for each weight of a 1.24B Transformer, and half of 12 s h for each of its 16 layers of attention."""
    sizes = {"hidden_size": 2048, "ffn_hidden_size": 8192, "kv_channels": 64, "pattern": "*-" * 16}
    small = replace(TRANSFORMER, **sizes, untie_embeddings_and_output_weights=False)
    assert small.num_parameters() == pytest.approx(1.24e9, rel=5e-3)
    assert training_flops_per_token(small, 4096) == pytest.approx(8.22e9, rel=5e-3)
    assert training_flops_per_token(HYBRID, 4096) == pytest.approx(46.4e9, rel=5e-3)


def test_memory_by_hand() -> None:
    """One layer of each kind without parallelism, counted again."""
    layout = Layout(micro_batch=2, seq_length=100, shard_optimizer=False)
    arch = replace(HYBRID, pattern="M*-", gated_linear_unit=True, activation="silu")
    found = memory(arch, layout)
    count = arch.num_parameters()
    assert (found["weights"], found["gradients"], found["optimizer"]) == (2 * count, 4 * count, 12 * count)
    h, inner, n, heads = 4096, 8192, 128, 128
    mamba = 2 * h + (2 * inner + 2 * 8 * n + heads) + 2 * inner + inner * n / 128
    attention = 2 * h + (32 + 8 + 8 + 32) * 128
    values = mamba + attention + 2 * h + 3 * arch.ffn_hidden_size
    logits = arch.padded_vocab_size * (2 + 4)  # and the last norm
    assert found["activations"] == pytest.approx(200 * (2 * (values + 2 * h) + 8 * heads + 4 * 8 + 4 * 32 + logits))
    # In plain torch the state-space layer keeps y and a state for every 32 tokens in fp32, and decays; the loss, in the
    # place of all logits, 64 MB of them and the gradient of the states.
    plain = memory(arch, replace(layout, fused=False, fused_gradients=False))
    more = 2 * inner + 4 * inner * (n + 1) / 32 - 2 * inner * n / 128 + (28 - 8) * heads
    assert 200 * 2 * arch.padded_vocab_size > 2**26
    assert 4 * arch.padded_vocab_size * h > 2**27, "the gradient of the weights is not kept"
    loss = 2**26 + 200 * 2 * h
    expected = 200 * (more - logits) + loss
    assert plain["activations"] - found["activations"] == pytest.approx(expected)
    assert plain["working"] == 2 * arch.padded_vocab_size * h
    assert "working" not in found


def test_layouts_divide_memory() -> None:
    whole = memory(HYBRID, Layout())
    parts = memory(HYBRID, Layout(tp=4, sequence_parallel=True, dp=8))
    assert parts["weights"] == pytest.approx(whole["weights"] / 4, rel=1e-3)
    assert parts["optimizer"] == pytest.approx(whole["optimizer"] / 32, rel=1e-3)
    assert parts["activations"] == pytest.approx(whole["activations"] / 4, rel=1e-3)
    apart = HYBRID.pattern.count("M") * 2 * HYBRID.mamba_inner_size * 2048  # the inputs of norms by themselves
    assert memory(HYBRID, Layout(cp=2))["activations"] == pytest.approx(whole["activations"] / 2)
    assert memory(HYBRID, Layout(cp=2, norm_apart=True))["activations"] == pytest.approx(
        whole["activations"] / 2 + apart
    )
    assert memory(HYBRID, Layout(recompute=True))["activations"] < whole["activations"] / 2
    # The first of two stages holds two micro-batches of half of the layers, the last one and the logits.
    first = sum(kept_per_token(HYBRID, layer, Layout()) for layer in range(28)) * 4096 * 2
    assert memory(HYBRID, Layout(pp=2, global_batch=8))["activations"] == pytest.approx(first)


def test_a_linear_sublayer_costs_two_products_and_keeps_its_input() -> None:
    linear = replace(HYBRID, pattern=HYBRID.pattern + "L", linear_rank=64)
    more = forward_flops_per_token(linear, 4096) - forward_flops_per_token(HYBRID, 4096)
    assert more == pytest.approx(4 * 64 * HYBRID.hidden_size)
    assert kept_per_token(linear, len(HYBRID.pattern), Layout()) == 2 * (HYBRID.hidden_size + 64)
    assert linear.num_parameters() - HYBRID.num_parameters() == (2 * 64 + 1) * HYBRID.hidden_size


def test_a_teacher_adds_its_weights_and_takes_the_logits() -> None:
    layout = Layout(seq_length=8192)
    alone, taught = memory(HYBRID, layout), memory(HYBRID, layout, TeacherSetup(TRANSFORMER))
    logits, states = 2**29, 2 * 8192 * HYBRID.hidden_size  # the weights' gradient is too large to be kept
    widest = max(kept_per_token(TRANSFORMER, layer, layout) for layer in range(2)) * 8192
    weights = 2 * TRANSFORMER.num_parameters()
    assert taught["distillation"] == pytest.approx(weights + widest + logits + states)
    assert alone["activations"] - taught["activations"] == pytest.approx(8192 * 6 * HYBRID.padded_vocab_size)
    gpu = GPUS["h200"]
    more = step_seconds(HYBRID, layout, gpu, 0.5, TRANSFORMER)["compute"]
    share = forward_flops_per_token(TRANSFORMER, 8192) / training_flops_per_token(HYBRID, 8192)
    assert more == pytest.approx(step_seconds(HYBRID, layout, gpu, 0.5)["compute"] * (1 + share))


def test_what_a_model_learns_from_takes_by_hand() -> None:
    layout = Layout(tp=2, pp=2, dp=2, micro_batch=2, global_batch=8, seq_length=100)
    small = replace(
        HYBRID, pattern="M*-M", padded_vocab_size=4096, hidden_size=64, untie_embeddings_and_output_weights=True
    )
    teacher = replace(TRANSFORMER, pattern="*-*-", padded_vocab_size=4096)
    distillation = {
        name: memory(small, layout, lesson)["distillation"]
        for name, lesson in {
            "cache": TeacherSetup(None),
            "beside": TeacherSetup(teacher),
            "trained": TeacherSetup(teacher, trained=True),
            "elsewhere": TeacherSetup(teacher, (1, 1)),
            "apart": TeacherSetup(teacher, (1, 1), apart=True),
        }.items()
    }
    # The last stage is the fullest: a rank's half of the logits and of the output weights' gradient.
    tokens, half = 200, 2048
    loss = 2 * tokens * half + 2 * tokens * 64 + 4 * half * 64
    assert distillation["cache"] == pytest.approx(loss)
    loss += 2 * tokens * half  # the teacher's logits
    parameters = cost.parameters_per_rank(teacher, tp=2, pp=2)[1]
    widest = max(kept_per_token(teacher, layer, layout) for layer in (0, 1)) * tokens
    assert distillation["beside"] == pytest.approx(loss + 2 * parameters + widest)
    alone = memory(teacher, layout, TeacherSetup(None))
    assert distillation["trained"] == pytest.approx(loss + sum(alone.values()) - alone["distillation"], rel=0.02)
    states = (2 * tokens + half) * 2 * teacher.hidden_size  # of two micro-batches, and the output rows
    assert distillation["apart"] == pytest.approx(loss + states)
    whole = 2 * teacher.num_parameters() + max(kept_per_token(teacher, i, Layout()) for i in (0, 1)) * tokens
    assert distillation["elsewhere"] == pytest.approx(loss + states + whole)


def test_seconds_by_hand() -> None:
    gpu = GPUS["h100"]
    layout = Layout(tp=8, pp=4, dp=2, global_batch=64, seq_length=4096)
    found = step_seconds(TRANSFORMER, layout, gpu, 0.5)
    compute = 64 * 4096 * training_flops_per_token(TRANSFORMER, 4096) / (64 * 989e12 * 0.5)
    assert found["compute"] == pytest.approx(compute)
    assert found["pipeline"] == pytest.approx(compute * 3 / 32)
    assert found["tensor"] == pytest.approx(2 * 16 * 32 * 4096 * 4096 * 2 * 2 * 7 / 8 / 450e9)
    fullest = max(cost.parameters_per_rank(TRANSFORMER, tp=8, pp=4))
    assert found["data"] == pytest.approx(fullest * 6 / 2 / 50e9)
    assert step_seconds(TRANSFORMER, replace(layout, overlap_gradients=True), gpu, 0.5)["data"] == 0
    assert scaled(layout, 512).gpus == 512


@pytest.mark.parametrize(
    ("flags", "apart"),
    [
        ({"overlap_param_gather": True, "ext_ssm_backend": "auto"}, False),
        ({"context_parallel_size": 2}, True),
        ({"ext_ssm_backend": "mamba_ssm"}, True),
        ({"ext_ssm_backend": "triton"}, False),
    ],
)
def test_a_norm_that_runs_by_itself_is_counted(flags, apart) -> None:
    """What runs apart is asked of a run in tests/functional/test_overlap.py and tests/distributed."""
    args = Absent(**{"context_parallel_size": 1, "micro_batch_size": 1, "data_parallel_size": 1} | flags)
    assert Layout.from_args(args).norm_apart == apart
