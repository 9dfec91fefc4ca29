"""Every public component on a device other than the CPU: equal results and gradients, nothing mixed, few launches.

The device is the pretended one of ``pretend_device.py``. It is registered for a whole process, so this file runs itself
in a process of its own, which prints what it measured as one line of JSON per case.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils import _pytree as pytree

from em_lightning import (
    ACTIVATIONS,
    COMPETITIONS,
    KERNELS,
    LOSSES,
    STATISTICS,
    EMLoss,
    EMOperator,
    Mixture,
    metrics,
    softmin,
)
from em_lightning.mixture import farthest_points, kmeans_plus_plus, random_points
from em_lightning.mixture.backends import use_backend
from em_lightning.operators import (
    DirectionalEM,
    EMAbstraction,
    EMAggregation,
    EMPooling,
    EMRefinement,
    GeneralizedEM,
)

# Each case: from nothing to a module or a function, and its tensors.
CASES = {}


def case(name, make, *tensors):
    assert name not in CASES
    CASES[name] = (make, tensors)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


X = draw(3, 60, 3)
MASK = torch.arange(60) < torch.tensor([[60], [40], [50]])
WEIGHTS = draw(3, 60).abs() + 0.1
UNIT = torch.nn.functional.normalize(X, dim=-1)
ENERGIES = draw(32, 6)
EDGES = torch.randint(0, 8, (40,), generator=torch.Generator().manual_seed(0)).sort().values


def mixture():
    return EMOperator(3, 3, residual=False)(X)


for key in KERNELS:
    if key not in ("learned", "mahalanobis"):
        case(f"kernel {key}", lambda key=key: KERNELS.build(key), draw(20, 3), draw(4, 3))
case("kernel mahalanobis", lambda: KERNELS.build("mahalanobis", num_features=3), draw(20, 3), draw(4, 3))
for key in COMPETITIONS:
    case(f"competition {key}", lambda key=key: COMPETITIONS.build(key), ENERGIES)
for key in STATISTICS:
    case(
        f"statistic {key}",
        lambda key=key: lambda energies, values: STATISTICS.build(key)(softmin(energies), values),
        ENERGIES,
        draw(6),
    )
for key in ACTIVATIONS:
    case(f"activation {key}", lambda key=key: ACTIVATIONS.build(key), ENERGIES)
for key in LOSSES:
    tensor = draw(6, 9) if key in ("weight_redundancy", "logdet") else ENERGIES
    case(f"loss {key}", lambda key=key: LOSSES.build(key), tensor)
case("loss em", EMLoss, ENERGIES)

for covariance in ("full", "diag", "spherical", "tied"):
    make = lambda covariance=covariance: EMOperator(4, 3, covariance=covariance, num_iters=3)  # noqa: E731
    case(f"operator {covariance}", make, X)
    case(f"operator {covariance}, masks and weights", make, X, MASK, WEIGHTS)
OPTIONS = {
    "lowrank": {"covariance": "lowrank", "rank": 1},
    "student_t": {"kernel": "student_t"},
    "huber": {"kernel": "huber"},
    "sparsemin": {"competition": "sparsemin"},
    "background": {"background": {"estimate": True}},
    "prior": {"prior": {}},
    "kmeans++": {"init": "kmeans++", "seed": 0},
    "random": {"init": "random", "seed": 0, "num_starts": 3},
    "learned start": {"init": "learned"},
    "checkpoint": {"gradient": "checkpoint"},
    "last": {"gradient": "last"},
}
for name, options in OPTIONS.items():
    case(f"operator {name}", lambda options=options: EMOperator(4, 3, num_iters=3, **options), X, MASK)
case("directional", lambda: DirectionalEM(3, 3, num_iters=2), UNIT)
case("generalized", lambda: GeneralizedEM(3, 3, kernel="pseudo_huber", num_iters=2), X)
case("pooling", lambda: EMPooling(4, 3), X, MASK)
case("refinement", lambda: EMRefinement(4, 3), X)
case("abstraction", lambda: EMAbstraction(4, 3, None, 8, pitch=0.5), X)
case("aggregation", lambda: EMAggregation(), draw(40, 3), EDGES)
case("log_prob", lambda: lambda x: EMOperator(3, 3).log_prob(x, mixture_on(x)), X)
case("posterior", lambda: lambda x: tuple(EMOperator(3, 3).posterior(x, mixture_on(x))), X)
case("Mixture.log_prob", lambda: lambda x: mixture_on(x).log_prob(x), X)
case("Mixture.posterior", lambda: lambda x: tuple(mixture_on(x).posterior(x)), X)
for start in (farthest_points, kmeans_plus_plus, random_points):
    case(start.__name__, lambda start=start: lambda x, weights: start(x, 4, weights), X, WEIGHTS)
for name in ("DeadUnits", "EffectiveRank", "L0", "MinVariance", "Redundancy"):

    def make(name=name):
        metric = getattr(metrics, name)()
        return lambda values: (metric.to(values.device).update(values), metric.compute())[1]

    case(f"metric {name}", make, ENERGIES)


def mixture_on(x):
    """Return a fixed mixture on the device of x."""
    fixed = mixture()
    return Mixture(*(part.to(x.device) for part in (fixed.log_weights, fixed.means, fixed.covariances)))


# Launches per iteration and of a start, at sizes where blocks of rows would show.
MANY, LARGE = (256, 1024, 3), (1, 300_000, 16)
BUDGETS = {
    "full": (lambda t: EMOperator(16, 3, residual=False, num_iters=t), MANY, 60),
    "diag": (lambda t: EMOperator(16, 3, covariance="diag", residual=False, num_iters=t), MANY, 51),
    "spherical": (lambda t: EMOperator(16, 3, covariance="spherical", residual=False, num_iters=t), MANY, 56),
    "directional": (lambda t: DirectionalEM(16, 3, num_iters=t), MANY, 50),
}
STARTS = {  # launches per center
    "farthest, many": (farthest_points, MANY, 16, 7),
    "farthest, large": (farthest_points, LARGE, 64, 7),
    "kmeans++, many": (kmeans_plus_plus, MANY, 16, 18),
    "kmeans++, large": (kmeans_plus_plus, LARGE, 64, 18),
}
# Launches of a start with random points, that is, mostly for the moments of their cells.
CELLS = {"full": 106, "diag": 99, "spherical": 107, "tied": 90}
# Launches of a whole start on Triton kernels, for K = 64 and any number of points.
TRITON_STARTS = {
    f"{init}, {covariance}": {"covariance": covariance, "init": init}
    for init in ("farthest", "kmeans++")
    for covariance in ("diag", "full")
}
MOST_LAUNCHES = 100


def measure_triton(device_module):
    """Print the launches of starts on Triton kernels, which are counted but not run."""
    try:
        from em_lightning.mixture.backends import triton_start
    except ImportError:
        return

    def count(kernel, *arguments, **options):
        device_module.record.launches += 1
        for tensor in pytree.tree_leaves(arguments):
            if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
                device_module.on_host(tensor).zero_()  # the rows that a kernel would write are indices of points

    for name, options in TRITON_STARTS.items():
        operator, launches, waits = EMOperator(64, 16, residual=False, **options), [], 0
        for count_of_points in (5_000, 300_000):
            with device_module.pretend() as record, use_backend("triton"), torch.no_grad():
                x = torch.randn(1, count_of_points, 16).to(device_module.DEVICE)
                sets = operator._prepare(x, None, None)
                record.reset()
                with mock.patch.object(type(triton_start._write_parameters), "run", count):
                    operator._start(sets, False)
                launches.append(record.launches)
                waits += sum(record.synchronizations.values())
        print(json.dumps({"case": f"triton {name}", "launches": launches, "waits": waits}))


def measure(device_module):
    """Print the largest relative difference and the record of each case, then launches per iteration and center."""
    for name, (make, tensors) in CASES.items():
        results = {}
        for device in ("cpu", "pretend"):
            torch.manual_seed(0)
            module = make()
            if isinstance(module, torch.nn.Module):
                module.eval()
            with device_module.pretend() as record:
                given = [tensor.clone() for tensor in tensors]
                if device == "pretend":
                    given = [tensor.to(device_module.DEVICE) for tensor in given]
                    module = module.to(device_module.DEVICE) if isinstance(module, torch.nn.Module) else module
                given = [tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in given]
                record.reset()
                outputs = [t for t in pytree.tree_leaves(module(*given)) if isinstance(t, torch.Tensor)]
                forward = {"synchronizations": dict(record.synchronizations), "copies": dict(record.copies)}
                if device == "pretend":
                    elsewhere = [tuple(t.shape) for t in outputs if t.device.type != device]
                trained = [t.double().nan_to_num(0, 0, 0).square().sum() for t in outputs if t.requires_grad]
                gradients = []
                if trained:
                    sum(trained).backward()
                    parameters = list(module.parameters()) if isinstance(module, torch.nn.Module) else []
                    gradients = [t.grad for t in (*given, *parameters)]
            found = [None if t is None else device_module.on_host(t).detach().double() for t in (*outputs, *gradients)]
            results[device] = found
        pairs = list(zip(*results.values(), strict=True))
        assert all((a is None) == (b is None) for a, b in pairs), name
        gaps = [float((a - b).abs().max() / (1 + a.abs().max())) for a, b in pairs if a is not None and a.numel()]
        difference = max(gaps, default=math.inf)
        line = {"case": name, "difference": difference, "elsewhere": elsewhere, "mixed": dict(record.mixed), **forward}
        print(json.dumps(line))
    for name, (make, shape, _) in BUDGETS.items():
        x, counts = torch.randn(*shape), []
        for num_iters in (1, 2):
            with device_module.pretend() as record:
                operator, given = make(num_iters).to(device_module.DEVICE), x.to(device_module.DEVICE)
                record.reset()
                operator(given)
                counts.append((record.launches, sum(record.synchronizations.values()), sum(record.copies.values())))
        print(json.dumps({"case": f"budget {name}", "iteration": [b - a for a, b in zip(*counts, strict=True)]}))
    for name, (choose, shape, num_components, _) in STARTS.items():
        with device_module.pretend() as record:
            x = torch.randn(*shape).to(device_module.DEVICE)
            record.reset()
            choose(x, num_components)
            waits = sum(record.synchronizations.values())
            print(json.dumps({"case": f"start {name}", "per center": record.launches / num_components, "waits": waits}))
    for name in CELLS:
        with device_module.pretend() as record:
            operator = EMOperator(64, 16, covariance=name, init="random", num_iters=0, residual=False)
            x = torch.randn(*LARGE).to(device_module.DEVICE)
            sets = operator._prepare(x, None, None)
            record.reset()
            with torch.no_grad():
                operator._start(sets, False)
            waits = sum(record.synchronizations.values())
            print(json.dumps({"case": f"cells {name}", "launches": record.launches, "waits": waits}))
    measure_triton(device_module)


@pytest.fixture(scope="module")
def measured():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("name", CASES)
def test_component_on_a_device(measured, name):
    found = measured[name]
    assert found["difference"] < 1e-5
    assert not found["mixed"] and not found["elsewhere"]
    assert not {place for place in found["copies"] if "outside" not in place and "metrics" not in place}


@pytest.mark.parametrize("name", BUDGETS)
def test_an_iteration_launches_little_and_never_waits(measured, name):
    launches, synchronizations, copies = measured[f"budget {name}"]["iteration"]
    assert launches <= BUDGETS[name][2]
    assert synchronizations == copies == 0


@pytest.mark.parametrize("name", STARTS)
def test_a_start_launches_little_and_never_waits(measured, name):
    found = measured[f"start {name}"]
    assert found["per center"] <= STARTS[name][3]
    assert found["waits"] == 0


@pytest.mark.parametrize("name", CELLS)
def test_the_mixture_of_cells_launches_little_and_never_waits(measured, name):
    assert measured[f"cells {name}"]["launches"] <= CELLS[name]
    assert measured[f"cells {name}"]["waits"] == 0


@pytest.mark.parametrize("name", TRITON_STARTS)
def test_a_start_on_triton_kernels_takes_a_hundred_launches(measured, name):
    pytest.importorskip("triton")
    few, many = measured[f"triton {name}"]["launches"]
    assert few == many <= MOST_LAUNCHES
    assert measured[f"triton {name}"]["waits"] == 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import pretend_device

    measure(pretend_device)
