"""``em-lightning audit``: where EM takes place in a model named on the command line."""

from __future__ import annotations

import functools
import importlib
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_FORMS = "package.module:NAME or path/to/file.py:NAME"


def _names_in(place: str) -> dict[str, Any]:
    is_file = place.endswith(".py")
    sys.path.insert(0, str(Path(place).resolve().parent if is_file else Path.cwd()))
    try:
        if is_file:  # under its own name, so that checkpoints find its classes
            return runpy.run_path(place, run_name=Path(place).stem)
        return vars(importlib.import_module(place))
    except (ImportError, FileNotFoundError) as error:
        raise ValueError(f"{place!r} cannot be imported: {error}") from error


def _named(argument: str, target: str) -> Any:
    place, colon, name = target.rpartition(":")
    if not colon:
        raise ValueError(f"{argument}={target!r} must be {_FORMS}")
    names = _names_in(place)
    if name not in names:
        raise ValueError(f"{place} has no {name!r}")
    return names[name]


def load_model(
    target: str, checkpoint: str | None = None, init_args: Mapping[str, Any] | None = None, weights_only: bool = True
) -> Any:
    """Return the model that ``package.module:NAME`` or ``path/to/file.py:NAME`` names.

    Args:
        target: NAME is a module, or a class or function that returns one.
        checkpoint: loaded into the model; a LightningModule class also gets the recorded surgery and hyperparameters.
        init_args: arguments of the class or function.
        weights_only: False loads a checkpoint that you trust with objects of any class.

    Raises:
        ValueError: there is no such file, module or name, it makes no model, or the checkpoint does not fit.
    """
    from torch import nn

    from em_lightning.checkpoints import read_checkpoint
    from em_lightning.surgery import read_plan, restore_surgery

    made, arguments = _named("model", target), dict(init_args or {})
    if checkpoint is not None and isinstance(made, type) and hasattr(made, "load_from_checkpoint"):
        load = (
            functools.partial(restore_surgery, made)
            if read_plan(checkpoint, weights_only)
            else made.load_from_checkpoint
        )
        try:
            return load(checkpoint, map_location="cpu", weights_only=weights_only, **arguments)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"--ckpt_path={checkpoint!r} does not fit {made.__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        try:
            made = made(**arguments)
        except TypeError as error:
            raise ValueError(f"{target!r} must be callable with --init_args={arguments} ({error})") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{target!r} must make a torch.nn.Module, got {type(made).__name__}")
    if checkpoint is not None:
        content = read_checkpoint(checkpoint, weights_only)
        try:
            made.load_state_dict(content.get("state_dict", content))
        except RuntimeError as error:
            raise ValueError(f"--ckpt_path={checkpoint!r} does not fit {type(made).__name__}: {error}") from error
    return made


def random_inputs(specifications: Sequence[str]) -> Any:
    """Return random tensors for the forward of a model: a tuple, or a dictionary if they are named.

    Args:
        specifications: each ``[NAME=]SHAPE`` for normal random numbers, such as ``32,784``, or ``[NAME=]SHAPE:LIMIT``
            for random integers from 0 to LIMIT - 1, such as ``ids=8,128:50257``.

    Raises:
        ValueError: one has another form, or only some are named.

    Example:
        >>> [value.shape for value in random_inputs(["2,3", "5:10"])]
        [torch.Size([2, 3]), torch.Size([5])]
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index, specification in enumerate(specifications):
        name, equals, form = specification.rpartition("=")
        shape, colon, limit = form.partition(":")
        try:
            size = [int(length) for length in shape.split(",")]
            if colon:
                tensor = torch.randint(int(limit), size, generator=generator)
            else:
                tensor = torch.randn(size, generator=generator)
        except (ValueError, RuntimeError) as error:
            form = "32,784 for numbers, 8,128:50257 for integers below 50257, each also as NAME=..."
            raise ValueError(f"--input={specification!r} must be a shape such as {form}") from error
        tensors[name if equals else index] = tensor
    if all(isinstance(name, int) for name in tensors):
        return tuple(tensors.values())
    if len(tensors) < len(specifications) or any(isinstance(name, int) for name in tensors):
        raise ValueError(f"--input={' --input='.join(specifications)}: name all inputs differently, or none")
    return tensors


def print_audit(
    target: str,
    inputs: Sequence[str] | None,
    batch: str | None,
    checkpoint: str | None = None,
    init_args: str = "{}",
    weights_only: bool = True,
) -> None:
    """Print the audit of the forward for random inputs, or of the training step for a batch.

    ``batch`` names a function beside the model, or elsewhere as the model is named; ``init_args`` is YAML. For the
    other arguments see :func:`load_model` and :func:`random_inputs`.

    Raises:
        ValueError: an argument has another form, or the model does not take the input.
    """
    import yaml

    from em_lightning.scope.auditing import audit, call

    try:
        arguments = yaml.safe_load(init_args)
    except yaml.YAMLError as error:
        raise ValueError(f"--init_args={init_args!r} is no YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"--init_args={init_args!r} must be a mapping such as '{{width: 8}}'")
    model = load_model(target, checkpoint, arguments, weights_only)
    if batch is None:
        values = random_inputs(inputs or ())
        given, run = f"--input={' --input='.join(inputs or ())}", functools.partial(call, model, values)
    else:
        make = _named("--batch", batch if ":" in batch else f"{target.rpartition(':')[0]}:{batch}")
        values, given, run = make(), f"--batch={batch}", None
    try:
        found = audit(model, values, run)
    except Exception as error:  # a model raises any kind
        raise ValueError(f"the model does not take {given}: {type(error).__name__}: {error}") from error
    print(found)
