"""Findings of an audit: why an operation is EM or not, and what to do where it is not."""

from __future__ import annotations

from dataclasses import dataclass, replace

TOLERANCE = 1e-3  # of sums and gradients: models compute softmaxes in float32 and below
UNITS = "competition of the units"
EACH_UNIT = "hypotheses of each unit by itself: units do not compete"
HYPOTHESES = "responsibilities of the hypotheses"
COMPONENTS = "responsibilities of the components of a mixture"
KEYS = "posterior mean of the values over the keys"
TARGETS = "dL/dz = r - onehot"
CLASSES = f"{TARGETS}: the weights are prototypes of the classes"
BETWEEN_LAYERS = f"{TARGETS}; the logits are computed outside of the layers"
RELU = "elementwise, no normalization, hard zeros"
HARD = "hard selection: only the selected have a gradient"
SPARSE = "normalized, but not exponentiated: hypotheses drop to exactly zero"
NOTHING_SEEN = "no exponentiated and normalized competition seen in its forward"
NO_ITEMS = "not checked: it got no items"
NOT_CALLED = "not checked: its forward was not called"
_SWAP = "replace it by a competition with SwapActivations({argument})"
_POOL = "EMPooling summarizes items by a mixture that it fits to them"
_KEEP = "nothing to change: it is no place for a competition"
# Reason, advice and classes by name, as PyG has a Linear too; * is 1d, 2d or 3d.
_LAYERS = (
    (RELU, _SWAP, "ReLU ReLU6 Threshold Hardtanh Hardsigmoid Hardshrink"),
    (
        "elementwise: no normalization across units",
        _SWAP,
        "LeakyReLU PReLU RReLU ELU SELU CELU GELU SiLU Mish Softplus Sigmoid Tanh LogSigmoid Hardswish",
    ),
    (
        "affine: scores, neither exponentiated nor normalized",
        "train its outputs as energies with LayerwiseEMLoss, or put a mixture behind it with InsertEMOperator",
        "Linear Bilinear Embedding Conv* ConvTranspose*",
    ),
    ("normalizes moments, not hypotheses", _KEEP, "BatchNorm* SyncBatchNorm InstanceNorm* LayerNorm GroupNorm RMSNorm"),
    ("hard maximum: only the maximum has a gradient", _POOL, "MaxPool* AdaptiveMaxPool*"),
    ("an average with fixed weights", _POOL, "AvgPool* AdaptiveAvgPool*"),
    ("no hypotheses", _KEEP, "Dropout Dropout* AlphaDropout Identity Flatten Unflatten Metric"),
)
_REASONS = {name.replace("*", f"{n}d"): why for why, _, names in _LAYERS for name in names.split() for n in (1, 2, 3)}
_ADVICE = {why: advice for why, advice, _ in _LAYERS} | {
    HARD: "select by the responsibilities of a competition such as softmin or topk, which have a gradient",
    SPARSE: "use softmin if every hypothesis must keep a gradient",
    NOTHING_SEEN: "if it competes, build it from softmax, logsumexp or em_lightning.competition",
    NO_ITEMS: "audit a batch that reaches it",
    NOT_CALLED: "audit a batch that reaches it",
}


@dataclass
class Finding:
    """The result of the audit for one operation of a module.

    Attributes:
        path: the module, or for a loss the module that computed its logits.
        hypotheses: the axis of the competing hypotheses and their number; empty if there are none.
        exponentiated: whether energies are exponentiated.
        normalized: whether the result sums to one over the hypotheses.
        soft: mean perplexity of the responsibilities; 1 means that one hypothesis takes all.
        error: largest difference between dF/dd and the responsibilities that the model used; None if not checked.
        reason: why this is EM or not.
    """

    path: str
    module: str
    operation: str
    hypotheses: str = ""
    exponentiated: bool = False
    normalized: bool = False
    soft: float | None = None
    error: float | None = None
    reason: str = ""

    @property
    def em(self) -> bool:
        """Whether this is EM: exponentiated, normalized, and the identity dF/dd = r holds."""
        return self.exponentiated and self.normalized and self.error is not None and self.error < TOLERANCE

    def merged(self, other: Finding) -> Finding:
        """Return the finding of two calls of one operation, with the larger error."""
        if not self.checked:
            return other
        errors = [error for error in (self.error, other.error) if error is not None]
        return replace(self, error=max(errors, default=None))

    @property
    def checked(self) -> bool:
        """Whether the batch reached the module; if not, ``em`` is False without a check."""
        return self.reason not in (NO_ITEMS, NOT_CALLED)

    @property
    def advice(self) -> str:
        """What to do where this is not EM; empty where it is."""
        if self.em:
            return ""
        other = "its responsibilities must be the gradient of its free energy, as CompetitionContract tests"
        argument = f"target={self.module}" if self.module in _REASONS else "functional=True"
        return _ADVICE.get(self.reason, other).format(argument=argument)


def reason_of(module: object) -> str:
    """Return why a module in which no competition was seen is not EM."""
    known = (_REASONS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _REASONS)
    return next(known, NOTHING_SEEN)


class Audit(list[Finding]):
    """The findings in the order of the forward pass; ``print`` shows a table, and advice for what is not EM."""

    def __str__(self) -> str:
        header = ("layer", "module", "operation", "hypotheses", "exp", "norm", "soft", "dF/dd - r", "EM", "reason")
        rows: list[tuple[str, ...]] = [header]
        advice: dict[str, list[str]] = {}
        for one in self:
            flags = ["yes" if flag else "no" for flag in (one.exponentiated, one.normalized)]
            numbers = (one.hypotheses, *flags) if one.hypotheses else ("-", "-", "-")
            soft = "-" if one.soft is None else f"{one.soft:.2f}"
            error = "-" if one.error is None else f"{one.error:.0e}"
            place = (one.path or "(root)", one.module, one.operation)
            em = "yes" if one.em else "no" if one.checked else "-"
            rows.append((*place, *numbers, soft, error, em, one.reason))
            if one.advice:
                advice.setdefault(one.advice, []).append(place[0])
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"{', '.join(dict.fromkeys(paths))}: {text}" for text, paths in advice.items()]
        return "\n".join(lines)

    def at(self, path: str) -> list[Finding]:
        """Return the findings at a path."""
        return [finding for finding in self if finding.path == path]
