"""Adam with the contract of Apex's and Transformer Engine's FusedAdam, in plain torch (where neither is installed).

With torch's own AdamW Megatron's distributed optimizer takes another path, whose checkpoints do not resume. The
contract: state `exp_avg` and `exp_avg_sq` per parameter, and `step` as an integer in the parameter group.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from megatron_ext.platform.replacements import replace

_T: Any = torch  # torch.optim's own multi-tensor functions, which torch does not export


class FusedAdam(torch.optim.Optimizer):
    """Adam (arXiv 1412.6980) or AdamW (arXiv 1711.05101, `adam_w_mode`), moments in fp32.

    Args:
        params: Parameters or parameter groups.
        lr, betas, eps, weight_decay: As in the papers.
        bias_correction: Divide the moments by `1 - beta**step`.
        adam_w_mode: Decoupled weight decay; otherwise decay is added to the gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **_: Any,  # options of the fused kernels that have no meaning here
    ) -> None:
        self.adam_w_mode = adam_w_mode
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        grads = [p.grad.float() for p in params]  # type: ignore[union-attr]
        first = [self.state[p]["exp_avg"] for p in params]
        second = [self.state[p]["exp_avg_sq"] for p in params]
        one_kernel = group["bias_correction"] and all(p.dtype == torch.float32 for p in params)
        update = self.fused if one_kernel else self.unfused
        update(group, params, grads, first, second)

    def fused(self, group: dict[str, Any], params: Any, grads: Any, first: Any, second: Any) -> None:
        """Torch's own fused kernel, which reads and writes each value in 32 bits once: 28 bytes a parameter, not 100.

        There is one for a GPU and one for a CPU.
        """
        step = torch.full((), float(group["step"]), device=params[0].device)  # filled there: nothing is waited for
        (beta1, beta2), update = group["betas"], _T._fused_adamw_ if self.adam_w_mode else _T._fused_adam_
        update(
            params, grads, first, second, [], [step] * len(params), lr=group["lr"], beta1=beta1, beta2=beta2,
            weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip

    def unfused(self, group: dict[str, Any], params: Any, grads: Any, first: Any, second: Any) -> None:
        """The same, an operation at a time, in any dtype and on any device."""
        beta1, beta2 = group["betas"]
        lr, decay, step = group["lr"], group["weight_decay"], group["step"]
        c1, c2 = (1 - beta1**step, 1 - beta2**step) if group["bias_correction"] else (1.0, 1.0)
        if decay and not self.adam_w_mode:
            grads = _T._foreach_add(grads, [p.float() for p in params], alpha=decay)
        _T._foreach_lerp_(first, grads, 1 - beta1)
        _T._foreach_mul_(second, beta2)
        _T._foreach_addcmul_(second, grads, grads, value=1 - beta2)
        if decay and self.adam_w_mode:
            _T._foreach_mul_(params, 1 - lr * decay)
        denominator = _T._foreach_div(second, c2)
        _T._foreach_sqrt_(denominator)
        _T._foreach_add_(denominator, group["eps"])
        _T._foreach_addcdiv_(params, first, denominator, value=-lr / c1)


def install() -> None:
    """Give Megatron's optimizers this Adam where neither Transformer Engine nor Apex is installed."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    reason = "Adam with FusedAdam's contract, so that distributed-optimizer checkpoints resume (no TE, no Apex)"
    replace(optimizer, "Adam", FusedAdam, reason)
    replace(optimizer, "USING_PYTORCH_OPTIMIZER", False, reason)
    replace(distributed, "HAVE_APEX_OR_TE", True, reason)
    replace(distributed, "USING_APEX_OPTIMIZER", True, reason)
    setter = distributed.DistributedOptimizer._set_main_param_and_optimizer_states
    replace(distributed.DistributedOptimizer, "_set_main_param_and_optimizer_states", torch.no_grad()(setter), reason)
