"""Cost of swapped activations: time of a training step of the classifiers of `em-lightning run swap_activations`.

`python -m benchmarks.swap_activations` prints, for both networks and each activation, the median time of interleaved
steps (forward, backward, fused Adam) with batch size 128 on one thread, and its ratio to the step with ReLU.
"""

from __future__ import annotations

import time

import torch

from em_lightning.activations import ACTIVATIONS
from em_lightning.surgery import swap_activations
from recipes.swap_activations import ImageClassifier

ROUNDS, WARM_UP = 60, 5  # the first five rounds are not counted


def step_of(network: str, activation: str):
    """Return a function that runs one training step and returns its time in seconds."""
    torch.manual_seed(0)
    model = ImageClassifier(network=network)  # type: ignore[arg-type]
    if activation != "relu":
        swap_activations(model, activation)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    x, y = torch.rand(128, 1, 28, 28), torch.randint(10, (128,))

    def step() -> float:
        start = time.perf_counter()
        loss = model.step((x, y), "train")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def main() -> None:
    torch.set_num_threads(1)
    for network in ("mlp", "cnn"):
        steps = {name: step_of(network, name) for name in ("relu", *ACTIVATIONS)}
        times = torch.tensor([[step() for step in steps.values()] for _ in range(ROUNDS)])[WARM_UP:]
        ratios = (times / times[:, :1]).median(0).values
        for name, seconds, ratio in zip(steps, times.median(0).values.tolist(), ratios.tolist(), strict=True):
            print(f"{network:4s} {name:18s} {1e3 * seconds:6.2f} ms {ratio:6.2f}")


if __name__ == "__main__":
    main()
