"""EM losses on the layers of any model, for training loops with and without Lightning."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from em_lightning.distributed import global_sum, units_last
from em_lightning.losses import LOSSES, EMLoss
from em_lightning.surgery.find import Where
from em_lightning.surgery.taps import Taps
from em_lightning.surgery.units import axis_of

Weight = float | Literal["auto"]


class LayerwiseLoss:
    r"""Adds to a training loss, for each tapped layer l, an EM loss of what flows there, read as energies.

    .. math:: L = L_\text{main} + f(t) \sum_l w_l L_l(d_l), \qquad
              w_l = \rho \, \|\partial L_\text{main} / \partial d_l\| / \|\partial L_l / \partial d_l\| \text{ (auto)}

    With ``weight="auto"`` each layer's EM gradient enters with the share ``ratio`` = rho of the main loss's gradient at
    the same tap, so one setting serves narrow and wide layers and losses of any scale. Both norms are those of the
    global batch, measured at the first step and then at every ``auto_every``-th, and smoothed by exponential averages;
    the weights carry no gradient.

    A layer that is called several times between two calls of :meth:`add_to` counts once, on all the items of its calls.
    Losses are computed in float32 or better, outside autocast.

    Args:
        model: any module.
        where: the layers, see :func:`em_lightning.surgery.find_modules`.
        loss: "em" for ``EMLoss()``; a key, mapping or class of ``LOSSES``; or a module or function of energies (..., K)
            that returns a scalar or a dict of scalars. Modules are copied for each layer.
        weight: a number, "auto", or a mapping from name patterns to either.
        tap: "output" of the layer, or its "input".
        target: a second selection that has to hold as well.
        dim: the axis of the units; "auto" takes 1 at convolutions and the norms of their kind, and at what follows
            them, else the last.
        schedule: a factor f(t) of the step, on all weights.
        warmup: number of steps over which the factor rises linearly from 0.
        every: charge the loss at each ``every``-th step, times ``every``: the same gradient on average, for less work.
        ratio: rho, the share of ``weight="auto"``.
        auto_every: steps between two measurements for ``weight="auto"``.
        momentum: of the averages for ``weight="auto"``.

    Raises:
        NoMatchError: nothing is selected; the message lists what is there.
        ValueError: an argument is out of range, or the loss has parameters, which no optimizer would train.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> em = LayerwiseLoss(net, "0", weight=0.01)
        >>> loss = em.add_to(net(torch.rand(16, 4)).square().mean())
        >>> loss.backward()
        >>> sorted(em.values)
        ['0/decorrelation', '0/free_energy', '0/variance', '0/weight']
        >>> em.remove()

    The share follows the adaptive weight of Esser et al., arXiv 2012.09841, eq. 7, taken at the tap.
    """

    def __init__(
        self,
        model: nn.Module,
        where: Where,
        loss: Any = "em",
        weight: Weight | Mapping[str, Weight] = "auto",
        *,
        tap: Literal["output", "input"] = "output",
        target: Where | None = None,
        dim: int | Literal["auto"] = "auto",
        schedule: Callable[[int], float] | None = None,
        warmup: int = 0,
        every: int = 1,
        ratio: float = 0.1,
        auto_every: int = 10,
        momentum: float = 0.9,
    ) -> None:
        for name, value in (("every", every), ("auto_every", auto_every)):
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name}={value!r} is no number of steps: give an int of at least 1")
        if not (isinstance(warmup, int) and warmup >= 0):
            raise ValueError(f"warmup={warmup!r} is no number of steps: give an int of at least 0")
        if not ratio > 0:
            raise ValueError(f"ratio={ratio!r} is out of range: give a positive number such as 0.1")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum!r} is out of range: give a number in [0, 1)")
        self.taps = Taps(model, where, tap, target)
        self.dims = {site.path: axis_of(site, dim) for site in self.taps.sites}
        self.schedule = schedule
        self.warmup = warmup
        self.every = every
        self.ratio = ratio
        self.auto_every = auto_every
        self.momentum = momentum
        self.step = 0
        self.values: dict[str, Tensor] = {}
        self.num_items = 1
        self._charged: set[str] = set()
        self.losses = {site.path: build_loss(loss) for site in self.taps.sites}
        self.weights = {site.path: _weight_at(site.path, weight) for site in self.taps.sites}
        if isinstance(weight, Mapping):
            for pattern in weight:
                if not any(fnmatchcase(path, pattern) for path in self.weights):
                    raise ValueError(
                        f"weight={dict(weight)!r}: no layer matches {pattern!r}; selected are {', '.join(self.weights)}"
                    )
        # path -> averages of both norms, and the step from which they are due to be measured again
        self.norms = {path: [0.0, 0.0, 0.0] for path, weight in self.weights.items() if weight == "auto"}
        self.taps.attach()

    def factor(self) -> float:
        """Return f at the present step."""
        factor = 1.0 if self.schedule is None else float(self.schedule(self.step))
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(f"schedule({self.step}) returned {factor}: it has to return a finite factor of at least 0")
        if self.warmup:
            factor *= min(1.0, self.step / self.warmup)
        if self.every > 1:
            factor *= self.every if self.step % self.every == 0 else 0
        return factor

    def add_to(self, loss: Tensor, all_layers: bool = True) -> Tensor:
        """Return the loss plus the EM losses of the layers that were called since the last time.

        Counts a step; where something else counts (a Trainer), it sets ``step`` before each call.

        Args:
            loss: the loss of the model's task.
            all_layers: whether every layer has to be there; else those alone are charged on which the loss depends, and
                the others wait for a loss of their own.

        Raises:
            RuntimeError: a layer was not called, or what was captured carries no gradient.
        """
        if all_layers:
            captured = self.taps.take()
            self._check(captured, loss)
        else:
            graph = _graph(loss)
            captured = self.taps.take(lambda tensor: tensor.grad_fn in graph)
        self._charged.update(captured)
        factor = self.factor()
        self.step += 1
        self.values = {}
        if factor == 0:
            return loss
        aux = {path: self._evaluate(path, tensors) for path, tensors in captured.items()}
        due = [path for path in aux if path in self.norms and self.step > self.norms[path][2]]
        if due:
            self._measure(due, loss, captured, aux)
        total = loss.new_zeros((), dtype=torch.promote_types(loss.dtype, torch.float32))
        for path, value in aux.items():
            weight = factor * self.weight_of(path)
            self.values[f"{path}/weight"] = torch.tensor(weight)
            total = total + weight * value
        return loss + total.to(loss.dtype)

    def weight_of(self, path: str) -> float:
        """Return the weight of a layer, without the schedule's factor."""
        weight = self.weights[path]
        if weight != "auto":
            return float(weight)
        main, own, _ = self.norms[path]  # both averages carry the same bias, which cancels
        return self.ratio * main / own if own > 0 else 0.0

    def remove(self) -> None:
        """Take the hooks off."""
        self.taps.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the averages behind ``weight="auto"``."""
        norms = {path: list(norms) for path, norms in self.norms.items()}
        return {"step": self.step, "norms": norms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ValueError: the state belongs to other layers.
        """
        if set(state["norms"]) != set(self.norms):
            raise ValueError(
                f"the state has automatic weights for {sorted(state['norms'])}, but the layers here are "
                f"{sorted(self.norms)}: use the where= and weight= it was saved with"
            )
        self.step = state["step"]
        self.norms = {path: list(norms) for path, norms in state["norms"].items()}

    def reset(self) -> None:
        """Forget what was captured and charged: the start of a training step with several losses."""
        self.taps.captured = {}
        self._charged = set()

    def check_charged(self) -> None:
        """Raise if a layer has been charged to none of the losses since :meth:`reset`.

        Raises:
            RuntimeError: there is one.
        """
        missed = [site.path for site in self.taps.sites if site.path not in self._charged]
        if missed:
            raise RuntimeError(
                f"no loss of this step depends on the layer(s) {', '.join(missed)}, so their EM loss is lost: they "
                f"were not called, or under no_grad, or compiled and run before the hooks were set, or backward "
                f"was called in place of manual_backward. Leave them out through where="
            )

    def _check(self, captured: Mapping[str, list[Tensor]], loss: Tensor) -> None:
        silent = [site.path for site in self.taps.sites if site.path not in captured]
        if silent:
            raise RuntimeError(
                f"the layer(s) {', '.join(silent)} fired no hook in this step, so their EM loss is lost: they were not "
                f"called, or they were compiled and run before the hooks were set, or belong to a fused fast path. "
                f"Leave them out through where=, or attach before the first call"
            )
        for path, tensors in captured.items():
            if loss.requires_grad and not any(tensor.requires_grad for tensor in tensors):
                raise RuntimeError(
                    f"the {self.taps.tap} of {path!r} carries no gradient, so its EM loss would be lost: nothing "
                    f"before it is trained, or it was computed under no_grad, as re-entrant activation checkpointing "
                    f"does (use_reentrant=False); or leave it out through where="
                )

    def _evaluate(self, path: str, tensors: list[Tensor]) -> Tensor:
        dim = self.dims[path]
        for tensor in tensors:
            if not -tensor.dim() <= dim < tensor.dim():
                raise ValueError(
                    f"dim={dim} is no axis of the {self.taps.tap} of {path!r}, of shape {tuple(tensor.shape)}: name "
                    f"that of the units"
                )
        energies = [units_last(tensor, dim) for tensor in tensors]
        if len(energies) > 1:
            energies = [torch.cat([tensor.flatten(0, -2) for tensor in energies])]
        self.num_items = energies[0][..., 0].numel()
        with torch.autocast(energies[0].device.type, enabled=False):
            result = self.losses[path](energies[0].to(torch.promote_types(energies[0].dtype, torch.float32)))
        terms = result if isinstance(result, Mapping) else {"em": result}
        self.values.update({f"{path}/{name}": value.detach() for name, value in terms.items()})
        return functools.reduce(torch.add, terms.values())

    def _measure(
        self, due: list[str], loss: Tensor, captured: Mapping[str, list[Tensor]], aux: Mapping[str, Tensor]
    ) -> None:
        tensors = [tensor for path in due for tensor in captured[path]]
        main = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        gradients = iter(main)
        for path in due:
            averages = self.norms[path]
            of_main = [next(gradients) for _ in captured[path]]
            of_aux = torch.autograd.grad(aux[path], captured[path], retain_graph=True, allow_unused=True)
            if all(gradient is None for gradient in of_main):
                raise RuntimeError(
                    f"weight='auto' compares with the gradient of the main loss, which does not depend on {path!r}, or "
                    f"lies with it in one compiled graph, where that cannot be seen: give this layer a number as weight"
                )
            squares = torch.stack([_square(of_main, loss), _square(of_aux, loss)])
            norms = global_sum(squares).sqrt().tolist()
            for index, norm in enumerate(norms):
                averages[index] = self.momentum * averages[index] + (1 - self.momentum) * norm
            averages[2] = self.step - 1 + self.auto_every


def _graph(loss: Tensor) -> set[Any]:
    """Return every node of the autograd graph that leads to a loss."""
    nodes: set[Any] = set()
    ahead = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            ahead.extend(following for following, _ in node.next_functions)
    return nodes


def _square(gradients: Sequence[Tensor | None], like: Tensor) -> Tensor:
    squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
    return torch.stack(squares).sum() if squares else torch.zeros((), device=like.device)


def _weight_at(path: str, weight: Weight | Mapping[str, Weight]) -> Weight:
    if isinstance(weight, Mapping):
        found = [one for pattern, one in weight.items() if fnmatchcase(path, pattern)]
        if not found:
            raise ValueError(f"weight={dict(weight)!r} has no pattern for {path!r}: add one, such as '*'")
        weight = found[0]
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight) and weight > 0
    if weight != "auto" and not number:
        raise ValueError(f"weight={weight!r} for {path!r} is out of range: give a positive number or 'auto'")
    return weight


def build_loss(loss: Any) -> Callable[[Tensor], Any]:
    """Build the loss of one layer: a copy where ``loss`` is a module, so that no state is shared."""
    if isinstance(loss, nn.Module):
        built: Any = copy.deepcopy(loss)
    elif loss == "em":
        built = EMLoss()
    elif isinstance(loss, Mapping) and loss.get("name") == "em":
        built = EMLoss(**{str(key): value for key, value in loss.items() if key != "name"})
    else:
        try:
            built = LOSSES.build(loss)
        except ValueError as error:
            raise ValueError(f"{error}; or 'em', the sum of the parts of EMLoss") from None
    if isinstance(built, nn.Module) and any(True for _ in built.parameters()):
        raise ValueError(
            f"loss={type(built).__name__} has parameters, which no optimizer would train: use fixed ones, or make the "
            f"loss a part of the model"
        )
    return built
