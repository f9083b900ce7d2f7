"""Tests in this folder run the host's own modules in this process. The pack is loaded as the host loads it."""
from __future__ import annotations

from dev.standalone import load_pack

pack = load_pack()
pack.register_model_folders()

import comfy.sample  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from learn_to_steer.classifiers.geometric import GeometricClassifier  # noqa: E402
from learn_to_steer.host.steering import Steering  # noqa: E402
from learn_to_steer.prompts.graph import build_graph  # noqa: E402
from learn_to_steer.steering.settings import SteeringSettings  # noqa: E402

torch.set_num_threads(1)
PROMPT = "a photo of a dog to the left of a teddy bear"


class Scene:
    """A small random UNet with its conditionings, loaded in inference mode, as by the host's nodes."""

    def __init__(self, prompt: str = PROMPT, **options):
        with torch.inference_mode():
            self.model = tiny.unet_patcher(**options)
            self.positive, self.negative = tiny.conditioning(pack, prompt), tiny.conditioning(pack, "", seed=2)
        self.graph = build_graph(prompt)

    def steering(self, classifier=None, graph=None, **settings) -> Steering:
        return Steering(graph or self.graph, classifier or GeometricClassifier(), SteeringSettings(**settings))

    def sample(self, model=None, sampler: str = "euler", steps: int = 5, cfg: float = 3.0, seed: int = 7, batch: int = 1,
               size: tuple[int, int] = (16, 16), channels: int = 4, positive=None, **options):
        with torch.inference_mode():
            latent = torch.zeros(batch, channels, *size)
            noise = comfy.sample.prepare_noise(latent, seed)
            return comfy.sample.sample(model or self.model, noise, steps, cfg, sampler, "normal", positive or self.positive,
                                       self.negative, latent, seed=seed, disable_pbar=True, **options)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene()
