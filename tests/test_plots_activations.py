import numpy as np
import pytest

from em_lightning.activations import ACTIVATIONS
from em_lightning.plots import activation_gallery
from em_lightning.plots.kernels import SCALAR_KERNELS


def test_every_activation_has_a_panel_with_value_and_derivative():
    figure = activation_gallery()
    panels = {panel.get_title(): panel for panel in figure.axes}
    for key in ACTIVATIONS:
        titles = [title for title in panels if title == key or (key == "signed" and title.startswith("signed"))]
        assert titles, key
        for title in titles:
            labels = {line.get_label() for line in panels[title].lines}
            assert {"value y", "derivative dy/dz"} <= labels
            competes = ACTIVATIONS[key].competes
            assert ("a rival's derivative by z" in labels) == competes


def test_every_scalar_kernel_has_a_panel_of_responsibilities_that_sum_to_one():
    panels = {panel.get_title(): panel for panel in activation_gallery(reach=3.0).axes}
    for key in SCALAR_KERNELS:
        curves = [line.get_ydata() for line in panels[f"kernel {key}"].lines if len(line.get_ydata()) > 2]
        np.testing.assert_allclose(sum(np.asarray(curve) for curve in curves), 1.0)
        assert len(curves) == 3


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"reach=0 must be positive"):
        activation_gallery(reach=0)
    with pytest.raises(ValueError, match=r"columns=0 must be at least 1"):
        activation_gallery(columns=0)
