"""Optimisers: LaProp with adaptive gradient clipping, and Adam with options per group."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Numbers that change from step to step, or tensors [] of them on the parameters' device.
Factors = tuple[Any, ...]


class LaProp(torch.optim.Optimizer):
    """LaProp (Ziyin et al. 2020): momentum of the normalised gradient.

    Each gradient is first clipped to `agc` times the norm of its parameter (adaptive gradient
    clipping, Brock et al. 2021; whole tensors, norms of at least `pmin`). The learning rate rises
    linearly from 0 over `warmup` steps, so the very first step changes nothing; with `anneal` it
    then falls linearly, to a tenth at step `anneal`. `weight_decay` acts on tensors of two or more
    axes only.

    "lr" in a parameter group is the rate that the last step used (before the first step: the rate
    that it will use), which learning rate monitors read; "peak_lr" is the argument `lr`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 4e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-20,
        agc: float = 0.3,
        pmin: float = 1e-3,
        warmup: int = 1000,
        anneal: int = 0,
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or eps < 0 or agc < 0 or warmup < 0 or weight_decay < 0:
            raise ValueError(
                f"lr={lr}, eps={eps}, agc={agc}, warmup={warmup}, weight_decay={weight_decay}; "
                "none may be negative"
            )
        if anneal and anneal <= warmup:
            raise ValueError(f"anneal={anneal}; expected 0 for none, or more than warmup={warmup}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={tuple(betas)}; expected two, both at least 0 and below 1")
        defaults = dict(
            lr=lr,
            betas=tuple(betas),
            eps=eps,
            agc=agc,
            pmin=pmin,
            warmup=warmup,
            anneal=anneal,
            weight_decay=weight_decay,
        )
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters whose options, such as "lr", may differ from the defaults."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["peak_lr"] = group["lr"]
        group["lr"] = _scheduled(group["peak_lr"], 0, group["warmup"], group["anneal"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; return the closure's value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.advance():
            self.apply(*part)
        return loss

    def advance(self) -> list[tuple[dict[str, Any], list[Tensor], Factors]]:
        """Count a step: return (group, parameters, factors) of all parameters with a gradient.

        `apply` takes each of them; it changes the parameters, and reads nothing else that varies
        from step to step.
        """
        parts = []
        for group in self.param_groups:
            # Parameters with the same number of gradients so far, usually all, step together.
            together: dict[int, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    together.setdefault(self._count(p), []).append(p)
            beta1, beta2 = group["betas"]
            for count in sorted(together):  # the highest count sets the reported rate
                lr = _scheduled(group["peak_lr"], count - 1, group["warmup"], group["anneal"])
                group["lr"] = lr
                decay = 1 - lr * group["weight_decay"]
                factors = (1 - beta2**count, decay, -lr / (1 - beta1**count))
                parts.append((group, together[count], factors))
        return parts

    def _count(self, p: Tensor) -> int:
        """Count the gradients of a parameter, on which its learning rate and averages depend."""
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg_sq"] = torch.zeros_like(p)
            state["exp_avg"] = torch.zeros_like(p)
        state["step"] += 1
        return state["step"]

    @torch.no_grad()
    def apply(self, group: dict[str, Any], params: list[Tensor], factors: Factors) -> None:
        """Update parameters by their gradients; see `advance`.

        factors: divisor of the mean squares, factor of the weights, factor of the moments.
        """
        by_square, by_decay, by_rate = factors
        states = [self.state[p] for p in params]
        squares = [s["exp_avg_sq"] for s in states]
        moments = [s["exp_avg"] for s in states]
        beta1, beta2 = group["betas"]
        grads = [p.grad for p in params if p.grad is not None]
        update = _clip(grads, params, group["agc"], group["pmin"])

        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, update, update, 1 - beta2)
        scale = torch._foreach_div(squares, by_square)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, group["eps"])
        torch._foreach_div_(update, scale)
        torch._foreach_lerp_(moments, update, 1 - beta1)

        kernels = [p for p in params if p.ndim > 1]
        if group["weight_decay"] and kernels:
            torch._foreach_mul_(kernels, by_decay)
        if isinstance(by_rate, Tensor):
            torch._foreach_add_(params, torch._foreach_mul(moments, by_rate))
        else:
            torch._foreach_add_(params, moments, alpha=by_rate)


class Adam(torch.optim.Adam):
    """Adam with learning rates and gradient clipping per parameter group.

    A group may contain "lr_scale", which multiplies `lr`, "eps", and "clip", a name: before each
    step the gradients of all groups with the same name are scaled together to a norm of at most
    `max_norm`, as `torch.nn.utils.clip_grad_norm_` does. None disables clipping.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_norm: float | None = None,
    ) -> None:
        if max_norm is not None and max_norm <= 0:
            raise ValueError(f"max_norm={max_norm}; expected above 0, or None for no clipping")
        super().__init__(params, lr, (betas[0], betas[1]), eps, fused=True)
        # Only needed for float16, which worldloom rejects; if set, Lightning cannot clip gradients.
        self._step_supports_amp_scaling = False
        for group in self.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
            group["max_norm"] = max_norm

    def step(self, closure: Any = None) -> Any:
        """Clip the gradients, then update; return the closure's value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._clip()
        super().step()
        return loss

    def advance(self) -> list[tuple[Factors]]:
        """Return the learning rates of all groups as a single part; see `LaProp.advance`."""
        return [(tuple(group["lr"] for group in self.param_groups),)]

    def apply(self, rates: Factors) -> None:
        """Clip the gradients, then update with these learning rates, one for each group."""
        kept = [group.copy() for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group |= {"lr": rate, "capturable": True}  # the counts of steps are on the device too
        try:
            self._clip()
            super().step()
        finally:
            for group, before in zip(self.param_groups, kept, strict=True):
                group |= {"lr": before["lr"], "capturable": before["capturable"]}

    def _clip(self) -> None:
        together: dict[tuple[str, float], list[Tensor]] = {}
        for group in self.param_groups:
            if group["max_norm"] is not None:
                key = group.get("clip", ""), group["max_norm"]
                together.setdefault(key, []).extend(group["params"])
        for (_, norm), params in together.items():
            torch.nn.utils.clip_grad_norm_(params, norm)


def _scheduled(lr: float, done: int, warmup: int, anneal: int) -> float:
    """Return the learning rate after `done` steps.

    The warm-up is computed in float32 and in the official order, whose subtraction loses digits:
    early in the warm-up the rate has a relative error of 1e-5.
    """
    if done >= warmup:
        progress = min(1.0, (done - warmup) / (anneal - warmup)) if anneal else 0.0
        return lr * (1 - 0.9 * progress)
    full, left = np.float32(lr), 1 - np.float32(done) / np.float32(warmup)
    return float(full - full * left)


def _clip(
    grads: list[Tensor], params: list[Tensor], agc: float, pmin: float
) -> tuple[Tensor, ...] | list[Tensor]:
    """Return new gradients of norm at most agc * max(pmin, norm of the parameter)."""
    if not agc:
        return torch._foreach_mul(grads, 1.0)
    ratio = torch._foreach_norm(grads)
    limit = torch._foreach_norm(params)
    torch._foreach_clamp_min_(limit, pmin)
    torch._foreach_mul_(limit, agc)
    torch._foreach_div_(ratio, limit)
    torch._foreach_clamp_min_(ratio, 1.0)
    return torch._foreach_div(grads, ratio)
