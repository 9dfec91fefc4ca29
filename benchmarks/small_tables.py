"""Times of GaussianMixture and of scikit-learn's on small tables, alternated, one thread: fit, predict and score.

    OMP_NUM_THREADS=1 python benchmarks/small_tables.py

Prints medians in milliseconds of alternated rounds, the median ratio of the rounds, and the difference of the mean
log-likelihoods per row, equal in all rounds, which must be 0 up to round-off: both run the same EM from the same start.
"""

import statistics
import time
import warnings

import sklearn.mixture
from sklearn.datasets import load_digits, load_iris, load_wine

from em_lightning.estimator import GaussianMixture

ROUNDS = 15  # chosen
# The larger reg_covar of the digits is for pixels that are constant within a component.
TABLES = {
    "iris, K=3, full": (load_iris, {"n_components": 3}),
    "wine, K=3, diag": (load_wine, {"n_components": 3, "covariance_type": "diag"}),
    "digits, K=10, diag": (load_digits, {"n_components": 10, "covariance_type": "diag", "reg_covar": 1e-2}),
    "digits, K=10, full": (load_digits, {"n_components": 10, "reg_covar": 1e-2}),
}


def timed(function, x):
    """Return the milliseconds and the result of a call."""
    start = time.perf_counter()
    result = function(x)
    return 1e3 * (time.perf_counter() - start), result


def main():
    warnings.simplefilter("ignore")
    print(f"{'table':20} {'call':8} {'ours':>9} {'sklearn':>9} {'ratio':>6}")
    for name, (load, options) in TABLES.items():
        x = load().data
        classes = (GaussianMixture, sklearn.mixture.GaussianMixture)
        times = {call: ([], []) for call in ("fit", "predict", "score")}
        for _ in range(ROUNDS):
            scores = []
            for index, cls in enumerate(classes):
                elapsed, model = timed(cls(**options, random_state=0).fit, x)
                times["fit"][index].append(elapsed)
                elapsed, _ = timed(model.predict, x)
                times["predict"][index].append(elapsed)
                elapsed, score = timed(model.score, x)
                times["score"][index].append(elapsed)
                scores.append(score)
        for call, (ours, theirs) in times.items():
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            medians = f"{statistics.median(ours):9.2f} {statistics.median(theirs):9.2f}"
            print(f"{name:20} {call:8} {medians} {ratio:6.2f}")
        print(f"{name:20} difference of the scores {abs(scores[0] - scores[1]):.1e}")


if __name__ == "__main__":
    main()
