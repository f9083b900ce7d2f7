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
    """What the classifier says of each relation. loss, probability: [B, relations]; probability of the right class.

    A diagonal with two targets has the mean of both cross-entropies as loss and exp(-loss) as probability, scaled so
    that an even split between its two targets counts as 1. dispersion: [B, relations], the part of the loss that comes from
    attention spread over more than one place.
    """

    loss: Tensor
    probability: Tensor
    dispersion: Tensor

    @property
    def fulfilment(self) -> Tensor:
        """What is held against the stopping probability, [B, relations]: the probability, less while an object is spread."""
        return self.probability * (-self.dispersion).exp()


def judge(maps: AttentionMaps, relations: Sequence[Relation], classifier: RelationClassifier, backbone: str,
          progress: float, compactness: float = 0.0) -> Judgement:
    """Loss and probability of every relation, differentiable w.r.t. the maps.

    progress: fraction of the denoising schedule that lies behind; compactness: weight in the loss, per side of the
    picture, of how far the attention to the two objects is spread (not part of the paper's loss).
    Raises ClassifierError where the maps do not fit the classifier or a relation is unknown to it.
    """
    check_layout(classifier, maps.channels, backbone)
    stack = maps.stack(classifier.layout.size, classifier.layout.normalise)  # [B, words, channels, size, size]
    when = torch.full((stack.shape[0],), progress, device=stack.device, dtype=stack.dtype)
    weights = classifier.channel_weights
    losses, probabilities, dispersions = [], [], []
    for relation in relations:
        subject = stack[:, maps.phrases.index(relation.subject)]
        object = stack[:, maps.phrases.index(relation.object)]
        targets = relation_indices(classifier, relation.predicates)
        log_p = F.log_softmax(classifier.logits(subject, object, when), dim=-1)[:, targets]
        dispersion = compactness * compactness_penalty(subject, object, weights) if compactness \
            else torch.zeros_like(log_p[:, 0])
        losses.append(-log_p.mean(-1) + dispersion)
        dispersions.append(dispersion.detach())
        probabilities.append((log_p.mean(-1).exp() * len(targets)).clamp(max=1).detach())
    return Judgement(torch.stack(losses, -1), torch.stack(probabilities, -1), torch.stack(dispersions, -1))


def total_loss(judgement: Judgement, weights: Sequence[float], chosen: int | None) -> Tensor:
    """Loss to descend, [B]: the weighted mean over relations, or relation `chosen` alone."""
    if chosen is not None:
        return weights[chosen] * judgement.loss[:, chosen]
    scale = judgement.loss.new_tensor(weights)
    return (judgement.loss * scale).sum(-1) / scale.sum()
