"""Leak test: memory, hooks and step time over many steps with each callback, and over many fits of one model.

    python benchmarks/soak.py [--steps 50000] [--fits 200] [CALLBACK ...]

Each case runs in a separate process with a small model. Memory is the resident set; its growth is the memory at the end
relative to that after 10 % of the steps or fits, when all warm-up allocations are over. Time is processor time, which
depends less on the load of the machine; its ratio is the time per step or fit in the last tenth over that in the second
tenth. Hooks are counted over all modules, together with methods that surgery has wrapped on an instance. Reports write
their tables and figures once per fit.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from em_lightning import callbacks, studies
from em_lightning.data import Digits
from em_lightning.modules import EMModule, GaussianMixtureModule, PointCloudGMM
from em_lightning.studies import AmortizedClustering, GaussianBlobs, MixtureSets, ProceduralSurfaces


class Small(EMModule):
    """A classifier with one hidden layer, and a temperature to schedule."""

    def __init__(self) -> None:
        super().__init__(lr=1e-3)
        self.hidden = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.out(self.hidden(x))

    def step(self, batch, stage):
        """Return the loss."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


STEPS = 50_000  # by default; the temperature is annealed over this number of steps, whatever --steps is
FIT_STEPS = 3  # of each fit in ``fit_and_undo``; chosen: few, because it looks for leaks of whole fits


def annealed() -> list[lightning.Callback]:
    return [callbacks.SwapActivations("gated"), callbacks.TemperatureSchedule(4.0, 1.0, steps=STEPS)]


@functools.cache
def checkpoint_with_surgery(folder: str) -> str:
    """Return the path of a checkpoint of a model with swapped activations."""
    model, data = subject("SwapActivations")
    trainer = make_trainer(1, [callbacks.SwapActivations("signed")], folder)
    trainer.fit(model, **data)
    trainer.save_checkpoint(f"{folder}/surgery.ckpt")
    return f"{folder}/surgery.ckpt"


SCRATCH = tempfile.TemporaryDirectory()
CASES = {
    "no callback": lambda: [],
    "SwapActivations": lambda: [callbacks.SwapActivations("signed")],
    "InsertEMOperator": lambda: [callbacks.InsertEMOperator("hidden", num_components=2)],
    "LayerwiseEMLoss": lambda: [callbacks.LayerwiseEMLoss("hidden")],
    "TemperatureSchedule": annealed,
    "PosteriorMonitor": lambda: [callbacks.PosteriorMonitor("hidden", every_n_steps=10)],
    "EMAudit": lambda: [callbacks.EMAudit(printed=False)],
    "StepSeeds": lambda: [callbacks.StepSeeds()],
    "RestoreSurgery": lambda: [callbacks.RestoreSurgery(checkpoint_with_surgery(SCRATCH.name))],
    "LayerReport": lambda: [studies.LayerReport(figures=False)],
    "MixtureReport": lambda: [studies.MixtureReport(sizes=(16, 32), num_pictured=2)],
    "SelectionReport": lambda: [studies.SelectionReport(components=[1, 3], max_iters=4)],
    "ClusteringReport": lambda: [studies.ClusteringReport()],
}


def subject(name: str) -> tuple[lightning.LightningModule, dict[str, Any]]:
    """Return a model and the data arguments of ``fit``."""
    torch.manual_seed(0)
    if name == "LayerReport":
        return studies.EMClassifier(64, 8), {"datamodule": Digits(batch_size=32)}
    if name == "MixtureReport":
        sizes = {"num_points": 32, "batch_size": 2, "train_clouds": 64, "val_clouds": 2, "test_clouds": 4}
        return PointCloudGMM(2, num_iters=2), {"datamodule": ProceduralSurfaces(**sizes)}
    if name == "SelectionReport":
        blobs = GaussianBlobs(1600, 2, true_components=3, held_out_points=100, block_rows=32)
        return GaussianMixtureModule(2, 2, tol=0.0), {"datamodule": blobs}
    if name == "ClusteringReport":
        sizes = {"batch_size": 2, "train_batches": 32, "val_sets": 2, "test_sets": 4, "held_out": 20}
        sets = MixtureSets(2, min_points=20, max_points=30, train_held_out=20, **sizes)
        return AmortizedClustering(2, num_iters=2, num_starts=1), {"datamodule": sets}
    data = TensorDataset(torch.randn(3200, 8), torch.randint(0, 3, (3200,)))
    return Small(), {"train_dataloaders": DataLoader(data, batch_size=32)}


def resident() -> float:
    """Return the resident set in MiB."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def hooks(model: nn.Module) -> int:
    """Return the number of hooks on the modules of a model plus the number of methods wrapped on instances."""
    found = 0
    for module in model.modules():
        found += sum(
            len(value) for name, value in vars(module).items() if name.endswith("_hooks") and value is not None
        )
        found += sum(callable(value) and hasattr(type(module), name) for name, value in vars(module).items())
    return found


class Watch(lightning.Callback):
    """Record memory, hooks and processor time after the first step and after each tenth of the steps."""

    def __init__(self, steps: int) -> None:
        self.every = max(steps // 10, 1)
        # The first entry is made after one step, the second one after a tenth of the steps.
        self.notes: list[tuple[float, int, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Record."""
        if trainer.global_step == 1 or trainer.global_step % self.every == 0:
            self.notes.append((resident(), hooks(pl_module), time.process_time()))


def make_trainer(steps: int, extra: list[lightning.Callback], folder: str) -> lightning.Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return lightning.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=extra, default_root_dir=folder, **quiet
    )


def soak(name: str, steps: int) -> str:
    """Train one model for a number of steps with a callback and return a row of the table."""
    watch = Watch(steps)
    model, data = subject(name)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        make_trainer(steps, [*CASES[name](), watch], folder).fit(model, **data)
    # Entry 1 is that after a tenth of the steps, as for the memory.
    memory, num_hooks, clock = zip(*watch.notes, strict=True)
    tenths = [b - a for a, b in zip(clock, clock[1:], strict=False)]
    growth = memory[-1] / memory[1] - 1
    return (
        f"| {name} | {steps} | {memory[1]:.0f} | {100 * growth:+.2f} | {num_hooks[1]} | {num_hooks[-1]} | "
        f"{1e3 * tenths[1] / watch.every:.2f} | {tenths[-1] / tenths[1]:.2f} |"
    )


def fit_and_undo(name: str, fits: int) -> str:
    """Fit one model repeatedly, undoing the surgery of the callback each time, and return a row of the table."""
    (model, data), notes = subject(name), []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        for _ in range(fits):
            start, extra = time.process_time(), CASES[name]()
            make_trainer(FIT_STEPS, extra, folder).fit(model, **data)
            for callback in extra:
                if getattr(callback, "surgery", None) is not None:
                    callback.surgery.undo()
            notes.append((resident(), hooks(model), time.process_time() - start))
    # Hooks are compared with those after the first undo, memory with that after a tenth of the fits (warm-up).
    memory, num_hooks, seconds = zip(*notes, strict=True)
    tenth = max(fits // 10, 1)
    growth = memory[-1] / memory[tenth] - 1
    ratio = sum(seconds[-tenth:]) / sum(seconds[tenth : 2 * tenth])
    return (
        f"| {name}, fit and undo | {fits} | {memory[tenth]:.0f} | {100 * growth:+.2f} | "
        f"{num_hooks[0]} | {num_hooks[-1]} | "
        f"{1e3 * sum(seconds[tenth : 2 * tenth]) / tenth:.0f} | {ratio:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("callbacks", nargs="*", metavar="CALLBACK", help=", ".join(CASES))
    parser.add_argument("--steps", type=int, default=STEPS, help="0 skips training with many steps")
    parser.add_argument("--fits", type=int, default=200, help="0 skips repeated fits")
    parser.add_argument("--here", choices=["soak", "undo"], help="run one case in this process (internal)")
    args = parser.parse_args()
    if args.here:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        (name,) = args.callbacks
        print(soak(name, args.steps) if args.here == "soak" else fit_and_undo(name, args.fits), flush=True)
        return
    print("| | steps or fits | MiB at a tenth | growth % | hooks | hooks at the end | ms each | last / second tenth |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in args.callbacks or CASES:
        for kind, number in (("soak", args.steps), ("undo", args.fits)):
            if number:
                numbers = [f"--steps={args.steps}", f"--fits={args.fits}"]
                subprocess.run([sys.executable, __file__, name, *numbers, "--here", kind], check=True)


if __name__ == "__main__":
    main()
