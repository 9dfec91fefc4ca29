"""Cost of EMLoss relative to its formulas in plain torch: forward + backward, and in a training step of a 4 x 512 MLP.

Rounds alternate between the two, so that a change of the machine's load affects both. The ratio is the median over the
rounds of the time of EMLoss divided by that of the formulas in the same round.

Run: python -m benchmarks.losses [rounds]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from em_lightning.losses import EMLoss

SHAPES = [(128, 64), (512, 512), (4096, 1024)]
LAYERS = nn.Sequential(*[nn.Linear(512, 512) for _ in range(4)])
WARM_UP = 2  # rounds that are not counted
Loss = Callable[[Tensor], Tensor]


def formulas(x: Tensor) -> Tensor:
    """Return the loss of energies (N, K), with the same small constants as in EMLoss."""
    std = x.std(0) + 1e-8
    correlation = torch.cov(x.T) / std / std[:, None]
    redundancy = correlation.square().sum() - correlation.diagonal().square().sum()
    return redundancy - torch.logsumexp(-x, 1).sum() - (x.var(0) + 1e-6).log().sum()


def batch_step(shape: tuple[int, int]) -> Callable[[Loss], object]:
    """Return a function that computes the derivative of a loss of random energies."""
    x = torch.rand(shape, requires_grad=True)
    return lambda loss: torch.autograd.grad(loss(x), x)


def mlp_step(loss: Loss, width: int = 512, batch: int = 256) -> None:
    """Run a training step of the MLP, with the loss on each layer."""
    hidden, total = torch.rand(batch, width), torch.zeros(())
    for layer in LAYERS:
        hidden = layer(hidden).relu()
        total = total + loss(hidden)
    LAYERS.zero_grad()
    total.backward()
    for parameter in LAYERS.parameters():
        parameter.data -= 1e-6 * parameter.grad  # type: ignore[operator]  # so small that the work stays the same


def seconds(step: Callable[[Loss], object], loss: Loss) -> float:
    """Return the seconds of a step with a loss."""
    start = time.perf_counter()
    step(loss)
    return time.perf_counter() - start


def main(rounds: int = 20) -> None:
    torch.manual_seed(0)
    table = Table(title=f"forward + backward in float32, {rounds} rounds")
    for column in ("batch", "threads", "EMLoss ms", "formulas ms", "ratio"):
        table.add_column(column, justify="right")
    steps = {f"{rows} x {units}": batch_step((rows, units)) for rows, units in SHAPES}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, step in {**steps, "MLP step": mlp_step}.items():
            pairs = [(seconds(step, EMLoss().total), seconds(step, formulas)) for _ in range(rounds + WARM_UP)]
            pairs = pairs[WARM_UP:]
            ours, plain = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            table.add_row(name, str(threads), f"{ours:.2f}", f"{plain:.2f}", f"{ratio:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
