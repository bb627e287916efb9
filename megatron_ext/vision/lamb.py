"""LAMB (You et al., arXiv 1904.00962), with which the published networks were trained, as an optimizer of Megatron's.

Adam's update, with weight decay in it, is scaled for each weight by the norm of the weight over its own. As in timm,
what has no weight decay takes Adam's update as it is. A norm is that of the whole weight, however it is split over
tensor-parallel ranks. The state is Adam's: two moments for each weight, and `step` in its group.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.platform.replacements import replace

_T: Any = torch  # torch's multi-tensor functions, which it does not export


class Lamb(torch.optim.Optimizer):
    """LAMB, of weights in fp32.

    Args:
        params: Parameters or parameter groups.
        lr, betas, eps, weight_decay: As in the paper; moments are corrected for their beginning at zero.
        group: Tensor-parallel ranks, which have a part each of what is marked `tensor_model_parallel`.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, group: Any = None,
    ) -> None:  # fmt: skip
        self._group = group
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def init_state(self) -> None:
        """Moments of zero where there are none yet."""
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    for name in ("exp_avg", "exp_avg_sq"):
                        self.state[p][name] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. A collective of the tensor-parallel ranks."""
        self.init_state()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        (beta1, beta2), step, decay = group["betas"], group["step"], group["weight_decay"]
        grads = [p.grad for p in params]
        first, second = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
        _T._foreach_lerp_(first, grads, 1 - beta1)
        _T._foreach_mul_(second, beta2)
        _T._foreach_addcmul_(second, grads, grads, value=1 - beta2)
        scale = _T._foreach_sqrt(second)
        _T._foreach_div_(scale, (1 - beta2**step) ** 0.5)
        _T._foreach_add_(scale, group["eps"])
        updates = _T._foreach_div(first, 1 - beta1**step)
        _T._foreach_div_(updates, scale)
        if decay:
            _T._foreach_add_(updates, params, alpha=decay)
            _T._foreach_mul_(updates, self._trust(params, updates))
        _T._foreach_add_(params, updates, alpha=-group["lr"])

    def _trust(self, params: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
        """For each weight its norm over its update's; 1 where one of them is zero."""
        ratios: dict[int, Tensor] = {}
        for split in (False, True):
            at = [i for i, p in enumerate(params) if getattr(p, "tensor_model_parallel", False) == split]
            if not at:
                continue
            norms = [torch.stack(_T._foreach_norm([each[i] for i in at])) for each in (params, updates)]
            squares = torch.stack(norms).square()  # (2, weights)
            if split and self._group is not None and self._group.size() > 1:
                dist.all_reduce(squares, group=self._group)
            own, change = squares.sqrt().unbind()
            ratios |= dict(zip(at, torch.where((own > 0) & (change > 0), own / change, 1.0).unbind(), strict=True))
        return [ratios[i] for i in range(len(params))]


def offer(parser: Any) -> Any:
    """Megatron's parser, whose `--optimizer` may be lamb."""
    if (known := parser._option_string_actions.get("--optimizer")) is not None:
        known.choices = [*known.choices, "lamb"]
    return parser


def install() -> None:
    """Let Megatron know this optimizer as `--optimizer lamb`, through its table of further ones."""
    import megatron.core.optimizer as optimizer
    import megatron.training.arguments as arguments
    from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS, EmergingOptimizerEntry

    def settings(config: Any, chunks: list[Any], groups: Any) -> dict[str, Any]:
        return {
            "lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps,
            "weight_decay": config.weight_decay, "group": groups.tp,
        }  # fmt: skip

    _EMERGING_OPTIMIZERS["lamb"] = EmergingOptimizerEntry(
        Lamb, init_state_fn=lambda own, config=None: own.init_state(), config_to_kwargs=settings,
        default_param_overrides={},
    )  # fmt: skip
    # Megatron parses the command line again when it begins to train.
    add: Any = arguments.add_megatron_arguments
    replace(arguments, "add_megatron_arguments", lambda parser: offer(add(parser)), "--optimizer lamb (vision)")
    replace(optimizer, "HAVE_EMERGING_OPTIMIZERS", True, "LAMB needs no package of further optimizers (vision)")
