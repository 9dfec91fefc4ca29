"""Draw the figure of docs/results/composition.md from results.json of runs of benchmarks/composition.py.

`python -m benchmarks.draw_composition SWEEP CURVE PATH.png` reads a run of the config sweep and one of curve.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from em_lightning.studies.style import figure_style, new_figure


def by_arm(values: dict[str, float], name: str) -> dict[str, dict[float, float]]:
    """Return a quantity by arm and learning rate."""
    found: dict[str, dict[float, float]] = {}
    for key, value in values.items():
        run, _, quantity = key.partition(": ")
        arm, _, rate = run.rpartition(", ")
        if quantity == name:
            found.setdefault(arm, {})[float(rate)] = value
    return found


@figure_style()
def draw(sweep: dict[str, Any], curve: dict[str, Any]) -> Any:
    """Return the figure: probes by rate, gradient ratios and curvature over training, spread by gradient ratio."""
    figure, (probe_axes, ratio_axes, curvature_axes, spread_axes) = new_figure(4, 2, width=4.2, height=3.0)
    raw, standardized = (by_arm(sweep["values"], f"{name} %") for name in ("probe", "standardized"))
    for number, arm in enumerate(raw):
        probe_axes.plot(*zip(*raw[arm].items(), strict=True), "o--", color=f"C{number}")
        probe_axes.plot(*zip(*standardized[arm].items(), strict=True), "o-", color=f"C{number}", label=arm)
    probe_axes.set(title="probe (dashed: raw features)", xlabel="learning rate", ylabel="%", xscale="log")
    probe_axes.legend()
    runs = list(dict.fromkeys(key.partition(": ")[0] for key in sweep["values"]))
    ratios, _ = torch.tensor(sweep["gradients"])[:, :, -1].unbind(1)  # (measurements, R) of the last layer
    epochs = [row["epoch"] for row in sweep["history"]]
    for number, run in enumerate(run for run in runs if run.endswith(", 0.01") or run.endswith(", 0.1")):
        style = "-" if run.endswith(", 0.1") else "--"
        index = runs.index(run)
        color = f"C{number % len(raw)}"
        if not run.startswith("stop"):
            ratio_axes.plot(ratios[:, index], style, color=color, label=run)
        curvatures = [row["curvature"][-1][index] for row in sweep["history"]]
        curvature_axes.plot(epochs, curvatures, style, color=color)
    ratio_axes.set(title="gradient of the task over that of EM", xlabel="measurement", yscale="log")
    ratio_axes.set_ylim(top=1e5)  # leaves room for the legend
    ratio_axes.legend(ncols=2, loc="upper left")
    curvature_axes.set(title="mean curvature of the free energy (at most 1/2)", xlabel="epoch")
    scores, late = by_arm(curve["values"], "standardized %"), by_arm(curve["values"], "ratio late")
    for arm, of_arm in scores.items():
        spread = max(of_arm.values()) - min(of_arm.values())
        x = late[arm][0.01]
        if x < float("inf"):  # the arm of weight 0 has no gradient of EM
            spread_axes.plot(x, spread, "o", color="C0")
            spread_axes.annotate(arm, (x, spread), fontsize=7, xytext=(3, 3), textcoords="offset points")
    spread_axes.set(
        title="spread over rates by measured ratio", xlabel="ratio at rate 0.01", ylabel="points", xscale="log"
    )
    return figure


def main() -> None:
    sweep, curve = (json.loads(Path(path).read_text()) for path in sys.argv[1:3])
    with figure_style():
        draw(sweep, curve).savefig(sys.argv[3])


if __name__ == "__main__":
    main()
