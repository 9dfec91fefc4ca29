"""Gaussian mixture of one large table: speed compared with scikit-learn, memory, and scaling over processes.

    python benchmarks/gaussian_mixture.py sklearn --covariance full     1,000,000 x 16, K = 64, 10 iterations
    python benchmarks/gaussian_mixture.py memory --storage npy --rows 20000000 --iterations 2
    python benchmarks/gaussian_mixture.py scaling --processes 2         one thread each, compared with one process

All three jobs use GaussianMixtureModule, its loader and Lightning's Trainer. ``--rows 100000`` runs a smaller version.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning
import numpy as np
import torch

from em_lightning.data import Table, TableBlocks, TabularDataModule
from em_lightning.modules import GaussianMixtureModule
from em_lightning.operators import EMOperator

# Warnings of Lightning about runs without validation and logger, and about deprecated functions of PyTorch.
warnings.filterwarnings("ignore", ".*no .val_dataloader.*|.*LeafSpec.*|.*torch.jit.script.*|.*Checkpoint directory.*")


def quiet_trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(**{"accelerator": "cpu", "enable_checkpointing": False, **quiet, **options})


def table_of(rows, features, path=None):
    """Return a table of 64 overlapping clusters, in memory or memory-mapped at a path."""
    generator = torch.Generator().manual_seed(0)
    centers = 2.0 * torch.randn(64, features, generator=generator)
    out = (
        torch.empty(rows, features) if path is None else np.lib.format.open_memmap(path, "w+", "<f4", (rows, features))
    )
    chunk = 2**18  # rows generated at a time, to limit memory
    for start in range(0, rows, chunk):
        size = min(chunk, rows - start)
        block = torch.randn(size, features, generator=generator)
        block += centers[torch.randint(0, 64, (size,), generator=generator)]
        out[start : start + size] = block if path is None else block.numpy()
    if path is not None:
        out.flush()
    return out


def start_of(blocks, components, kind):
    """Return a mixture with k-means++ centers, drawn from a sample of the rows."""
    sample = blocks.sample(2**14).points  # as many rows as GaussianMixtureModule samples
    operator = EMOperator(components, sample.shape[1], covariance=kind, init="kmeans++", seed=0, residual=False)
    return operator(sample[None].double(), num_iters=0)


def module_of(components, features, kind, start):
    module = GaussianMixtureModule(components, features, covariance=kind, tol=0.0)
    module.start_from(start)
    return module


def resident():
    """Return current and peak memory of this process in MiB, and reset the peak."""
    text = Path("/proc/self/status").read_text()
    now, peak = (int(text.split(f"{name}:")[1].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return now, peak


def warm_up(options, start):
    """Fit a small table, so that libraries allocate their memory before the measurement."""
    small = TabularDataModule(torch.randn(3000, options.features))
    quiet_trainer(max_epochs=1).fit(module_of(options.components, options.features, options.covariance, start), small)


def sklearn_seconds(rows, start, options, iterations):
    """Return the seconds of a fit and the log-likelihood before its last M-step."""
    from sklearn.mixture import GaussianMixture

    covariances = start.covariances[0].double()
    precisions = torch.linalg.inv(covariances) if options.covariance in ("full", "tied") else 1 / covariances
    reference = GaussianMixture(
        options.components,
        covariance_type=options.covariance,
        max_iter=iterations,
        tol=0,
        weights_init=(start.weights[0] / start.weights[0].sum()).numpy(),
        means_init=start.means[0].numpy(),
        precisions_init=precisions.numpy().astype(np.float32),
    )
    begin = time.perf_counter()
    reference.fit(rows)
    return time.perf_counter() - begin, reference.lower_bound_


def compare_with_sklearn(options):
    from sklearn.exceptions import ConvergenceWarning

    warnings.simplefilter("ignore", ConvergenceWarning)
    torch.set_num_threads(options.threads)
    kind, steps, sklearn_steps = options.covariance, options.iterations, options.sklearn_iterations
    x = table_of(options.rows, options.features)
    data = TabularDataModule(x)
    start = start_of(data.blocks(), options.components, kind)
    warm_up(options, start)
    before, _ = resident()
    times, log_likelihoods = [], {}
    for _ in range(options.repeats):
        module = module_of(options.components, options.features, kind, start)
        watch = _LogLikelihoods(log_likelihoods)
        begin = time.perf_counter()
        quiet_trainer(max_epochs=steps, callbacks=[watch]).fit(module, data)
        times.append(time.perf_counter() - begin)
    _, peak = resident()
    seconds = sorted(times)[len(times) // 2]
    longest, log_likelihood = sklearn_seconds(x.numpy(), start, options, sklearn_steps)
    _, sklearn_peak = resident()
    expected, source = longest, "measured"
    if sklearn_steps < steps:
        # The time of a fit is linear in the number of iterations.
        shortest, _ = sklearn_seconds(x.numpy(), start, options, 1)
        expected = shortest + (longest - shortest) / (sklearn_steps - 1) * (steps - 1)
        source = f"from {shortest:.1f} s for 1 iteration and {longest:.1f} s for {sklearn_steps}"
    print(
        f"{kind}: {options.rows:,} x {options.features}, K = {options.components}, {steps} iterations, "
        f"{options.threads} threads: {seconds:.2f} s with module and loader, scikit-learn {expected:.1f} s ({source}): "
        f"{expected / seconds:.1f} x"
    )
    print(
        f"  log-likelihood per row before M-step {sklearn_steps}: {log_likelihoods[sklearn_steps]:.7f}, "
        f"scikit-learn {log_likelihood:.7f}"
    )
    print(
        f"  peak memory in addition to the data {peak - before:.0f} MiB, scikit-learn {sklearn_peak - before:.0f} MiB"
    )


class _LogLikelihoods(lightning.Callback):
    """Record the log-likelihood per row before each M-step, by the number of the M-step."""

    def __init__(self, log_likelihoods):
        self.log_likelihoods = log_likelihoods

    def on_train_epoch_end(self, trainer, module):
        self.log_likelihoods[int(module.iterations)] = float(module.log_likelihood)


def memory(options):
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        source = table_of(options.rows, options.features, None if options.storage == "memory" else path)
        data = TabularDataModule(source if options.storage == "memory" else str(path))
        del source
        start = start_of(data.blocks(), options.components, options.covariance)
        warm_up(options, start)
        module = module_of(options.components, options.features, options.covariance, start)
        before, _ = resident()
        begin = time.perf_counter()
        quiet_trainer(max_epochs=options.iterations).fit(module, data)
        seconds = time.perf_counter() - begin
        _, peak = resident()
    print(
        f"{options.covariance}, {options.storage}: {options.rows:,} x {options.features}, K = {options.components}, "
        f"{options.iterations} iterations: {seconds:.1f} s, "
        f"peak memory in addition to the baseline {peak - before:.0f} MiB, "
        f"log-likelihood per row {float(module.log_likelihood):.6f}"
    )


def scaling(options):
    """Time the fit of one table by one process, by several ranks, and by as many independent processes."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        table_of(options.rows, options.features, path)
        command = [sys.executable, __file__, "worker", f"--path={path}", f"--block_rows={options.block_rows}"]
        command += [f"--covariance={options.covariance}", f"--components={options.components}"]
        command += [f"--iterations={options.iterations}", f"--features={options.features}"]
        environment, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
        for name, processes, copies in (
            ("one process", 1, 1),
            (f"{options.processes} ranks", options.processes, 1),
            (f"{options.processes} independent processes, the whole table each", 1, options.processes),
        ):
            arguments = [*command, f"--processes={processes}"]
            runs = [
                subprocess.Popen(arguments, stdout=pipe, stderr=pipe, text=True, env=environment) for _ in range(copies)
            ]
            outputs = [run.communicate() for run in runs]
            lines = [line for out, _ in outputs for line in out.splitlines() if line.startswith("seconds")]
            if len(lines) < copies:
                raise SystemExit("".join(out + err for out, err in outputs))
            numbers = [[float(word) for word in line.split()[1:]] for line in lines]
            found[name] = (copies, *(sum(column) / copies for column in zip(*numbers, strict=True)))
    print(f"{options.covariance}: {options.rows:,} x {options.features}, K = {options.components}, one thread each")
    print(
        "| | seconds per iteration | of these in block statistics "
        "| million rows per second | speedup | log-likelihood |\n"
        "|---|---|---|---|---|---|"
    )
    _, seconds_alone, _, _ = found["one process"]
    for name, (copies, seconds, inside, log_likelihood) in found.items():
        speed = copies * options.rows / seconds / 1e6
        ratio = copies * seconds_alone / seconds
        print(f"| {name} | {seconds:.3f} | {inside:.3f} | {speed:.2f} | {ratio:.2f} | {log_likelihood:.9f} |")


class _Clock(lightning.Callback):
    """Record the seconds of each epoch and the seconds of this rank in ``module.learn``, the statistics of blocks."""

    def __init__(self):
        self.epochs, self.inside = [], []

    def on_fit_start(self, trainer, module):
        learn = module.learn

        def timed(*arguments):
            begin = time.perf_counter()
            loss = learn(*arguments)
            self.inside[-1] += time.perf_counter() - begin
            return loss

        module.learn = timed

    def on_train_epoch_start(self, trainer, module):
        self.begin = time.perf_counter()
        self.inside.append(0.0)

    def on_train_epoch_end(self, trainer, module):
        self.epochs.append(time.perf_counter() - self.begin)


def worker(options):
    torch.set_num_threads(1)
    blocks = TableBlocks(Table(options.path))
    start = start_of(blocks, options.components, options.covariance)
    clock = _Clock()
    ddp = {"strategy": "ddp", "devices": options.processes} if options.processes > 1 else {}
    trainer = quiet_trainer(max_epochs=options.iterations, callbacks=[clock], **ddp)
    module = module_of(options.components, options.features, options.covariance, start)
    trainer.fit(module, TabularDataModule(options.path, block_rows=options.block_rows))
    if trainer.is_global_zero:
        middle = len(clock.epochs) // 2
        seconds = sorted(clock.epochs)[middle], sorted(clock.inside)[middle]
        print("seconds", *seconds, float(module.log_likelihood), flush=True)


def main():
    jobs = {"sklearn": compare_with_sklearn, "memory": memory, "scaling": scaling}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=[*jobs, "worker"])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--block_rows", type=int, default=2**16)
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--sklearn_iterations", type=int, help="by default --iterations; fewer are extrapolated")
    parser.add_argument("--repeats", type=int, default=3, help="fits of em_lightning, for sklearn")
    parser.add_argument("--covariance", default="full")
    parser.add_argument("--threads", type=int, default=2, help="for sklearn and memory")
    parser.add_argument("--storage", choices=["memory", "npy"], default="memory", help="of the rows, for memory")
    parser.add_argument("--processes", type=int, default=2, help="for scaling")
    parser.add_argument("--path", help="file of the rows of a worker, which scaling starts")
    options = parser.parse_args()
    options.sklearn_iterations = options.sklearn_iterations or options.iterations
    {**jobs, "worker": worker}[options.job](options)


if __name__ == "__main__":
    main()
