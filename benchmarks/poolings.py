"""Time of training and prediction of PoolingClassifier by pooling, at equal numbers of parameters, on one thread.

Every round times all poolings one after the other, so that changes of the machine's load affect all of them. The table
shows medians over the rounds, in milliseconds of processor time per cloud, for the clouds of the configs ``pooling``
and ``shapes_pooling``.

Run: python -m benchmarks.poolings [rounds]
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from torch.nn.functional import cross_entropy

from em_lightning.studies import POOLINGS, PoolingClassifier

BATCH, POINTS = 128, 64


def main(rounds: int = 15) -> None:
    """Time all poolings and print a table."""
    torch.set_num_threads(1)
    for name, features, classes in (("MNIST", 2, 10), ("GeometricShapes", 3, 40)):
        torch.manual_seed(0)
        points, labels = torch.rand(BATCH, POINTS, features) * 2 - 1, torch.randint(classes, (BATCH,))
        modules = {p: PoolingClassifier(classes, features, p, num_parameters=100_000) for p in POOLINGS}
        optimizers = {p: torch.optim.AdamW(module.parameters(), fused=True) for p, module in modules.items()}
        times: dict[str, list[tuple[float, float]]] = {p: [] for p in POOLINGS}
        for _ in range(rounds):
            for pooling, module in modules.items():
                start = time.process_time()
                optimizers[pooling].zero_grad()
                cross_entropy(module.train()(points), labels).backward()
                optimizers[pooling].step()
                middle = time.process_time()
                with torch.no_grad():
                    module.eval()(points)
                times[pooling].append((middle - start, time.process_time() - middle))
        print(f"\n| {name} | parameters | ms per cloud, training | ms per cloud, prediction |\n|---|---|---|---|")
        for pooling, module in modules.items():
            training, prediction = (1e3 / BATCH * statistics.median(each) for each in zip(*times[pooling], strict=True))
            print(
                f"| {pooling} | {sum(p.numel() for p in module.parameters()):,} | {training:.3f} | {prediction:.3f} |"
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
