"""Encoder, decoder and heads of DreamerV3 (paper, appendix "Networks"; official rssm.py, heads.py).

Axes: N stands for all leading axes flattened; features are concat(deter, stoch).
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom.models.spaces import ActSpaces, ObsSpace, ObsSpaces
from worldloom.nn.distributions import BoundedNormal, Classes, one_hot
from worldloom.nn.layers import (
    MLP,
    BlockLinear,
    Conv,
    Dense,
    Linear,
    RMSNorm,
    max_pool,
    norm_silu,
    to_float32,
)
from worldloom.nn.symlog import symexp, symlog


class ImageStage(nn.Module):
    """Convolution, 2x2 max pool where it shrinks, RMS norm over channels, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, pool: bool) -> None:
        super().__init__()
        self.conv = Conv(inputs, outputs, kernel)
        self.norm = RMSNorm(outputs)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, H, W, C] to [N, H', W', C']."""
        x = self.conv(x)
        x = max_pool(x) if self.pool else x
        return norm_silu(x, self.norm.scale)


def _image_size(images: dict[str, ObsSpace], stages: int) -> tuple[int, int, int]:
    """Return total channels, height and width; all images must have one size."""
    sizes = {k: s.shape[1:] for k, s in images.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"image observations differ in size: {sizes}; resize them to one size")
    height, width = next(iter(sizes.values()))
    factor = 2**stages
    if height % factor or width % factor:
        nearest = [max(factor, round(n / factor) * factor) for n in (height, width)]
        raise ValueError(
            f"no encoder takes images of {height}x{width}; both sides must be divisible by "
            f"{factor}: resize to {nearest[0]}x{nearest[1]} (env.image_size) or give channels first"
        )
    return sum(s.shape[0] for s in images.values()), height, width


class Encoder(nn.Module):
    """Turn observations into tokens: an MLP over all vectors, a CNN over all images."""

    def __init__(
        self,
        spaces: ObsSpaces,
        *,
        units: int,
        layers: int,
        depth: int,
        mults: Sequence[int],
        kernel: int,
        symlog: bool,
    ) -> None:
        super().__init__()
        self.vectors = dict(sorted(spaces.vectors().items()))
        self.images = sorted(spaces.images())
        self.symlog = symlog
        self.mlp, self.cnn = MLP(0, units, 0), nn.Sequential()
        self.width = 0
        if self.vectors:
            self.mlp = MLP(sum(s.width for s in self.vectors.values()), units, layers)
            self.width += units
        if self.images:
            channels, height, width = _image_size(spaces.images(), len(mults))
            depths = [channels, *[depth * m for m in mults]]
            self.cnn = nn.Sequential(
                *[ImageStage(i, o, kernel, pool=True) for i, o in itertools.pairwise(depths)]
            )
            self.width += depths[-1] * (height >> len(mults)) * (width >> len(mults))

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        """Encode observations {key: [..., *shape]} into tokens [..., width]."""
        key, value = next(iter(obs.items()))
        rank = 3 if key in self.images else len(self.vectors[key].shape)
        lead = value.shape[: value.ndim - rank]
        tokens = []
        if self.vectors:
            tokens.append(self.mlp(self.vector_input(obs, len(lead))))
        if self.images:
            dtype = next(self.cnn.parameters()).dtype
            images = torch.cat([obs[k].flatten(0, len(lead) - 1) for k in self.images], 1)
            x = images.permute(0, 2, 3, 1).to(dtype) / 255 - 0.5
            tokens.append(self.cnn(x).flatten(1).unflatten(0, lead))
        return torch.cat(tokens, -1)

    def vector_input(self, obs: dict[str, Tensor], lead: int) -> Tensor:
        """Concatenate all vectors, sorted by key: symlog of numbers, one-hot of classes."""
        dtype = self.mlp.first.linear.weight.dtype
        parts = []
        for key, space in self.vectors.items():
            x = obs[key]
            if space.classes:
                x = one_hot(x.long(), space.classes, dtype)
            else:
                x = symlog(x.to(dtype)) if self.symlog else x.to(dtype)
            parts.append(x.reshape(*x.shape[:lead], -1))
        return torch.cat(parts, -1)


class ImageDecoder(nn.Module):
    """Turn a latent state into all images at once."""

    def __init__(
        self,
        images: dict[str, ObsSpace],
        deter: int,
        stoch: int,
        *,
        units: int,
        depth: int,
        mults: Sequence[int],
        kernel: int,
        bspace: int,
    ) -> None:
        super().__init__()
        channels, height, width = _image_size(images, len(mults))
        self.channels = [s.shape[0] for s in images.values()]
        self.keys = list(images)
        depths = [depth * m for m in mults]
        self.shape = (height >> len(mults), width >> len(mults), depths[-1])
        size = math.prod(self.shape)
        self.blocks = bspace
        self.sp0 = BlockLinear(deter, size, bspace)
        self.sp1 = Dense(stoch, 2 * units)
        self.sp2 = Linear(2 * units, size)
        self.spnorm = RMSNorm(depths[-1])
        stages = list(zip(depths[:0:-1], depths[-2::-1], strict=True))
        self.stages = nn.ModuleList(ImageStage(i, o, kernel, pool=False) for i, o in stages)
        self.imgout = Conv(depths[0], channels, kernel)

    def forward(self, deter: Tensor, stoch: Tensor) -> dict[str, Tensor]:
        """Map [N, deter] and [N, stoch] to images in [0, 1], {key: [N, C, H, W]}."""
        (h, w, c), g = self.shape, self.blocks
        n = len(deter)
        x = self.sp0(deter.view(n, g, -1).transpose(0, 1))
        x = x.view(g, n, h, w, c // g).permute(1, 2, 3, 0, 4).reshape(n, h, w, c)
        x = x + self.sp2(self.sp1(stoch)).view(n, h, w, c)
        x = norm_silu(x, self.spnorm.scale)
        for stage in self.stages:
            x = stage(_upsample(x))
        image = torch.sigmoid(self.imgout(_upsample(x))).permute(0, 3, 1, 2)
        return dict(zip(self.keys, image.split(self.channels, 1), strict=True))


def _upsample(x: Tensor) -> Tensor:
    """Repeat every pixel of [N, H, W, C] twice in both directions."""
    return F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2).permute(0, 2, 3, 1)


class Decoder(nn.Module):
    """Predict every observation from the latent state."""

    def __init__(
        self,
        spaces: ObsSpaces,
        deter: int,
        stoch: int,
        *,
        units: int,
        layers: int,
        depth: int,
        mults: Sequence[int],
        kernel: int,
        bspace: int,
    ) -> None:
        super().__init__()
        self.spaces = spaces
        self.vectors = spaces.vectors()
        self.mlp = MLP(stoch + deter, units, layers if self.vectors else 0)
        self.vec = nn.ModuleDict(
            {module_name(k): Linear(units, s.width) for k, s in self.vectors.items()}
        )
        images = spaces.images()
        kw = dict(units=units, depth=depth, mults=mults, kernel=kernel, bspace=bspace)
        self.image = ImageDecoder(images, deter, stoch, **kw) if images else None  # type: ignore[arg-type]

    def forward(self, deter: Tensor, stoch: Tensor) -> dict[str, Tensor]:
        """Predict from [..., deter] and [..., stoch] flattened.

        Images in [0, 1] [..., C, H, W]; numbers in symlog space [..., *shape]; classes as logits
        [..., *shape, classes].
        """
        lead = deter.shape[:-1]
        outs = {}
        if self.vectors:
            x = self.mlp(torch.cat([stoch, deter], -1))
            for key, space in self.vectors.items():
                event = (*space.shape, space.classes) if space.classes else space.shape
                outs[key] = self.vec[module_name(key)](x).reshape(*lead, *event)
        if self.image is not None:
            images = self.image(deter.flatten(0, -2), stoch.flatten(0, -2))
            outs |= {k: v.unflatten(0, lead) for k, v in images.items()}
        return {key: to_float32(outs[key]) for key in self.spaces}

    def loss(self, key: str, out: Tensor, target: Tensor) -> Tensor:
        """Return the reconstruction loss [...] of one observation, summed over its elements."""
        space = self.spaces[key]
        lead = target.shape[: target.ndim - len(space.shape)]
        if space.classes:
            index = target.long().unsqueeze(-1)
            error = -out.log_softmax(-1).gather(-1, index).squeeze(-1)
        elif space.is_image:
            error = (out - target.to(out.dtype) / 255).square()
        else:
            error = (out - symlog(target.to(out.dtype))).square()
        return error.reshape(*lead, -1).sum(-1)

    def observation(self, key: str, out: Tensor) -> Tensor:
        """Turn an output into the observation's own units: pixels from 0 to 255, raw numbers."""
        space = self.spaces[key]
        if space.classes:
            return out.argmax(-1)
        return out * 255 if space.is_image else symexp(out)


_RESERVED = frozenset(dir(nn.ModuleDict()))


def module_name(key: str) -> str:
    """Make any key a legal module name: torch forbids dots and names such as "keys" or "type"."""
    name = key.replace(".", "\N{MIDDLE DOT}")
    return name + "\N{MIDDLE DOT}" if name in _RESERVED else name


class Head(nn.Module):
    """An MLP and a linear output: two-hot logits for numbers, one logit for the continuation."""

    def __init__(
        self, inputs: int, *, units: int, layers: int, outputs: int, outscale: float
    ) -> None:
        super().__init__()
        self.mlp = MLP(inputs, units, layers)
        self.out = Linear(units, outputs, outscale)

    def forward(self, features: Tensor) -> Tensor:
        """Map features [..., inputs] to logits [..., outputs]."""
        return to_float32(self.out(self.mlp(features)))


class ActionOutput(nn.Module):
    """The last layers of the policy for one action."""

    def __init__(self, units: int, shape: tuple[int, ...], classes: int, outscale: float) -> None:
        super().__init__()
        self.event = (*shape, classes) if classes else shape
        names = ["logits"] if classes else ["mean", "stddev"]
        size = math.prod(self.event)
        self.layers = nn.ModuleDict({name: Linear(units, size, outscale) for name in names})

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map [..., units] to raw outputs, each [..., *event]."""
        return [to_float32(layer(x)).unflatten(-1, self.event) for layer in self.layers.values()]


class Policy:
    """The distributions of all actions; an event is the whole action vector [..., A]."""

    def __init__(self, spaces: ActSpaces, dists: dict[str, Classes | BoundedNormal]) -> None:
        self.spaces, self.dists = spaces, dists

    @classmethod
    def stack(cls, policies: Sequence["Policy"]) -> "Policy":
        """Put policies of the same actions together along a new second axis."""
        dists: dict[str, Any] = {}
        for key, dist in policies[0].dists.items():
            same: list[Any] = [policy.dists[key] for policy in policies]
            dists[key] = dist.stack(same)
        return cls(policies[0].spaces, dists)

    def sample(self, deterministic: bool = False) -> Tensor:
        """Draw an action vector [..., A], or return the likeliest."""
        events = []
        for key, dist in self.dists.items():
            event = dist.mode() if deterministic else dist.sample()
            events.append(event.flatten(-len(self.spaces[key].event)))
        return torch.cat(events, -1)

    def log_prob(self, action: Tensor) -> Tensor:
        """Return the log-probability [...] of an action vector."""
        logps = [self.dists[key].log_prob(event) for key, event in self.spaces.split(action)]
        return torch.stack(logps).sum(0)

    def entropy(self) -> dict[str, Tensor]:
        """Return the entropy [...] of each action."""
        return {key: dist.entropy() for key, dist in self.dists.items()}


class Actor(nn.Module):
    """The policy network."""

    def __init__(
        self,
        inputs: int,
        spaces: ActSpaces,
        *,
        units: int,
        layers: int,
        minstd: float,
        maxstd: float,
        outscale: float,
    ) -> None:
        super().__init__()
        self.spaces = spaces
        self.bounds = (minstd, maxstd)
        self.mlp = MLP(inputs, units, layers)
        self.out = nn.ModuleDict(
            {
                module_name(k): ActionOutput(units, s.shape, s.classes, outscale)
                for k, s in spaces.items()
            }
        )

    def forward(self, features: Tensor) -> Policy:
        """Map features [..., inputs] to the policy."""
        x = self.mlp(features)
        dists: dict[str, Classes | BoundedNormal] = {}
        for key, space in self.spaces.items():
            raw = self.out[module_name(key)](x)
            dims = len(space.event)
            if space.classes:
                dists[key] = Classes(raw[0], dims)
            else:
                dists[key] = BoundedNormal.from_raw(raw[0], raw[1], dims, *self.bounds)
        return Policy(self.spaces, dists)
