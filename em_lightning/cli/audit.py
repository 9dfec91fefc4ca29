"""``em-lightning audit``: where EM takes place in a model named on the command line."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any


def load_model(target: str, checkpoint: str | None = None) -> Any:
    """Return the model that ``package.module:NAME`` or ``path/to/file.py:NAME`` names.

    NAME is a module, or a class or function that returns one without arguments. With a checkpoint it is a
    LightningModule class, which loads the checkpoint and the surgery that is recorded in it.

    Raises:
        ValueError: there is no such file, module or name, or it makes no model.
    """
    from torch import nn

    place, colon, name = target.rpartition(":")
    if not colon:
        raise ValueError(f"model={target!r} must be package.module:NAME or path/to/file.py:NAME")
    is_file = place.endswith(".py")
    sys.path.insert(0, str(Path(place).resolve().parent if is_file else Path.cwd()))
    try:
        names = runpy.run_path(place) if is_file else vars(importlib.import_module(place))
    except (ImportError, FileNotFoundError) as error:
        raise ValueError(f"{place!r} cannot be imported: {error}") from error
    if name not in names:
        raise ValueError(f"{place} has no {name!r}")
    made = names[name]
    if checkpoint is not None:
        made = _load(made, checkpoint)
    elif not isinstance(made, nn.Module):
        try:
            made = made()
        except TypeError as error:
            raise ValueError(f"{target!r} must be callable without arguments ({error})") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{target!r} must make a torch.nn.Module, got {type(made).__name__}")
    return made


def _load(cls: Any, checkpoint: str) -> Any:
    from em_lightning.surgery import read_plan, restore_surgery

    if not hasattr(cls, "load_from_checkpoint"):
        raise ValueError(f"--ckpt_path={checkpoint!r} requires a LightningModule class, got {type(cls).__name__}")
    plan = read_plan(checkpoint)
    try:
        if plan:
            return restore_surgery(cls, checkpoint, map_location="cpu")
        return cls.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"--ckpt_path={checkpoint!r} does not fit {cls.__name__}: {error}") from error


def print_audit(target: str, shape: str, checkpoint: str | None) -> None:
    """Print the audit of a model for a random input of a shape such as ``"32,784"``.

    Raises:
        ValueError: the shape is not a list of integers, the model does not take it, or as :func:`load_model`.
    """
    import torch

    from em_lightning.scope import audit

    try:
        batch = torch.randn(*map(int, shape.split(",")), generator=torch.Generator().manual_seed(0))
    except ValueError as error:
        raise ValueError(f"--input={shape!r} must be a shape such as 32,784") from error
    model = load_model(target, checkpoint)
    try:
        model(batch)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the model takes no input of shape {shape}: {error}") from error
    # A random input has no labels, so only the forward pass is run, even if there is a training step.
    print(audit(model, batch, run=lambda: model(batch)))
