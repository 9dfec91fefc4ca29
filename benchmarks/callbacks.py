"""Cost of callbacks: time of a training step with a callback's change of the model relative to the plain step.

The changes are made by the functions behind the callbacks, `swap_activations` and `LayerwiseLoss`, without a Trainer.

`python benchmarks/callbacks.py [--threads 1]` trains a 4 x 512 MLP with batch size 1,024. In each round all variants
take four steps in turn; the printed times are medians over the rounds of the mean step. It measures wall-clock time and
the processor time of all threads, which depends less on the load of the machine.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

from em_lightning.surgery import LayerwiseLoss, swap_activations

ROUNDS = 15  # chosen


def mlp() -> nn.Sequential:
    """Four hidden layers of 512 units between 512 inputs and 10 classes."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(512, 512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


class Step:
    """One training step of one variant."""

    def __init__(self, swap: str | None = None, **layerwise_loss: object) -> None:
        self.model = mlp()
        if swap is not None:
            swap_activations(self.model, swap)
        self.losses: LayerwiseLoss | None = None
        if layerwise_loss:
            self.losses = LayerwiseLoss(self.model, nn.ReLU, **layerwise_loss)  # type: ignore[arg-type]
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.x, self.y = torch.randn(1024, 512), torch.randint(10, (1024,))

    def __call__(self) -> tuple[float, float]:
        """Run the step and return its wall-clock time and its processor time in seconds."""
        start, busy = time.perf_counter(), time.process_time()
        loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        if self.losses is not None:
            loss = self.losses.add_to(loss)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start, time.process_time() - busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    torch.set_num_threads(parser.parse_args().threads)
    without_decorrelation = {"name": "em", "decorrelation": 0.0}
    steps = {
        "plain": Step(),
        "LayerwiseEMLoss, free energy and variance": Step(loss=without_decorrelation, weight=0.01),
        "the same, weight='auto'": Step(loss=without_decorrelation, weight="auto"),
        "LayerwiseEMLoss, with decorrelation": Step(weight=0.01),
        "with decorrelation, every=4": Step(weight=0.01, every=4),
        "SwapActivations('signed')": Step(swap="signed"),
        "SwapActivations('gated')": Step(swap="gated"),
        "SwapActivations('softmax_gated')": Step(swap="softmax_gated"),
    }
    times: dict[str, list[torch.Tensor]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            cycle = torch.tensor([step() for _ in range(4)])  # every=4 adds the loss in one of four steps
            times[name].append(cycle.mean(0))
    print(f"{'':45s} ms/step   ratio  ms of processor   ratio")
    plain = torch.stack(times["plain"])
    for name, rounds in times.items():
        measured = torch.stack(rounds)
        # Ratios within a round, because a busy machine slows both steps.
        wall, busy = (1e3 * measured.median(0).values).tolist()
        ratio, busy_ratio = (measured / plain).median(0).values.tolist()
        print(f"{name:45s} {wall:7.2f} {ratio:7.2f} {busy:16.2f} {busy_ratio:7.2f}")


if __name__ == "__main__":
    main()
