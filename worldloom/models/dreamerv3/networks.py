"""Encoder and decoder of DreamerV3 (official rssm.py).

Axes: N stands for all leading axes flattened; images are [N, H, W, C] inside the networks.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom.models.spaces import ObsSpace, ObsSpaces
from worldloom.nn.distributions import one_hot
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
    """Convolution, optional 2x2 max pooling, RMS norm over channels, SiLU."""

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
    """Return total channels, height and width; raise ValueError if image sizes are unsuitable."""
    sizes = {k: s.shape[1:] for k, s in images.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"image observations differ in size: {sizes}; resize them to one size")
    height, width = next(iter(sizes.values()))
    factor = 2**stages
    if height % factor or width % factor:
        nearest = [max(factor, round(n / factor) * factor) for n in (height, width)]
        raise ValueError(
            f"cannot encode images of {height}x{width}; both sides must be divisible by "
            f"{factor}: resize to {nearest[0]}x{nearest[1]} (env.image_size) or give channels first"
        )
    return sum(s.shape[0] for s in images.values()), height, width


class Encoder(nn.Module):
    """Encode observations into tokens: an MLP over all vectors, a CNN over all images."""

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
        """Map observations {key: [..., *shape]} to tokens [..., width]."""
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
        """Concatenate all vectors, sorted by key: numbers in symlog space, classes one-hot."""
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
    """Decode a latent state into all images, stacked along the channels."""

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
        # Both parts of the state give a small image; each block of sp0 gives c / g channels.
        x = self.sp0(deter.view(n, g, -1).transpose(0, 1))  # [g, n, h * w * c / g]
        x = x.view(g, n, h, w, c // g).permute(1, 2, 3, 0, 4).reshape(n, h, w, c)
        x = x + self.sp2(self.sp1(stoch)).view(n, h, w, c)
        x = norm_silu(x, self.spnorm.scale)
        for stage in self.stages:
            x = stage(_upsample(x))
        image = torch.sigmoid(self.imgout(_upsample(x))).permute(0, 3, 1, 2)
        return dict(zip(self.keys, image.split(self.channels, 1), strict=True))


def _upsample(x: Tensor) -> Tensor:
    """Double the size of images [N, H, W, C] by nearest-neighbour interpolation."""
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
        """Map deter [..., D] and stoch [..., S * C] to one prediction per observation.

        Images are [..., C, H, W] in [0, 1], numbers [..., *shape] in symlog space, and classes
        logits [..., *shape, classes].
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
        """Convert an output to units of the observation: pixels from 0 to 255, raw numbers."""
        space = self.spaces[key]
        if space.classes:
            return out.argmax(-1)
        return out * 255 if space.is_image else symexp(out)


_RESERVED = frozenset(dir(nn.ModuleDict()))


def module_name(key: str) -> str:
    """Return a valid module name for any key; torch rejects dots and names such as "keys"."""
    name = key.replace(".", "\N{MIDDLE DOT}")
    return name + "\N{MIDDLE DOT}" if name in _RESERVED else name


def build_decoder(
    spaces: ObsSpaces, latent_width: int, is_probe: bool, options: Mapping[str, Any]
) -> Decoder | None:
    """Build the decoder that the hyperparameters of DreamerV3 describe, or None for none.

    latent_width: S * C. is_probe: whether another loss shapes the latents. A probe takes no random
        numbers, so that all other weights start as without it.

    Raises:
        ValueError: there is to be none, but the latents are learned from reconstructions.
    """
    decoder = options["decoder"]
    if not decoder and not is_probe:
        raise ValueError(
            f"decoder is {decoder}, but representation=decoder learns from reconstructions; "
            "expected decoder=true, or another representation, such as r2dreamer"
        )
    if not decoder:
        return None
    if decoder is True:  # with the encoder's sizes
        sizes = {name: options["encoder"][name] for name in ("layers", "mults", "kernel")}
        decoder = {**sizes, "bspace": options["blocks"]}
    decoder = {"units": options["units"], "depth": options["depth"], **decoder}
    with torch.random.fork_rng([]) if is_probe else nullcontext():
        return Decoder(spaces, options["deter"], latent_width, **decoder)
