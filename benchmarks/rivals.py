"""Compare fits of many clouds with other libraries: processor seconds, likelihood and memory per library.

    python benchmarks/rivals.py                  256 clouds x 1,024 x 3, K = 16, full, 20 iterations, one thread
    python benchmarks/rivals.py --sets 16 --loop 4

A library that takes one set at a time fits the first ``--loop`` clouds; its time is scaled to all of them. Likelihoods
are those of the first ``--loop`` clouds for every library. Libraries that are not installed are skipped.
"""

import argparse
import contextlib
import io
import logging
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


def main():
    """Print one row per library."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=256, help="number of clouds")
    parser.add_argument("--loop", type=int, default=8, help="clouds that libraries fit which take one at a time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # Lightning's messages in torchgmm
    x = blobs(options.sets, ITEMS, FEATURES, COMPONENTS)
    eye = torch.eye(FEATURES).expand(options.sets, COMPONENTS, -1, -1)
    start = Mixture(torch.full((options.sets, COMPONENTS), 1 / COMPONENTS).log(), x[:, :COMPONENTS].clone(), eye)
    print("| | processor seconds | log-likelihood per point | MiB |\n|---|---|---|---|")
    for fit in (em_lightning, textbook, scikit_learn, torchgmm, pomegranate, tgmm, gmmx):
        batched = fit in (em_lightning, textbook)
        count = options.sets if batched else options.loop
        clouds, init = x[:count], start[:count]
        try:
            with torch.no_grad(), threadpool_limits(1), contextlib.redirect_stdout(io.StringIO()):
                fit(clouds[:1], init[:1])  # warm-up
                before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
                scores = fit(clouds, init)
        except Exception as error:  # a library is missing or cannot fit these clouds
            print(f"| {fit.__name__} | {type(error).__name__}: {str(error)[:60]} | | |", flush=True)
            continue
        seconds = (time.process_time() - begin) * options.sets / count
        used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(f"| {fit.__name__} | {seconds:.2f} | {np.mean(scores[: options.loop]):.5f} | {used:.0f} |", flush=True)


if __name__ == "__main__":
    main()
