"""Labelled pictures of the small world: drawn, with exact boxes, or made by its model and verified by the detector."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from ..host.backbones import find_backbone
from ..prompts.relations import RELATIONS
from ..toyworld.config import SAMPLING, Sampling
from ..toyworld.detector import detect
from ..toyworld.latent import PATCH
from ..toyworld.sampling import sample_pictures
from ..toyworld.scenes import LAYOUTS, UNET_LAYOUT, Layout, Prompt, random_scene, true_relations, with_article
from .sources import SPLITS, Candidate, Drop, Example
from .storage import TrainingError

MODELS = {"unet": "unet", "mmdit": "flux"}
"""The small model of each backbone."""
LICENCE = "pictures: made by this project from Noto Color Emoji, SIL Open Font License 1.1"


def _counted(per_relation: Mapping[str, int | None], kind: str) -> list[Candidate]:
    return [Candidate(f"{kind}-{split}-{number}", split, number) for split in SPLITS
            for number in range(len(RELATIONS) * (per_relation.get(split) or 0))]


def _random(seed: int, candidate: Candidate) -> np.random.Generator:
    return np.random.default_rng([seed, SPLITS.index(candidate.split), candidate.number])


@dataclass(frozen=True)
class DrawnScenes:
    """Scenes of two objects in which exactly one of the four relations holds, by GenEval's rule on the exact boxes."""

    per_relation: Mapping[str, int | None]
    seed: int = 0
    layout: Layout = UNET_LAYOUT
    licence: str = field(default=LICENCE, init=False)

    def describe(self) -> dict:
        return {"kind": "small world, drawn", "per_relation": dict(self.per_relation), "seed": self.seed,
                "nouns": list(self.layout.nouns), "grid": self.layout.grid, "sizes": list(self.layout.few)}

    def candidates(self) -> list[Candidate]:
        return _counted(self.per_relation, "drawn")

    def open(self, candidates: Sequence[Candidate]) -> list[Example | Drop]:
        return [self._draw(candidate) for candidate in candidates]

    def _draw(self, candidate: Candidate) -> Example:
        rng = _random(self.seed, candidate)
        wanted = RELATIONS[candidate.number % len(RELATIONS)]
        while True:
            scene = random_scene(rng, 2, layout=self.layout)
            for subject, other in (scene.objects, scene.objects[::-1]):
                if true_relations(subject.box, other.box) == {wanted}:
                    image = torch.from_numpy(scene.image).float() / 255
                    return Example(candidate.picture, image, subject.noun, wanted, other.noun)


@dataclass(frozen=True)
class GeneratedPictures:
    """Pictures that the small model itself makes of prompts, labelled by what the exact detector finds.

    world: MODEL, CLIP, VAE; backbone: its backbone's name. A picture counts when both objects are there once, nothing
    else is, and exactly one relation holds; whether it is the prompt's does not matter.
    """

    world: tuple
    per_relation: Mapping[str, int | None]
    seed: int = 0
    backbone: str = "unet"
    licence: str = field(default=LICENCE, init=False)

    def describe(self) -> dict:
        return {"kind": "small world, generated and verified", "per_relation": dict(self.per_relation),
                "seed": self.seed, "sampling": asdict(self._sampling), "nouns": list(self._nouns)}

    @property
    def _sampling(self) -> Sampling:
        return SAMPLING[MODELS[self.backbone]]

    @property
    def _nouns(self) -> tuple[str, ...]:
        return LAYOUTS[MODELS[self.backbone]].nouns

    def candidates(self) -> list[Candidate]:
        return _counted(self.per_relation, "generated")

    def open(self, candidates: Sequence[Candidate]) -> list[Example | Drop]:
        prompts, seeds = zip(*(self._prompt(candidate) for candidate in candidates), strict=True)
        images = sample_pictures(*self.world, [prompt.text for prompt in prompts], list(seeds), **asdict(self._sampling))
        return [_label(*made) for made in zip(candidates, prompts, images, detect(images), strict=True)]

    def _prompt(self, candidate: Candidate) -> tuple[Prompt, int]:
        rng = _random(self.seed + 1, candidate)
        subject, other = (self._nouns[index] for index in rng.permutation(len(self._nouns))[:2])
        relation = RELATIONS[candidate.number % len(RELATIONS)]
        text = f"{with_article(subject)} {relation} {with_article(other)}"
        return Prompt(text, ((subject, relation, other),)), int(rng.integers(2**31))


def _label(candidate: Candidate, prompt: Prompt, image: torch.Tensor, found: Sequence) -> Example | Drop:
    (subject, _, other), = prompt.relations
    if sorted(item.noun for item in found) != sorted((subject, other)):
        return Drop(candidate.picture, "not exactly the two objects")
    boxes = {item.noun: item.box for item in found}
    held = true_relations(boxes[subject], boxes[other])
    if len(held) != 1:
        return Drop(candidate.picture, "no single relation holds")
    return Example(candidate.picture, image, subject, next(iter(held)), other)


def small_world_source(models: tuple, generated: bool, per_relation: Mapping[str, int | None], seed: int
                       ) -> DrawnScenes | GeneratedPictures:
    """Pictures that the small model behind `models` (MODEL, CLIP, VAE) knows: drawn, or generated by itself.

    Raises TrainingError for another model.
    """
    if models[0].get_model_object("latent_format").spacial_downscale_ratio != PATCH:
        raise TrainingError("source: the small world's pictures are for its own models (\"Load Small World\"), and this model "
                            "is another. Choose a folder with table, or GQA scene graphs.")
    backbone = find_backbone(models[0].model.diffusion_model).name
    if generated:
        return GeneratedPictures(models, per_relation, seed, backbone=backbone)
    return DrawnScenes(per_relation, seed, layout=LAYOUTS[MODELS[backbone]])
