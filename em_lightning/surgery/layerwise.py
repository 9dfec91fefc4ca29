"""EM losses on the layers of any model, for training loops with and without Lightning."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from em_lightning.checks import check_choice, check_counts, positive_number
from em_lightning.distributed import global_sum
from em_lightning.losses import LOSSES, EMLoss
from em_lightning.surgery.owners import Owner, graph_of, leaves_of, only_for
from em_lightning.surgery.select import Where
from em_lightning.surgery.taps import TAPS, Taps

# weight="auto" averages over about ten measurements, ten steps apart, as each needs another gradient of both losses.
_MOMENTUM = 0.9  # chosen, not measured
_AUTO_EVERY = 10  # chosen, not measured


@dataclasses.dataclass
class _Norms:
    """The norms of the gradients at a tap, averaged over measurements, for ``weight="auto"``."""

    main: float = 0.0  # of the main loss
    em: float = 0.0  # of the EM loss
    next_step: int = 0  # LayerwiseLoss.step from which on the norms are measured again


class LayerwiseLoss:
    r"""Adds to a training loss, for each tapped layer l, an EM loss of the layer's output (or input) read as energies.

    .. math:: L = L_\text{main} + f(t) \sum_l w_l L_l(d_l), \qquad
              w_l = \rho \, \|\partial L_\text{main} / \partial d_l\| / \|\partial L_l / \partial d_l\| \text{ (auto)}

    With ``weight="auto"`` the norm of each EM loss's gradient is ``ratio`` = rho times that of the main loss at the
    same tap. Both norms are those of the global batch, measured every tenth step and smoothed by exponential
    averages. A layer that is called several times between two calls of :meth:`add_to` has one loss, over the items of
    all calls with a gradient. While nothing before a layer is trained, its loss waits (it is not added), with one
    warning. Losses are computed in float32 or float64, without autocast.

    Args:
        where: the layers, see :func:`find_modules`.
        tap: read the "output" or the "input" of the layers.
        loss: "em" for ``EMLoss()``; a key, mapping or class of ``LOSSES``; or a module or function of energies (..., K)
            that returns a scalar or a dict of scalars. Modules are copied for each layer.
        weight: a number or "auto".
        dim: the axis of the units, or "auto", see :class:`UnitAxis`.
        schedule: a factor f(t) of the step, on all weights.
        every: add the loss every ``every`` steps, multiplied by ``every``: an equal mean gradient at lower cost.
        ratio: rho of ``weight="auto"``.
        detach: continue with a detached tap, so only the EM loss trains what comes before it; "auto" is then weight 1.
        verbose: whether to print a line per layer at the first batch: path, shape, axis of units, units, items.

    Attributes:
        step: the current step; :meth:`add_to` adds 1 to it.
        values: for logging, from the last :meth:`add_to`: unweighted terms, and weights w_l times :meth:`factor`.

    Raises:
        NoMatchError: nothing matches; the message lists the modules of the model.
        ValueError: an argument is out of range, or the loss has parameters, which no optimizer would train.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> em = LayerwiseLoss(net, "0", weight=0.01, verbose=False)
        >>> loss = em.add_to(net(torch.rand(16, 4)).square().mean())
        >>> loss.backward()
        >>> sorted(em.values)
        ['0/decorrelation', '0/free_energy', '0/variance', '0/weight']
        >>> em.remove()

    Source: the adaptive weight of Esser et al., arXiv 2012.09841, eq. 7, taken at the tap.
    """

    def __init__(
        self,
        model: nn.Module,
        where: Where,
        loss: Any = "em",
        weight: float | Literal["auto"] = "auto",
        *,
        tap: Literal["output", "input"] = "output",
        dim: int | Literal["auto"] = "auto",
        schedule: Callable[[int], float] | None = None,
        every: int = 1,
        ratio: float = 0.1,
        detach: bool = False,
        verbose: bool = True,
    ) -> None:
        check_options(loss, weight, tap, every, ratio, schedule)
        self.taps = Taps(model, where, tap, dim, detach, verbose)
        self.losses = {path: _build_loss(loss) for path in self.taps.axes}
        name = loss.get("name") if isinstance(loss, Mapping) else loss
        self._term = name if isinstance(name, str) else "em"  # the name of a loss without terms in ``values``
        self.weight = 1.0 if detach and weight == "auto" else weight
        self.schedule = schedule
        self.every = every
        self.ratio = ratio
        self.step = 0
        self.values: dict[str, Tensor] = {}
        self._added: set[str] = set()
        self._said_waiting = False
        self._trained_alone: set[str] = set()  # layers with ``alone`` calls, see _of_owners
        self.norms = {path: _Norms() for path in self.losses if self.weight == "auto"}

    @property
    def dims(self) -> dict[str, int | Literal["auto"]]:
        """The axis of the units of each layer; "auto" where the first batch decides it."""
        return {path: next(iter(axis.decided.values()), axis.dim) for path, axis in self.taps.axes.items()}

    def factor(self) -> float:
        """Return the factor of all weights at the current step: f times ``every``, or 0 in the steps between."""
        factor = 1.0 if self.schedule is None else float(self.schedule(self.step))
        if not 0 <= factor < math.inf:
            raise ValueError(f"schedule({self.step}) returned {factor}; it must return a finite factor of at least 0")
        return factor * self.every if self.step % self.every == 0 else 0.0

    def add_to(self, loss: Tensor, all_layers: bool = True, owners: Mapping[str, Owner] | None = None) -> Tensor:
        """Return the loss plus the EM losses of the layers that were called since the last call, and count a step.

        With ``all_layers`` every layer must have been called, in this step or before. Otherwise only losses of layers
        that ``loss`` depends on are added (with ``detach``, those of all layers), and the others are kept for a later
        call. With ``owners``, from :func:`owners_of`, the EM loss of a layer is then added only if it depends on
        parameters of the layer's optimizer, and trains only these.

        Raises:
            RuntimeError: with ``all_layers`` and gradients, a layer was never called or its tap has no gradient.
        """
        if all_layers:
            captured = self.taps.take()
            if loss.requires_grad or any(tensor.requires_grad for tensors in captured.values() for tensor in tensors):
                captured = self._with_gradient(captured)
        else:
            graph = graph_of(loss)
            captured = self.taps.take(
                lambda tensor: tensor.requires_grad if self.taps.detach else tensor.grad_fn in graph
            )
        if owners is not None:
            captured = self._of_owners(captured, owners)
        self._added.update(captured)  # also where the factor is 0
        factor = self.factor()
        self.step += 1
        self.values = {}
        if factor == 0:
            return loss
        em_losses = {path: self._evaluate(path, tensors) for path, tensors in captured.items()}
        due = [path for path in em_losses if path in self.norms and self.step >= self.norms[path].next_step]
        if due:
            self._measure(due, loss, captured, em_losses)
        total = loss.new_zeros((), dtype=torch.promote_types(loss.dtype, torch.float32))
        for path, value in em_losses.items():
            weight = factor * self.weight_of(path)
            self.values[f"{path}/weight"] = torch.tensor(weight)
            weighted = weight * value
            if owners is not None and path not in self._trained_alone:  # those depend on no other parameters
                weighted = only_for(owners[path].own, weighted)
            total = total + weighted
        return loss + total.to(loss.dtype)

    def weight_of(self, path: str) -> float:
        """Return the weight w_l of a layer, without :meth:`factor`."""
        if self.weight != "auto":
            return float(self.weight)
        norms = self.norms[path]  # both averages start at 0; this bias cancels
        return self.ratio * norms.main / norms.em if norms.em > 0 else 0.0

    def remove(self) -> None:
        """Remove the hooks."""
        self.taps.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the step, averages of ``weight="auto"``, axes, and layers that one optimizer has trained alone."""
        axes = {path: dict(axis.decided) for path, axis in self.taps.axes.items()}
        norms = {path: dataclasses.asdict(norms) for path, norms in self.norms.items()}
        return {"step": self.step, "norms": norms, "trained_alone": sorted(self._trained_alone), "axes": axes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`; raise ValueError if its layers are not the selected ones."""
        if set(state["norms"]) != set(self.norms):
            raise ValueError(
                f"the state has automatic weights for {sorted(state['norms'])}, but the layers are "
                f"{sorted(self.norms)}: use the where= and weight= that it was saved with"
            )
        self.step = state["step"]
        self.norms = {path: _Norms(**norms) for path, norms in state["norms"].items()}
        self._trained_alone = set(state["trained_alone"])
        for path, decided in state.get("axes", {}).items():
            self.taps.axes[path].decided.update(decided)

    def reset(self) -> None:
        """Discard captured tensors and the list of added losses; call it before a training step with several losses."""
        self.taps.clear()
        self._added = set()

    def check_all_added(self) -> None:
        """Raise RuntimeError if the EM loss of a layer was not added since :meth:`reset`, unless it waits."""
        self._check(self.losses.keys() - self._added)

    def _check(self, missed: set[str]) -> None:
        """Warn once of layers that wait, because nothing before them is trained; raise RuntimeError for the others."""
        waiting = missed & self.taps.frozen
        if waiting and not self._said_waiting:
            self._said_waiting = True
            warnings.warn(
                f"the loss(es) of {', '.join(sorted(waiting))} wait: nothing before these layers is trained now",
                stacklevel=4,
            )
        if missed - waiting:
            raise RuntimeError(
                f"no loss of this step depends on the layer(s) {', '.join(sorted(missed - waiting))}: they were not "
                f"called, or under no_grad, as re-entrant checkpointing does (set use_reentrant=False), or compiled "
                f"before the hooks were set, or backward was called instead of manual_backward"
            )

    def _with_gradient(self, captured: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """Return the captured tensors with a gradient; raise RuntimeError if a layer has none and does not wait."""
        kept = {path: [tensor for tensor in tensors if tensor.requires_grad] for path, tensors in captured.items()}
        self._check({path for path, tensors in kept.items() if not tensors} | (self.losses.keys() - self.taps.seen))
        self.taps.frozen = set()  # the next step finds anew which layers wait
        return {path: tensors for path, tensors in kept.items() if tensors}

    def _of_owners(self, captured: Mapping[str, list[Tensor]], owners: Mapping[str, Owner]) -> dict[str, list[Tensor]]:
        """Return the tensors that depend on parameters of their owner, the optimizer of the layer's parameters.

        A call is ``alone`` if it depends on no parameters of another optimizer, as a discriminator's on detached
        images. Once a layer had such a call, only these count.
        """
        kept: dict[str, list[Tensor]] = {}
        for path, tensors in captured.items():
            alone: list[Tensor] = []
            mixed: list[Tensor] = []
            for tensor in tensors:
                leaves = leaves_of(tensor).keys()
                if leaves & owners[path].own:
                    (mixed if leaves & owners[path].others else alone).append(tensor)
            if alone and path not in self._trained_alone:
                self._trained_alone.add(path)
                if path in self.norms:
                    self.norms[path] = _Norms()  # they were measured with the losses of other optimizers
            kept[path] = alone if path in self._trained_alone else mixed
        return {path: tensors for path, tensors in kept.items() if tensors}

    def _evaluate(self, path: str, tensors: list[Tensor]) -> Tensor:
        """Return the EM loss of a layer, and keep its terms for logging."""
        last_axis_units = [tensor.movedim(self.taps.axes[path](tensor.shape), -1) for tensor in tensors]
        widths = sorted({tensor.shape[-1] for tensor in last_axis_units})
        if len(widths) > 1:
            raise ValueError(
                f"{path!r} was called with {' and '.join(map(str, widths))} units, whose losses cannot be joined: give "
                f"each place a layer of its own, or tap the layers before it"
            )
        energies = last_axis_units[0]
        if len(tensors) > 1:
            energies = torch.cat([tensor.flatten(0, -2) for tensor in last_axis_units])
        with torch.autocast(energies.device.type, enabled=False):
            result = self.losses[path](energies.to(torch.promote_types(energies.dtype, torch.float32)))
        terms = result if isinstance(result, Mapping) else {self._term: result}
        are_scalars = all(isinstance(value, Tensor) and value.ndim == 0 for value in terms.values())
        if not are_scalars or not any(value.requires_grad for value in terms.values()) and energies.requires_grad:
            raise TypeError(
                f"the loss of {path!r} must be a scalar tensor with a gradient, or terms of these: {result}"
            )
        self.values.update({f"{path}/{name}": value.detach() for name, value in terms.items()})
        return functools.reduce(torch.add, terms.values())

    def _measure(
        self, due: list[str], loss: Tensor, captured: Mapping[str, list[Tensor]], em_losses: Mapping[str, Tensor]
    ) -> None:
        """Update the averages of the norms of the gradients at the taps."""
        tensors = [tensor for path in due for tensor in captured[path]]
        gradients = iter(torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True))
        for path in due:
            of_main = [next(gradients) for _ in captured[path]]
            of_em = torch.autograd.grad(em_losses[path], captured[path], retain_graph=True, materialize_grads=True)
            if all(gradient is None for gradient in of_main):
                raise RuntimeError(
                    f"weight='auto' needs the gradient of the main loss at {path!r}, but the loss does not depend on "
                    f"it (a layer with detach=True after it, or a detached tensor?), or both lie in one compiled "
                    f"graph: give this layer a number as weight"
                )
            main, em = global_sum(torch.stack([_squared_norm(of_main), _squared_norm(of_em)])).sqrt().tolist()
            norms = self.norms[path]
            if not math.isfinite(main + em):
                continue  # half precision has overflowed, or the loss diverges: measure again in the next step
            norms.main = _MOMENTUM * norms.main + (1 - _MOMENTUM) * main
            norms.em = _MOMENTUM * norms.em + (1 - _MOMENTUM) * em
            norms.next_step = self.step + _AUTO_EVERY


def _squared_norm(gradients: Iterable[Tensor | None]) -> Tensor:
    return torch.stack([gradient.float().square().sum() for gradient in gradients if gradient is not None]).sum()


def check_options(loss: Any, weight: Any, tap: Any, every: Any, ratio: Any, schedule: Any) -> None:
    """Raise ValueError or TypeError if an argument of :class:`LayerwiseLoss` is out of range or of a wrong type."""
    check_counts(1, every=every)
    positive_number("ratio", ratio)
    if schedule is not None and not callable(schedule):
        raise TypeError(f"schedule={schedule!r} must be a function of the step that returns a factor, or None")
    check_choice("tap", tap, TAPS)
    if weight != "auto":
        positive_number("weight", weight)
        if ratio != 0.1:  # the default
            raise ValueError(f"ratio={ratio} has an effect with weight='auto' only, got weight={weight}")
    _build_loss(loss)


def _build_loss(loss: Any) -> Callable[[Tensor], Any]:
    """Build the loss of one layer; a module is copied, so that layers share no state."""
    arguments = dict(loss) if isinstance(loss, Mapping) else {"name": loss}
    is_em_loss = arguments.pop("name", None) == "em"
    built: Any = EMLoss(**arguments) if is_em_loss else LOSSES.build(copy.deepcopy(loss))
    if isinstance(built, nn.Module) and list(built.parameters()):
        raise ValueError(
            f"loss={type(built).__name__} has parameters, which no optimizer would train: make it a part of the model"
        )
    return built
