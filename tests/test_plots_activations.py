from em_lightning.activations import ACTIVATIONS
from em_lightning.plots import activation_gallery


def test_every_activation_has_a_panel_with_value_and_derivative():
    figure = activation_gallery()
    panels = {panel.get_title(): panel for panel in figure.axes}
    for key in ACTIVATIONS:
        titles = [title for title in panels if title == key or (key == "signed" and title.startswith("signed"))]
        assert titles, key
        for title in titles:
            labels = {line.get_label() for line in panels[title].lines}
            assert {"value y", "derivative dy/dz"} <= labels
            assert ("derivative of a rival by z" in labels) == ACTIVATIONS[key].competes
