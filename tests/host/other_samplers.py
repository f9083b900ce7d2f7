"""Sampler functions in the style of other packs: sound ones with peculiarities, and ones that steering must refuse.

All of them integrate dx/dsigma = (x - denoised) / sigma, or claim to.
"""
from __future__ import annotations

import torch
from torch import Tensor


def sample_exponential_2s(model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None) -> Tensor:
    """Exponential midpoint rule in log sigma; calls back after both of its stages."""
    for i in range(len(sigmas) - 1):
        sigma, following = sigmas[i], sigmas[i + 1]
        start, denoised = x, model(x, sigma * x.new_ones(len(x)), **extra_args)
        if following > 0:
            middle = (sigma * following).sqrt()
            x = middle / sigma * start + (1 - middle / sigma) * denoised
            denoised = model(x, middle * x.new_ones(len(x)), **extra_args)
        x = following / sigma * start + (1 - following / sigma) * denoised
        callback({"x": x, "i": i, "sigma": sigma, "denoised": denoised})
    return x


def _euler(model, x: Tensor, sigmas: Tensor, extra_args: dict, callback, hand_over, level=1.0, turn=1.0) -> Tensor:
    for i in range(len(sigmas) - 1):
        denoised = model(hand_over(x, i), level * sigmas[i] * x.new_ones(len(x)), **extra_args)
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = denoised + turn * sigmas[i + 1] / sigmas[i] * (x - denoised)
    return x


def sample_copying(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler that passes a copy to the model, like uni_pc. Writing into the copy has no effect."""
    return _euler(model, x, sigmas, extra_args, callback, lambda x, i: x.clone())


def sample_with_changed_sigmas(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler that passes a lower noise level to the model, for more detail."""
    return _euler(model, x, sigmas, extra_args, callback, lambda x, i: x, level=0.93)


def sample_turning(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Reverses the noise in each step, and with it any move of the latent."""
    return _euler(model, x, sigmas, extra_args, callback, lambda x, i: x, turn=-1.0)


def sample_ignoring(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Passes fresh noise to the model instead of the latent."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    return _euler(model, x, sigmas, extra_args, callback, lambda x, i: noise * sigmas[i])


def sample_stubborn(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Does not denoise: keeps its latent, whatever the model's output."""
    for i in range(len(sigmas) - 1):
        denoised = model(x.clone(), sigmas[i] * x.new_ones(len(x)), **extra_args)
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
    return x


def sample_in_silence(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Never calls back."""
    return _euler(model, x, sigmas, extra_args, lambda info: None, lambda x, i: x)


def sample_growing(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Doubles the latent's size half-way, so that moved cells end up at other positions."""
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = denoised + sigmas[i + 1] / sigmas[i] * (x - denoised)
        if i == 1:
            x = x.repeat_interleave(2, dim=-1)
    return x


def sample_broken(model, x, sigmas, extra_args=None, callback=None, disable=None):
    if x.shape[-1] < 16:
        raise RuntimeError("latent too small for tiles of 16")
    return _euler(model, x, sigmas, extra_args, callback, lambda x, i: x)


def sample_by_what_it_sees(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Evaluates the model twice where its output is large. A rehearsal with output 0 cannot detect that."""
    def hand_over(x: Tensor, i: int) -> Tensor:
        sigma = sigmas[i] * x.new_ones(len(x))
        return x if model(x, sigma, **extra_args).abs().max() < 1e-3 else x + 0 * model(x, sigma, **extra_args)

    return _euler(model, x, sigmas, extra_args, callback, hand_over)


def sample_until_good_enough(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler that stops early where the model's output is large. A rehearsal with output 0 cannot detect that."""
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        if i == 2 and denoised.abs().max() > 1e-3:
            return denoised
        x = denoised + sigmas[i + 1] / sigmas[i] * (x - denoised)
    return x


def _rearranging(rearranged, model, x, sigmas, extra_args, callback):
    """Euler that moves the latent's cells after each step."""
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = rearranged(denoised + sigmas[i + 1] / sigmas[i] * (x - denoised))
    return x


def sample_rolling(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Rolls the picture after each step, as samplers for seamless tiles and panoramas do."""
    return _rearranging(lambda x: x.roll(4, -1), model, x, sigmas, extra_args, callback)


def sample_flipping(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Mirrors the picture after each step."""
    return _rearranging(lambda x: x.flip(-1), model, x, sigmas, extra_args, callback)


def sample_swapping_channels(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Reverses the channels after each step."""
    return _rearranging(lambda x: x.flip(1), model, x, sigmas, extra_args, callback)


def sample_smoothing(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Averages each cell with its neighbour after each step."""
    return _rearranging(lambda x: (x + x.roll(1, -2)) / 2, model, x, sigmas, extra_args, callback)
