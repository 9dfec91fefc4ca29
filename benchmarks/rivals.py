"""Compare fits of many clouds with other libraries: seconds, likelihood and memory per library.

    python benchmarks/rivals.py                  256 clouds x 1,024 x 3, K = 16, full, 20 iterations, one thread
    python benchmarks/rivals.py --sets 16 --loop 4

A library that takes one set at a time fits the first ``--loop`` clouds; its time is scaled to all of them. Likelihoods
are those of the first ``--loop`` clouds for every library, and MiB the memory that a process of its own takes more at
its peak than after the fit of one cloud. For libraries that are not installed the row says so.
"""

import argparse
import contextlib
import io
import logging
import multiprocessing
import resource
import time
import warnings

import numpy as np
import torch
from em_operator import blobs, sklearn_fit
from threadpoolctl import threadpool_limits

from em_lightning import EMOperator, Mixture

ITEMS, FEATURES, COMPONENTS, ITERATIONS = 1024, 3, 16, 20


def scikit_learn(x, start):
    options = {"iterations": ITERATIONS, "covariance": "full"}
    fits = [sklearn_fit(x, start, index=i, **options) for i in range(len(x))]
    return [fit.score(points.numpy()) for fit, points in zip(fits, x, strict=True)]


def torchgmm(x, start):
    from torchgmm.bayes import GaussianMixture

    scores = []
    for points, means in zip(x, start.means, strict=True):
        trainer = dict(max_epochs=ITERATIONS, logger=False, enable_progress_bar=False, enable_model_summary=False)
        fit = GaussianMixture(
            COMPONENTS,
            covariance_type="full",
            init_means=means,
            convergence_tolerance=0.0,
            trainer_params=trainer | {"accelerator": "cpu"},
        ).fit(points)
        scores.append(-float(np.mean(fit.score(points))))
    return scores


def pomegranate(x, start):
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel

    scores = []
    for points, means, covariances in zip(x, start.means, start.covariances, strict=True):
        normals = [Normal(mean, covariance) for mean, covariance in zip(means, covariances, strict=True)]
        fit = GeneralMixtureModel(normals, max_iter=ITERATIONS, tol=0.0).fit(points)
        scores.append(float(fit.log_probability(points).mean()))
    return scores


def tgmm(x, start):
    from tgmm import GaussianMixture

    scores = []
    for points, means in zip(x, start.means, strict=True):
        fit = GaussianMixture(
            n_features=FEATURES,
            n_components=COMPONENTS,
            max_iter=ITERATIONS,
            tol=1e-30,  # must be positive
            init_means=means,
            device="cpu",
        )
        scores.append(float(fit.fit(points).score(points)))
    return scores


def gmmx(x, start):
    import jax.numpy as jnp
    from gmmx import EMFitter, GaussianMixtureModelJax

    fitter, scores = EMFitter(max_iter=ITERATIONS, tol=0.0), []
    for points, means, covariances in zip(x.numpy(), start.means.numpy(), start.covariances.numpy(), strict=True):
        weights = np.full(COMPONENTS, 1 / COMPONENTS, dtype=np.float32)
        model = GaussianMixtureModelJax.from_squeezed(means=means, covariances=covariances, weights=weights)
        fit = fitter.fit(x=jnp.asarray(points), gmm=model).gmm
        log_likelihood, _ = fitter.e_step(jnp.asarray(points), fit)
        scores.append(float(log_likelihood))
    return scores


def textbook(x, start):
    from em_operator import textbook

    return textbook(x, start, ITERATIONS).log_prob(x).mean(1).numpy()


def em_lightning(x, start):
    operator = EMOperator(COMPONENTS, FEATURES, num_iters=ITERATIONS, residual=False)
    return operator(x, init=start).log_prob(x).mean(1).numpy()


def measure(name, num_sets, loop):
    """Return a row of the table; in a process of its own, because the largest resident memory never falls."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # Lightning's messages in torchgmm
    count = num_sets if name in ("em_lightning", "textbook") else loop
    x = blobs(num_sets, ITEMS, FEATURES, COMPONENTS)[:count]
    eye = torch.eye(FEATURES).expand(count, COMPONENTS, -1, -1)
    start = Mixture(torch.full((count, COMPONENTS), 1 / COMPONENTS).log(), x[:, :COMPONENTS].clone(), eye)
    fit = globals()[name]
    try:
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            fit(x[:1], start[:1])  # warm-up; loads the libraries whose threads are limited next
            threadpool_limits(1)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            wall, processor = time.perf_counter(), time.process_time()
            scores = fit(x, start)
            seconds = [time.perf_counter() - wall, time.process_time() - processor]
    except Exception as error:  # a library is missing or cannot fit these clouds
        return f"| {name} | {type(error).__name__}: {str(error)[:60]} | | | |"
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    times = " | ".join(f"{part * num_sets / count:.3g}" for part in seconds)
    return f"| {name} | {times} | {np.mean(scores[:loop]):.5f} | {used:.0f} |"


def main():
    """Print one row per library."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=256, help="number of clouds")
    parser.add_argument("--loop", type=int, default=8, help="clouds that libraries fit which take one at a time")
    options = parser.parse_args()
    print("| | seconds | processor seconds | log-likelihood per point | MiB |\n|---|---|---|---|---|")
    names = "em_lightning", "textbook", "scikit_learn", "torchgmm", "pomegranate", "tgmm", "gmmx"
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in names:
            print(pool.apply(measure, (name, options.sets, options.loop)), flush=True)


if __name__ == "__main__":
    main()
