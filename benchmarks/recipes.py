"""Epoch time of a recipe and of an equivalent hand-written loop, on one thread.

    python benchmarks/recipes.py --root PATH/TO/mnist

The recipe runs as with ``em-lightning run``, with logger, checkpoints and report. A callback runs an epoch of the loop
before each epoch of the recipe. The loop uses float pixels and Adam, once fused and once with PyTorch's default. With
``--validate`` both also evaluate the test set after each epoch. Times are medians over ``--rounds`` epochs, after one
that is not counted.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time

import lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from em_lightning.cli.recipes import find_recipe, load_recipe
from em_lightning.studies import LayerReport

ADAM = {"fused Adam": True, "default Adam": None}  # the argument ``fused`` of the optimizer of the loop


class Loop:
    """The published training of ``decoder_free_sae`` or ``volume_control`` in plain PyTorch."""

    def __init__(self, recipe, data, validate, fused):
        self.x, self.y = data.whole("train")
        self.test = data.whole("test") if validate else None
        self.x = self.x.flatten(1)
        is_classifier = recipe == "volume_control"
        units = 25 if is_classifier else 64
        self.encoder = nn.Linear(784, units)
        self.head = nn.Sequential(nn.Linear(units, 10), nn.LayerNorm(10)) if is_classifier else None
        parameters = [*self.encoder.parameters(), *(self.head.parameters() if self.head else ())]
        self.optimizer = torch.optim.Adam(parameters, fused=fused)

    def epoch(self):
        """Train on every item once, and evaluate the test set if requested."""
        for index in torch.randperm(len(self.x)).split(128):
            a = self.encoder(self.x.index_select(0, index)).relu()
            variance, mean = torch.var_mean(a, 0)
            z = (a - mean) / (variance.sqrt() + 1e-8)
            correlation = z.T @ z / (len(a) - 1)
            volume = correlation.square().sum() - correlation.diagonal().square().sum() - (variance + 1e-6).log().sum()
            if self.head is None:
                loss = volume - torch.logsumexp(-a, 1).sum()
            else:
                logits = self.head(a + torch.logsumexp(-a, 1, keepdim=True))
                loss = cross_entropy(logits, self.y.index_select(0, index)) + 1e-3 * volume
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        if self.test is not None:
            self.measure()

    @torch.no_grad()
    def measure(self):
        """Return the test metrics that the modules of the recipes log."""
        a = self.encoder(self.test.x.flatten(1)).relu()
        covariance = torch.cov(a.T.double())
        std = covariance.diagonal().sqrt()
        correlation = covariance / (std[:, None] * std + 1e-8)
        spectrum = torch.linalg.eigvalsh(covariance).clamp_min(1e-12)
        p = spectrum / spectrum.sum()
        r = torch.softmax(-a, 1)
        accuracy = None
        if self.head is not None:
            logits = self.head(a + torch.logsumexp(-a, 1, keepdim=True))
            accuracy = (logits.argmax(1) == self.test.y).float().mean()
        return (
            (covariance.diagonal() < 0.01).sum(),
            covariance.diagonal().min(),
            correlation.square().sum(),
            torch.special.entr(p).sum().exp(),
            torch.special.entr(r).sum(1).mean(),
            r.amax(1).mean(),
            (a > 0.01).sum(1).float().mean(),
            accuracy,
        )


class EpochTimer(lightning.Callback):
    """Time an epoch of each loop before every epoch of the recipe."""

    def __init__(self, loops):
        self.loops = loops
        self.seconds = {name: [] for name in [*loops, "recipe"]}

    def on_train_epoch_start(self, trainer, pl_module):
        """Run an epoch of each loop."""
        with torch.enable_grad():
            for name, loop in self.loops.items():
                start = time.perf_counter()
                loop.epoch()
                self.seconds[name].append(time.perf_counter() - start)
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer, pl_module):
        """Stop the clock."""
        self.seconds["recipe"].append(time.perf_counter() - self.start)


def measure(recipe, root, rounds, validate):
    validation = ["--trainer.check_val_every_n_epoch=1"] if validate else ["--trainer.limit_val_batches=0"]
    args = ["--data=MNIST", f"--data.root={root}", f"--trainer.max_epochs={rounds + 1}", *validation]
    args += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cli = load_recipe(find_recipe(recipe)).prepare(args)
        loops = {name: Loop(recipe, cli.datamodule, validate, fused) for name, fused in ADAM.items()}
        timed = EpochTimer(loops)
        for report in [callback for callback in cli.trainer.callbacks if isinstance(callback, LayerReport)]:
            report.probe = report.figures = False  # made after training, which alone is timed
        cli.trainer.callbacks.insert(0, timed)
        cli.trainer.fit(cli.model, cli.datamodule)
    # The first epoch, in which libraries allocate their memory, is not counted.
    return {name: statistics.median(seconds[1:]) for name, seconds in timed.seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True, help="folder of MNIST")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--validate", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root, here = os.path.abspath(options.root), os.getcwd()
    print("| recipe | seconds per epoch | by hand, fused Adam | by hand, default Adam | ratio | ratio, default Adam |")
    print("|---|---|---|---|---|---|")
    for recipe in ("decoder_free_sae", "volume_control"):
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            seconds = measure(recipe, root, options.rounds, options.validate)
            os.chdir(here)
        fused, default, own = (seconds[name] for name in ("fused Adam", "default Adam", "recipe"))
        print(f"| {recipe} | {own:.3f} | {fused:.3f} | {default:.3f} | {own / fused:.2f} | {own / default:.2f} |")


if __name__ == "__main__":
    main()
