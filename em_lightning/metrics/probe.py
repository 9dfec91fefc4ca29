"""Accuracy of a linear probe on features."""

from __future__ import annotations

from torch import Tensor


def linear_probe(features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> float:
    """Return the test accuracy, from 0 to 1, of a logistic regression on standardized features.

    It is scikit-learn's ``StandardScaler`` and ``LogisticRegression`` with their defaults, but 5,000 iterations.

    Args:
        features: (N, D), for training.
        labels: (N,).
        test_features: (M, D).
        test_labels: (M,).

    Example:
        >>> import torch
        >>> labels = torch.arange(20) % 2
        >>> linear_probe(labels[:, None] - 0.5, labels, labels[:, None] - 0.5, labels)
        1.0
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    probe.fit(features.detach().cpu().numpy(), labels.cpu().numpy())
    return float(probe.score(test_features.detach().cpu().numpy(), test_labels.cpu().numpy()))
