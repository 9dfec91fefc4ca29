"""Everything that is to be measured on a GPU, in one command of a few minutes: errors, launches, times.

    python benchmarks/gpu.py                             on the GPU, writes gpu.json and prints the tables
    python benchmarks/gpu.py --table docs/results/gpu.md and writes the tables to a page
    python benchmarks/gpu.py --device cpu --scale 0.001  a dry run at toy size

Errors are differences between float32 and float64 on the CPU, relative to the largest value, in six settings: plain
float32, Triton kernels, TF32 products allowed (``torch.set_float32_matmul_precision("high")``), bf16 and fp16 autocast,
and deterministic algorithms. Times are medians of repeats over rotating inputs, measured with CUDA events. Launches and
synchronizations are counted by torch.profiler. A step that fails is reported, and the next one runs.
"""

import argparse
import contextlib
import itertools
import json
import platform
import statistics
import time
import traceback
from pathlib import Path

import torch
from torch import nn

import em_lightning
from em_lightning import ACTIVATIONS, COMPETITIONS, KERNELS, EMLoss, EMOperator
from em_lightning.mixture import farthest_points
from em_lightning.mixture.backends import use_backend
from em_lightning.operators import DirectionalEM, EMPooling, GeneralizedEM

SETTINGS = ("float32", "Triton kernels", "TF32", "bf16-mixed", "16-mixed", "deterministic")


@contextlib.contextmanager
def setting(name, device):
    """Run a block under one of the settings; Triton kernels are used on CUDA devices only."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "TF32" else "highest")
    torch.use_deterministic_algorithms(name == "deterministic")
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(name)
    backend = "triton" if name == "Triton kernels" and device == "cuda" else "auto"
    try:
        with torch.autocast(device, half) if half else contextlib.nullcontext(), use_backend(backend):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.use_deterministic_algorithms(False)


def call_under(name, function, device, *arguments):
    """Return ``function(device, *arguments)`` under one of the settings."""
    with setting(name, device):
        return function(device, *arguments)


def components(scale):
    """Return, by name, a module and its input."""
    items = max(int(1024 * scale), 40)
    x, energies = torch.randn(16, items, 3), torch.randn(512, 64)
    found = {
        f"EMOperator {covariance}": (EMOperator(8, 3, covariance=covariance), x)
        for covariance in ("full", "diag", "spherical", "tied")
    }
    for kernel in ("student_t", "huber"):
        found[f"EMOperator {kernel}"] = (EMOperator(8, 3, kernel=kernel), x)
    found["EMOperator background"] = (EMOperator(8, 3, background={"estimate": True}), x)
    found["EMOperator prior"] = (EMOperator(8, 3, prior={}), x)
    found["DirectionalEM"] = (DirectionalEM(4, 3, num_iters=3), nn.functional.normalize(x, dim=-1))
    found["GeneralizedEM"] = (GeneralizedEM(4, 3, kernel="pseudo_huber", num_iters=3), x)
    found["EMPooling"] = (EMPooling(4, 3), x)
    found["EMLoss"] = (EMLoss(), energies)
    for registry, kind in ((COMPETITIONS, "competition"), (ACTIVATIONS, "activation")):
        found |= {f"{kind} {key}": (registry.build(key), energies) for key in registry}
    found |= {
        f"kernel {key}": (_Energies(key), torch.randn(256, 8))
        for key in KERNELS
        if key not in ("learned", "mahalanobis")  # these need arguments
    }
    return found


class _Energies(nn.Module):
    """Energies of the first half of the items under centers at the second half."""

    def __init__(self, key):
        super().__init__()
        self.kernel = KERNELS.build(key)

    def forward(self, x):
        return self.kernel(*x.chunk(2))


def outputs_and_gradient(module, x):
    """Return the outputs, and the gradient of their squared sum in x, as float64 on the CPU."""
    x = x.clone().requires_grad_()
    leaves = torch.utils._pytree.tree_leaves(module(x))
    outputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    sum(leaf.double().square().sum() for leaf in outputs if leaf.requires_grad).backward()
    return [leaf.detach().double().cpu() for leaf in (*outputs, x.grad)]


def errors(device, scale):
    """Return the largest relative error of each component under each setting."""
    table = {}
    for name, (module, x) in components(scale).items():
        module = module.eval()
        exact = outputs_and_gradient(module.double(), x.double())
        module, row = module.float().to(device), {}
        for label in SETTINGS:
            try:
                with setting(label, device):
                    found = outputs_and_gradient(module, x.to(device))
                row[label] = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))
            except Exception as error:
                row[label] = f"{type(error).__name__}: {error}"[:200]
        table[name] = row
    return table


class Clock:
    """Seconds of calls on a device."""

    def __init__(self, device, repeats):
        self.device, self.repeats = device, repeats

    def wait(self):
        """Wait until the device is idle."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call, inputs):
        """Return the median seconds of a call over rotating inputs, after one warm-up each."""
        for given in inputs:
            call(given)
        times = []
        for repeat in range(self.repeats):
            given = inputs[repeat % len(inputs)]
            self.wait()
            if self.device == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call(given)
                end.record()
                self.wait()
                times.append(begin.elapsed_time(end) / 1e3)
            else:
                begin = time.perf_counter()
                call(given)
                times.append(time.perf_counter() - begin)
        return statistics.median(times)


def machine(device, scale):
    """Return names, versions, copy bandwidth in GB/s and the float32 matrix rate in TFLOP/s."""
    found = {
        "card": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "em_lightning": em_lightning.__version__,
    }
    clock = Clock(device, repeats=5)
    numbers = max(int(2**28 * scale), 1000)
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    found["copy GB/s"] = 8e-9 * numbers / clock.seconds(target.copy_, [source])  # 4 bytes read and written
    side = max(int(8192 * scale**0.5), 64)
    matrix = torch.randn(side, side, device=device)
    found["float32 TFLOP/s"] = 2e-12 * side**3 / clock.seconds(lambda m: m @ m, [matrix])  # side^3 products and sums
    return found


def launches_and_waits(call, given, device):
    """Return the numbers of kernel launches and synchronizations of a call."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=activities) as record:
        call(given)
    names = [event.name for event in record.events()]
    waits = sum("Synchronize" in name for name in names)
    return sum("LaunchKernel" in name for name in names), waits


def workloads(scale):
    """Return, by name, a function from the number of iterations to an operator, and the shape of the points."""
    sets, rows = max(int(256 * scale), 2), max(int(1_000_000 * scale), 2000)
    plain = {"residual": False}
    return {
        "256 x 1,024 x 3, K = 16, full": (lambda t: EMOperator(16, 3, num_iters=t, **plain), (sets, 1024, 3)),
        "1M x 16, K = 64, diag": (
            lambda t: EMOperator(64, 16, covariance="diag", num_iters=t, **plain),
            (1, rows, 16),
        ),
        "1M x 16, K = 64, full": (lambda t: EMOperator(64, 16, num_iters=t, **plain), (1, rows, 16)),
        "1M x 128, K = 1,024, spherical": (
            lambda t: EMOperator(1024, 128, covariance="spherical", num_iters=t, init="random", seed=0, **plain),
            (1, max(rows, 4000), 128),  # more points than components in a dry run
        ),
    }


def times(device, scale, repeats):
    """Return milliseconds per iteration, forward and with backward, launches and memory of each workload."""
    table, clock = {}, Clock(device, repeats)
    for name, (make, shape) in workloads(scale).items():
        try:
            inputs = [torch.randn(shape, device=device) for _ in range(2)]
            start = make(0).to(device)(inputs[0])
            one, three = (make(t).to(device) for t in (1, 3))

            def forward(operator):
                return lambda x: operator(x, init=start)  # noqa: B023

            def backward(operator):
                def call(x):
                    x = x.detach().requires_grad_()
                    operator(x, init=start).means.sum().backward()  # noqa: B023

                return call

            row = {}
            with torch.no_grad():
                seconds = [clock.seconds(forward(operator), inputs) for operator in (one, three)]
                row["iteration ms"] = 1e3 * (seconds[1] - seconds[0]) / 2  # three iterations minus one
                launches = [launches_and_waits(forward(operator), inputs[0], device) for operator in (one, three)]
                row["launches"], row["synchronizations"] = (
                    (of_three - of_one) / 2 for of_one, of_three in zip(*launches, strict=True)
                )
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    forward(one)(inputs[0])
                    row["MiB beyond the data"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            seconds = [clock.seconds(backward(operator), inputs) for operator in (one, three)]
            row["iteration with backward ms"] = 1e3 * (seconds[1] - seconds[0]) / 2
            if one.init == "farthest":
                count = one.num_components
                row["start ms"] = 1e3 * clock.seconds(lambda x: farthest_points(x, count), inputs)  # noqa: B023
        except Exception:
            row = {"failed": traceback.format_exc(limit=-3)}  # the last three frames
        table[name] = row
        if device == "cuda":
            torch.cuda.empty_cache()
    return table


def starts(device, scale, repeats):
    """Return milliseconds, launches and largest relative errors of starts of a large set, for K = 64.

    Errors are against float64 on the same device, where k-means++ draws the same numbers.
    """
    table, clock = {}, Clock(device, repeats)
    x = torch.randn(1, max(int(1_000_000 * scale), 2000), 16, device=device)
    for init, covariance in itertools.product(("farthest", "kmeans++"), ("diag", "full")):
        options = {"init": init, "seed": 0 if init == "kmeans++" else None, "covariance": covariance}
        operator = EMOperator(64, 16, num_iters=0, residual=False, **options).to(device)
        row = {}
        for label in ("float32", "Triton kernels"):
            try:
                with torch.no_grad(), setting(label, device):
                    row[f"{label}: ms"] = 1e3 * clock.seconds(operator, [x])
                    row[f"{label}: launches"], _ = launches_and_waits(operator, x, device)
                    pairs = zip(operator(x).parameters(), operator(x.double()).parameters(), strict=True)
                    row[f"{label}: error"] = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)
            except Exception as error:
                row["failed"] = f"{label}: {type(error).__name__}: {error}"[:200]
        table[f"1M x 16, K = 64, {init}, {covariance}"] = row
    return table


def graph(device, scale):
    """Return milliseconds per iteration of a forward pass captured in a CUDA graph."""
    if device != "cuda":
        return {"CUDA graph": "not on this device"}
    found, clock = {}, Clock(device, repeats=20)
    # Without the last workload, whose matrix products take so long that a graph, which saves launches, gains nothing.
    for name, (make, shape) in list(workloads(scale).items())[:3]:
        try:
            x = torch.randn(shape, device=device)
            start, seconds = make(0).to(device)(x), []
            for num_iters in (1, 6):
                operator = make(num_iters).to(device)
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.no_grad(), torch.cuda.stream(side):
                    operator(x, init=start)
                torch.cuda.current_stream().wait_stream(side)
                captured = torch.cuda.CUDAGraph()
                with torch.no_grad(), torch.cuda.graph(captured):
                    operator(x, init=start)
                seconds.append(clock.seconds(lambda _: captured.replay(), [x]))  # noqa: B023
            found[name] = 1e3 * (seconds[1] - seconds[0]) / 5  # six iterations minus one
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:300]
    return found


def table_of(rows):
    """Return a Markdown table of rows of named values."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))

    def cell(value):
        return f"{value:.3g}" if isinstance(value, float) else str(value).replace("\n", " ").replace("|", "/")

    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(cell(row.get(c, '-')) for c in columns)} |" for name, row in rows.items()]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--table", type=Path, help="page that is written")
    arguments = parser.parse_args()
    device, scale = arguments.device, arguments.scale
    torch.manual_seed(0)
    tables = {}
    steps = {
        "Machine": lambda: {"this machine": machine(device, scale)},
        "Times": lambda: times(device, scale, arguments.repeats),
        "Times of Triton kernels": lambda: call_under("Triton kernels", times, device, scale, arguments.repeats),
        "Starts": lambda: starts(device, scale, arguments.repeats),
        "Milliseconds per iteration in a CUDA graph": lambda: {
            "forward": graph(device, scale),
            "forward, Triton kernels": call_under("Triton kernels", graph, device, scale),
        },
        "Largest relative errors": lambda: errors(device, scale),
    }
    for title, step in steps.items():
        begin = time.perf_counter()
        try:
            tables[title] = step()
        except Exception:
            tables[title] = {"failed": {"reason": traceback.format_exc(limit=-3)}}
        arguments.json.write_text(json.dumps(tables, indent=1))
        print(f"\n## {title}\n\n{table_of(tables[title])}\n\n({time.perf_counter() - begin:.0f} s)", flush=True)
    if arguments.table:
        pages = [f"## {title}\n\n{table_of(rows)}\n" for title, rows in tables.items()]
        arguments.table.write_text("# On a GPU\n\n`python benchmarks/gpu.py`\n\n" + "\n".join(pages))


if __name__ == "__main__":
    main()
