"""LAMB against timm's, on weights, vectors, zeros, and groups without weight decay."""

import copy

import torch
from timm.optim import Lamb as Timms

from megatron_ext.models.bootstrap import prepare

prepare()  # before Megatron is imported

from megatron_ext.vision.lamb import Lamb  # noqa: E402


def test_five_steps_are_those_of_timm() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 3), torch.randn(5, 2, 3), torch.zeros(2, 2)]
    vectors = [torch.randn(4), torch.randn(1)]
    optimizers, found = [], []
    for kind in (Lamb, Timms):
        own = [[torch.nn.Parameter(copy.deepcopy(t)) for t in group] for group in (weights, vectors)]
        groups = [{"params": own[0], "weight_decay": 0.05}, {"params": own[1], "weight_decay": 0.0, "lr": 3e-3}]
        more = {"max_grad_norm": None} if kind is Timms else {}
        optimizers.append(kind(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, **more))
        found.append([p for group in own for p in group])
    start = [p.detach().clone() for p in found[0]]
    for _ in range(5):
        grads = [torch.randn(p.shape, generator=generator) for p in start]
        for own, optimizer in zip(found, optimizers, strict=True):
            for p, gradient in zip(own, grads, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
    for before, ours, theirs in zip(start, *found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(ours, before, rtol=1e-3)
