"""Time of every kernel, forward and backward, relative to torch.cdist in the same run.

    python benchmarks/kernels.py [--items 4096] [--centers 64] [--features 16] [--threads 1]

The last row is the squared distance computed by broadcasting, which stores one difference per item, center and
feature for the backward pass.
"""

import argparse
import statistics
import time

import torch

from em_lightning.kernels import KERNELS, pairwise


def seconds(calls, x, centers, grad, repeats):
    """Return the median time of each call; calls are interleaved, so that a busy machine slows all of them equally."""
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            torch.autograd.grad(call(x, centers), (x, centers), grad)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("items", 4096), ("centers", 64), ("features", 16), ("threads", 1), ("repeats", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x = torch.randn(options.items, options.features, requires_grad=True)
    centers = torch.randn(options.centers, options.features, requires_grad=True)
    grad = torch.randn(options.items, options.centers)
    calls = {"torch.cdist": torch.cdist}
    for key in KERNELS:
        if key != "learned":  # its cost is that of its network
            calls[key] = KERNELS.build(key, **({"num_features": options.features} if key == "mahalanobis" else {}))
    calls["broadcast square"] = lambda x, centers: pairwise(x, centers).square().sum(-1)
    times = seconds(calls, x, centers, grad, options.repeats)
    print(
        f"{options.items} items, {options.centers} centers, {options.features} features, float32, forward + backward\n"
    )
    print("| kernel | ms | x torch.cdist |\n|---|---|---|")
    for name, value in times.items():
        print(f"| {name} | {1e3 * value:.2f} | {value / times['torch.cdist']:.2f} |")


if __name__ == "__main__":
    main()
