import pytest
import torch

from megatron_ext.platform.fused_adam import FusedAdam

SETTINGS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6}


def trajectories(ours, theirs, steps=25):
    """The same parameters under two optimizers with the same gradients, of a loss that is not separable."""
    torch.manual_seed(0)
    start = [torch.randn(7, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    results = []
    for make in (ours, theirs):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = make(params)
        for _ in range(steps):
            optimizer.zero_grad()
            ((params[0].sin() @ torch.arange(5.0).double()).square().mean() + params[1].pow(4).sum()).backward()
            optimizer.step()
        results.append([p.detach() for p in params])
    return start, *results


# The moments are in float32 whatever the parameters' type: hence the tolerance.
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(("mode", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_it_follows_torch(mode, reference, decay):
    start, ours, theirs = trajectories(
        lambda params: FusedAdam(params, adam_w_mode=mode, weight_decay=decay, **SETTINGS),
        lambda params: reference(params, weight_decay=decay, **SETTINGS),
    )
    for at, mine, expected in zip(start, ours, theirs, strict=True):
        assert (expected - at).abs().max() > 0.1, "the reference has not moved"
        torch.testing.assert_close(mine, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("mode", [True, False])
def test_one_kernel_is_the_same_update(mode, monkeypatch):
    """What runs in 32 bits: by torch's kernel for a CPU, which has the name of that for a GPU."""

    def in_float32(params):
        leaves = [p.clone().requires_grad_() for p in params]
        return FusedAdam(leaves, adam_w_mode=mode, weight_decay=0.3, **SETTINGS)

    torch.manual_seed(0)
    start = [torch.randn(7, 5), torch.randn(3)]
    results = []
    for update in (FusedAdam.unfused, FusedAdam.fused):
        monkeypatch.setattr(FusedAdam, "fused", update)
        optimizer = in_float32(start)
        params = optimizer.param_groups[0]["params"]
        for _ in range(25):
            for p in params:
                p.grad = p.detach().sin()
            optimizer.step()
        results.append([p.detach() for p in params])
    for at, expected, fused in zip(start, *results, strict=True):
        assert (expected - at).abs().max() > 0.1
        torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-6)


def test_the_two_kinds_of_decay_differ():
    _, decoupled, added = trajectories(
        lambda params: FusedAdam(params, adam_w_mode=True, weight_decay=0.3, **SETTINGS),
        lambda params: FusedAdam(params, adam_w_mode=False, weight_decay=0.3, **SETTINGS),
    )
    assert (decoupled[0] - added[0]).abs().max() > 1e-2


def test_without_bias_correction_the_first_step_is_the_plain_ratio():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = FusedAdam([p], lr=0.1, betas=(0.9, 0.99), eps=0.0, bias_correction=False)
    p.grad = torch.tensor([0.5, 4.0])
    optimizer.step()
    # m / sqrt(v) = (0.1 g) / sqrt(0.01 g^2) = 1
    torch.testing.assert_close(p.detach(), torch.tensor([0.9, -2.1]))


def test_the_contract_of_the_state_that_megatron_saves():
    used, unused = (torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = FusedAdam([used, unused])
    for _ in range(3):
        used.grad = torch.ones_like(used)
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 3
    assert type(optimizer.param_groups[0]["step"]) is int
    assert set(optimizer.state[used]) == {"exp_avg", "exp_avg_sq"}
    assert all(moment.dtype == torch.float32 for moment in optimizer.state[used].values())
    assert torch.equal(unused, torch.ones_like(unused))
    assert not optimizer.state[unused]


def test_a_restored_state_goes_on_bit_for_bit():
    def advance(optimizer, p, steps):
        for _ in range(steps):
            p.grad = p.detach().cos()
            optimizer.step()

    straight = torch.nn.Parameter(torch.linspace(-1, 1, 9))
    advance(FusedAdam([straight], lr=0.1), straight, 6)
    first = torch.nn.Parameter(torch.linspace(-1, 1, 9))
    optimizer = FusedAdam([first], lr=0.1)
    advance(optimizer, first, 3)
    second = torch.nn.Parameter(first.detach().clone())
    restored = FusedAdam([second], lr=0.7)
    restored.load_state_dict(optimizer.state_dict())
    advance(restored, second, 3)
    assert torch.equal(straight, second)


@pytest.mark.parametrize(
    ("dtype", "correction", "chosen"),
    [
        (torch.float32, True, "fused"),
        (torch.float32, False, "unfused"),
        (torch.bfloat16, True, "unfused"),
        (torch.float64, True, "unfused"),
    ],
)
def test_one_kernel_runs_what_it_can_express(monkeypatch, dtype, correction, chosen):
    calls = []
    for name in ("fused", "unfused"):
        monkeypatch.setattr(FusedAdam, name, lambda *_, name=name: calls.append(name))
    p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    p.grad = torch.ones_like(p)
    FusedAdam([p], bias_correction=correction).step()
    assert calls == [chosen]
