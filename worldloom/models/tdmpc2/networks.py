"""The networks of TD-MPC2: normed MLPs, the ensemble of Q-functions, encoders and a decoder.

Paper: Hansen et al. 2024, appendix A. Axes: N any number of rows, Q members of the ensemble.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom.models.spaces import ObsSpace, ObsSpaces
from worldloom.models.tdmpc2 import draws
from worldloom.nn.mish import mish
from worldloom.nn.simnorm import simnorm
from worldloom.nn.symlog import symexp, symlog

IMAGE_SIDE = 64  # the only side for which the official convolutions fit their latent
SHIFT = 3  # pixels that the random shift moves an image at most

Stacked = tuple[Tensor, ...]  # parameters of one layer of all members, first axis by member


def init_linear(weight: Tensor) -> None:
    """Fill with a normal of deviation 0.02, cut at -2 and 2 (absolute values)."""
    nn.init.trunc_normal_(weight, std=0.02)


def joint_linear(parts: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """Map the concatenation of parts [..., width] along the last axis, without making it.

    Leading axes broadcast, so that rows which many others share are multiplied once; and a part
    that needs no gradient costs none.
    """
    first, *others = parts
    if not others:
        return F.linear(first, weight, bias)
    piece, *pieces = weight.split([part.shape[-1] for part in parts], -1)
    y = F.linear(first, piece, bias)
    for part, piece in zip(others, pieces, strict=True):
        if part.shape[:-1] == y.shape[:-1]:
            rows = torch.addmm(y.flatten(0, -2), part.flatten(0, -2), piece.t())
            y = rows.view(y.shape)
        else:
            y = y + F.linear(part, piece)
    return y


class NormedLinear(nn.Module):
    """Linear and layer norm; the activation is the caller's."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.linear = _linear(inputs, units)
        self.norm = nn.LayerNorm(units)

    def forward(self, *parts: Tensor) -> Tensor:
        """Map [..., inputs], or parts of that width (see `joint_linear`), to [..., units]."""
        return self.norm(joint_linear(parts, self.linear.weight, self.linear.bias))


class MLP(nn.Module):
    """Hidden layers (linear, layer norm, Mish) and a last layer: linear, normed or not.

    zero: start with a last weight of zeros.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        *,
        normed: bool = False,
        zero: bool = False,
    ) -> None:
        super().__init__()
        widths = [inputs, *hidden]
        layers: list[nn.Module] = [NormedLinear(a, b) for a, b in pairwise(widths)]
        last = NormedLinear(widths[-1], outputs) if normed else _linear(widths[-1], outputs)
        if zero:
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        self.layers = nn.ModuleList([*layers, last])

    def forward(self, *parts: Tensor) -> Tensor:
        """Map [..., inputs], or parts of that width (see `joint_linear`), to [..., outputs]."""
        first, *others = self.layers
        x = first(*parts)
        for layer in others:
            x = layer(mish(x))
        return x


def drop(x: Tensor, probability: float) -> Tensor:
    """Set each number to zero with a probability and divide the others by that of staying."""
    if not probability:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, probability)
    lost = draws.dropped(x.numel(), probability)
    return (x / (1 - probability)).flatten().index_fill(0, lost, 0.0).view_as(x)


class EnsembleLinear(nn.Module):
    """The parameters of Q linear layers, each followed by a layer norm of its own if `normed`.

    weight: [Q, outputs, inputs]; bias, scale and shift of the norm: [Q, outputs].
    """

    def __init__(self, count: int, inputs: int, outputs: int, *, normed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(count, outputs))
        self.normed = normed
        if normed:
            self.scale = nn.Parameter(torch.ones(count, outputs))
            self.shift = nn.Parameter(torch.zeros(count, outputs))
            for weight in self.weight:
                init_linear(weight)
        else:
            nn.init.zeros_(self.weight)

    def stacked(self) -> Stacked:
        """Return weight and bias, and of a normed layer scale and shift as well."""
        norm = (self.scale, self.shift) if self.normed else ()
        return (self.weight, self.bias, *norm)


class Ensemble(nn.Module):
    """Q MLPs of the same shape; the last weights start at zero."""

    def __init__(self, count: int, inputs: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        pairs = enumerate(pairwise([inputs, *hidden, outputs]))
        self.count = count
        self.layers = nn.ModuleList(
            [EnsembleLinear(count, *pair, normed=i < len(hidden)) for i, pair in pairs]
        )

    def forward(
        self, *parts: Tensor, members: Tensor | None = None, dropout: float = 0.0
    ) -> Tensor:
        """Map [..., inputs] to [Q, ..., outputs], of all members or of those that are given.

        parts: one tensor, or several of that width together (see `joint_linear`). members:
        indices; only these are computed. dropout: probability, after the first linear map and
        before its norm.
        """
        layers = [layer.stacked() for layer in self.layers]  # type: ignore[operator]
        compute = one_by_one if parts[0].device.type == "cpu" else all_at_once
        return compute(parts, layers, members, dropout)


def one_by_one(
    parts: Sequence[Tensor], layers: Sequence[Stacked], members: Tensor | None, dropout: float
) -> Tensor:
    """Compute an `Ensemble` member by member, as suits a CPU.

    Its cores share every product, where in a batch of products each core takes whole ones, and what
    lies between two products stays in its cache.
    """
    split = [[p.unbind() for p in layer] for layer in layers]
    outputs = []
    for i in range(len(layers[0][0])) if members is None else members.tolist():
        inputs = parts
        for number, layer in enumerate(split):
            weight, bias, *norm = (p[i] for p in layer)
            y = joint_linear(inputs, weight, bias)
            y = y if number else drop(y, dropout)
            if norm:
                y = mish(F.layer_norm(y, y.shape[-1:], norm[0], norm[1]))
            inputs = (y,)
        outputs.append(y)
    return torch.stack(outputs)


def all_at_once(
    parts: Sequence[Tensor], layers: Sequence[Stacked], members: Tensor | None, dropout: float
) -> Tensor:
    """Compute an `Ensemble` as one batch of products, in as few kernels as suit a GPU."""
    layers = [tuple(p if members is None else p[members] for p in layer) for layer in layers]
    weight, bias = layers[0][:2]
    y = joint_linear(parts, weight.flatten(0, 1), bias.flatten())  # one large product
    rows = y.shape[:-1]
    y = y.reshape(-1, *bias.shape).transpose(0, 1)  # [Q, N, units]
    for number, (weight, bias, *norm) in enumerate(layers):
        y = torch.baddbmm(bias.unsqueeze(1), y, weight.mT) if number else drop(y, dropout)
        if norm:
            scale, shift = (p.unsqueeze(1) for p in norm)
            y = mish(torch.addcmul(shift, F.layer_norm(y, y.shape[-1:]), scale))
    return y.unflatten(1, rows)


class ImageEncoder(nn.Module):
    """Convolutions over randomly shifted 64x64 images, as the official code has them.

    The shift is applied at every encoding, in acting and evaluation too.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        sizes = [(channels, 7, 2), (width, 5, 2), (width, 3, 2), (width, 3, 1)]
        self.convs = nn.ModuleList(
            [nn.Conv2d(inputs, width, kernel, stride) for inputs, kernel, stride in sizes]
        )

    @property
    def like(self) -> Tensor:
        """A parameter, for its dtype and device."""
        return next(self.parameters())

    def forward(self, images: Tensor, shifts: Tensor) -> Tensor:
        """Map uint8 [N, channels, 64, 64], shifted by [N, 2], to [N, 16 * width]."""
        x = random_shift(images, shifts).to(self.like.dtype) / 255 - 0.5
        for i, conv in enumerate(self.convs):
            x = conv(F.relu(x) if i else x)
        return x.flatten(1)


def random_shift(images: Tensor, shifts: Tensor) -> Tensor:
    """Repeat the border by three pixels and crop at (x, y) from the top left.

    Yarats et al. 2021 (DrQ-v2). The official code crops by bilinear sampling at whole pixels, which
    differs by rounding alone. images: [N, C, H, W]; shifts: [N, 2], x then y, from 0 to 6.
    """
    height, width = images.shape[-2:]
    rows = (torch.arange(height, device=images.device) + shifts[:, 1:] - SHIFT).clamp(0, height - 1)
    cols = (torch.arange(width, device=images.device) + shifts[:, :1] - SHIFT).clamp(0, width - 1)
    index = torch.arange(len(images), device=images.device)[:, None, None]
    # Indexed axes come first: [N, H, W, C].
    return images[index, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """Read vectors by one MLP and images by one network; both together add up before SimNorm.

    The official code knows one observation only. Sums of logits are products of what each of them
    says, and with one observation this is the official encoder.
    """

    def __init__(
        self,
        spaces: ObsSpaces,
        task_dim: int,
        *,
        latent_dim: int,
        num_enc_layers: int,
        enc_dim: int,
        num_channels: int,
        simnorm_dim: int,
    ) -> None:
        super().__init__()
        self.simnorm_dim = simnorm_dim
        images = spaces.images()
        self.image_keys = sorted(images)
        self.vector_keys = sorted(key for key in spaces if key not in images)
        if self.vector_keys:
            inputs = sum(spaces[key].width for key in self.vector_keys) + task_dim
            hidden = max(num_enc_layers - 1, 1) * [enc_dim]
            self.vector = MLP(inputs, hidden, latent_dim, normed=True)
        if self.image_keys:
            _require_images_fit(images, latent_dim, num_channels)
            channels = sum(images[key].shape[0] for key in self.image_keys)
            self.image = ImageEncoder(channels, num_channels)

    def draw_shifts(self, images: int) -> Tensor | None:
        """Draw what one encoding of so many rows needs; None without images."""
        if not self.image_keys:
            return None
        return draws.image_shifts(images, 2 * SHIFT, self.image.like.device)

    def forward(self, obs: dict[str, Tensor], task: Tensor | None, shifts: Tensor | None) -> Tensor:
        """Map observations [N, *shape] and task embeddings [N, task_dim] to z [N, latent_dim]."""
        parts = []
        if self.vector_keys:
            like = next(self.vector.parameters())
            vectors = [obs[key] for key in self.vector_keys]
            inputs = [x.reshape(len(x), -1).to(like.dtype) for x in vectors]
            inputs += [] if task is None else [task]
            parts.append(self.vector(torch.cat(inputs, -1)))
        if self.image_keys:
            assert shifts is not None
            pictures = torch.cat([obs[key] for key in self.image_keys], 1)
            parts.append(self.image(pictures, shifts))
        return simnorm(sum(parts[1:], parts[0]), self.simnorm_dim)


class Decoder(nn.Module):
    """Show what a latent stands for: a probe that is trained on detached latents.

    Not part of the official model. Vectors are predicted in symlog space, images from 0 to 1.
    """

    def __init__(self, spaces: ObsSpaces, latent_dim: int, units: int) -> None:
        super().__init__()
        self.spaces = spaces
        # Names of modules may not hold dots, keys of observations may.
        self.heads = nn.ModuleList(
            [
                _image_decoder(latent_dim, space.shape[0])
                if space.is_image
                else MLP(latent_dim, 2 * [units], space.width)
                for space in spaces.values()
            ]
        )

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        """Map z [N, latent_dim] to observations [N, *shape], images as float from 0 to 255."""
        return {
            key: 255 * out.clamp(0, 1) if self.spaces[key].is_image else symexp(out)
            for key, out in self._outputs(z).items()
        }

    def loss(self, z: Tensor, obs: dict[str, Tensor]) -> Tensor:
        """Return the mean squared error [N] of z [N, latent_dim], summed over observations."""
        errors = []
        for key, out in self._outputs(z).items():
            target = obs[key].to(out.dtype)
            target = target / 255 if self.spaces[key].is_image else symlog(target)
            errors.append((out - target).square().reshape(len(z), -1).mean(1))
        return torch.stack(errors).sum(0)

    def _outputs(self, z: Tensor) -> dict[str, Tensor]:
        heads = zip(self.spaces.items(), self.heads, strict=True)
        return {key: head(z).reshape(len(z), *space.shape) for (key, space), head in heads}


def _image_decoder(latent_dim: int, channels: int, width: int = 32) -> nn.Module:
    """Build a network from a latent to images of 64x64, by four doublings from 4x4."""
    widths = [4 * width, 4 * width, 2 * width, width, channels]
    layers: list[nn.Module] = [
        nn.Linear(latent_dim, widths[0] * 16),
        nn.Unflatten(1, (widths[0], 4, 4)),
    ]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Mish(), nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 3, padding=1)]
    return nn.Sequential(*layers)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    init_linear(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _require_images_fit(images: Mapping[str, ObsSpace], latent_dim: int, num_channels: int) -> None:
    for key, space in images.items():
        if space.shape[1:] != (IMAGE_SIDE, IMAGE_SIDE):
            raise ValueError(
                f"TD-MPC2 reads images of {IMAGE_SIDE}x{IMAGE_SIDE} pixels, but {key!r} has shape "
                f"{space.shape}; resize it (env.image_size=64), or take dreamerv3"
            )
    if 16 * num_channels != latent_dim:
        raise ValueError(
            f"num_channels={num_channels} makes {16 * num_channels} features of an image, but "
            f"latent_dim is {latent_dim}; expected num_channels = latent_dim / 16"
        )
