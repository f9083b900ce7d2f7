"""The latent space of the small world: a fixed linear transform of 4x4 patches instead of a trained VAE.

The transform is a principal component analysis of the patches of drawn scenes. Each channel is scaled half way to equal
variance: without scaling, noise would hide fine detail; with equal variance, fine detail would hide the layout.
"""
from __future__ import annotations

import numpy as np
import torch

from .scenes import IMAGE_SIZE, random_scene

PATCH = 4
LATENT_SIZE = IMAGE_SIZE // PATCH


class PatchTransform(torch.nn.Module):
    """Encodes pictures [B, 3, H, W] from -1 to 1 as latents [B, channels, H/4, W/4], and decodes them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        shape = (channels, 3, PATCH, PATCH)
        self.encode_weight = torch.nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.encode_bias = torch.nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.decode_weight = torch.nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.decode_bias = torch.nn.Parameter(torch.zeros(shape[1:]), requires_grad=False)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(pixels, self.encode_weight, self.encode_bias, stride=PATCH)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        pixels = torch.nn.functional.conv_transpose2d(latents, self.decode_weight, stride=PATCH)
        rows, columns = latents.shape[-2:]
        return pixels + self.decode_bias.repeat(1, rows, columns)

    def rescaled(self, scale: float, shift: float) -> PatchTransform:
        """The transform with latents z for which (z - shift) * scale are this one's latents, as in a host's latent format."""
        other = PatchTransform(self.channels)
        with torch.no_grad():
            other.encode_weight.copy_(self.encode_weight / scale)
            other.encode_bias.copy_(self.encode_bias / scale + shift)
            other.decode_weight.copy_(self.decode_weight * scale)
            other.decode_bias.copy_(self.decode_bias - shift * scale * self.decode_weight.sum(dim=0))
        return other

    def restored(self, scale: float, shift: float) -> PatchTransform:
        """The inverse of `rescaled`: `restored(scale, shift).rescaled(scale, shift)` is this transform."""
        return self.rescaled(1 / scale, -shift * scale)

    def rgb_factors(self) -> tuple[list[list[float]], list[float]]:
        """Mean colour (-1 to 1) of a patch as a function of its latent, for previews: [channels][3] and bias [3]."""
        return self.decode_weight.mean(dim=(2, 3)).tolist(), self.decode_bias.mean(dim=(1, 2)).tolist()


def fit_patch_transform(channels: int, deviation: float = 1.0, scenes: int = 2000, seed: int = 0) -> PatchTransform:
    """Fits the transform to `scenes` random scenes. The same seed gives the same transform.

    deviation: standard deviation of the latents. With a smaller deviation, the layout is decided later in the schedule.
    """
    rng = np.random.default_rng(seed)
    pixels = np.stack([random_scene(rng).image for _ in range(scenes)]).astype(np.float64) / 127.5 - 1
    patches = pixels.reshape(scenes, LATENT_SIZE, PATCH, LATENT_SIZE, PATCH, 3).transpose(0, 1, 3, 5, 2, 4)
    patches = patches.reshape(-1, 3 * PATCH * PATCH)
    mean = patches.mean(axis=0)
    variances, axes = np.linalg.eigh(np.cov((patches - mean).T))
    variances, axes = variances[::-1][:channels], axes[:, ::-1][:, :channels].T
    axes *= np.sign(axes.sum(axis=1, keepdims=True))
    scale = variances ** -0.25
    scale *= deviation / np.sqrt((scale ** 2 * variances).mean())
    transform = PatchTransform(channels)
    encode = axes * scale[:, None]
    with torch.no_grad():
        transform.encode_weight.copy_(torch.from_numpy(encode.reshape(channels, 3, PATCH, PATCH)))
        transform.encode_bias.copy_(torch.from_numpy(-encode @ mean))
        transform.decode_weight.copy_(torch.from_numpy((axes / scale[:, None]).reshape(channels, 3, PATCH, PATCH)))
        transform.decode_bias.copy_(torch.from_numpy(mean.reshape(3, PATCH, PATCH)))
    return transform
