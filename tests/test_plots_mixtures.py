"""Figures of mixtures."""

import numpy as np
import pytest
import torch

from em_lightning.mixture import Mixture
from em_lightning.plots import mixture_grid

COVARIANCES = {
    "full": 0.04 * torch.eye(2).expand(1, 2, 2, 2),
    "tied": 0.04 * torch.eye(2).expand(1, 1, 2, 2),
    "diag": torch.full((1, 2, 2), 0.04),
    "spherical": torch.full((1, 2), 0.04),
}


@pytest.mark.parametrize("kind", COVARIANCES)
def test_ellipses_have_the_radius_of_the_components(kind):
    means = torch.tensor([[[-1.0, 0.0], [1.0, 0.5]]])
    mixture = Mixture(torch.full((1, 2), 0.5).log(), means, COVARIANCES[kind])
    figure = mixture_grid(torch.randn(1, 20, 2), mixture, torch.arange(20)[None] < 15)
    assert len(figure.axes[0].collections[0].get_offsets()) == 15
    for line, mean in zip(figure.axes[0].lines, means[0].numpy(), strict=True):
        distance = np.linalg.norm(np.stack(line.get_data(), -1) - mean, axis=-1)
        np.testing.assert_allclose(distance, 2.0 * 0.2, rtol=1e-5)


def test_3d_plot_draws_one_surface_per_component_with_positive_weight():
    mixture = Mixture(torch.tensor([[0.5, 0.5, 1e-9]]).log(), torch.randn(1, 3, 3), torch.ones(1, 3))
    figure = mixture_grid(torch.randn(1, 7, 3), mixture, titles=["a cloud"])
    assert len(figure.axes[0].collections) == 1 + 2 and figure.axes[0].get_title() == "a cloud"
