"""Lambda-returns."""

import torch
from torch import Tensor


def lambda_return(
    last: Tensor,
    term: Tensor,
    reward: Tensor,
    boot: Tensor,
    disc: float,
    lam: float,
) -> Tensor:
    """Return lambda-returns [N, L - 1] (Sutton & Barto, eq. 12.18; DreamerV3, eq. 5).

    All inputs are [N, L]. Reward and flags at t + 1 belong to the transition from t to t + 1.
    `term` (0 to 1) removes the future; `last` only ends the trace, so a truncated episode
    bootstraps fully from `boot`.
    """
    live = (1 - term[:, 1:]) * disc
    cont = (1 - last[:, 1:]) * lam
    inner = reward[:, 1:] + live * (1 - cont) * boot[:, 1:]
    trace = live * cont
    value = boot[:, -1]
    returns = []
    for t in reversed(range(inner.shape[1])):
        value = inner[:, t] + trace[:, t] * value
        returns.append(value)
    return torch.stack(returns[::-1], 1)
