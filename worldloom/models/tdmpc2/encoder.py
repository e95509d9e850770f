"""Observations to latents, and back with an optional decoder.

Paper: Hansen et al. 2024, appendix A. Axes: N any number of rows, L = latent_dim.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom.models.spaces import ObsSpace, ObsSpaces
from worldloom.models.tdmpc2 import draws
from worldloom.models.tdmpc2.hyperparameters import Hyperparameters
from worldloom.models.tdmpc2.layers import MLP
from worldloom.models.tdmpc2.vector_order import arrange_vectors
from worldloom.nn.shifts import shift_images
from worldloom.nn.simnorm import simnorm
from worldloom.nn.symlog import symexp, symlog

IMAGE_SIDE = 64  # the only side for which the official convolutions match their latent
SHIFT = 3  # pixels by which the random shift moves an image at most


class ImageEncoder(nn.Module):
    """The official convolutions over randomly shifted 64x64 images.

    Each encoding shifts its images, during acting and evaluation too.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        sizes = [(channels, 7, 2), (width, 5, 2), (width, 3, 2), (width, 3, 1)]
        self.convs = nn.ModuleList(
            [nn.Conv2d(inputs, width, kernel, stride) for inputs, kernel, stride in sizes]
        )

    def forward(self, images: Tensor, shifts: Tensor) -> Tensor:
        """Map uint8 [N, channels, 64, 64], shifted by [N, 2], to [N, 16 * width]."""
        dtype = next(self.parameters()).dtype
        x = shift_images(images, shifts, SHIFT).to(dtype) / 255 - 0.5
        for i, conv in enumerate(self.convs):
            x = conv(F.relu(x) if i else x)
        return x.flatten(1)


class Encoder(nn.Module):
    """Encode all vectors with one MLP and all images with one CNN; SimNorm of their sum.

    Vectors are concatenated in the order `obs_order`, images in that of their sorted keys. The
    official code has a single observation, for which this is the official encoder.
    """

    def __init__(self, spaces: ObsSpaces, options: Hyperparameters) -> None:
        super().__init__()
        self.simnorm_dim = options.simnorm_dim
        images = spaces.images()
        self.image_keys = sorted(images)
        self.vector_keys = arrange_vectors(spaces, options.obs_order)
        if self.vector_keys:
            inputs = sum(spaces[key].width for key in self.vector_keys) + options.task_dim
            hidden = max(options.num_enc_layers - 1, 1) * [options.enc_dim]
            self.vector = MLP(inputs, hidden, options.latent_dim, normed=True)
        if self.image_keys:
            _require_images_fit(images, options)
            channels = sum(images[key].shape[0] for key in self.image_keys)
            self.image = ImageEncoder(channels, options.num_channels)

    def forward(self, obs: dict[str, Tensor], task: Tensor | None, steps: int = 1) -> Tensor:
        """Map observations [N, *shape] and task embeddings [N, task_dim] to latents [N, L].

        steps: number of time steps among the N rows; the shifts of each are drawn on their own.
        """
        parts = []
        if self.vector_keys:
            dtype = next(self.vector.parameters()).dtype
            vectors = [obs[key] for key in self.vector_keys]
            inputs = [x.reshape(len(x), -1).to(dtype) for x in vectors]
            inputs += [] if task is None else [task]
            parts.append(self.vector(torch.cat(inputs, -1)))  # [N, L]
        if self.image_keys:
            images = torch.cat([obs[key] for key in self.image_keys], 1)
            rows = len(images) // steps
            shifts = [draws.draw_shifts(rows, 2 * SHIFT, images.device) for _ in range(steps)]
            parts.append(self.image(images, torch.cat(shifts)))  # [N, L]
        return simnorm(sum(parts[1:], parts[0]), self.simnorm_dim)


class Decoder(nn.Module):
    """Predict observations from detached latents: a probe without effect on the model.

    It is not part of the official model. Vectors are predicted in symlog space, images from 0 to 1.
    """

    def __init__(self, spaces: ObsSpaces, latent_dim: int, units: int) -> None:
        super().__init__()
        self.spaces = spaces
        # A list, because keys of observations may contain dots and module names may not.
        self.heads = nn.ModuleList(
            [
                _make_image_decoder(latent_dim, space.shape[0])
                if space.is_image
                else MLP(latent_dim, 2 * [units], space.width)
                for space in spaces.values()
            ]
        )

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        """Map latents [N, L] to observations [N, *shape], images as float from 0 to 255."""
        return {
            key: 255 * out.clamp(0, 1) if self.spaces[key].is_image else symexp(out)
            for key, out in self._predict(z).items()
        }

    def compute_loss(self, z: Tensor, obs: dict[str, Tensor]) -> Tensor:
        """Return the mean squared errors [N] of latents [N, L], summed over observations."""
        errors = []
        for key, out in self._predict(z).items():
            target = obs[key].to(out.dtype)
            target = target / 255 if self.spaces[key].is_image else symlog(target)
            errors.append((out - target).square().reshape(len(z), -1).mean(1))
        return torch.stack(errors).sum(0)

    def _predict(self, z: Tensor) -> dict[str, Tensor]:
        """Return the outputs of all heads, [N, *shape]."""
        heads = zip(self.spaces.items(), self.heads, strict=True)
        return {key: head(z).reshape(len(z), *space.shape) for (key, space), head in heads}


def _make_image_decoder(latent_dim: int, channels: int, width: int = 32) -> nn.Module:
    """Return a network from latents to 64x64 images, which doubles 4x4 pixels four times."""
    widths = [4 * width, 4 * width, 2 * width, width, channels]
    layers: list[nn.Module] = [
        nn.Linear(latent_dim, widths[0] * 16),
        nn.Unflatten(1, (widths[0], 4, 4)),
    ]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Mish(), nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 3, padding=1)]
    return nn.Sequential(*layers)


def _require_images_fit(images: Mapping[str, ObsSpace], options: Hyperparameters) -> None:
    """Raise ValueError unless the images and their features have the sizes of the official CNN."""
    for key, space in images.items():
        if space.shape[1:] != (IMAGE_SIDE, IMAGE_SIDE):
            raise ValueError(
                f"TD-MPC2 reads images of {IMAGE_SIDE}x{IMAGE_SIDE} pixels, but {key!r} has shape "
                f"{space.shape}; resize it (env.image_size=64), or use dreamerv3"
            )
    features = 16 * options.num_channels
    if features != options.latent_dim:
        raise ValueError(
            f"num_channels={options.num_channels} makes {features} features of an image, but "
            f"latent_dim is {options.latent_dim}; expected num_channels = latent_dim / 16"
        )
