"""Time of EMAggregation, forward and backward, against PyG's mean and softmax aggregation.

    OMP_NUM_THREADS=1 python benchmarks/aggregation.py

The cases are messages along 100,000 edges to 20,000 nodes, and one hub of 2,000 rows among 400 groups of 5. The three
aggregations alternate in each round. Prints the fastest times in milliseconds and the median ratios of the rounds, and
the largest differences of the values and gradients from those of the reference backend, relative to the largest.
"""

import statistics
import time

import torch
from torch_geometric.nn.aggr import MeanAggregation, SoftmaxAggregation

from em_lightning.mixture.backends import use_backend
from em_lightning.operators import EMAggregation

ROUNDS = 9
FEATURES = 16


def cases():
    random = torch.Generator().manual_seed(0)
    hub = torch.cat([torch.zeros(2000, dtype=torch.long), torch.arange(1, 401).repeat_interleave(5)])
    yield "20,000 nodes, 100,000 edges", torch.randint(20_000, (100_000,), generator=random)
    yield "hub of 2,000 among 400", hub


def forward_backward(aggregation, rows, index, size):
    """Return the seconds of a call and its derivative."""
    rows = rows.detach().requires_grad_()
    start = time.perf_counter()
    aggregation(rows, index, dim_size=size).square().sum().backward()
    return time.perf_counter() - start


def largest_differences(index, size):
    """Return the largest differences of values and gradients from those of the reference backend, in float64."""
    rows = torch.randn(len(index), FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    aggregation = EMAggregation().double()
    with torch.no_grad():
        aggregation.by_weight.fill_(2.0)  # at the initial value of 1 the result is the plain mean
    results = []
    for backend in ("auto", "reference"):
        leaf = rows.clone().requires_grad_()
        with use_backend(backend):
            means = aggregation(leaf, index, dim_size=size)
            results.append((means, torch.autograd.grad(means.square().sum(), leaf)[0]))
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True)]


def main():
    aggregations = {"mean": MeanAggregation(), "softmax": SoftmaxAggregation(learn=True), "em": EMAggregation()}
    print(f"{'case':28} {'mean':>8} {'softmax':>8} {'em':>8} {'em/mean':>8} {'em/softmax':>10}  differences")
    for name, index in cases():
        size = int(index.max()) + 1
        rows = torch.randn(len(index), FEATURES, generator=torch.Generator().manual_seed(0))
        for aggregation in aggregations.values():
            forward_backward(aggregation, rows, index, size)  # compiles the native operators
        rounds = [
            {key: forward_backward(aggregation, rows, index, size) for key, aggregation in aggregations.items()}
            for _ in range(ROUNDS)
        ]
        best = " ".join(f"{1e3 * min(times[key] for times in rounds):8.2f}" for key in aggregations)
        ratios = [statistics.median(times["em"] / times[key] for times in rounds) for key in ("mean", "softmax")]
        value, gradient = largest_differences(index, size)
        print(f"{name:28} {best} {ratios[0]:8.1f} {ratios[1]:10.1f}  {value:.0e}, {gradient:.0e}")


if __name__ == "__main__":
    main()
