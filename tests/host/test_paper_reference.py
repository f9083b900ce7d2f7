"""Steered runs "as in the paper" equal a second computation, written from the formulas of docs/method.md in plain PyTorch.

The networks are the host's, small and with random weights. This file computes a second time everything that the method adds: word
positions, maps from q and k, their order and size, the classifier (published_files.py), loss, turns, targets and updates, the
conversion to model-input space and back, and the denoising steps of DDIM and Euler. Everything is in float64.
"""
from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import published_files
import pytest
import tiny
import torch
import torch.nn.functional as F
from comfy.sd1_clip import SD1Tokenizer
from comfy.text_encoders.flux import FluxTokenizer
from learn_to_steer.classifiers.checkpoint import load_classifier
from learn_to_steer.host.patching import apply_steering
from learn_to_steer.host.steering import Steering
from learn_to_steer.host.tokens import CONDITIONING_KEY, TokenisedPrompt
from learn_to_steer.nodes.settings import read_settings
from learn_to_steer.prompts.relations import Relation, RelationGraph
from tiny_flux import tiny_flux
from torch import Tensor
from torch.overrides import TorchFunctionMode

PROMPT = "a photo of a dog to the left of a teddy bear, and a cat above the dog"
RELATIONS = (("dog", ("to the left of",), "teddy bear"), ("cat", ("above", "to the left of"), "dog"))
TARGETS = (1e-5, 3e-5, 5e-5, 7e-5)
OWN = {"start_percent": 0.0, "end_percent": 0.36, "step_size": 2.5, "max_updates": 3, "stop_probability": 0.99,
       "update_rule": "normalised", "relations_per_update": "all"}


@dataclass(frozen=True)
class Case:
    """One model, one published classifier, one run.

    side: of the latent, in cells; raw: maps have the classifier's own resolution; sharpness: factor on the classifier's logits,
    with which a loss can reach its target; stops: whether a loss reaches it.
    """

    name: str
    shape: published_files.Shape
    side: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    relations: tuple = RELATIONS
    step_size: float = 5.0
    window: float = 0.5
    raw: bool = False
    trained: tuple[int, ...] = (5, 10, 15, 20, 25, 49)
    length: int = 50
    channels: int = 1368
    sharpness: float = 1.0
    stops: bool = False

    @functools.cached_property
    def weights(self) -> dict[str, Tensor]:
        weights = published_files.random_weights(self.shape, self.channels, contrast=100)
        weights["relation_classifier.fc.8.weight"] *= self.sharpness
        return {name: value.double() for name, value in weights.items()}

    @property
    def is_flux(self) -> bool:
        return self.shape is published_files.FLUX


CASES = [
    Case("sd2", published_files.SD, 16, 4, 7.5, "ddim", "normal"),
    Case("sd2, early stop", published_files.SD, 16, 3, 7.5, "ddim", "normal", RELATIONS[:1], sharpness=1000.0, stops=True),
    Case("sd1", published_files.SD, 16, 2, 7.5, "ddim", "normal", step_size=7.5),
    Case("flux dev, resized", published_files.FLUX, 36, 2, 1.0, "euler", "simple", channels=8),
    Case("flux schnell, raw, early stop", published_files.FLUX, 32, 4, 1.0, "euler", "simple", window=0.25, raw=True,
         trained=(1, 3), length=4, channels=8, sharpness=200.0, stops=True),
]


# --- the host's models, and what both sides are given ------------------------------------------------------------


def build(case: Case):
    """The host's model with random weights."""
    if not case.is_flux:
        if case.name == "sd1":
            return tiny.unet_patcher({"use_linear_in_transformer": False}, comfy.supported_models.SD15, torch.float64)
        return tiny.unet_patcher(dtype=torch.float64)
    base = tiny_flux(guidance=not case.raw, dtype=torch.float64)
    base.diffusion_model.pe_embedder.register_forward_hook(lambda module, args, out: out.double())
    return comfy.model_patcher.ModelPatcher(base, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Text:
    """The conditionings of a run: embeddings [1, tokens, 32] and, for FLUX, the pooled text [1, 16]."""

    tokens: int
    positive: Tensor
    negative: Tensor
    pooled: Tensor


def text(case: Case) -> Text:
    tokens = 32 if case.is_flux else 77
    return Text(tokens, draw(1, tokens, 32, seed=1), draw(1, tokens, 32, seed=2), draw(1, 16, seed=3))


@functools.cache
def tokenizer(is_flux: bool) -> FluxTokenizer | SD1Tokenizer:
    return FluxTokenizer() if is_flux else SD1Tokenizer()


def noise(case: Case) -> Tensor:
    return draw(1, 4, case.side, case.side, seed=4)


def conditionings(case: Case) -> tuple[list, list]:
    """Conditionings as from the pack's text encoding nodes."""
    prompt = TokenisedPrompt.read(PROMPT, tokenizer(case.is_flux))
    given = text(case)
    extra = {"pooled_output": given.pooled.clone(), "guidance": 3.5} if case.is_flux else {"pooled_output": None}
    return tuple([[embedding.clone(), {CONDITIONING_KEY: prompt, "uuid": uuid.uuid4(), **extra}]]
                 for embedding in (given.positive, given.negative))


# --- the pack ----------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """The results of one computation. latents: the sampler's x at each step's own evaluation, and the last one. The other
    fields hold one entry per evaluation of the classifier, in order, with its (step, update)."""

    latents: list[Tensor] = field(default_factory=list)
    at: list[tuple[int, int]] = field(default_factory=list)
    maps: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def pack(case: Case, save_memory: bool, folder: Path) -> Seen:
    """A run through the pack's file loader, settings and session, in inference mode, as in a node."""
    seen, path = Seen(), folder / "any.pth"
    training = {"timesteps": list(case.trained), "num_timesteps": case.length, "orig_map_size": 16 if case.raw else 32}
    torch.save(published_files.checkpoint(case.shape, case.channels, case.weights, training_config=training), path)
    with torch.inference_mode():
        model, (positive, negative), classifier = build(case), conditionings(case), load_classifier(path)
        classifier.network.double()
        judged: list[tuple[Tensor, Tensor, Tensor]] = []
        original = classifier.logits

        def logits(subject: Tensor, object: Tensor, progress: Tensor) -> Tensor:
            found = original(subject, object, progress)
            judged.append(tuple(value.detach().clone() for value in (subject[0], object[0], found[0])))
            return found

        classifier.logits = logits
        graph = RelationGraph(tuple(Relation(subject, predicates, object) for subject, predicates, object in case.relations))
        settings = read_settings(model, **OWN, save_memory=save_memory, method="as in the paper")
        steered, runs = apply_steering(model, Steering(graph, classifier, settings))
        start = noise(case)
        out = comfy.sample.sample(steered, start, case.steps, case.cfg, case.sampler, case.scheduler, positive, negative,
                                  torch.zeros_like(start), seed=0, disable_pbar=True,
                                  callback=lambda step, x0, x, total: seen.latents.append(x.clone()))
        seen.latents.append(model.model.process_latent_in(out))
    for number, record in enumerate(runs.last.report.records):
        turn = record.update % len(case.relations)
        subject, object, found = judged[number * len(case.relations) + turn]
        seen.at.append((record.step, record.update))
        seen.maps.append((subject, object))
        seen.logits.append(found)
        seen.losses.append(record.loss[0])
    return seen


# --- the second computation --------------------------------------------------------------------------------------


class HoldEverything(TorchFunctionMode):
    """Keeps every result alive, because PyTorch tracks tensors that change in place by identity."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.held.append(result)
        return result


@contextlib.contextmanager
def plain_autograd() -> Iterator[None]:
    """Makes the host's in-place blocks differentiable. Its rotary embedding has a derivative with the training flag only."""
    before, comfy.model_management.in_training = comfy.model_management.in_training, True
    try:
        with torch.enable_grad(), torch.autograd.graph.allow_mutation_on_saved_tensors(), HoldEverything():
            yield
    finally:
        comfy.model_management.in_training = before


def word_places(case: Case, word: str) -> list[int]:
    """Positions of the first occurrence of the word's tokens in the prompt's, without T5's bare word mark."""
    given = tokenizer(case.is_flux)
    inner = (given.t5xxl if case.is_flux else given.clip_l).tokenizer
    prompt, wanted = (inner.convert_ids_to_tokens(inner(words)["input_ids"]) for words in (PROMPT, word))
    wanted = [piece for piece in wanted if piece not in ("<|startoftext|>", "<|endoftext|>", "</s>")]
    wanted = wanted[1:] if wanted[0] == "▁" else wanted
    start = next(i for i in range(len(prompt)) if prompt[i:i + len(wanted)] == wanted)
    return list(range(start, start + len(wanted)))


class Reference:
    """The method on one model."""

    def __init__(self, case: Case):
        self.case, self.patcher, self.text = case, build(case), text(case)
        self.base = self.patcher.model
        for parameter in self.base.parameters():
            parameter.requires_grad_(False)
        self.places = {word: word_places(case, word) for subject, _, object in case.relations for word in (subject, object)}

    def denoised(self, x: Tensor, sigma: Tensor, embedding: Tensor, attention: Callable | None = None) -> Tensor:
        options = {} if attention is None else {"optimized_attention_override": attention}
        extra = {"y": self.text.pooled, "guidance": torch.tensor([3.5], dtype=torch.float64)} if self.case.is_flux else {}
        return self.base.apply_model(x, sigma.reshape(1), c_crossattn=embedding, transformer_options=options, **extra)

    def maps(self, x: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """Maps of each word, [layers x heads, 16, 16], from the positive conditioning alone."""
        tokens, layers = self.text.tokens, []

        def attention(func, q, k, v, heads, *args, **kwargs):
            if self.case.is_flux:  # text first, then the picture
                layers.append((q[0, :, tokens:], k[0, :, :tokens]))
            elif k.shape[1] == tokens:
                layers.append(tuple(part[0].unflatten(-1, (heads, -1)).transpose(0, 1) for part in (q, k)))
            return func(q, k, v, heads, *args, **kwargs)

        self.denoised(x, sigma, self.text.positive, attention)
        found = [((q @ k.transpose(1, 2)) / q.shape[-1] ** 0.5).softmax(-1) for q, k in layers]  # [heads, cells, tokens]
        sides = [round(layer.shape[1] ** 0.5) for layer in found]
        order = sorted(range(len(found)), key=lambda number: (sides[number], number))
        resize = any(side != 16 for side in sides)
        words = {}
        for word, places in self.places.items():
            stack = []
            for number in order:
                maps = found[number][:, :, places].mean(-1).reshape(-1, 1, sides[number], sides[number])
                if resize:
                    maps = F.interpolate(maps, (16, 16), mode="bilinear", align_corners=False)
                    maps = maps / (maps.sum((-2, -1), keepdim=True) + 1e-8)
                stack.append(maps[:, 0])
            words[word] = torch.cat(stack)
        return words

    def steer(self, z: Tensor, sigma: Tensor, scale: Tensor, step: int, seen: Seen) -> Tensor:
        """One step's updates of the model's input z = scale * x."""
        case = self.case
        index = next((t for t in case.trained if t * case.steps >= step * case.length), case.trained[-1])
        for update in range(15 + 1):
            with plain_autograd():
                leaf = z.clone().requires_grad_()
                maps = self.maps(leaf / scale, sigma)
                subject, predicates, object = case.relations[update % len(case.relations)]
                logits = published_files.logits(maps[subject], maps[object], index, case.shape, case.weights)
                targets = torch.tensor([published_files.RELATIONS.index(predicate) for predicate in predicates])
                loss = F.cross_entropy(logits.expand(len(targets), -1), targets)  # the mean over the targets
                seen.at.append((step, update))
                seen.maps.append((maps[subject].detach(), maps[object].detach()))
                seen.logits.append(logits.detach())
                seen.losses.append(float(loss.detach()))
                if loss <= TARGETS[min(step, 3)]:
                    return z
                gradient, = torch.autograd.grad(loss, leaf)
            z = z - case.step_size * gradient
        return z

    def run(self) -> Seen:
        case, seen = self.case, Seen()
        sampling = self.base.model_sampling
        sigmas = comfy.samplers.calculate_sigmas(sampling, case.scheduler, case.steps)
        x = self.start(sigmas)
        for step in range(case.steps):
            sigma, following = sigmas[step].double(), sigmas[step + 1].double()
            scale = torch.ones(()).double() if case.is_flux else 1 / (sigma ** 2 + 1).sqrt()
            if step / case.steps < case.window:
                x = self.steer(x * scale, sigma, scale, step, seen) / scale
            seen.latents.append(x)
            with torch.no_grad():
                x = self.step(x, sigma, following)
        seen.latents.append(x)
        return seen

    def step(self, x: Tensor, sigma: Tensor, following: Tensor) -> Tensor:
        """Euler for FLUX; for SD, DDIM in the variance-preserving latent with alpha = 1 / (sigma^2 + 1)."""
        x0 = self.denoised(x, sigma, self.text.positive)
        if self.case.cfg != 1:
            plain = self.denoised(x, sigma, self.text.negative)
            x0 = plain + self.case.cfg * (x0 - plain)
        if self.case.is_flux:
            return x + (following - sigma) * (x - x0) / sigma
        now, then = 1 / (sigma ** 2 + 1), 1 / (following ** 2 + 1)
        noise = (x * now.sqrt() - now.sqrt() * x0) / (1 - now).sqrt()
        return (then.sqrt() * x0 + (1 - then).sqrt() * noise) / then.sqrt()

    def start(self, sigmas: Tensor) -> Tensor:
        """The noise that the host passes to a sampler function."""
        given: list[Tensor] = []

        def note(model, x, sigmas, extra_args=None, callback=None, **options):
            given.append(x.clone())
            return x

        positive, negative = conditionings(self.case)
        start = noise(self.case)
        with torch.no_grad():
            comfy.sample.sample_custom(self.patcher, start, 1.0, comfy.samplers.KSAMPLER(note), sigmas, positive, negative,
                                       torch.zeros_like(start), disable_pbar=True, seed=0)
        return given[0]


@functools.cache
def reference(number: int) -> Seen:
    return Reference(CASES[number]).run()


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("save_memory", [False, True], ids=["plain", "save_memory"])
@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_a_run_as_in_the_paper(number: int, save_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comfy.model_management, "in_training", True)  # the host's rotary kernel has no float64
    case, expected = CASES[number], reference(number)
    found = pack(case, save_memory, tmp_path)
    steered = sum(step / case.steps < case.window for step in range(case.steps))
    assert found.at == expected.at and (len(expected.at) < 16 * steered) == case.stops
    for ours, theirs in zip(found.maps, expected.maps, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * float(other.max()))
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert apart(ours.double(), theirs) < 1e-5
    assert found.losses == pytest.approx(expected.losses, rel=1e-5, abs=1e-9)
    assert len(found.latents) == len(expected.latents) == case.steps + 1
    for ours, theirs in zip(found.latents, expected.latents, strict=True):
        assert apart(ours.double(), theirs) < 1e-5


