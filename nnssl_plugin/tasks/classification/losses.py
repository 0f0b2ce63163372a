"""Losses and probabilities of image classification: multi-class, binary, multi-label and ordinal targets.

What a head gives (``outputs``), what its labels are, and what the weights of its classes are, by ``kind``:

===========  =======  =============================  ==========================================================
kind         outputs  labels                         weights
===========  =======  =============================  ==========================================================
multiclass   K        (B,) int64, class              (K,), one per class
binary       2        (B,) int64, 1 is positive      (2,)
multilabel   K        (B, K) float, 1 where present  (2, K): of an absent (row 0) and of a present label (row 1)
ordinal      K − 1    (B,) int64, rank of the class  (K,)
===========  =======  =============================  ==========================================================

Ordinal targets follow the continuation ratio of CORN (Shi, Cao and Raschka 2023, eq. 1-4): logit k is that of "beyond
class k, given at least class k". The probability of "beyond k" is a product, so it never grows with k, whatever the
logits; K − 1 free cumulative logits would give negative probabilities where they cross. The predicted class is the most
probable one, as for every other kind; CORN's rank rule counts the thresholds k with P(beyond k) > 0.5 instead.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nnssl_plugin.nnunet.case_labels import MULTILABEL, ORDINAL, Target


def class_loss(
    logits: Tensor, labels: Tensor, *, kind: str, classes: int, weights: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Mean over the batch of the negative log-likelihood of one target's labels.

    A sample's loss is multiplied by the weight of its class. The mean is not divided by the weights of the batch, as
    ``torch.nn.CrossEntropyLoss`` does: in a batch of one class, of which small batches often are, they would cancel.

    Args:
        logits: (B, outputs).
        labels: see the table above.
        kind: one of ``class_labels.KINDS``.
        classes: K.
        weights: see the table above; ``None`` is 1 for all. :func:`balanced_weights` gives weights of mean 1.
        smoothing: share of the label that is spread over all classes, in [0, 1): over the K classes (Szegedy et al.
            2016), or over "yes" and "no" of each label or rank.

    Returns:
        () scalar.
    """
    if kind == MULTILABEL:
        losses = _yes_or_no(logits, labels, smoothing)
        if weights is not None:
            losses = losses * torch.where(labels > 0.5, weights[1], weights[0])
        return losses.mean()
    if kind == ORDINAL:
        losses = _ordinal(logits, labels, classes, smoothing)
    else:
        losses = functional.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
    return (losses if weights is None else losses * weights[labels]).mean()


def class_probabilities(logits: Tensor, *, kind: str, classes: int) -> Tensor:
    """Probabilities (B, K) of the classes: they sum to 1, but for ``multilabel``, where each is of its label alone.

    Args:
        logits: (B, outputs).
        kind: one of ``class_labels.KINDS``.
        classes: K.
    """
    logits = logits.float()
    if kind == MULTILABEL:
        return logits.sigmoid()
    if kind != ORDINAL:
        return logits.softmax(1)
    beyond = functional.pad(logits.sigmoid().cumprod(1), (1, 0), value=1.0)  # of class −1, 0 … K − 2
    return beyond * functional.pad(1 - logits.sigmoid(), (0, 1), value=1.0)


def balanced_weights(labels: Tensor, *, kind: str, classes: int) -> Tensor:
    """Weights that give every class the same say; their mean over ``labels`` is 1.

    A class of n out of N cases has N / (K n); each label of a multi-label target is such a problem of two classes.
    What does not occur has 1.

    Args:
        labels: of all training cases, as in the table above.
        kind: one of ``class_labels.KINDS``.
        classes: K.

    Returns:
        (K,), or (2, K) for ``multilabel``; float32.
    """
    if kind == MULTILABEL:
        present = labels.double().sum(0)
        counts = torch.stack((len(labels) - present, present))
    else:
        counts = torch.bincount(labels, minlength=classes).double()
    occurring = (counts > 0).sum(0)
    weights = torch.where(counts > 0, len(labels) / (occurring * counts.clamp(min=1)), 1.0)
    return weights.float()


def joint_loss(
    logits: Mapping[str, Tensor],
    labels: Sequence[Tensor],
    *,
    targets: Sequence[Target],
    weights: Sequence[Tensor | None],
    smoothing: float = 0.0,
) -> Tensor:
    """Mean of :func:`class_loss` over several targets; ``labels`` and ``weights`` hold one entry per target."""
    losses = [
        class_loss(
            logits[target.name], y, kind=target.kind, classes=len(target.classes), weights=w, smoothing=smoothing
        )
        for target, y, w in zip(targets, labels, weights, strict=True)
    ]
    return torch.stack(losses).mean()


def joint_probabilities(logits: Mapping[str, Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
    """:func:`class_probabilities` of each target."""
    return {
        target.name: class_probabilities(logits[target.name], kind=target.kind, classes=len(target.classes))
        for target in targets
    }


def _yes_or_no(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    wanted = labels.float() * (1 - smoothing) + smoothing / 2
    return functional.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none")


def _ordinal(logits: Tensor, labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B,): the sum over the ranks that a sample reaches; without smoothing, −log of its class's probability."""
    ranks = torch.arange(classes - 1, device=labels.device)
    reached, beyond = labels[:, None] >= ranks, labels[:, None] > ranks
    return (_yes_or_no(logits, beyond, smoothing) * reached).sum(1)
