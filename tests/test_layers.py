"""The order of the rooms: each imports only from those before it, and the top level loads no heavy library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import em_lightning
import em_lightning.testing

PACKAGE = Path(em_lightning.__file__).parent
ORDER = [
    "_version",
    "files",
    "checkpoints",
    "registry",
    "distributed",
    "kernels",
    "competition",
    "statistics",
    "activations",
    "losses",
    "mixture",
    "operators",
    "estimator",
    "surgery",
    "scope",
    "metrics",
    "plots",
    "results",
    "data",
    "modules",
    "callbacks",
    "testing",
    "cli",
]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.startswith("em_lightning."):
                yield name.split(".")[1]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_before_it(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    assert room in ORDER, f"{room} has no place in the order of the rooms"
    later = {name for name in imports(path) if ORDER.index(name) > ORDER.index(room)}
    assert not later, f"{path.name} in {room} imports from later rooms: {', '.join(sorted(later))}"


def test_files_of_surgery_import_only_from_those_before_them():
    order = ["select", "hooks", "wrappers", "record", "edit", "functional", "replay", "em", "layerwise"]
    for place, name in enumerate(order):
        for node in ast.walk(ast.parse((PACKAGE / "surgery" / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("em_lightning.surgery"):
                assert node.module.split(".")[2] in order[:place], f"{name} imports {node.module}"


def test_the_top_level_loads_neither_lightning_nor_pyg():
    code = "import sys, em_lightning; em_lightning.EMOperator; em_lightning.KERNELS; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("'lightning'", "'pytorch_lightning'", "'torch_geometric'", "'matplotlib'", "'sklearn'"):
        assert heavy not in modules


def test_every_public_name_resolves():
    for name in em_lightning.__all__:
        assert getattr(em_lightning, name) is not None
    assert dir(em_lightning) == sorted(em_lightning.__all__)
    with pytest.raises(AttributeError, match="'Softmin'.*softmin"):
        _ = em_lightning.Softmin


def test_every_contract_is_offered():
    for name in em_lightning.testing.__all__:
        assert getattr(em_lightning.testing, name).__module__.startswith("em_lightning.testing.")
    with pytest.raises(AttributeError, match="'Contract'"):
        _ = em_lightning.testing.Contract
