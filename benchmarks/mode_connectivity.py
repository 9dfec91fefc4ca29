"""Loss on the straight line between solutions of EM and of cross-entropy, after matching their units.

`python -m benchmarks.mode_connectivity` trains the arms EM and CE (cross-entropy) on the digits from several
initial weights.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from benchmarks.composition import Arm, StackedNetworks
from em_lightning import EMLoss
from em_lightning.data import Digits
from em_lightning.studies import markdown_table, spread

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
NEVER = 10**6  # steps between two logs, because there is no logger
POINTS = 11  # on a line between two solutions
ARMS = {"EM": Arm(weight=1.0, stop=True), "CE": Arm(weight=0.0)}


def trained(seed: int, epochs: int, rate: float) -> StackedNetworks:
    """Return the networks of both arms, trained on the digits."""
    torch.manual_seed(seed)
    networks = StackedNetworks(dict(ARMS), [rate], num_features=64)  # 8 x 8 pixels
    trainer = lightning.Trainer(max_epochs=epochs, limit_val_batches=0, log_every_n_steps=NEVER, **QUIET)
    trainer.fit(networks, Digits(seed=seed, batch_size=128))
    return networks


def solution(networks: StackedNetworks, name: str) -> list[Tensor]:
    """Return W, b, V, c, gain and shift of an arm."""
    arm = list(ARMS).index(name)
    lists = [*zip(networks.weights, networks.biases, strict=True), (networks.gain, networks.shift)]
    return [of_rates[0][arm].detach() for pair in lists for of_rates in pair]  # there is one learning rate


def energies(parameters: list[Tensor], x: Tensor) -> Tensor:
    """Return the energies (N, K) of a solution."""
    w, b, *_ = parameters
    return (x @ w.T + b).relu()


def losses(parameters: list[Tensor], x: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the cross-entropy and the EM loss of a solution."""
    _, _, v, c, gain, shift = parameters
    d = energies(parameters, x)
    logits = functional.layer_norm(-functional.log_softmax(-d, -1) @ v.T + c, gain[0].shape, gain[0], shift[0])
    return float(functional.cross_entropy(logits, labels)), float(EMLoss(reduction="mean").total(d))


def matched(parameters: list[Tensor], d: Tensor, other: Tensor) -> list[Tensor]:
    """Return the solution with energies ``other`` with its units reordered to correlate best with those of ``d``."""
    correlation = torch.corrcoef(torch.cat([d, other], 1).T).nan_to_num()[: d.shape[1], d.shape[1] :]
    _, order = linear_sum_assignment(-correlation.numpy())
    w, b, v, *rest = parameters
    return [w[order], b[:, order], v[:, order], *rest]


def barriers(first: list[Tensor], second: list[Tensor], x: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the largest excess of the cross-entropy and of the EM loss over the line between the ends' values."""
    fractions = torch.linspace(0, 1, POINTS)
    line = [[a.lerp(b, float(t)) for a, b in zip(first, second, strict=True)] for t in fractions]
    values = torch.tensor([losses(parameters, x, labels) for parameters in line])
    straight = values[:1] + fractions[:, None] * (values[-1:] - values[:1])
    task, em = (values - straight).amax(0).tolist()
    return task, em


def connectivity(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return barriers between EM and CE solutions from the same and from different initial weights."""
    data = Digits().whole("train")
    x, labels = data.x.flatten(1), data.y
    networks = [trained(seed, options.epochs, options.rate) for seed in range(options.seeds + 1)]
    em, ce = ([solution(of_seed, arm) for of_seed in networks] for arm in ("EM", "CE"))
    pairs = {
        "EM and CE, same initial weights": zip(em, ce, strict=True),
        "EM and EM, different initial weights": zip(em, em[1:], strict=False),
        "CE and CE, different initial weights": zip(ce, ce[1:], strict=False),
    }
    rows = []
    for name, found in pairs.items():
        columns: dict[str, list[float]] = {}
        for first, second in found:
            d = energies(first, x)
            reordered = matched(second, d, energies(second, x))
            both = torch.corrcoef(torch.cat([d, energies(reordered, x)], 1).T).nan_to_num()
            columns.setdefault("correlation of matched units", []).append(
                float(both[: d.shape[1], d.shape[1] :].diagonal().mean())
            )
            for label, end in (("", second), (", matched", reordered)):
                for loss, value in zip(("CE", "EM"), barriers(first, end, x, labels), strict=True):
                    columns.setdefault(f"barrier of {loss}{label}", []).append(value)
        rows.append({"pair": name, **{key: spread(values) for key, values in columns.items()}})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument(
        "--seeds", type=int, default=3, help="number of pairs of different initial weights; one more is trained"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(markdown_table(connectivity(options)))


if __name__ == "__main__":
    main()
