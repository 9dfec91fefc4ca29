"""``em-lightning audit``: load a model named on the command line and print its audit."""

from __future__ import annotations

import argparse
import functools
import importlib
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def _import_object(target: str) -> Any:
    """Return the object ``package.module:NAME``, or ``path/to/file.py:NAME``, whose file is run."""
    source, colon, name = target.rpartition(":")
    if not colon:
        raise ValueError(f"{target!r} must be package.module:NAME or path/to/file.py:NAME")
    is_file = source.endswith(".py")
    sys.path.insert(0, str(Path(source).resolve().parent if is_file else Path.cwd()))
    # A file runs under its own name, so that checkpoints find its classes.
    names = runpy.run_path(source, run_name=Path(source).stem) if is_file else vars(importlib.import_module(source))
    if name not in names:
        raise ValueError(f"{source} has no {name!r}")
    return names[name]


def load_model(
    target: str, checkpoint: str | None = None, weights_only: bool = True, arguments: Mapping[str, Any] | None = None
) -> Any:
    """Return the module ``package.module:NAME`` or ``path/to/file.py:NAME``; a class or function is called first.

    A checkpoint is loaded into it; a LightningModule class also gets the recorded surgery and hyperparameters.
    ``arguments`` are passed to the class or function.
    """
    from torch import nn

    from em_lightning.checkpoints import read_checkpoint
    from em_lightning.surgery import read_plan, restore_surgery

    named = _import_object(target)
    if checkpoint is not None and isinstance(named, type) and hasattr(named, "load_from_checkpoint"):
        restore = functools.partial(restore_surgery, named)
        load = restore if read_plan(checkpoint, weights_only) else named.load_from_checkpoint
        return load(checkpoint, map_location="cpu", weights_only=weights_only, **(arguments or {}))
    model = named if isinstance(named, nn.Module) else named(**(arguments or {}))
    if not isinstance(model, nn.Module):
        raise ValueError(f"{target!r} must be or return a torch.nn.Module, got {type(model).__name__}")
    if checkpoint is not None:
        content = read_checkpoint(checkpoint, weights_only)
        model.load_state_dict(content.get("state_dict", content))
    return model


def _random_inputs(specifications: Sequence[str]) -> Any:
    """Return random tensors of the forms ``[NAME=]SHAPE[:LIMIT]``: a tuple, or a dictionary if they are named."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tensors: dict[Any, Any] = {}
    for index, specification in enumerate(specifications):
        name, _, form = specification.rpartition("=")
        shape, colon, limit = form.partition(":")
        try:
            size = [int(length) for length in shape.split(",")]
            random = functools.partial(torch.randint, int(limit)) if colon else torch.randn
            tensors[name or index] = random(size, generator=generator)
        except (ValueError, RuntimeError) as error:
            raise ValueError("--input must be a shape such as 32,784, or 8,128:50257 for integers") from error
    names = [name for name in tensors if isinstance(name, str)]
    if names and len(names) < len(specifications):
        raise ValueError("--input: name all inputs, each differently, or none of them")
    return tensors if names else tuple(tensors.values())


def print_audit(options: argparse.Namespace, command: str) -> None:
    """Audit a model on random inputs or on a batch; raise ValueError with the command if anything fails."""
    import yaml

    from em_lightning.scope.auditing import audit, call

    try:
        arguments = yaml.safe_load(options.init_args)
        model = load_model(options.model, options.ckpt_path, options.weights_only == "true", arguments)
        if options.batch is None:  # call forward; with a batch, audit() calls training_step if the model has one
            found = audit(model, batch=None, run=functools.partial(call, model, _random_inputs(options.input)))
        else:  # without a colon, the function is in the file or module of the model
            source = options.model.rpartition(":")[0]
            make_batch = _import_object(options.batch if ":" in options.batch else f"{source}:{options.batch}")
            found = audit(model, make_batch())
    except Exception as error:  # user code may raise errors of any type
        reason = " ".join(str(error).split())
        if "'dict' object has no attribute" in reason:
            reason += "; --init_args holds plain values, so for dataclasses name a function that makes the model"
        raise ValueError(f"{command}: {type(error).__name__}: {reason}") from error
    print(found)
