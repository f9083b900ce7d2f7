"""From maps, relations and a classifier to a loss and probabilities (docs/method.md, "The loss")."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..classifiers.base import RelationClassifier, check_layout, relation_indices
from ..classifiers.geometric import compactness_penalty
from ..prompts.relations import Relation
from .attention import AttentionMaps


@dataclass(frozen=True)
class Judgement:
    """The classifier's verdict on each relation. All fields are [B, relations].

    loss: cross-entropy plus `dispersion`; the loss of a diagonal with two targets is the mean of both cross-entropies.
    probability: of the right class. For two targets it is exp(-mean cross-entropy), scaled so that an even split counts as 1.
    dispersion: the part of the loss that comes from attention spread over more than one place.
    """

    loss: Tensor
    probability: Tensor
    dispersion: Tensor

    @property
    def fulfilment(self) -> Tensor:
        """The value compared with the stopping probability, [B, relations]: probability * exp(-dispersion)."""
        return self.probability * (-self.dispersion).exp()


def judge(maps: AttentionMaps, relations: Sequence[Relation], classifier: RelationClassifier, backbone: str,
          progress: float, compactness: float = 0.0) -> Judgement:
    """Loss and probability of every relation, differentiable w.r.t. the maps.

    progress: fraction of the denoising schedule completed so far.
    compactness: weight of `compactness_penalty`, which is in fractions of the picture's side; not part of the paper's loss.
    Raises ClassifierError where the maps do not fit the classifier or the classifier does not know a relation.
    """
    check_layout(classifier, maps.channels, backbone)
    stack = maps.stack(classifier.layout.size, classifier.layout.normalise)  # [B, words, channels, size, size]
    progresses = torch.full((stack.shape[0],), progress, device=stack.device, dtype=stack.dtype)
    weights = classifier.channel_weights
    losses, probabilities, dispersions = [], [], []
    for relation in relations:
        subject_maps = stack[:, maps.phrases.index(relation.subject)]
        object_maps = stack[:, maps.phrases.index(relation.object)]
        targets = relation_indices(classifier, relation.predicates)
        log_p = F.log_softmax(classifier.logits(subject_maps, object_maps, progresses), dim=-1)[:, targets]
        dispersion = compactness * compactness_penalty(subject_maps, object_maps, weights) if compactness \
            else torch.zeros_like(log_p[:, 0])
        losses.append(-log_p.mean(-1) + dispersion)
        dispersions.append(dispersion.detach())
        probabilities.append((log_p.mean(-1).exp() * len(targets)).clamp(max=1).detach())
    return Judgement(torch.stack(losses, -1), torch.stack(probabilities, -1), torch.stack(dispersions, -1))


def total_loss(judgement: Judgement, weights: Sequence[float], chosen: int | None) -> Tensor:
    """The loss to descend, [B]: the weighted mean over relations, or the weighted loss of relation `chosen` alone."""
    if chosen is not None:
        return weights[chosen] * judgement.loss[:, chosen]
    scale = judgement.loss.new_tensor(weights)
    return (judgement.loss * scale).sum(-1) / scale.sum()
