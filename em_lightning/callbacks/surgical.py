"""Callbacks that change the model: when to operate, and what to check."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any, Literal

from lightning.pytorch import Callback
from torch import nn

from em_lightning.surgery import NoMatchError, Surgery, apply_plan, read_plan, recorded_plan
from em_lightning.surgery.chain import Handle, wrap
from em_lightning.surgery.edit import Calls
from em_lightning.surgery.em import insert_em_operators, swap_activations
from em_lightning.surgery.sites import MARKER

_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


class SurgicalCallback(Callback):
    """Operates on the model before its optimizers are built and its checkpoint is loaded; a subclass defines how.

    A model that builds layers in its own ``setup`` or ``configure_model`` is operated right after these as well. The
    operation outlasts the run, as its parameters are trained: ``callback.surgery.undo()`` takes it back. Checkpoints
    carry the plan of it and refuse to load into a model without it.

    Attributes:
        surgery: what was done; None before the first run.
    """

    def __init__(self) -> None:
        self.surgery: Surgery | None = None
        self._handles: list[Handle] = []

    def operate(self, model: nn.Module, surgery: Surgery) -> None:
        """Extend the surgery by what is to be done to the model as it stands; raise NoMatchError if that is nothing."""
        raise NotImplementedError

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Operate, unless an earlier run with the same settings has done so."""
        self._check_order(trainer)
        if any(entry["by"] == self.state_key for entry in recorded_plan(pl_module)):
            return
        self.surgery = Surgery(pl_module, by=self.state_key)
        builders = [name for name in ("setup", "configure_model") if _overrides(pl_module, name)]
        self._attempt(pl_module, last=not builders)
        for name in builders:
            self._handles.append(wrap(pl_module, name, self._after(pl_module, last=name == builders[-1])))

    def _after(self, model: Any, last: bool) -> Callable[..., Any]:
        def operate_after(proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = proceed(*args, **kwargs)
            self._attempt(model, last)
            if last:
                self._release()
            return result

        return operate_after

    def _attempt(self, model: Any, last: bool) -> None:
        assert self.surgery is not None
        try:
            self.operate(model, self.surgery)
        except NoMatchError:
            if last and not self.surgery.changes:
                raise

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that every parameter which came with a surgery is trained.

        Raises:
            ValueError: one is in no optimizer.
        """
        trained = {
            id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        names = {id(p): name for name, p in pl_module.named_parameters() if p.requires_grad}
        operators = [module for module in pl_module.modules() if MARKER in module._buffers]
        mine = {id(p) for module in operators for p in module.parameters() if p.requires_grad}
        missing = sorted(names[key] for key in mine - trained)
        if trained and missing:
            raise ValueError(
                f"no optimizer trains {', '.join(missing)}: configure_optimizers names its parameters one by one, so "
                f"add these, or operate with em_lightning.surgery before the optimizer is built"
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the methods that were wrapped; the surgery stays."""
        self._release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let go of the methods that were wrapped: Lightning calls no teardown after an exception."""
        self._release()

    def _check_order(self, trainer: Any) -> None:
        for callback in trainer.callbacks:
            if callback is self:
                return
            if any(cls.__name__ in _AVERAGING for cls in type(callback).__mro__):
                raise ValueError(
                    f"{type(callback).__name__} stands before {type(self).__name__} in the list of callbacks and "
                    f"copies the model before it is operated: put {type(self).__name__} first"
                )


def _overrides(module: Any, name: str) -> bool:
    # by name, as `lightning` and `pytorch_lightning` each have a LightningModule of their own
    base = next((cls for cls in type(module).__mro__ if cls.__name__ == "LightningModule"), None)
    return base is not None and (name in vars(module) or getattr(type(module), name) is not getattr(base, name))


class SwapActivations(SurgicalCallback):
    """Replaces activations by competitive ones in any LightningModule.

    Without a Trainer: :func:`em_lightning.surgery.em.swap_activations`, which has the same arguments.

    Args:
        activation: a key, class, mapping or instance of ``ACTIVATIONS``.
        target: the class of module to replace, or several.
        where: and where: a name pattern such as ``"encoder.*"``, a predicate, or a list.
        dim: the axis of the units; "auto" takes 1 behind convolutions and the norms of their kind, else the last.
        shared: one instance under several names becomes "separate" modules, one ("together"), or is "refuse"-d.
        calls: operators for a module that is called several times; see :func:`em_lightning.surgery.replace_modules`.
        functional: also swap ``relu`` where a forward calls it as a function.
        arguments: of the activation.

    Raises:
        NoMatchError: at setup, if nothing is selected; the message lists what is there.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SwapActivations("signed")], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        activation: Any = "signed",
        target: type[nn.Module] | list[type[nn.Module]] = nn.ReLU,
        where: Any = "*",
        *,
        dim: int | Literal["auto"] = "auto",
        shared: Literal["separate", "together", "refuse"] = "separate",
        calls: Calls = None,
        functional: bool = False,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.target = target
        self.where = where
        self.options: dict[str, Any] = {
            "dim": dim,
            "shared": shared,
            "calls": calls,
            "functional": functional,
            **(arguments or {}),
        }

    @property
    def state_key(self) -> str:
        """Tell two such callbacks apart."""
        return self._generate_state_key(
            activation=_said(self.activation), target=_said(self.target), where=_said(self.where), **self.options
        )

    def operate(self, model: nn.Module, surgery: Surgery) -> None:
        """Swap what matches."""
        swap_activations(model, self.activation, self.target, self.where, into=surgery, **self.options)


class InsertEMOperator(SurgicalCallback):
    """Puts a gated EM layer behind chosen layers: ``x + gate * op(x)`` with a gate that starts at 0.

    Without a Trainer: :func:`em_lightning.surgery.em.insert_em_operators`, which has the same arguments.

    Args:
        where: the layers: a class, a name pattern, a predicate, or a list.
        num_components: K.
        target: a second selection that has to hold as well.
        num_features: the width of the layer's output; read off the layer where it is left out.
        dim: the axis of the features; "auto" takes 1 behind convolutions and the norms of their kind, else the last.
        shared: one instance under several names gets "separate" operators, one ("together"), or is "refuse"-d.
        calls: operators for a layer that is called several times; see :func:`em_lightning.surgery.insert_after`.
        arguments: of :class:`em_lightning.operators.EMRefinement`.

    Raises:
        NoMatchError: at setup, if nothing is selected; the message lists what is there.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[InsertEMOperator("encoder.2")], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        where: Any,
        num_components: int = 8,
        *,
        target: type[nn.Module] | None = None,
        num_features: int | None = None,
        dim: int | Literal["auto"] = "auto",
        shared: Literal["separate", "together", "refuse"] = "separate",
        calls: Calls = None,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.where = where
        self.target = target
        self.options: dict[str, Any] = {
            "num_components": num_components,
            "num_features": num_features,
            "dim": dim,
            "shared": shared,
            "calls": calls,
            **(arguments or {}),
        }

    @property
    def state_key(self) -> str:
        """Tell two such callbacks apart."""
        return self._generate_state_key(where=_said(self.where), target=_said(self.target), **self.options)

    def operate(self, model: nn.Module, surgery: Surgery) -> None:
        """Insert where it matches."""
        insert_em_operators(model, self.where, target=self.target, into=surgery, **self.options)


class RestoreSurgery(SurgicalCallback):
    """Repeats the surgery that a checkpoint was saved with, so that test and predict need no other callback.

    Without a Trainer: :func:`em_lightning.surgery.restore_surgery`.

    Args:
        path: the checkpoint whose plan to follow, the one that is given to the Trainer as ``ckpt_path``.

    Raises:
        ValueError: before a validation, test or prediction whose Trainer loaded no checkpoint: the model would be
            measured with the weights that it was built with.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        super().__init__()
        self.path = path
        self._plan: list[dict[str, Any]] = []
        self._operated = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Read the plan and operate, unless the model has been operated already."""
        self._plan = read_plan(self.path)
        before = self.surgery
        if self._plan and recorded_plan(pl_module) != self._plan:
            super().setup(trainer, pl_module, stage)
        self._operated = self.surgery is not before

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse to measure weights that nobody trained; a fit may start from them."""
        if self._operated and trainer.state.fn != "fit" and trainer.ckpt_path is None:
            raise ValueError(
                f"{trainer.state.fn.value} was called without ckpt_path, so the operated model would run on the "
                f"weights that it was built with: give ckpt_path={str(self.path)!r}, or a model from restore_surgery"
            )

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def operate(self, model: nn.Module, surgery: Surgery) -> None:
        """Follow the part of the plan whose sites exist by now and are not operated yet."""
        done = [entry["path"] for entry in recorded_plan(model)]
        apply_plan(model, [entry for entry in self._plan if entry["path"] not in done], into=surgery)


def _said(what: Any) -> str:
    if isinstance(what, (list, tuple)):
        return ",".join(_said(one) for one in what)
    return getattr(what, "__qualname__", None) or (type(what).__name__ if isinstance(what, nn.Module) else str(what))
