"""Turns a picture and a caption into attention maps: inverts the picture to noise, denoises it again, and records the maps.

UNets use fixed-point DDIM inversion, flow models rectified-flow inversion (docs/method.md, "Training data"). Both run as a
SAMPLER under the host's CFGGuider with guidance 1, so the host handles loading, conditioning, hooks and LoRAs.
"""
from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor

from ..classifiers.steps import PAPER_TIMESTEPS
from ..host.backbones import find_backbone
from ..host.tokens import CONDITIONING_KEY, TokenError, encode_prompt
from ..steering.attention import AttentionMaps, LayerMaps, MapRecorder, WordColumns
from .captions import Caption, Inverted
from .storage import TrainingError

WORDS = ("subject", "object")
Denoise = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class InversionSettings:
    """Settings of inversion and recording.

    steps, scheduler: the host's schedule.
    timesteps: step indices at which maps are recorded.
    iterations: fixed-point iterations per step (UNets).
    gamma: 0 to 1, pull of the rectified-flow inversion towards the noise; eta: pull of its reconstruction to the picture.
    guidance: guidance of guidance-distilled FLUX models.
    least_psnr: in dB; a sample with a worse reconstruction is dropped.
    size, normalise: as in `MapLayout`. normalise is not "resized", so that maps are alike for every size of pictures.
    Raises TrainingError for values out of range.
    """

    steps: int = 50
    scheduler: str = "ddim_uniform"
    timesteps: tuple[int, ...] = PAPER_TIMESTEPS[50]
    iterations: int = 5
    gamma: float = 1.0
    eta: float = 1.0
    guidance: float = 0.0
    least_psnr: float = 19.5
    size: int = 16
    normalise: str = "always"

    def __post_init__(self) -> None:
        if not self.timesteps or not 0 <= min(self.timesteps) <= max(self.timesteps) < self.steps:
            raise TrainingError(f"Recorded steps {list(self.timesteps)} do not lie within {self.steps} steps (0 to "
                                f"{self.steps - 1}). Give others.")
        if self.iterations < 1 or not (0 <= self.gamma <= 1 and 0 <= self.eta <= 1):
            raise TrainingError("iterations must be 1 or more, gamma and eta from 0 to 1.")
        if not (math.isfinite(self.guidance) and math.isfinite(self.least_psnr)):
            raise TrainingError("guidance and least_psnr must be finite numbers.")

    @staticmethod
    def for_backbone(backbone: str, steps: int = 50, **changes) -> InversionSettings:
        """The paper's settings for "unet" or "mmdit". For another number of steps, timesteps scale with it."""
        timesteps = PAPER_TIMESTEPS.get(steps) or tuple(sorted({
            min(steps - 1, round(step * steps / 50)) for step in PAPER_TIMESTEPS[50]}))
        family = {"scheduler": "simple", "least_psnr": 20.0} if backbone == "mmdit" else {}
        return InversionSettings(**{"steps": steps, "timesteps": timesteps, **family, **changes})


class Inverter:
    """Turns pictures and captions into maps with a MODEL, CLIP and VAE of the host.

    check: called between evaluations of the model; raises if the user interrupts.
    """

    def __init__(self, model, clip, vae, settings: InversionSettings, check: Callable[[], None] = lambda: None) -> None:
        self.model, self.clip, self.vae, self.settings, self.check = model, clip, vae, settings, check
        self.backbone = find_backbone(model.model.diffusion_model)

    @property
    def least_psnr(self) -> float:
        return self.settings.least_psnr

    def describe(self) -> dict:
        """Everything that determines the maps, as JSON values."""
        settings = asdict(self.settings)
        return {"backbone": self.backbone.name, "model": fingerprint(self.model, self.clip, self.vae),
                **settings, "timesteps": list(settings["timesteps"])}

    def invert(self, images: Tensor, captions: Sequence[Caption], seeds: Sequence[int]) -> Inverted:
        """Inverts a batch of pictures.

        images: [B, H, W, 3] from 0 to 1; captions, seeds: one per picture. The seed is that of the rectified flow's noise.
        A caption whose words the text encoder does not keep is marked in `unread`.
        Raises TokenError where the text encoder is not the model's, and TrainingError for pictures of a size that does not
        fit the VAE.
        """
        unit = self.vae.spacial_compression_encode()
        if images.shape[1] % unit or images.shape[2] % unit:
            raise TrainingError(f"Pictures of {images.shape[2]} x {images.shape[1]} do not fit this VAE. Give a size that {unit} "
                                "divides.")
        with torch.inference_mode():
            latents = self.vae.encode(images)
            noise = torch.cat([torch.randn(latents[:1].shape, generator=torch.Generator().manual_seed(seed))
                               for seed in seeds])
            conditioning, weights, unread = self._encode(captions)
            sampler = InversionSampler(self.settings, self.backbone, weights, self.check)
            sigmas = comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"),
                                                     self.settings.scheduler, self.settings.steps)
            if len(sigmas) != self.settings.steps + 1:
                raise TrainingError(f"The scheduler {self.settings.scheduler!r} gives {len(sigmas) - 1} steps instead "
                                    f"of {self.settings.steps}. Choose another number of steps or scheduler.")
            guider = comfy.samplers.CFGGuider(self.model)
            guider.inner_set_conds({"positive": conditioning})
            restored = guider.sample(noise, latents, sampler, sigmas, disable_pbar=True, seed=seeds[0])
            pictures = self.vae.decode(restored)
            return Inverted(torch.stack(sampler.maps, 1).half().clone(), psnr(pictures, images).clone(), unread)

    def _encode(self, captions: Sequence[Caption]) -> tuple[list, Tensor, tuple[bool, ...]]:
        """One conditioning for the whole batch, token weights of both words [B, 2, tokens], and `unread` per caption."""
        encoded, weights, unread = [], [], []
        for caption in captions:
            tokens, details = encode_prompt(self.clip, caption.text)[0]
            encoded.append((tokens, details))
            words = details[CONDITIONING_KEY]
            words.columns((), self.backbone.streams, tokens.shape[1])  # raises for another model's text encoder
            try:
                weights.append(words.columns((caption.subject, caption.object), self.backbone.streams, tokens.shape[1]).weights)
                unread.append(False)
            except TokenError:
                weights.append(torch.eye(tokens.shape[1])[:1].expand(len(WORDS), -1))  # any token; its maps are dropped
                unread.append(True)
        if len({tokens.shape for tokens, _ in encoded}) > 1:
            raise TrainingError("The captions of one batch have different lengths in tokens. Use a batch of 1.")
        details = {key: torch.cat([extra[key] for _, extra in encoded]) if isinstance(value, Tensor) else value
                   for key, value in encoded[0][1].items() if key != CONDITIONING_KEY}
        if self.backbone.name == "mmdit":
            details["guidance"] = self.settings.guidance
        return [[torch.cat([tokens for tokens, _ in encoded]), details]], torch.stack(weights), tuple(unread)


class InversionSampler(comfy.samplers.Sampler):
    """A host SAMPLER that inverts the latent image to noise, denoises it again, and keeps the maps of the denoising.

    weights: [B, 2, tokens], each word's weights over the text tokens; maps: per recorded step [B, 2, channels, size, size].
    """

    def __init__(self, settings: InversionSettings, backbone, weights: Tensor, check: Callable[[], None]) -> None:
        self.settings, self.backbone, self.weights, self.check = settings, backbone, weights, check
        self.maps: list[Tensor] = []

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False) -> Tensor:
        """Called with the host's signature. Returns the reconstructed latent."""
        base, settings = model_wrap.inner_model, self.settings
        columns = self.weights.sum((0, 1)).nonzero().flatten().tolist()
        recorder = self._recorder(model_wrap.conds["positive"], columns)
        options = extra_args["model_options"]
        options = {**options, "transformer_options": self.backbone.instrument(
            base.diffusion_model, options.get("transformer_options", {}), recorder, recompute_blocks=False)}

        def denoise(x: Tensor, sigma: float, record: bool = False) -> Tensor:
            self.check()
            recorder.active = record
            try:
                return model_wrap(x, x.new_full((len(x),), sigma), model_options=options, seed=extra_args.get("seed"))
            finally:
                recorder.active = False

        levels = [float(sigma) for sigma in sigmas]
        is_flow = isinstance(base.model_sampling, comfy.model_sampling.CONST)
        if is_flow:
            x = invert_rectified_flow(denoise, latent_image, noise, levels[::-1], settings.gamma)
        else:
            x = invert_fixed_point(denoise, latent_image, levels[::-1], settings.iterations)
        eta = settings.eta if is_flow else 0.0
        for step, (sigma, following) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
            record = step in settings.timesteps
            # With eta 1 the path is fixed, and the model is evaluated for its maps alone.
            denoised = denoise(x, sigma, record) if record or eta < 1 else latent_image
            if record:
                self.maps.append(self._stack(recorder.take(), columns))
            denoised = torch.lerp(denoised, latent_image, eta)
            x = x + (x - denoised) / sigma * (following - sigma)
        return x

    def _recorder(self, positive: Sequence[dict], columns: Sequence[int]) -> MapRecorder:
        """A recorder for every token that belongs to some word of the batch; captions have their words at different positions."""
        one_hot = torch.eye(self.weights.shape[2])[columns]
        tokens = WordColumns(tuple(map(str, columns)), one_hot)
        return MapRecorder({conditioning["uuid"]: tokens for conditioning in positive}, active=False)

    def _stack(self, tokens: AttentionMaps, columns: Sequence[int]) -> Tensor:
        """Combines the tokens' maps to the maps of the two words: [B, 2, channels, size, size]."""
        if not tokens.layers:
            raise TrainingError("No cross-attention was recorded. Another pack replaced the model's blocks: take it "
                                "out of the model's line.")
        weights = self.weights[:, :, columns]
        layers = [LayerMaps(layer.name, layer.order, torch.einsum("bhtij,bwt->bhwij", layer.maps,
                                                                  weights.to(layer.maps))) for layer in tokens.layers]
        words = AttentionMaps(WORDS, tuple(layers))
        return words.stack(self.settings.size, self.settings.normalise).float().cpu()


def invert_fixed_point(denoise: Denoise, x: Tensor, sigmas: Sequence[float], iterations: int) -> Tensor:
    """DDIM inversion: the latent at sigmas[-1] from which DDIM's (Euler's) steps lead to `x` at sigmas[0].

    x: in the host's convention, x0 + sigma*noise; sigmas: ascending, the first is 0. The noise of a step is
    evaluated at the unknown latent, which is found by `iterations` fixed-point iterations. They start from the same model input.
    """
    for low, high in zip(sigmas[:-1], sigmas[1:], strict=True):
        found = x * ((high**2 + 1) / (low**2 + 1)) ** 0.5
        for _ in range(iterations):
            found = x + (found - denoise(found, high)) / high * (high - low)
        x = found
    return x


def invert_rectified_flow(denoise: Denoise, x: Tensor, noise: Tensor, sigmas: Sequence[float], gamma: float) -> Tensor:
    """Rectified-flow inversion: follows the model's velocity field, pulled towards `noise` by `gamma` (1: a straight line).

    x = (1 - sigma)*x0 + sigma*noise; sigmas: ascending, the first is 0.
    """
    for low, high in zip(sigmas[:-1], sigmas[1:], strict=True):
        velocity = (noise - x) / (1 - low)
        if gamma < 1:  # with gamma 1 the model's velocity has no weight
            level = low or high
            velocity = torch.lerp((x - denoise(x, level)) / level, velocity, gamma)
        x = x + velocity * (high - low)
    return x


def psnr(pictures: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [B]; pictures: [B, H, W, 3] from 0 to 1."""
    error = (pictures.cpu().float() - originals.cpu().float()).square().mean((1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


def fingerprint(model, clip, vae) -> str:
    """A cheap hash of weights, patches (a LoRA and its strength) and noise schedule.

    A resumed run compares it to detect another model.
    """
    digest = hashlib.sha256()
    for patcher in (model, clip.patcher, vae.patcher):
        for name, weight in sorted(patcher.model.state_dict().items()):
            if name.startswith("model_sampling."):  # belongs to whichever clone is loaded
                continue
            if name in patcher.backup:  # the weight is currently patched, by this patcher or a clone
                weight = patcher.backup[name].weight
            digest.update(repr((name, tuple(weight.shape), _mark(weight))).encode())
        digest.update(repr(sorted((name, _mark(patches)) for name, patches in patcher.patches.items())).encode())
    sampling = model.get_model_object("model_sampling")
    digest.update(repr(([kind.__name__ for kind in type(sampling).__mro__], _mark(sampling.sigmas))).encode())
    return digest.hexdigest()[:16]


def _mark(value: object) -> object:
    """A value that is equal for equal tensors and for equal patches of the host (tuples and adapters of tensors)."""
    if isinstance(value, Tensor):
        return value.flatten()[:16].float().tolist()
    if isinstance(value, (list, tuple)):
        return [_mark(item) for item in value]
    if isinstance(value, (str, int, float, type(None))):
        return value
    return [type(value).__name__, _mark(getattr(value, "weights", None))]
