import runpy
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from scipy.integrate import trapezoid

from em_lightning.activations import ACTIVATIONS
from em_lightning.kernels import KERNELS
from em_lightning.studies.style import PALETTE, figure_style, new_figure

DOCS = Path(__file__).parents[1] / "docs"
GALLERIES = runpy.run_path(str(DOCS / "make_images.py"))
HOW_TO = runpy.run_path(str(DOCS / "make_howto_images.py"))


def test_gallery_shows_energies_and_responsibilities():
    keys = ["gaussian", "laplace", "huber", "student_t", "exponential"]
    figure = GALLERIES["kernel_gallery"](keys)
    assert [axes.get_title() for axes in figure.axes[::2]] == keys
    z, energy = figure.axes[0].lines[0].get_data()
    np.testing.assert_allclose(np.asarray(energy), (np.asarray(z) + 2) ** 2 / 2, rtol=1e-5, atol=1e-6)
    for axes in figure.axes[1::2]:
        responsibilities = [np.asarray(line.get_ydata()) for line in axes.lines if len(line.get_ydata()) > 2]
        assert len(responsibilities) == 3
        np.testing.assert_allclose(sum(responsibilities), 1, rtol=1e-5)


def test_gallery_has_every_kernel_of_one_feature_that_can_be_built_by_name():
    needs_more = {"mahalanobis", "learned", "cosine"}  # a size, a network, and a direction in the plane
    built_in = {key for key in KERNELS if KERNELS[key].__module__.startswith("em_lightning.")}
    assert set(GALLERIES["SCALAR_KERNELS"]) == built_in - needs_more


def test_style_is_restored(tmp_path):
    def settings():  # without the backend, which matplotlib settles whenever it is first asked
        return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}

    before = settings()
    with figure_style():
        assert matplotlib.rcParams["axes.prop_cycle"].by_key()["color"] == list(PALETTE)
    figure, axes = new_figure(5, 3, sharex=True)
    assert len(axes) == len(figure.axes) == 5
    path = GALLERIES["save_figure"](figure, tmp_path / "new" / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert settings() == before


def test_an_unknown_kernel_raises_with_the_nearest_key():
    with pytest.raises(ValueError, match="'gausian'.*'gaussian'"):
        GALLERIES["kernel_gallery"](["gausian"])


def test_every_activation_has_a_panel_with_value_and_derivative():
    figure = GALLERIES["activation_gallery"]()
    panels = {panel.get_title(): panel for panel in figure.axes}
    for key in ACTIVATIONS:
        titles = [title for title in panels if title == key or (key == "signed" and title.startswith("signed"))]
        assert titles, key
        for title in titles:
            labels = {line.get_label() for line in panels[title].lines}
            assert {"value y", "derivative dy/dz"} <= labels
            assert ("derivative of a rival by z" in labels) == ACTIVATIONS[key].competes


def test_clouds_show_two_classical_fits_beside_the_pretrained_one():
    figure = GALLERIES["cloud_gallery"](["moebius"], 128)
    names, levels = zip(*(panel.get_title().split("\n") for panel in figure.axes), strict=True)
    assert names == ("EM, 40 steps", "EM, tuned", "pretrained", "held-out points")
    assert float(levels[0]) < float(levels[1]) < float(levels[2])
    colors = GALLERIES["_COLORS"]
    assert min(np.abs(a - b).max() for i, a in enumerate(colors) for b in colors[:i]) > 0.1


def test_every_figure_of_the_how_to_pages_is_drawn_and_shown():
    pages = "".join(page.read_text() for page in (DOCS / "how-to").glob("*.md"))
    drawn = {f"{draw.__name__}.png" for draw in HOW_TO["FIGURES"]}
    assert drawn == {path.name for path in (DOCS / "images" / "how-to").iterdir()}
    assert not [name for name in drawn if f"(../images/how-to/{name})" not in pages]
    assert all(path.stat().st_size < 60_000 for path in (DOCS / "images" / "how-to").iterdir())


def test_densities_of_the_kernel_figure_have_integral_one():
    _, density = HOW_TO["own_kernel"]().axes
    for line in density.lines:
        x, y = (np.asarray(values).ravel() for values in line.get_data())
        assert trapezoid(y, x) == pytest.approx(1, abs=1e-3)
