"""Every public name is in a property test, or in a list with the reason why it is not."""

import ast
import importlib
from pathlib import Path

import pytest

from em_lightning import ACTIVATIONS, COMPETITIONS, KERNELS, LOSSES, STATISTICS

ROOMS = [
    "activations",
    "callbacks",
    "competition",
    "data",
    "distributed",
    "kernels",
    "losses",
    "metrics",
    "mixture",
    "modules",
    "operators",
    "surgery",
]
ELSEWHERE = {
    "base classes, which subclasses are tested in place of": (
        "Competition Tempered Kernel EnergyLoss Float64Metric MomentLoss MeanOfItems UnitMoments "
        "PointCloudDataModule SetOperator SurgicalCallback"
    ),
    "parts of the EM loop, which the operators and em_step call": ("BlockFit Covariance Parameters Points prepare"),
    "functions that modules of the registry call, and nothing else": ("entmin hardmin none_of_the_above pairwise topk"),
    "of a whole run under a Trainer, whose tests have one": ("EMAudit RestoreSurgery StepSeeds tensorboard_writers"),
    "data sets with nothing to draw, in tests/test_data*.py and tests/test_images.py": (
        "Digits MNIST PointCloudFolder"
    ),
    "a loader that resumes, in tests/test_data_tables.py": "ResumableLoader",
    "checkpoints, in tests/test_hostile.py and tests/test_surgery.py": "read_plan restore_surgery",
    "hooks and types, in tests/test_surgery.py and tests/test_callbacks_*.py": (
        "Calls Chain LayerwiseLoss SetRefinement Taps UnitAxis surgery_by undo_all unit_axis walk wrap"
    ),
}


def used():
    """Return the names that the property tests use beside importing them, and the classes of whole registries."""
    registries = (ACTIVATIONS, COMPETITIONS, KERNELS, LOSSES, STATISTICS)
    names = {registry[key].__name__ for registry in registries for key in registry}
    for path in Path(__file__).parent.glob("test_properties_*.py"):
        if path.name == Path(__file__).name:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name):
                names.add(node.id)
            elif isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
    return names


def exempt():
    return {name for names in ELSEWHERE.values() for name in names.split()}


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_has_a_property_test(room):
    public = set(importlib.import_module(f"em_lightning.{room}").__all__)
    assert public - used() - exempt() == set()


def test_exemptions_are_needed():
    public = {name for room in ROOMS for name in importlib.import_module(f"em_lightning.{room}").__all__}
    assert exempt() <= public
    assert not exempt() & used()
