"""Layers on top of an operator use the responsibilities of its own kernel and background."""

import pytest
import torch
from helpers import two_clusters

from em_lightning.operators import EMPooling, EMRefinement

DENSITIES = {
    "gaussian": {},
    "student_t": {"kernel": "student_t"},
    "background": {"background": 0.3},
    "estimated": {"kernel": "student_t", "background": {"estimate": True}},
}


@pytest.mark.parametrize("name", DENSITIES)
def test_pooled_values_are_those_of_the_operator(name):
    x = two_clusters(2, 60, outliers=(0.1, 0.3))
    mask = torch.rand(x.shape[:2]) < 0.8
    pooling = EMPooling(2, 2, summary=("values",), residual=False, **DENSITIES[name]).double()
    found = pooling(x, mask)
    operator = pooling.operator
    mixture = operator(x, mask)
    shares = operator.posterior(x, mixture, mask).responsibilities[..., :2] * mask.unsqueeze(-1)
    values = (shares.mT @ x / shares.sum(1).unsqueeze(-1)).flatten(1)
    torch.testing.assert_close(found, values, rtol=0, atol=1e-9)
    other = mixture.posterior(x).responsibilities * mask.unsqueeze(-1)
    gaussian = (other.mT @ x / other.sum(1).unsqueeze(-1)).flatten(1)
    assert torch.allclose(found, gaussian, atol=1e-6) == (name == "gaussian")


@pytest.mark.parametrize("name", DENSITIES)
def test_refined_items_and_queries_take_the_responsibilities_of_the_operator(name):
    x = two_clusters(2, 60, outliers=(0.1, 0.3))
    layer = EMRefinement(2, 2, residual=False, **DENSITIES[name]).double()
    mixture = layer.operator(x)
    expected = layer.operator.posterior(x, mixture).responsibilities[..., :2] @ mixture.means
    torch.testing.assert_close(layer.reconstruct(x), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(layer.reconstruct(x, queries=x[:, 5:9]), expected[:, 5:9], rtol=0, atol=1e-9)
