"""Callbacks that modify the model before its optimizers are built: swap activations, insert operators, restore both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from os import PathLike
from types import MethodType
from typing import Any, Literal

from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from em_lightning.surgery import apply_plan, insert_em_operators, read_plan, recorded_plan, swap_activations
from em_lightning.surgery.edit import Calls, Surgery, surgery_by
from em_lightning.surgery.hooks import undo_all, wrap
from em_lightning.surgery.owners import parameters_of, untrained_parameters
from em_lightning.surgery.select import NoMatchError, described, walk

# Compared by name, because the packages lightning and pytorch_lightning each define these classes.
_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


class SurgicalCallback(Callback):
    """Base class of callbacks that modify the model before its optimizers are built; a subclass implements ``apply``.

    If the model builds layers in ``setup`` or ``configure_model``, the surgery is applied again after them. It remains
    after the run, because its parameters are trained; ``callback.surgery.undo()`` undoes it. Checkpoints store its
    plan, and loading such a checkpoint into a model without the surgery raises an error.

    ``settings`` are the subclass's arguments; callbacks with equal settings share ``surgery``. It is None before a run.
    """

    def __init__(self, verbose: bool = True, **settings: Any) -> None:
        self.verbose = verbose
        self.settings = settings
        self.surgery: Surgery | None = None
        self._undos: list[Callable[[], Any]] = []
        self._warned = False

    @property
    def state_key(self) -> str:
        settings = ", ".join(f"{name}={described(value)}" for name, value in self.settings.items())
        return f"{type(self).__qualname__}({settings})"

    def apply(self, model: nn.Module, surgery: Surgery) -> None:
        """Apply the surgery to the layers that exist so far; raise NoMatchError if nothing matches."""
        raise NotImplementedError

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Apply the surgery, unless an earlier run with the same settings has done so."""
        for callback in trainer.callbacks[: trainer.callbacks.index(self)]:
            if any(cls.__name__ in _AVERAGING for cls in type(callback).__mro__):
                averaging, own = type(callback).__name__, type(self).__name__
                raise ValueError(f"{averaging} copies the model in its setup: put {own} before it in callbacks")
        if any(entry["by"] == self.state_key for entry in recorded_plan(pl_module)):
            self.surgery = surgery_by(pl_module, self.state_key)
            return
        surgery = self.surgery = Surgery(pl_module, by=self.state_key)
        base: Any = next(cls for cls in type(pl_module).__mro__ if cls.__name__ == "LightningModule")
        methods = {name: MethodType(getattr(base, name), pl_module) for name in ("setup", "configure_model")}
        builders = [name for name, method in methods.items() if getattr(pl_module, name) != method]  # overridden
        self._apply_so_far(surgery, raise_if_unmatched=not builders)

        def build(is_last: bool, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = proceed(*args, **kwargs)
            self._apply_so_far(surgery, raise_if_unmatched=is_last)
            if is_last:
                undo_all(self._undos)
            return result

        self._undos = [wrap(pl_module, name, functools.partial(build, name == builders[-1])) for name in builders]

    def _apply_so_far(self, surgery: Surgery, raise_if_unmatched: bool) -> None:
        try:
            self.apply(surgery.model, surgery)
        except NoMatchError:
            if raise_if_unmatched and not surgery.changes:
                raise

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Raise ValueError if no optimizer trains an added parameter; warn of target networks without the changes."""
        missing = untrained_parameters(pl_module, trainer.optimizers)
        if trainer.optimizers and missing:
            raise ValueError(
                f"no optimizer trains {', '.join(missing)}: add these in configure_optimizers, or use the functions "
                f"of em_lightning.surgery before the optimizer is built"
            )
        trained = parameters_of(trainer.optimizers) & {id(p) for p in pl_module.parameters() if p.requires_grad}
        if self.surgery is not None and trainer.is_global_zero:
            self.surgery.warn_of_copies(lambda parameter: id(parameter) in trained)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Warn once of new modules that no batch of an epoch called, unless one for the same old layer was called."""
        calls, changes = (self.surgery.first_calls, self.surgery.changes) if self.surgery else ([], [])
        seen = {first.path for first in calls if first.seen}
        shared = [change.old for change in changes if change.path in seen and isinstance(change.old, nn.Module)]
        seen.update(change.path for change in changes if any(change.old is old for old in shared))
        paths = [first.path for first in calls if first.path not in seen]
        # Do not warn if the parent has frozen parameters: it may be a weight-averaged copy, called after training.
        parents = {path: pl_module.get_submodule(path.rpartition(".")[0]).parameters() for path in paths}
        uncalled = [path for path, each in parents.items() if "." not in path or all(p.requires_grad for p in each)]
        if uncalled and not self._warned:
            self._warned = True
            old = {id(change.old): change.path for change in changes if change.path in uncalled}
            named = [(site.path, old[id(site.module)]) for site in walk(pl_module) if id(site.module) in old]
            others = [path for path, changed in named if not f"{path}.".startswith(f"{changed}.")]
            rank_zero_warn(
                f"{type(self).__name__} changed {', '.join(uncalled)}, but no batch of the epoch called the forward "
                f"there: the change has no effect" + f"; select the same layers by {', '.join(others)}" * bool(others)
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: Any) -> None:
        undo_all(self._undos)

    on_exception = teardown  # type: ignore[assignment]  # Lightning calls no teardown after an exception


class SwapActivations(SurgicalCallback):
    """Replaces activations by those of the library, such as competitive ones, in any LightningModule.

    Without a Trainer: :func:`em_lightning.surgery.swap_activations`, which explains the arguments and the
    errors, raised at setup or the first batch. ``arguments`` are those of the activation.

    Example:
        >>> callbacks = [SwapActivations("signed")]
    """

    def __init__(
        self,
        activation: Any = "signed",
        target: type[nn.Module] | list[type[nn.Module]] = nn.ReLU,
        where: Any = "*",
        *,
        dim: int | Literal["auto"] = "auto",
        calls: Calls = None,
        functional: bool = False,
        verbose: bool = True,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        settings: dict[str, Any] = {"activation": activation, "target": target, "where": where, "dim": dim}
        settings.update(calls=calls, functional=functional)
        super().__init__(verbose, **settings, **(arguments or {}))

    def apply(self, model: nn.Module, surgery: Surgery) -> None:
        swap_activations(model, into=surgery, verbose=self.verbose, **self.settings)


class InsertEMOperator(SurgicalCallback):
    """Inserts a gated EM layer behind chosen layers: ``x + gate * op(x)`` with a gate that starts at 0.

    Without a Trainer: :func:`em_lightning.surgery.insert_em_operators`, which explains the arguments and the
    errors, raised at setup or the first batch. ``arguments`` are those of :class:`em_lightning.operators.EMRefinement`.

    Example:
        >>> callbacks = [InsertEMOperator("encoder.2")]
    """

    def __init__(
        self,
        where: Any,
        num_components: int = 8,
        *,
        num_features: int | None = None,
        dim: int | Literal["auto"] = "auto",
        set_dim: int | Literal["auto"] = "auto",
        causal: bool = False,
        calls: Calls = None,
        verbose: bool = True,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        settings: dict[str, Any] = {"where": where, "num_components": num_components, "num_features": num_features}
        settings.update(dim=dim, set_dim=set_dim, causal=causal, calls=calls)
        super().__init__(verbose, **settings, **(arguments or {}))

    def apply(self, model: nn.Module, surgery: Surgery) -> None:
        insert_em_operators(model, into=surgery, verbose=self.verbose, **self.settings)


class RestoreSurgery(SurgicalCallback):
    """Repeats the surgery of the checkpoint at ``path`` as :func:`~em_lightning.surgery.restore_surgery` does.

    Args:
        path: the checkpoint with the plan; give the Trainer the same one as ``ckpt_path``.
        weights_only: False loads objects of any class, as in the Trainer's methods; only for trusted checkpoints.

    Raises:
        ValueError: before a validation, test or prediction for which the Trainer loaded no checkpoint, as the model
            would have untrained weights. A fit without a checkpoint starts from new weights, with a warning.
    """

    def __init__(self, path: str | PathLike[str], weights_only: bool = True) -> None:
        super().__init__(path=str(path))
        self.path = path
        self.weights_only = weights_only
        self._plan: list[dict[str, Any]] = []
        self._needs_weights = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._plan = read_plan(self.path, self.weights_only)
        self._needs_weights = bool(self._plan) and recorded_plan(pl_module) != self._plan
        if self._needs_weights:
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        if self._needs_weights and trainer.ckpt_path is None:
            rank_zero_warn(
                f"RestoreSurgery repeats the surgery of {str(self.path)!r} without its weights: give fit "
                f"ckpt_path={str(self.path)!r} to resume it, or a model from restore_surgery to start from its weights"
            )

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Raise if the model has untrained weights; in a fit a warning was given."""
        if self._needs_weights and trainer.state.fn != "fit" and trainer.ckpt_path is None:
            raise ValueError(
                f"{trainer.state.fn.value} was called without ckpt_path, so the restored model would have untrained "
                f"weights: give ckpt_path={str(self.path)!r}, or a model from restore_surgery"
            )

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def apply(self, model: nn.Module, surgery: Surgery) -> None:
        """Apply the entries of the plan whose layers exist so far."""
        apply_plan(model, self._plan, into=surgery)
