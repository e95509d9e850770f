"""Running offset and scale of returns, values and advantages."""

import functools

import torch
from torch import Tensor, nn

from worldloom.ranks import gather_rows


class Normalizer(nn.Module):
    """Exponential moving averages of an offset and a scale.

    Args:
        impl: "perc" for the lower of two percentiles and the range between them (DreamerV3, eq. 7);
            "meanstd" for mean and standard deviation; "none" for 0 and 1.
        rate: weight of the newest value in the averages.
        limit: minimum of the scale.
        perclo, perchi: the two percentiles, from 0 to 100.
        debias: correct the averages for their start at zero.
    """

    def __init__(
        self,
        impl: str = "perc",
        rate: float = 0.01,
        limit: float = 1e-8,
        perclo: float = 5.0,
        perchi: float = 95.0,
        debias: bool = True,
    ) -> None:
        super().__init__()
        if impl not in ("perc", "meanstd", "none"):
            raise ValueError(f"impl is {impl!r}; expected perc, meanstd or none")
        self.impl, self.rate, self.limit = impl, rate, limit
        self.perclo, self.perchi, self.debias = perclo, perchi, debias
        # perc: both percentiles; meanstd: mean and mean square.
        self.register_buffer("first", torch.zeros(()))
        self.register_buffer("second", torch.zeros(()))
        self.register_buffer("corr", torch.zeros(()))
        self.first: Tensor
        self.second: Tensor
        self.corr: Tensor

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Update the averages with new values of any shape, those of all ranks together.

        All ranks have to call this, with the same shape.
        """
        if self.impl == "none":
            return
        x = gather_rows(x.detach().flatten().to(self.first.dtype))
        if self.impl == "perc":
            levels = make_constant((self.perclo, self.perchi), x.dtype, x.device) / 100
            first, second = x.quantile(levels).unbind()
        else:
            first, second = x.mean(), x.square().mean()
        self.first.lerp_(first, self.rate)
        self.second.lerp_(second, self.rate)
        self.corr.lerp_(torch.ones_like(self.corr), self.rate)

    def stats(self) -> tuple[Tensor, Tensor]:
        """Return offset and scale (scalars)."""
        if self.impl == "none":
            return torch.zeros_like(self.first), torch.ones_like(self.first)
        first, second = self.first.clone(), self.second.clone()
        if self.debias:
            corr = self.corr.clamp(min=self.rate)
            first, second = first / corr, second / corr
        if self.impl == "perc":
            return first, (second - first).clamp(min=self.limit)
        return first, (second - first.square()).clamp(min=0).sqrt().clamp(min=self.limit)


@functools.lru_cache
def make_constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of constants, created once for each dtype and device."""
    with torch.inference_mode(False):  # otherwise training could not use a tensor made in acting
        return torch.tensor(values, dtype=dtype, device=device)
