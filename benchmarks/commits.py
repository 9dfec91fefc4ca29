"""One large set under this version and another one, in turns: seconds per iteration, memory, likelihood.

    git worktree add ../old COMMIT
    python benchmarks/commits.py ../old                      1,000,000 x 16, K = 64, full and diagonal, one thread
    python benchmarks/commits.py ../old --items 100000 --threads 2

Each version runs in a process of its own and fits from the same start. Seconds per iteration are those of a run with
more iterations minus a run with fewer, divided by the difference, so that they contain no preparation.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FEATURES, COMPONENTS = 16, 64
FEW, MANY = 1, 4  # iterations of the two runs whose difference is timed


def work():
    """Serve requests of :func:`main` from standard input, in a process that imports one version."""
    import torch

    from em_lightning import EMOperator, Mixture

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    x = None
    for line in sys.stdin:
        request = json.loads(line)
        torch.set_num_threads(request["threads"])
        if x is None:
            centers = 3.0 * torch.randn(COMPONENTS, FEATURES)
            x = torch.randn(1, request["items"], FEATURES)
            x += centers[torch.randint(0, COMPONENTS, (1, request["items"]))]
        kind = request["covariance"]
        eye = torch.eye(FEATURES) if kind == "full" else torch.ones(FEATURES)
        weights = torch.full((1, COMPONENTS), 1 / COMPONENTS).log()
        start = Mixture(weights, x[:, :COMPONENTS].clone(), 4.0 * eye.expand(1, COMPONENTS, *eye.shape))
        operator = EMOperator(COMPONENTS, FEATURES, covariance=kind, residual=False)
        clocks = []
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak of resident memory
        before = mib("VmRSS")  # resident memory now; VmHWM is its peak
        for iterations in (FEW, MANY):
            begin = time.perf_counter(), time.process_time()
            mixture = operator(x, init=start, num_iters=iterations)
            clocks.append([time.perf_counter() - begin[0], time.process_time() - begin[1]])
        used = mib("VmHWM") - before
        wall, processor = ((many - few) / (MANY - FEW) for few, many in zip(*clocks, strict=True))
        score = mixture.log_prob(x[:, :20_000]).mean().item()
        print(json.dumps({"wall": wall, "processor": processor, "mib": used, "score": score}), flush=True)


def mib(name):
    """Return a figure of this process's memory (Linux)."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def main():
    """Print one row per covariance type and version."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="a checkout of the other version")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--covariance", nargs="+", default=["full", "diag"])
    options = parser.parse_args()
    workers = {}
    for name, folder in (("other", options.other), ("this", ROOT)):
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve()), "OMP_NUM_THREADS": str(options.threads)}
        command = [sys.executable, "-W", "ignore", __file__, "--work"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        workers[name] = subprocess.Popen(command, env=environment, cwd=folder, **pipes)
    print(f"{options.items:,} x {FEATURES}, K = {COMPONENTS}, float32, {options.threads} threads, ", end="")
    print(f"load {os.getloadavg()[0]:.1f}, medians of {options.rounds} rounds\n")
    print("| | version | seconds per iteration | processor seconds | speedup | in processor seconds | MiB | ", end="")
    print("log-likelihood |\n|---|---|---|---|---|---|---|---|", flush=True)
    for kind in options.covariance:
        request = json.dumps({"covariance": kind, "items": options.items, "threads": options.threads})
        found = {name: [] for name in workers}
        for count in range(options.rounds + 1):
            for name, worker in workers.items():
                print(request, file=worker.stdin, flush=True)
                result = json.loads(worker.stdout.readline())
                if count:  # the first round allocates memory
                    found[name].append(result)
        medians = {
            name: {key: statistics.median(result[key] for result in results) for key in results[0]}
            for name, results in found.items()
        }
        for name, row in medians.items():
            ratios = [medians["other"][clock] / row[clock] for clock in ("wall", "processor")]
            print(f"| {kind} | {name} | {row['wall']:.3f} | {row['processor']:.3f} | {ratios[0]:.2f} | ", end="")
            print(f"{ratios[1]:.2f} | {row['mib']:.0f} | {row['score']:.5f} |", flush=True)
    for worker in workers.values():
        worker.stdin.close()


if __name__ == "__main__":
    work() if "--work" in sys.argv else main()
