"""Report, the base class of the callbacks that write a table and figures at the end of a fit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from em_lightning.callbacks import tensorboard_writers
from em_lightning.studies.results import write_results
from em_lightning.studies.style import NEUTRAL, figure_style, new_figure

_MOST_MARKERS = 20  # on a line; more would hide it


class Findings(NamedTuple):
    """The content of a report."""

    title: str
    notes: Sequence[str]  # paragraphs above the table
    rows: Sequence[Mapping[str, Any]]  # the table
    verdict: str  # the result in one sentence, which is printed last
    figures: Mapping[str, Figure] = {}  # by the names of their files
    facts: Mapping[str, Any] = {}  # further entries of results.json, such as the seed


class Report(lightning.Callback):
    """Calls :meth:`report` on the first rank at the end of a fit, in evaluation mode and without gradients.

    The findings are written to the folder of the logger as ``results.md``, ``results.json`` and figures, which
    TensorBoard and Weights & Biases also get. The table, the names of the files and, last, the verdict are printed.
    Afterwards every submodule is in its previous mode, and the random state of PyTorch is unchanged. An interrupted
    fit and a ``fast_dev_run`` write no report.

    A subclass may append the values of an epoch to ``history``, which checkpoints store; ``training.png`` shows them.
    """

    figures: bool = True  # whether to draw training.png

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the history, so that a resumed run reports all of it."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    def report(self, trainer: Any, module: Any, folder: Path) -> Findings | None:
        """Measure, and return the findings if there are any; ``folder`` is that of the logger, for further files."""
        raise NotImplementedError

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.fast_dev_run or not trainer.is_global_zero or trainer.interrupted:
            return
        folder, began = folder_of(trainer), time.time() - 1.0  # some file systems round times to seconds
        modes = {module: module.training for module in pl_module.modules()}
        device = pl_module.device
        pl_module.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng([device] if device.type in ("cuda", "mps") else []):
                findings = self.report(trainer, pl_module, folder)
        finally:
            for module, mode in modes.items():
                module.training = mode
        if findings is None:
            return
        write_results(folder, findings.title, findings.notes, findings.rows, **findings.facts)
        writers = tensorboard_writers(trainer)
        drawn = dict(findings.figures)
        if self.history and self.figures:
            drawn["training"] = _training_figure(self.history)
        for name, figure in drawn.items():
            path = folder / f"{name}.png"
            with figure_style():
                figure.savefig(path)
            for writer in writers:
                writer.add_figure(name, figure, trainer.global_step, close=False)
                writer.flush()
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image(name, [str(path)])
        files = [path.name for path in sorted(folder.glob("*.*")) if path.stat().st_mtime > began]
        print(f"Files in {folder}: {', '.join(name for name in files if not name.startswith('events'))}")
        if writers:
            print(f"TensorBoard: tensorboard --logdir {folder.parent}")
        print(findings.verdict)


@figure_style()
def _training_figure(history: Sequence[Mapping[str, float]]) -> Figure:
    """Draw each recorded value over the epochs, in its own panel."""
    names = list(dict.fromkeys(name for epoch in history for name in epoch if name != "epoch"))
    figure, axes = new_figure(len(names), 3, width=2.6, height=2.0, sharex=True)
    for ax, name in zip(axes, names, strict=True):
        recorded = [(epoch["epoch"], epoch[name]) for epoch in history if name in epoch]
        ax.plot(*zip(*recorded, strict=True), marker="o" if len(recorded) <= _MOST_MARKERS else None, markersize=3)
        ax.set(title=name, xlabel="epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def folder_of(trainer: Any) -> Path:
    """Return the folder of a run: that of its logger, in which Lightning puts the checkpoints too."""
    logger = trainer.logger
    if logger is None or getattr(logger, "log_dir", None):
        return Path(trainer.default_root_dir if logger is None else logger.log_dir)
    return Path(logger.save_dir or trainer.default_root_dir, str(logger.name), str(logger.version))


@figure_style()
def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str = "",
    levels: Mapping[str, float] | None = None,
    log_x: bool = False,
) -> Figure:
    """Draw the named lines (x, y) of ``series`` in one panel, and the dashed horizontal lines ``levels``."""
    figure, (ax,) = new_figure(width=4.6, height=3.0)
    if all(value == int(value) for x, _ in series.values() for value in x):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for name, (x, y) in series.items():
        ax.plot(x, y, label=name, marker="o" if len(x) <= _MOST_MARKERS else None, markersize=3)
    for name, level in (levels or {}).items():
        ax.axhline(level, color=NEUTRAL, linestyle="--", linewidth=1.2, label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if log_x:
        ax.set_xscale("log")
        ax.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter())
    ax.legend(loc="best")
    return figure
