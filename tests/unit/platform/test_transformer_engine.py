"""The torch modules that stand under Transformer Engine's names, against formulas written out here."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from on_a_gpu import fake
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ext.platform import transformer_engine
from megatron_ext.platform.transformer_engine import TorchDotProductAttention, TorchNorm

EPS = 1e-3


def make_norm(monkeypatch, normalization, zero_centered):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    config = SimpleNamespace(
        normalization=normalization, layernorm_zero_centered_gamma=zero_centered, params_dtype=torch.float64,
        sequence_parallel=True,
    )  # fmt: skip
    return TorchNorm(config, 6, eps=EPS)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_norm(monkeypatch, normalization, zero_centered):
    norm = make_norm(monkeypatch, normalization, zero_centered)
    x = torch.randn(3, 2, 6, dtype=torch.float64) + 1
    centred = x - x.mean(-1, keepdim=True) if normalization == "LayerNorm" else x
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + EPS)
    torch.testing.assert_close(norm(x), scaled, msg="a new norm scales by one")
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(6))
    expected = scaled * (norm.weight + zero_centered)
    if normalization == "LayerNorm":
        expected = expected + norm.bias
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    assert (norm.bias is None) == (normalization == "RMSNorm")
    assert all(p.sequence_parallel for p in norm.parameters()), "gradients are summed over the sequence's ranks"


def make_attention(kind, *, dropout=0.0, scale=None, heads=4):
    config = SimpleNamespace(
        attention_dropout=dropout, num_attention_heads=heads, tensor_model_parallel_size=1, context_parallel_size=1
    )
    return TorchDotProductAttention(config, 1, SimpleNamespace(name=kind), "self", softmax_scale=scale)


def naive(q, k, v, allowed, scale):
    """softmax(q k^T * scale) v, one head of one sequence at a time. q: (s, b, n, d); k, v: (t, b, groups, d)."""
    out = torch.zeros_like(q)
    share = q.shape[2] // k.shape[2]
    for b in range(q.shape[1]):
        for n in range(q.shape[2]):
            scores = q[:, b, n] @ k[:, b, n // share].T * scale
            weights = torch.softmax(scores.masked_fill(~allowed, float("-inf")), -1)
            out[:, b, n] = weights @ v[:, b, n // share]
    return out.reshape(*q.shape[:2], -1)


def inputs(queries, keys, groups):
    torch.manual_seed(queries)
    shapes = ((queries, 2, 4, 8), (keys, 2, groups, 8), (keys, 2, groups, 8))
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("queries", [7, 3, 1])
def test_causal_attention(queries, groups):
    """Fewer queries than keys is decoding: the queries are the last positions."""
    q, k, v = inputs(queries, 7, groups)
    allowed = torch.arange(7)[None] <= torch.arange(7 - queries, 7)[:, None]
    out = make_attention("causal")(q, k, v, None)
    torch.testing.assert_close(out, naive(q, k, v, allowed, 1 / math.sqrt(8)))


@pytest.mark.parametrize("groups", [2, 1])
@pytest.mark.parametrize("queries", [7, 3])
def test_groups_as_sequences_are_the_same_attention(monkeypatch, queries, groups):
    """What 32 bits do on a GPU, forward and backward."""
    q, k, v = inputs(queries, 7, groups)
    allowed = torch.arange(7)[None] <= torch.arange(7 - queries, 7)[:, None]
    parted, calls = transformer_engine.groups_as_sequences, []
    monkeypatch.setattr(transformer_engine, "shares_keys", lambda q: False)
    monkeypatch.setattr(transformer_engine, "groups_as_sequences", lambda *t: calls.append(parted(*t)) or calls[-1])
    leaves, others = ([t.clone().requires_grad_() for t in (q, k, v)] for _ in range(2))
    out, expected = make_attention("causal")(*leaves, None), naive(*others, allowed, 1 / math.sqrt(8))
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    for own, theirs in zip(grad(out, leaves, upstream), grad(expected, others, upstream), strict=True):
        torch.testing.assert_close(own, theirs)
    assert [tuple(t.shape[:2]) for t in calls[0]] == [(2 * groups, 4 // groups)] * 3


def recorded(monkeypatch):
    """What torch's attention is asked for, in its place, and what might run it."""
    calls = []

    def noted(q, k, v, *_, enable_gqa, **__):
        sizes = {"heads": (q.shape[1], k.shape[1]), "held": k.untyped_storage().nbytes(), "gqa": enable_gqa}
        calls.append(sizes | {"planned": torch.backends.cuda.cudnn_sdp_enabled()})
        return torch.empty_like(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_32_bits_get_heads_that_a_kernel_takes(monkeypatch, dtype):
    """With tensors that only say they are there."""
    calls = recorded(monkeypatch)
    q, k, v = (fake(64, 2, heads, 8, dtype=dtype) for heads in (4, 2, 2))
    out = make_attention("causal")(q, k, v, None)
    assert out.shape == (64, 2, 4 * 8)
    whole = dtype == torch.bfloat16
    keys = 64 * 2 * 2 * 8 * dtype.itemsize
    assert calls == [{"heads": (4, 2) if whole else (2, 2), "held": keys, "gqa": whole, "planned": True}]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_generating_on_a_gpu_plans_nothing(monkeypatch, device):
    from megatron.core.inference.utils import InferenceMode

    calls, attention = recorded(monkeypatch), make_attention("causal")
    q, k, v = (fake(length, 2, 4, 8, device=device) for length in (1, 9, 9))
    attention(q, k, v, None)
    with InferenceMode.active():
        attention(q, k, v, None)
    assert [call["planned"] for call in calls] == [True, device == "cpu"]
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [4096, 1024, 1])
def test_a_kernel_without_the_square_of_scores_runs_32_bits(queries):
    q, k, v = (
        torch.randn(length, 1, heads, 64, device="cuda", requires_grad=True)
        for length, heads in ((queries, 8), (4096, 2), (4096, 2))
    )
    attention = make_attention("causal", heads=8)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
        out = attention(q, k, v, None)
        out.sum().backward()
    allowed = torch.arange(4096)[None] <= torch.arange(4096 - queries, 4096)[:, None]
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = naive(*leaves, allowed.cuda(), 1 / 8)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-4)
    for own, theirs in zip((q, k, v), grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(own.grad.double(), theirs, rtol=1e-3, atol=1e-3)


def test_a_mask_names_what_is_hidden_and_a_scale_is_obeyed():
    q, k, v = inputs(5, 5, 2)
    hidden = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    hidden[..., 1:3] = True
    out = make_attention("padding", scale=0.5)(q, k, v, hidden)
    torch.testing.assert_close(out, naive(q, k, v, ~hidden[0, 0], 0.5))
    causal = make_attention("padding")(q, k, v, hidden, attn_mask_type=SimpleNamespace(name="causal"))
    torch.testing.assert_close(causal, naive(q, k, v, torch.ones(5, 5).tril().bool(), 1 / math.sqrt(8)))


def test_no_mask_is_full_attention():
    q, k, v = inputs(4, 4, 4)
    out = make_attention("no_mask")(q, k, v, None)
    torch.testing.assert_close(out, naive(q, k, v, torch.ones(4, 4).bool(), 1 / math.sqrt(8)))


def test_dropout_is_for_training_only():
    q, k, v = inputs(6, 6, 4)
    attention = make_attention("causal", dropout=0.5)
    assert not torch.equal(attention(q, k, v, None), attention(q, k, v, None))
    attention.eval()
    assert torch.equal(attention(q, k, v, None), attention(q, k, v, None))


def test_what_it_cannot_do_is_refused():
    q, k, v = inputs(4, 4, 4)
    with pytest.raises(NotImplementedError, match="Transformer Engine"):
        make_attention("causal")(q, k, v, None, packed_seq_params=object())
