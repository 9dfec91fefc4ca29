"""The native and the reference backend: processor time of EM, and errors of the log-likelihood.

python benchmarks/backends.py               256 sets x 1,024 x 3, K = 16, full, 20 iterations, one thread
python benchmarks/backends.py --sets 32     smaller
"""

import argparse
import time

import torch

from em_lightning import EMOperator, Mixture
from em_lightning.mixture import e_step, prepare
from em_lightning.mixture.backends import use_backend
from em_lightning.mixture.e_step import Likelihood

ITERATIONS, COMPONENTS = 20, 16


def clouds(sets, items, features):
    centers = 3.0 * torch.randn(sets, COMPONENTS, features)
    member = torch.randint(0, COMPONENTS, (sets, items, 1)).expand(-1, -1, features)
    return torch.randn(sets, items, features) + centers.gather(1, member)


def best(function, repetitions=4):
    """Return the shortest processor time in milliseconds, which other programs affect least."""
    times = []
    for _ in range(repetitions):
        begin = time.process_time()
        function()
        times.append(time.process_time() - begin)
    return 1e3 * min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = clouds(arguments.sets, 1024, 3)
    weights = torch.full((len(x), COMPONENTS), 1 / COMPONENTS).log()
    start = Mixture(weights, x[:, :COMPONENTS].clone(), torch.eye(3).expand(len(x), COMPONENTS, 3, 3))
    operator = EMOperator(COMPONENTS, 3, num_iters=ITERATIONS, residual=False)
    covariance = operator.family
    with use_backend("reference"), torch.no_grad():
        fitted = operator(x.double(), init=start.to(torch.float64))

    def log_likelihood(points):
        """Return the log-likelihood per point (B,) under the mixtures that the reference backend fitted."""
        sets = prepare(points)
        parameters = sets.frame.enter_parameters(fitted.parameters())
        found = e_step(sets, parameters, Likelihood(covariance), with_log_likelihood=True).log_likelihood
        return (found - sets.log_jacobian() * sets.mass) / points.shape[1]

    with use_backend("reference"):
        exact = log_likelihood(x.double())

    def forward(points):
        with torch.no_grad():
            return operator(points, init=start.to(points.dtype))

    def backward(points):
        points = points.detach().requires_grad_()
        mixture = operator(points, init=start.to(points.dtype))
        (mixture.means.sum() + mixture.covariances.sum()).backward()

    print(f"{len(x)} sets x 1,024 x 3, K = {COMPONENTS}, {ITERATIONS} iterations, one thread")
    print("| backend | points | forward, ms | forward + backward, ms | error of log-likelihood per point |")
    print("|---|---|---|---|---|")
    for backend in ("native", "reference"):
        for points in (x, x.double()):
            with use_backend(backend):
                times = best(lambda points=points: forward(points)), best(lambda points=points: backward(points))
                error = float((log_likelihood(points) - exact).abs().max())
            print(
                f"| {backend} | {points.dtype} | {times[0]:.0f} | {times[1]:.0f} | {error:.1e} |".replace("torch.", "")
            )


if __name__ == "__main__":
    main()
