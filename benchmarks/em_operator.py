"""Speed, memory, gradients and accuracy of the EM operator.

    python benchmarks/em_operator.py clouds      many clouds, compared with a loop over scikit-learn
    python benchmarks/em_operator.py large       one large set, compared with scikit-learn
    python benchmarks/em_operator.py starts      memory of the initialization on one large set
    python benchmarks/em_operator.py gradients   a training step, compared with autograd through textbook EM
    python benchmarks/em_operator.py scaling     time over sets B, points N, iterations T and components K
    python benchmarks/em_operator.py accuracy    float32 compared with float64

``--scale 0.1`` makes each, except ``scaling``, about ten times smaller. Times are medians of repeats in one process;
calls that are compared take turns. Scikit-learn on the large set is timed once.
"""

import argparse
import math
import os
import statistics
import time
import warnings
from collections import namedtuple
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from em_lightning import EMOperator, Mixture
from em_lightning.mixture import COVARIANCES, e_step, m_step, prepare
from em_lightning.mixture.e_step import Likelihood
from em_lightning.operators.gradients import GRADIENTS

LOW_FLOOR = 1e-10  # below the smallest variance of the data of ``accuracy``, 1e-8
Seconds = namedtuple("Seconds", ["wall", "processor"])  # wall-clock and processor time of a call
Usage = namedtuple("Usage", ["result", "wall", "mib"])  # of a call; wall: seconds; MiB: peak growth of resident memory


def blobs(sets, items, features, components, spread=3.0):
    """Return points (B, N, D) of Gaussian clusters with random centers."""
    centers = spread * torch.randn(sets, components, features)
    x = torch.randn(sets, items, features)
    x += centers.gather(1, torch.randint(0, components, (sets, items, 1)).expand(-1, -1, features))
    return x


def medians(calls, repeats):
    """Return the median :class:`Seconds` of each call; calls are interleaved, after a warm-up."""
    clocks = time.perf_counter, time.process_time
    times = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            begin = [clock() for clock in clocks]
            call()
            if repeat:
                times[name].append([clock() - start for clock, start in zip(clocks, begin, strict=True)])
    return {name: Seconds(*map(statistics.median, zip(*values, strict=True))) for name, values in times.items()}


def sklearn_fit(x, start, *, index, iterations, covariance):
    """Fit scikit-learn's mixture to the set ``x[index]`` from ``start[index]``."""
    from sklearn.mixture import GaussianMixture

    initial = start.covariances[index].double()
    precisions = torch.linalg.inv(initial) if covariance == "full" else 1 / initial
    weights = start.weights[index].double().numpy()
    fit = GaussianMixture(
        start.means.shape[1],
        covariance_type=covariance,
        max_iter=iterations,
        tol=0,
        weights_init=weights / weights.sum(),  # float32 weights do not sum to 1 as closely as scikit-learn requires
        means_init=start.means[index].numpy(),
        precisions_init=precisions.to(x.dtype).numpy(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit.fit(x[index].numpy())


def usage_of(call):
    """Run a call and return its :class:`Usage` (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before, begin = _mib("VmRSS"), time.perf_counter()
    result = call()
    return Usage(result, time.perf_counter() - begin, _mib("VmHWM") - before)


def _mib(name):
    """Return the resident memory, "VmRSS", or its peak, "VmHWM", of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def table(title, head, rows):
    """Print a Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |")


def clouds(options):
    """Compare 256 clouds of 1,024 points with a loop over scikit-learn; both run at 1 to ``--threads`` threads."""
    sets, items, iterations = max(int(256 * options.scale), 1), 1024, 20
    few = sets // 8 + 1  # scikit-learn fits these, as its time is the same for each cloud
    x = blobs(sets, items, 3, 16)
    operator = EMOperator(16, 3, num_iters=iterations, residual=False)
    start = operator(x, num_iters=0)
    fits = {}

    def ours(threads):
        torch.set_num_threads(threads)
        fits["em_lightning"] = operator(x, init=start)

    def theirs(threads):
        with threadpool_limits(threads):
            arguments = {"iterations": iterations, "covariance": "full"}
            fits["scikit-learn"] = [sklearn_fit(x, start, index=i, **arguments) for i in range(few)]

    calls = {}
    for threads in range(1, options.threads + 1):
        calls["em_lightning", threads] = lambda n=threads: ours(n)
        calls["scikit-learn", threads] = lambda n=threads: theirs(n)
    times = medians(calls, options.repeats)
    for (name, threads), seconds in times.items():
        if name == "scikit-learn":
            times[name, threads] = Seconds(*(value * sets / few for value in seconds))
    torch.set_num_threads(1)
    exact = operator(x.double(), init=start.to(torch.float64)).log_prob(x.double()).mean(1)
    rows, fastest = [], min(times["scikit-learn", n].wall for n in range(1, options.threads + 1))
    for name, threads in calls:
        if name == "scikit-learn":
            scores = torch.tensor([fit.score(x[i].numpy()) for i, fit in enumerate(fits[name])])
        else:
            scores = fits[name].log_prob(x).double().mean(1)
        wall, processor = times[name, threads]
        rows.append([name, threads, f"{wall:.3f}", f"{fastest / wall:.1f}", f"{processor:.3f}"])
        rows[-1] += [f"{times['scikit-learn', 1].processor / processor:.1f}", f"{scores[:few].mean():.6f}"]
        rows[-1] += [f"{(scores - exact[: len(scores)]).abs().max():.1e}"]
    title = f"{sets} clouds x {items} x 3, K = 16, full, {iterations} iterations, float32"
    head = ["", "threads", "seconds", "speedup over the fastest scikit-learn", "processor seconds"]
    head += ["speedup in processor seconds", f"log-likelihood per point of {few} clouds"]
    table(title, [*head, "largest error of a cloud against float64"], rows)
    print("\nspeedup in processor seconds: over scikit-learn with one thread")


def large(options):
    """Compare one set of a million points with scikit-learn, whose time per iteration is a difference of two fits."""
    items, features, components, iterations = int(1_000_000 * options.scale), 16, 64, 10
    x, few = blobs(1, items, features, components), 50_000  # points whose likelihood is compared
    rows = []
    for kind in options.covariance:
        eye = torch.eye(features) if kind == "full" else torch.ones(features)
        covariances = 4.0 * eye.expand(1, components, *eye.shape)  # chosen
        start = Mixture(torch.full((1, components), 1 / components).log(), x[:, :components].clone(), covariances)
        operator = EMOperator(components, features, num_iters=iterations, covariance=kind, residual=False)
        operator(x[:, :1000], init=start)  # warm-up: libraries allocate memory at first use
        runs = [usage_of(lambda o=operator, s=start: o(x, init=s)) for _ in range(options.repeats)]
        seconds, used = statistics.median(run.wall for run in runs), max(run.mib for run in runs)
        likelihood = runs[0].result.log_prob(x[:, :few]).mean()
        steps = 2 if kind == "full" else 6  # of scikit-learn, whose iteration is slow for full covariances
        early = operator(x, init=start, num_iters=steps).log_prob(x[:, :few]).mean()
        calls = [
            lambda n=n, s=start, k=kind: sklearn_fit(x, s, index=0, iterations=n, covariance=k) for n in (1, 1, steps)
        ]
        _, one, more = (usage_of(call) for call in calls)  # the first call is a warm-up
        theirs = (more.wall - one.wall) / (steps - 1)
        rows.append([kind, f"{seconds / iterations:.3f}", f"{theirs:.2f}", f"{theirs * iterations / seconds:.1f}"])
        rows[-1] += [f"{used:.0f}", f"{more.mib:.0f}", f"{likelihood:.5f}"]
        rows[-1] += [f"{steps}: {early:.5f} / {more.result.score(x[0, :few].numpy()):.5f}"]
    head = ["s per iteration", "scikit-learn", "speedup", "extra MiB", "scikit-learn, MiB", "log-likelihood"]
    title = f"one set of {items:,} x {features}, K = {components}, {iterations} iterations, float32"
    table(title, ["", *head, "early, em_lightning / scikit-learn"], rows)
    print("\nem_lightning: median of runs of 10 iterations including preparation; scikit-learn: a fit with the")
    print("iterations of the last column minus a fit with 1. MiB: largest growth of resident memory during a fit.")


def starts(options):
    """Measure the memory of each initialization on one set of a million points."""
    items, features, components = int(1_000_000 * options.scale), 16, 64
    x, rows = blobs(1, items, features, components), []
    for init in ("random", "farthest", "kmeans++"):
        operator = EMOperator(components, features, init=init, residual=False)
        operator(x[:, :1000].clone(), num_iters=1)  # warm-up: libraries allocate memory at first use
        rows.append([init, f"{usage_of(lambda o=operator: o(x, num_iters=0)).mib:.0f}"])
    table(f"start on one set of {items:,} x {features}, K = {components}, full", ["init", "extra MiB"], rows)


def textbook(x, start, iterations, floor=1e-6):  # the default floor of EMOperator
    """Return the mixture after textbook EM, with every product an einsum over (B, N, K, D, D)."""
    log_weights, means, covariances = start.log_weights, start.means, start.covariances
    ridge = floor * torch.eye(x.shape[-1])
    for _ in range(iterations):
        inverse = torch.linalg.inv(covariances)
        offset = x.unsqueeze(2) - means.unsqueeze(1)
        distance = torch.einsum("bnki,bkij,bnkj->bnk", offset, inverse, offset)
        log_det = torch.linalg.slogdet(covariances)[1]
        responsibilities = (log_weights.unsqueeze(1) - 0.5 * (distance + log_det.unsqueeze(1))).softmax(-1)
        mass = responsibilities.sum(1) + 1e-8  # no division by zero for an empty component
        log_weights = (mass / mass.sum(-1, keepdim=True)).log()
        means = torch.einsum("bnk,bni->bki", responsibilities, x) / mass.unsqueeze(-1)
        offset = x.unsqueeze(2) - means.unsqueeze(1)
        scatter = torch.einsum("bnk,bnki,bnkj->bkij", responsibilities, offset, offset)
        covariances = scatter / mass[..., None, None] + ridge
    return Mixture(log_weights, means, covariances)


def peak_allocation(call):
    """Return the peak growth of memory allocated by torch during a call, in MiB."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    most = now = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / 2**20


def backward_of(call, x):
    """Return a function that computes the gradient of a scalar of the fitted mixtures with respect to the points."""

    def step():
        points = x.clone().requires_grad_()
        mixture = call(points)
        loss = mixture.means.square().sum() + mixture.covariances.sum()
        return torch.autograd.grad(loss, points)[0]

    return step


def train(mode, *, iterations, steps):
    """Return the log-likelihood per point after training the corrections with one gradient mode."""
    torch.manual_seed(1)
    x = blobs(16, 256, 3, 8, spread=1.5)
    operator = EMOperator(8, 3, num_iters=iterations, gradient=mode)
    optimizer = torch.optim.Adam(operator.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (-operator(x).log_prob(x).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        return operator(x).log_prob(x).mean().item()


def gradients(options):
    """Compare a training step in three gradient modes with textbook EM, then all four modes on converged loops."""
    sets, items, components = max(int(32 * options.scale), 1), 1024, 16
    x = blobs(sets, items, 3, components)
    rows, exact, calls, memory = [], None, {}, {}
    for iterations in (10, 40):
        operators = {
            mode: EMOperator(components, 3, num_iters=iterations, residual=False, gradient=mode)
            for mode in ("unrolled", "checkpoint", "last")
        }
        start = operators["last"](x, num_iters=0)
        steps = {mode: backward_of(lambda p, o=o, s=start: o(p, init=s), x) for mode, o in operators.items()}
        if iterations == 10:
            book = backward_of(lambda p, s=start: textbook(p, s, 10), x)
            calls, exact = {"textbook einsum": book, **steps}, steps["unrolled"]()
            memory = {(name, 10): peak_allocation(call) for name, call in calls.items()}
        else:
            memory |= {(name, iterations): peak_allocation(call) for name, call in steps.items()}
    times = medians(calls, options.repeats)
    for name, seconds in times.items():
        error = (calls[name]() - exact).norm() / exact.norm()
        speedups = [other / own for other, own in zip(times["textbook einsum"], seconds, strict=True)]
        saving = memory["textbook einsum", 10] / memory[name, 10]
        later = f"{memory[name, 40]:.1f}" if (name, 40) in memory else ""
        reached = f"{train(name, iterations=5, steps=options.steps):.4f}" if name in GRADIENTS else ""
        rows.append([name, f"{1e3 * seconds.wall:.1f}", *(f"{speedup:.1f}" for speedup in speedups)])
        rows[-1] += [f"{memory[name, 10]:.1f}", f"{saving:.0f}"]
        rows[-1] += [later, f"{error:.1e}", reached]
    head = ["T = 10", "ms", "speedup", "speedup, processor", "peak MiB", "textbook / row", "MiB at T = 40"]
    title = f"forward + backward, {sets} clouds x {items} x 3, K = {components}, full, float32"
    head += ["error of the gradient", f"log-likelihood after {options.steps} steps of training, T = 5"]
    table(title, head, rows)

    torch.manual_seed(2)
    # Separated clusters, so that 100 iterations converge, as the mode "implicit" requires.
    corners = torch.tensor([[0.0, 0.0], [7.0, 0.0], [0.0, 7.0]], dtype=torch.float64)
    x = corners.repeat_interleave(100, 0) + torch.randn(4, 300, 2, dtype=torch.float64)
    reference, rows = None, []
    for mode in ("unrolled", "checkpoint", "last", "implicit"):
        operator = EMOperator(3, 2, num_iters=100, residual=False, gradient=mode)
        start = operator(x, num_iters=0)
        step = backward_of(lambda p, o=operator, s=start: o(p, init=s), x)
        grad = step()
        reference = grad if reference is None else reference
        seconds = medians({mode: step}, options.repeats)[mode].wall
        rows.append([mode, f"{1e3 * seconds:.1f}", f"{(grad - reference).norm() / reference.norm():.1e}"])
    title = "converged loops: 4 clouds x 300 x 2, K = 3, full, T = 100, float64"
    table(title, ["", "ms", "error of the gradient against unrolled"], rows)


def scaling(options):
    """Measure the time over two decades of each of B, N, T and K, with the others fixed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base = {"B": 16, "N": 512, "T": 10, "K": 8}
    ranges = {
        "B": [16, 48, 160, 480, 1600],
        "N": [512, 1536, 5120, 15360, 51200],
        "T": [2, 6, 20, 60, 200],
        "K": [2, 6, 20, 60, 200],
    }
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    rows = []
    for axis, (letter, values) in zip(axes, ranges.items(), strict=True):
        calls = {}
        for value in values:
            # The largest K needs more points than components.
            size = base | {letter: value} | ({"N": 2048} if letter == "K" else {})
            x = blobs(size["B"], size["N"], 3, size["K"])
            # The floor keeps the components thick for every T.
            operator = EMOperator(size["K"], 3, num_iters=size["T"], covariance_floor=0.1, residual=False)
            start = operator(x, num_iters=0)
            calls[value] = lambda o=operator, p=x, s=start: o(p, init=s)
        seconds = [median.wall for median in medians(calls, options.repeats).values()]
        slope = math.log(seconds[-1] / seconds[-3]) / math.log(values[-1] / values[-3])  # the last three: one decade
        rows.append([letter, *(f"{1e3 * s:.1f}" for s in seconds), f"{slope:.2f}"])
        axis.loglog(values, seconds, "o-")
        axis.loglog(values, [seconds[-1] * v / values[-1] for v in values], "--", color="0.6", label="linear")
        axis.set(xlabel=letter, ylabel="seconds", title=f"exponent of the last decade {slope:.2f}")
    axes[0].legend()
    figure.savefig(options.plot, dpi=90)
    table(f"ms over two decades, from B, N, T, K = {base}", ["", "1st", "2nd", "3rd", "4th", "5th", "exponent"], rows)


def in_the_loop(x, start, iterations=20):
    """Return the log-likelihood per point (B,) after some iterations of the EM loop, by one more of its E-steps.

    Points have the dtype of x and parameters are float64, as in the loop of EMOperator.
    """
    covariance = COVARIANCES["full"]
    points = prepare(x)
    parameters = points.frame.enter_parameters(start.to(torch.float64).parameters())
    for _ in range(iterations + 1):
        found = e_step(points, parameters, Likelihood(covariance), with_log_likelihood=True)
        parameters = m_step(found, covariance, points.floor(LOW_FLOOR), parameters.covariances)
    # The loop scales points; subtract the log of the Jacobian to get the log-density of x.
    return (found.log_likelihood - points.log_jacobian() * points.mass) / points.mass


def accuracy(options):
    """Compare float32 with float64 for components that are thin or far from the origin."""
    items = int(2000 * options.scale) or 1
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    round_ = blobs(8, items, 3, 8).double()
    angle = 2 * math.pi * torch.rand(8, items, 1, dtype=torch.float64)
    height = torch.rand(8, items, 1, dtype=torch.float64)
    surface = torch.cat([angle.cos(), angle.sin(), 2 * height], -1)
    stretch = torch.tensor([1.0, 1e-2, 1e-4], dtype=torch.float64)
    data = {
        "centred": round_,
        "offset by 1e3": round_ + 1e3,
        "offset by 1e6": round_ + 1e6,
        "axes 1 : 1e-2 : 1e-4": round_ * stretch,
        "the same, rotated": (round_ * stretch) @ turn,
        "surface of a cylinder": surface,
        "slab 1 : 1 : 1e-3, rotated": (round_ * torch.tensor([1.0, 1.0, 1e-3], dtype=torch.float64)) @ turn,
    }
    rows = []
    for name, points in data.items():
        x = points.float()
        operator = EMOperator(8, 3, num_iters=20, residual=False, covariance_floor=LOW_FLOOR)
        start = operator(x, num_iters=0)
        narrow = operator(x, init=start).log_prob(x)
        # The same float32 points in float64, so that the rounding of the data does not count.
        wide = operator(x.double(), init=start.to(torch.float64)).log_prob(x.double())
        error = (narrow.double().mean(1) - wide.mean(1)).abs().max()
        in_loop = (in_the_loop(x, start) - in_the_loop(x.double(), start)).abs().max()
        rows.append([name, f"{in_loop:.1e}", f"{error:.1e}", f"{wide.mean():.4f}"])
    head = ["8 clouds, K = 8, T = 20", "in the loop", "of the mixture in float32", "log-likelihood"]
    table("largest error of a cloud's log-likelihood per point, float32 against float64 on the same points", head, rows)


COMMANDS = {call.__name__: call for call in (clouds, large, starts, gradients, scaling, accuracy)}


def main():
    """Run one comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2, help="of all libraries; clouds runs 1 to this number")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of training in each gradient mode")
    parser.add_argument("--covariance", nargs="+", default=["full", "diag"], help="of the large set")
    parser.add_argument("--plot", default="operator-scaling.png", help="file of the plot of scaling")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"threads {options.threads}, load before {os.getloadavg()[0]:.1f}", end="", flush=True)
    with torch.set_grad_enabled(options.command == "gradients"), threadpool_limits(options.threads):
        COMMANDS[options.command](options)
    print(f"\nload after {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
