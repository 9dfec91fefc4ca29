"""Train rectified layers by volume control alone (InfoMax), and count the epochs until decoder-free encoders converge.

    python -m benchmarks.infomax PATH/TO/mnist                   InfoMax: 784 -> 16, three settings
    python -m benchmarks.infomax PATH/TO/mnist --convergence     decoder-free encoders: SGD and Adam, four rates

The InfoMax loss of the energies d = relu(W x + b) is -sum_j log(Var(d_j) + 1e-6) + alpha sum_{i != j} Corr(d_i, d_j)^2
+ beta sum_{i != j} cos(w_i, w_j)^2, with the rows w_i of W. An encoder has converged at the first epoch after which the
mean training loss changes by less than 1 nat in each of five epochs. All runs of a seed read the same batches and start
from the same weights.

Both commands reproduce published tables: InfoMax that of Oursland, 2026,
github.com/alanoursland/implicit_em_in_neural_activations (study of InfoMax), and the convergence the runs with several
optimizers of Oursland, arXiv 2601.06478.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from em_lightning.data import MNIST
from em_lightning.losses import EMLoss, WeightRedundancyLoss
from em_lightning.metrics import EffectiveRank, Redundancy
from em_lightning.studies import linear_probe, markdown_table

SETTINGS = {"1, 0": (1.0, 0.0), "100, 0": (100.0, 0.0), "100, 10": (100.0, 10.0)}  # alpha and beta
RATES = (1e-4, 1e-3, 1e-2, 1e-1)
BATCH_SIZE = 128
TOLERANCE, PATIENCE = 1.0, 5  # nats and epochs


class Layers(nn.Module):
    """Layers (R, K, D) of R runs with equal initial weights; each has parameters of its own."""

    def __init__(self, runs: int, num_features: int, num_components: int) -> None:
        super().__init__()
        first = nn.Linear(num_features, num_components)
        self.weights = nn.ParameterList(nn.Parameter(first.weight.detach().clone()) for _ in range(runs))
        self.biases = nn.ParameterList(nn.Parameter(first.bias.detach().clone()) for _ in range(runs))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the energies (N, K) of each run for items (N, D)."""
        z = x @ torch.cat(list(self.weights)).T + torch.cat(list(self.biases))
        return z.relu().chunk(len(self.weights), 1)


def train(
    layers: Layers,
    x: Tensor,
    losses: list[Callable[[Tensor, Tensor], Tensor]],
    optimizers: list[torch.optim.Optimizer],
    epochs: int,
    generator: torch.Generator,
) -> Tensor:
    """Minimize one loss of energies and weights per run; return the mean loss of each epoch (epochs, R)."""
    history = torch.zeros(epochs, len(losses))
    batches = len(x) // BATCH_SIZE
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=generator)[: batches * BATCH_SIZE].split(BATCH_SIZE):
            values = [loss(d, w) for loss, d, w in zip(losses, layers(x[rows]), layers.weights, strict=True)]
            layers.zero_grad()
            torch.stack(values).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
            history[epoch] += torch.stack(values).detach() / batches
    return history


def infomax(alpha: float, beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the InfoMax loss, a function of energies (N, K) and weights (K, D)."""
    volume, between_weights = EMLoss(free_energy=0.0, decorrelation=alpha), WeightRedundancyLoss()
    return lambda d, w: volume.total(d) + (beta * between_weights(w) if beta else 0.0)


def decoder_free(energies: Tensor, weight: Tensor) -> Tensor:
    """Return the loss of decoder-free encoders, which does not depend on the weight."""
    return EMLoss().total(energies)


def infomax_table(data: MNIST, epochs: int, seeds: list[int]) -> list[dict[str, str]]:
    """Train the three settings and return a row for each."""
    (x, y), (test_x, test_y) = ((part.x.flatten(1), part.y) for part in (data.whole("train"), data.whole("test")))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
    for seed in seeds:
        torch.manual_seed(seed)
        layers = Layers(len(SETTINGS), x.shape[1], 16)
        optimizers = [torch.optim.Adam(layers.parameters(), 1e-3)]
        train(
            layers,
            x,
            [infomax(*pair) for pair in SETTINGS.values()],
            optimizers,
            epochs,
            torch.Generator().manual_seed(seed),
        )
        with torch.no_grad():
            energies, scored = layers(x), layers(test_x)
        weights = [weight.detach() for weight in layers.weights]
        for name, d, other, w in zip(SETTINGS, energies, scored, weights, strict=True):
            correlation = torch.corrcoef(d.double().T)
            found[name].append({
                "sum of squared correlations": _measured(Redundancy(), d),
                "sum of absolute correlations": float(correlation.triu(1).abs().sum() * 2),
                "norm of the correlations": float((correlation - torch.eye(16)).norm()),
                "total correlation": float(-torch.linalg.slogdet(correlation).logabsdet / 2),
                "weight redundancy": float(WeightRedundancyLoss()(w)),
                "effective rank": _measured(EffectiveRank(), d),
                "effective rank, standardized": _measured(EffectiveRank(), (d - d.mean(0)) / d.std(0)),
                "probe %": 100 * linear_probe(d, y, other, test_y),
            })  # fmt: skip
    return [{"alpha, beta": name, **_summaries(values)} for name, values in found.items()]


def _measured(metric: nn.Module, energies: Tensor) -> float:
    metric.update(energies)
    return float(metric.compute())


def converged(losses: list[float]) -> int | None:
    """Return the first epoch, from 1 on, after which the loss changes by less than 1 for five epochs.

    >>> converged([9.0, 5.0, 3.0, 2.5, 2.2, 2.0, 1.9, 1.8])
    3
    >>> converged([9.0, 5.0, 3.0, 2.5])
    """
    small = [abs(after - before) < TOLERANCE for before, after in zip(losses, losses[1:], strict=False)]
    return next((i + 1 for i in range(len(small) - PATIENCE + 1) if all(small[i : i + PATIENCE])), None)


def convergence_table(data: MNIST, epochs: int, seeds: list[int]) -> list[dict[str, str]]:
    """Train decoder-free encoders of 64 units and return a row per optimizer and rate."""
    x = data.whole("train").x.flatten(1)
    names = [f"{name} {rate:g}" for name in ("SGD", "Adam") for rate in RATES]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for seed in seeds:
        torch.manual_seed(seed)
        layers = Layers(len(names), x.shape[1], 64)
        pairs = [list(pair) for pair in zip(layers.weights, layers.biases, strict=True)]
        optimizers = [torch.optim.SGD(pair, rate) for pair, rate in zip(pairs[: len(RATES)], RATES, strict=True)]
        optimizers += [torch.optim.Adam(pair, rate) for pair, rate in zip(pairs[len(RATES) :], RATES, strict=True)]
        history = train(layers, x, [decoder_free] * len(names), optimizers, epochs, torch.Generator().manual_seed(seed))
        for name, values in zip(names, history.unbind(1), strict=True):
            found[name].append(values)
    rows = []
    for name, runs in found.items():
        ends = [converged(values.tolist()) for values in runs]
        last = torch.stack([values[-1] for values in runs])
        change = torch.stack([(values[1:] - values[:-1])[-PATIENCE:].abs().max() for values in runs])
        row = {"optimizer": name, "converged at epoch": ", ".join("never" if end is None else str(end) for end in ends)}
        rows.append(
            {**row, "final loss": f"{last.mean():.1f}", "largest change in the last five": f"{change.mean():.2f}"}
        )
    return rows


def _summaries(runs: list[dict[str, float]]) -> dict[str, str]:
    columns = {name: torch.tensor([run[name] for run in runs]) for name in runs[0]}
    return {
        name: f"{values.mean():.4g}" + (f" ± {values.std():.2g}" if len(runs) > 1 else "")
        for name, values in columns.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("root", help="folder of MNIST")
    parser.add_argument("--convergence", action="store_true")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = convergence_table if options.convergence else infomax_table
    print(markdown_table(table(MNIST(root=options.root), options.epochs, options.seeds)))


if __name__ == "__main__":
    main()
