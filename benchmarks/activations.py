"""Cost of each activation, forward + backward on (4096, 1024) float32, as ratios to torch.softmax and torch.tanh.

Every round times all rows one after the other, so that changes of the machine's load affect all of them. The ratio of a
row is the median over the rounds of its time divided by the reference's time in the same round. Saved memory is what
autograd keeps for the backward pass in addition to the input; it is also measured for the textbook formula.

Run: python -m benchmarks.activations [rounds]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from em_lightning.activations import ACTIVATIONS, SignedActivation

SHAPE = (4096, 1024)
WARM_UP = 2  # rounds that are not counted
Call = Callable[[Tensor], Tensor]

# Row: activation, textbook formula, reference of the time ratio, target: the largest ratio that is intended (chosen).
ROWS: dict[str, tuple[Call, Call, str, float | None]] = {
    "log_softmax": (ACTIVATIONS.build("log_softmax"), lambda z: (z.softmax(-1)).log(), "softmax", 1.6),
    "neg_log_softmin": (
        ACTIVATIONS.build("neg_log_softmin"),
        lambda z: z + torch.logsumexp(-z, -1, keepdim=True),
        "softmax",
        1.6,
    ),
    "softmax_gated": (ACTIVATIONS.build("softmax_gated"), lambda z: z * z.softmax(-1), "softmax", 1.6),
    "residual_softmax": (ACTIVATIONS.build("residual_softmax"), lambda z: z + z.softmax(-1), "softmax", 1.6),
    "relu_gated": (ACTIVATIONS.build("relu_gated"), lambda z: z.relu() * z.softmax(-1), "softmax", None),
    "grouped": (
        ACTIVATIONS.build("grouped"),
        lambda z: (z.unflatten(-1, (-1, 2)) * z.unflatten(-1, (-1, 2)).softmax(-1)).flatten(-2),
        "softmax",
        None,
    ),
    "direction": (
        ACTIVATIONS.build("direction"),
        lambda z: z.norm(dim=-1, keepdim=True) * (z / z.norm(dim=-1, keepdim=True)).softmax(-1),
        "softmax",
        None,
    ),
    "sparsemin": (ACTIVATIONS.build("sparsemin"), ACTIVATIONS.build("sparsemin"), "softmax", None),
    "signed gaussian": (SignedActivation(), torch.tanh, "tanh", 1.3),
    "signed gaussian, m = 2": (SignedActivation(margin=2.0), lambda z: torch.tanh(2 * z), "tanh", None),
    "signed laplace": (SignedActivation("laplace"), lambda z: torch.tanh(z.clamp(-1, 1)), "tanh", None),
    "signed student_t": (SignedActivation("student_t"), lambda z: 2 * z / (2 + z * z), "tanh", None),
    "gated": (ACTIVATIONS.build("gated"), functional.silu, "tanh", None),
}
REFERENCES: dict[str, Call] = {"softmax": lambda z: z.softmax(-1), "tanh": torch.tanh}


def saved_mebibytes(call: Call, z: Tensor) -> float:
    """Return the memory that autograd keeps for the backward pass of a call, without its input."""
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = call(z)
    saved.pop(z.untyped_storage().data_ptr(), None)
    del y
    return sum(saved.values()) / 2**20


def seconds(call: Call, z: Tensor, grad: Tensor) -> float:
    """Return the seconds of a call and its derivative."""
    start = time.perf_counter()
    torch.autograd.grad(call(z), z, grad)
    return time.perf_counter() - start


def main(rounds: int = 30) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    z, grad = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    calls = REFERENCES | {name: row[0] for name, row in ROWS.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + WARM_UP):
        for name, call in calls.items():
            times[name].append(seconds(call, z, grad))
    table = Table(title=f"forward + backward on {SHAPE} float32, one thread, {rounds} rounds")
    for column in ("activation", "ms", "ratio", "reference", "target", "saved MiB", "textbook, saved MiB"):
        table.add_column(column, justify="left" if column in ("activation", "reference") else "right")
    for name, call in calls.items():
        _, textbook, reference, target = ROWS.get(name, (call, call, name, None))
        pairs = list(zip(times[name], times[reference], strict=True))[WARM_UP:]
        table.add_row(
            name,
            f"{1e3 * statistics.median(a for a, _ in pairs):.1f}",
            f"{statistics.median(a / b for a, b in pairs):.2f}",
            f"torch.{reference}",
            "" if target is None else f"{target:.1f}",
            f"{saved_mebibytes(call, z):.1f}",
            f"{saved_mebibytes(textbook, z):.1f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
