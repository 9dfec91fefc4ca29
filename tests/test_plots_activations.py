import pytest

from em_lightning.activations import ACTIVATIONS
from em_lightning.plots.activations import activation_gallery


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


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"reach=0 must be positive"):
        activation_gallery(reach=0)
    with pytest.raises(ValueError, match=r"columns=0 must be at least 1"):
        activation_gallery(columns=0)
