"""Draw the figures of the how-to pages: python docs/make_howto_images.py [FOLDER]."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from em_lightning import EMOperator, Mixture
from em_lightning.callbacks import TemperatureSchedule
from em_lightning.competition import none_of_the_above, softmin
from em_lightning.estimator import GaussianMixture
from em_lightning.kernels import KERNELS, Kernel, pairwise
from em_lightning.metrics import layer_metrics
from em_lightning.operators import EMAbstraction, EMRefinement, GeneralizedEM
from em_lightning.studies import ImagePointSets
from em_lightning.studies.style import NEUTRAL, PALETTE, figure_style, new_figure
from em_lightning.surgery import LayerwiseLoss


def clusters(sets: int, points: int, centers: Tensor, seed: int) -> Tensor:
    """Return sets (B, N, 2) with unit Gaussian clusters around centers (B, K, 2)."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(centers.shape[1], (sets, points, 1), generator=generator)
    return centers.gather(1, which.expand(-1, -1, 2)) + torch.randn(sets, points, 2, generator=generator)


def scatter(ax: Any, points: Tensor, color: Any = NEUTRAL, **options: Any) -> None:
    """Draw points (N, 2) on axes of equal scale without ticks."""
    ax.scatter(*points.T.numpy(), c=color, **{"s": 6, "linewidths": 0, **options})
    ax.set(aspect="equal", xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.grid(False)


def ellipses(ax: Any, mixture: Mixture, index: int = 0) -> None:
    """Draw the components of a mixture of two features at two standard deviations."""
    angle = torch.linspace(0, 2 * torch.pi, 65)
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    full = mixture.to(torch.float64).full()
    for k in range(mixture.components):
        factor = torch.linalg.cholesky(full.covariances[index, k])
        ax.plot(*(full.means[index, k] + 2 * circle.double() @ factor.T).T, color=PALETTE[k])


@figure_style()
def many_sets() -> Figure:
    """Draw four of 500 small sets, fitted without and with a prior."""
    centers = 4 * torch.randn(500, 3, 2, generator=torch.Generator().manual_seed(0))
    clouds = clusters(500, 30, centers, seed=1)
    figure, axes = new_figure(8, 4, width=1.8, height=1.8)
    for row, prior in enumerate((None, {"covariance_strength": 3.0})):
        operator = EMOperator(3, 2, init="kmeans++", num_starts=4, seed=0, residual=False, prior=prior)
        mixtures, _ = operator.fit(clouds)
        for i in range(4):
            ax = axes[4 * row + i]
            scatter(ax, clouds[i])
            ellipses(ax, mixtures, i)
            middle, half = clouds[i].mean(0), 1.3 * float((clouds[i] - clouds[i].mean(0)).abs().max())
            ax.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))
        axes[4 * row].set_ylabel("with a prior" if prior else "without a prior")
    return figure


@figure_style()
def outliers() -> Figure:
    """Draw a Gaussian fit and a robust fit with a background of two clusters among 20 % outliers."""
    torch.manual_seed(2)
    inside = torch.randn(1, 200, 2) + 8 * torch.randint(0, 2, (1, 200, 1))
    points = torch.cat([inside, 40 * torch.rand(1, 50, 2) - 16], 1)
    start = {"init": "kmeans++", "num_starts": 20, "seed": 0, "residual": False}
    robust = {"kernel": {"name": "student_t", "df": 3.0, "density": True}, "background": 0.2}
    figure, axes = new_figure(2, 2, width=2.6, height=2.6)
    for ax, title, options in zip(axes, ("Gaussian", "Student-t and background"), ({}, robust), strict=True):
        operator = EMOperator(2, 2, **start, **options, prior={"covariance_strength": 1.0})
        mixture, _ = operator.fit(points, tol=1e-5)
        is_outlier = torch.zeros(points.shape[1], dtype=torch.bool)
        if "background" in options:
            is_outlier = none_of_the_above(operator.posterior(points, mixture))[0] > 0.5
        scatter(ax, points[0, ~is_outlier])
        scatter(ax, points[0, is_outlier], PALETTE[3], marker="x", linewidths=0.8, s=14)
        ellipses(ax, mixture)
        ax.set(title=title, xlim=(-18, 26), ylim=(-18, 26))
    axes[0].set_ylabel("crosses: classified as outliers")
    return figure


class QuarticKernel(Kernel):
    """d = sum over features of (x - mu)^4."""

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:
        """Return the energies."""
        return pairwise(x, centers).pow(4).sum(-1)


@figure_style()
def any_kernel() -> Figure:
    """Draw the energies of a Gaussian and of a quartic kernel fitted to points in two squares."""
    torch.manual_seed(0)
    corners = torch.tensor([[0.0, 0.0], [5.0, 5.0]])[torch.randint(0, 2, (1, 300))]
    points = corners + 2 * torch.rand(1, 300, 2) - 1
    line = torch.linspace(-2, 7, 181)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    figure, axes = new_figure(2, 2, width=2.6, height=2.6)
    for ax, name, kernel in zip(axes, ("gaussian", "QuarticKernel"), ("gaussian", QuarticKernel()), strict=True):
        operator = GeneralizedEM(2, 2, kernel=kernel, num_iters=20)
        mixture = operator(points)
        energies = KERNELS.build(kernel)(grid.reshape(-1, 2), mixture.centers[0]).amin(-1)
        scatter(ax, points[0])
        ax.contour(line, line, energies.reshape(len(line), len(line)), levels=[0.25, 0.5, 1.0, 2.0], colors=PALETTE[0])
        ax.plot(*mixture.centers[0].T, "+", color=PALETTE[1], markersize=12)
        ax.set_title(name)
    return figure


@figure_style()
def own_kernel() -> Figure:
    """Draw the energy and the density of the cubic kernel beside two others."""
    x = torch.linspace(-3, 3, 301).unsqueeze(-1)
    zero = torch.zeros(1, 1)
    figure, (left, right) = new_figure(2, 2, width=2.8, height=2.1, sharex=True)
    energies = {name: KERNELS.build(name)(x, zero) for name in ("laplace", "gaussian")} | {"cubic": x.abs() ** 3}
    for name, energy in energies.items():
        left.plot(x, energy, label=name)
        density = torch.exp(-energy)
        right.plot(x, density / torch.trapezoid(density[:, 0], x[:, 0]))
    left.set(ylim=(0, 5), xlabel="x", ylabel="energy")
    right.set(xlabel="x", ylabel="density")
    left.legend()
    return figure


@figure_style()
def temperature() -> Figure:
    """Draw responsibilities at three temperatures, and the three curves of a schedule."""
    x = torch.linspace(-4, 4, 201).unsqueeze(-1)
    energies = KERNELS.build("gaussian")(x, torch.tensor([[-2.0], [0.0], [2.0]]))
    figure, axes = new_figure(4, 4, width=2.0, height=1.9)
    for ax, value in zip(axes, (4.0, 1.0, 0.25), strict=False):
        ax.plot(x, softmin(energies, value).responsibilities)
        ax.set(title=f"T = {value:g}", xlabel="input", ylim=(-0.03, 1.03))
    axes[0].set_ylabel("responsibility")
    for curve in ("exponential", "linear", "cosine"):
        schedule = TemperatureSchedule(4.0, 1.0, steps=100, shape=curve)
        axes[3].plot([schedule.value(step) for step in range(121)], label=curve)
    axes[3].set(title="schedules from 4 to 1", xlabel="step", ylabel="T")
    axes[3].legend()
    return figure


@figure_style()
def refinement() -> Figure:
    """Draw the items of a set for three values of the gate."""
    centers = torch.tensor([[[-3.0, 0.0], [3.0, 0.0], [0.0, 4.0]]])
    points = clusters(1, 150, centers, seed=0)
    layer = EMRefinement(3, 2, temperature=1.0, num_iters=10)
    figure, axes = new_figure(3, 3, width=2.2, height=2.0, sharex=True, sharey=True)
    colors = None
    for ax, gate in zip(axes, (0.0, 0.5, 1.0), strict=True):
        with torch.no_grad():
            layer.gate.fill_(gate)
            moved = layer(points)[0]
            colors = torch.cdist(points[0], centers[0]).argmin(-1) if colors is None else colors
        scatter(ax, moved, [PALETTE[k] for k in colors])
        ax.set_title(f"gate {gate:g}")
    return figure


@figure_style()
def pyramid() -> Figure:
    """Draw the points of a digit and the centers of the levels of a pyramid."""
    data = ImagePointSets(num_points=160, batch_size=8, seed=0)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    torch.manual_seed(0)
    sizes = ((40, None), (14, 8), (1, 8))  # components of each level, and features of its items
    levels = [
        EMAbstraction(
            num_components=components, num_coordinates=2, num_features=features, out_features=8, pitch=0.3
        ).eval()
        for components, features in sizes
    ]
    coordinates, features, mask = batch.points, None, batch.mask
    shown = 3  # the item of the batch that is drawn
    figure, axes = new_figure(4, 4, width=1.8, height=2.0, sharex=True, sharey=True)
    scatter(axes[0], coordinates[shown])
    axes[0].set_title("160 points")
    for ax, level in zip(axes[1:], levels, strict=True):
        with torch.no_grad():
            coordinates, features = level(coordinates, features, mask)
        mask = None
        scatter(ax, batch.points[shown], "#D0D0D0", s=3)
        scatter(ax, coordinates[shown], PALETTE[1], s=22)
        ax.set_title(f"{coordinates.shape[1]} token" + "s" * (coordinates.shape[1] > 1))
    return figure


NUM_TRAIN = 1200  # of the 1,797 digits


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits, in random order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]


def train_classifier(*, em: bool) -> dict[str, list[float]]:
    """Train a classifier of the digits, and return metrics of its second hidden layer after each epoch."""
    x, y = digits()
    test_x, test_y = x[NUM_TRAIN:], y[NUM_TRAIN:]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    losses = LayerwiseLoss(model, ["1", "3"], verbose=False) if em else None
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    history: dict[str, list[float]] = {"accuracy": []}
    for _ in range(20):
        for batch in torch.randperm(NUM_TRAIN).split(64):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            (losses.add_to(loss) if losses else loss).backward()
            optimizer.step()
        with torch.no_grad():
            metrics = layer_metrics()
            metrics.update(model[:4](test_x))  # the outputs of the second ReLU
            for name, value in metrics.compute().items():
                history.setdefault(name, []).append(float(value))
            history["accuracy"].append(float((model(test_x).argmax(-1) == test_y).float().mean()))
    return history


@figure_style()
def layer_curves() -> Figure:
    """Draw metrics of a hidden layer during training without and with its EM loss."""
    names = {"dead_units": "dead units", "redundancy": "redundancy", "effective_rank": "effective rank"}
    names |= {"accuracy": "accuracy"}
    figure, axes = new_figure(4, 4, width=2.0, height=1.9)
    for em, label in ((False, "without"), (True, "with EM losses")):
        history = train_classifier(em=em)
        for ax, (name, title) in zip(axes, names.items(), strict=True):
            ax.plot(range(1, 21), history[name], label=label)
            ax.set(title=title, xlabel="epoch")
    axes[0].legend()
    return figure


@figure_style()
def table_scores() -> Figure:
    """Draw the components of a table of 100,000 rows with 20 odd ones, and the scores of its rows."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[[-4.0, 0.0], [4.0, 2.0], [0.0, -5.0]]])
    rows = clusters(1, 100_000, centers, seed=0)[0]
    odd = torch.randperm(len(rows), generator=generator)[:20]
    rows[odd] = 40 * torch.rand(20, 2, generator=generator) - 20
    fit = GaussianMixture(n_components=3, random_state=0).fit(rows[::50].numpy())
    scores = torch.as_tensor(fit.score_samples(rows.numpy()))
    lowest = scores.argsort()[:20]
    print("odd rows among the 20 lowest scores:", len({*lowest.tolist()} & {*odd.tolist()}))
    figure, (left, right) = new_figure(2, 2, width=3.0, height=2.4)
    scatter(left, rows[::50])
    scatter(left, rows[lowest], PALETTE[1], s=16, label="20 least likely rows")
    left.legend(loc="lower right")
    right.hist(scores.clamp(min=-60).numpy(), bins=80, log=True, color=PALETTE[0])
    right.set(xlabel="score of a row (below -60: at -60)", ylabel="rows")
    return figure


FIGURES: tuple[Callable[[], Figure], ...] = (
    many_sets,
    outliers,
    any_kernel,
    own_kernel,
    temperature,
    refinement,
    pyramid,
    layer_curves,
    table_scores,
)

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images" / "how-to"
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    for draw in FIGURES:
        path = folder / f"{draw.__name__}.png"
        draw().savefig(path, dpi=150)
        Image.open(path).convert("RGB").quantize(48).save(path, optimize=True)  # a third of the size
        print(path)
