"""``em-lightning audit``: where EM lives in a model that is named on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from em_lightning.cli.folders import UsageError


def load_model(target: str, checkpoint: str | None = None) -> Any:
    """Return the model that ``package.module:NAME`` or ``path/to/file.py:NAME`` stands for.

    NAME is a module, or a class or function that makes one without arguments; with a checkpoint it is a
    LightningModule class, which loads it.

    Raises:
        UsageError: there is no such file, module or name, or it makes no model.
    """
    import torch

    place, colon, name = target.rpartition(":")
    if not colon:
        raise UsageError(f"{target!r} names no model; write package.module:NAME or path/to/file.py:NAME")
    try:
        if place.endswith(".py"):
            if not Path(place).is_file():
                raise UsageError(f"there is no file {place!r}; give its path from here, {Path.cwd()}")
            sys.path.insert(0, str(Path(place).resolve().parent))
            # Not by its own name, which may be that of a module loaded already.
            spec = importlib.util.spec_from_file_location(f"audited_{Path(place).stem}", place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, str(Path.cwd()))
            module = importlib.import_module(place)
        made = getattr(module, name)
    except ImportError as error:
        raise UsageError(f"{target!r} cannot be imported: {error}") from error
    except AttributeError as error:
        raise UsageError(f"{place} has no {name!r}; check the name behind the colon") from error
    if checkpoint is not None:
        if not Path(checkpoint).is_file():
            raise UsageError(f"--ckpt_path={checkpoint!r} is no file; give the path of a checkpoint")
        made = _loaded(made, checkpoint)
    elif not isinstance(made, torch.nn.Module):
        try:
            made = made()
        except TypeError as error:
            raise UsageError(
                f"{target!r} cannot be made without arguments ({error}); name a function that can"
            ) from error
    if not isinstance(made, torch.nn.Module):
        raise UsageError(f"{target!r} is a {type(made).__name__} and no torch.nn.Module")
    return made


def _loaded(cls: Any, checkpoint: str) -> Any:
    """Load a LightningModule, with the surgery that its checkpoint records."""
    from em_lightning.surgery import read_plan, restore_surgery

    if not hasattr(cls, "load_from_checkpoint"):
        raise UsageError(f"--ckpt_path={checkpoint!r} goes with a LightningModule class, which {cls!r} is not")
    try:
        if read_plan(checkpoint):
            return restore_surgery(cls, checkpoint, map_location="cpu")
        return cls.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UsageError(f"--ckpt_path={checkpoint!r} does not fit {cls.__name__}: {error}") from error


def print_audit(target: str, shape: str, checkpoint: str | None) -> None:
    """Print the audit of a model at a random input of a shape such as ``"32,784"``.

    Raises:
        UsageError: the shape is none, or as :func:`load_model`.
    """
    import torch

    from em_lightning.scope import audit

    if not re.fullmatch(r"\d+(,\d+)*", shape):
        raise UsageError(f"--input={shape!r} is no shape; write for instance --input=32,784")
    batch = torch.randn(*map(int, shape.split(",")), generator=torch.Generator().manual_seed(0))
    model = load_model(target, checkpoint)
    try:
        model(batch)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the model takes no input of shape {shape}: {error}") from error
    # A random input has no labels, so only the forward is run, also where there is a training step.
    print(audit(model, batch, run=lambda: model(batch)))
