"""A trained RelationNetwork as a RelationClassifier."""
from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .base import ClassifierError, MapLayout, RelationClassifier, check_maps, working_dtype
from .network import RelationNetwork
from .steps import StepMapping


class LearnedClassifier(RelationClassifier):
    """A frozen copy of a RelationNetwork in eval mode, with its relations, map layout and step mapping.

    relations: names in the order of the logits.
    training: summary of the training, JSON values; licence: the licence's terms in words.
    The weights are ordinary tensors even if the classifier is made in inference mode, in which the host runs nodes. A gradient
    can therefore pass through them.
    Raises ClassifierError where relations, layout or steps do not fit the network.
    """

    def __init__(self, network: RelationNetwork, relations: Sequence[str], layout: MapLayout, steps: StepMapping, *,
                 name: str, training: Mapping | None = None, licence: str = "") -> None:
        self.name, self.relations, self.layout, self.steps = name, tuple(relations), layout, steps
        self.training, self.licence = dict(training or {}), licence
        self._check(network)
        if network.object_extractor is not None:
            self.layout = replace(layout, max_channels=network.input_channels)
        with torch.inference_mode(False):
            self.network = copy.deepcopy(network).eval().requires_grad_(False)

    def logits(self, subject_maps: Tensor, object_maps: Tensor, progress: Tensor) -> Tensor:
        """Two stacks [B, C, size, size], progress [B] -> [B, relations], in float32, or float64 if the network is float64.

        See RelationClassifier.logits.
        """
        check_maps(self, subject_maps, object_maps)
        channels, most = subject_maps.shape[1], self.layout.max_channels
        if channels != (self.layout.channels or channels) or channels > (most or channels):
            wanted = self.layout.channels or f"up to {most}"
            raise ClassifierError(f"Classifier {self.name!r} expects stacks of {wanted} maps; it got {channels}. Load "
                                  "a classifier trained for this model.")
        weight = self.network.relation_classifier.projection.weight
        steps = self.steps.index(progress.expand(len(subject_maps)).to(weight.device))
        logits = self.network(subject_maps.to(weight), object_maps.to(weight), steps)
        return logits.to(working_dtype(logits))

    def to(self, device: torch.device | str) -> LearnedClassifier:
        """Moves the network, and returns the same object."""
        with torch.inference_mode(False):
            self.network.to(device)
        return self

    def _check(self, network: RelationNetwork) -> None:
        config = network.config
        if len(set(self.relations)) != len(self.relations) or len(self.relations) != network.num_relations:
            raise ClassifierError(f"Classifier {self.name!r}: {network.num_relations} logits need as many different "
                                  f"relation names, not {', '.join(self.relations) or 'none'}.")
        if self.layout.size != config.map_size:
            raise ClassifierError(f"Classifier {self.name!r}: the map layout says {self.layout.size} x "
                                  f"{self.layout.size} maps, the network takes {config.map_size} x {config.map_size}.")
        if self.steps.timesteps[-1] >= config.num_timesteps:
            raise ClassifierError(f"Classifier {self.name!r}: trained at step {self.steps.timesteps[-1]}, but the "
                                  f"network has step embeddings only for 0 to {config.num_timesteps - 1}.")
        if network.object_extractor is not None and (self.layout.channels or 0) > network.input_channels:
            raise ClassifierError(f"Classifier {self.name!r}: the map layout says {self.layout.channels} maps, the "
                                  f"network has positions for {network.input_channels}.")
