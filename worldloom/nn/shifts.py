"""Random shifts of images, an augmentation (Yarats et al. 2021, DrQ-v2)."""

import torch
from torch import Tensor


def draw_shifts(images: int, most: int, device: torch.device) -> Tensor:
    """Draw the shift of each image, x and then y, [images, 2] int64 from 0 to `most`."""
    return torch.randint(most + 1, (images, 2), device=device)


def shift_images(images: Tensor, shifts: Tensor, pad: int) -> Tensor:
    """Pad images [N, C, H, W] by repeating their border, and crop at `shifts` [N, 2].

    Official implementations crop with bilinear sampling at whole pixels, which differs by rounding
    only.

    shifts: x and then y of the crop in the padded image, from 0 to 2 * pad; `pad` is no shift.
    """
    height, width = images.shape[-2:]
    rows = (torch.arange(height, device=images.device) + shifts[:, 1:] - pad).clamp(0, height - 1)
    cols = (torch.arange(width, device=images.device) + shifts[:, :1] - pad).clamp(0, width - 1)
    index = torch.arange(len(images), device=images.device)[:, None, None]
    # Indexed axes come first: [N, H, W, C].
    return images[index, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
