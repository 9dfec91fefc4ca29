"""The structure of the package: order of the rooms, no import cycles, lines of code, no private attributes."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import em_lightning

PACKAGE = Path(em_lightning.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Rooms in the order in which data flows; each imports only from rooms above it.
ORDER = [
    "_version",
    "extras",
    "checks",
    "files",
    "registry",
    "distributed",
    "checkpoints",
    "kernels",
    "competition",
    "statistics",
    "activations",
    "losses",
    "mixture",
    "operators",
    "surgery",
    "scope",
    "metrics",
    "plots",
    "data",
    "modules",
    "callbacks",
    "estimator",
    "testing",
    "studies",
    "cli",
]
MAX_LINES = {"file": 400, "package without studies": 16_500, "package": 19_000}
# Private attributes of other libraries that are used, and why no public one exists.
EXCEPTIONS = {
    "_python_dispatch": "torch has no public name for TorchDispatchMode, which sees the operations below autograd",
}
# Names with an underscore that the standard library documents: of named tuples, os._exit and sys._current_frames.
PUBLIC = {"_replace", "_asdict", "_fields", "_make", "_field_defaults", "_exit", "_current_frames"}


def name_of(path):
    """Return the dotted name of a file of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def room_of(name):
    return name.split(".")[1] if "." in name else ""


def imports(path, lazy=True):
    """Return the modules of the package that a file imports when it is loaded, with those inside functions if lazy."""
    pending, found = [ast.parse(path.read_text())], set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports are not followed"
            # A name may be a module: from em_lightning import surgery.
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys() or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if lazy or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pending += ast.iter_child_nodes(node)
    return {name for name in found if name in MODULES} - {name_of(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_above_it(path):
    room = room_of(name_of(path))
    if not room:
        return  # the top level, which resolves its names lazily
    assert room in ORDER, f"{room} has no place in the order of the rooms"
    others = {room_of(name) for name in imports(path)} - {room}
    if room == "cli":
        others -= {""}
    assert "" not in others, f"{path.relative_to(PACKAGE)} imports from the top level"
    below = {name for name in others if ORDER.index(name) > ORDER.index(room)}
    assert not below, f"{path.relative_to(PACKAGE)} imports from {', '.join(sorted(below))}, below {room}"


def test_there_is_no_import_cycle():
    """Count imports inside functions too, except in the command line, which imports the code of a command lazily."""
    graph = {name: imports(path, lazy=room_of(name) != "cli") for name, path in MODULES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_only_the_command_line_imports_studies():
    users = {room_of(name) for name, path in MODULES.items() for other in imports(path) if room_of(other) == "studies"}
    assert users <= {"studies", "cli"}
    loaded = {other for name, path in MODULES.items() if room_of(name) == "cli" for other in imports(path, lazy=False)}
    assert "studies" not in map(room_of, loaded)


def lines_of(path):
    return len(path.read_text().splitlines())


def test_the_package_keeps_its_budget_of_lines():
    long = {str(path.relative_to(PACKAGE)): lines_of(path) for path in FILES if lines_of(path) > MAX_LINES["file"]}
    assert not long
    studies = sum(lines_of(path) for path in FILES if room_of(name_of(path)) == "studies")
    total = sum(map(lines_of, FILES))
    assert total - studies <= MAX_LINES["package without studies"] and total <= MAX_LINES["package"]


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name.strip("_") and name not in PUBLIC


def own_names():
    """Return the private names that the package defines: functions, classes, attributes, parameters, variables."""
    names = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return set(filter(is_private, names)) | {"_version"}


def private_uses(path, own):
    """Yield line and name of every private attribute, import or ``getattr`` that the package does not define."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            if not module.startswith("em_lightning"):
                dotted = [module, *(alias.name for alias in node.names)]
                names = [part for name in dotted for part in name.split(".")]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "hasattr",
            "setattr",
            "delattr",
        ):
            names = [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
        for name in names:
            if is_private(name) and name not in own:
                yield node.lineno, name


def test_no_private_attribute_of_another_library_is_used():
    own = own_names()
    found = [(path, line, name) for path in FILES for line, name in private_uses(path, own)]
    wrong = [f"{path.relative_to(PACKAGE)}:{line} {name}" for path, line, name in found if name not in EXCEPTIONS]
    assert not wrong, "\n".join(wrong)
    assert EXCEPTIONS.keys() <= {name for _, _, name in found}, "an exception is no longer needed"


def test_the_top_level_loads_neither_lightning_nor_pyg():
    code = "import sys, em_lightning; em_lightning.EMOperator; em_lightning.KERNELS; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("'lightning'", "'pytorch_lightning'", "'torch_geometric'", "'matplotlib'", "'sklearn'"):
        assert heavy not in modules


def test_callbacks_and_modules_do_not_need_the_plots():
    code = "import sys, em_lightning.callbacks, em_lightning.modules; print('em_lightning.plots' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_the_command_line_starts_without_torch():
    code = "import sys, em_lightning.cli; print({'torch', 'lightning'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_public_name_resolves():
    for name in em_lightning.__all__:
        assert getattr(em_lightning, name) is not None
    assert dir(em_lightning) == sorted(em_lightning.__all__)
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    names = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names == {*em_lightning.__all__}
    with pytest.raises(AttributeError, match="'Softmin'.*softmin"):
        _ = em_lightning.Softmin


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_generators_are_forked_for_named_devices(path):
    """A bare ``fork_rng()`` saves the generators of all GPUs of a node, and so does ``isolate_rng()``."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    for call in calls:
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        given = {keyword.arg for keyword in call.keywords}
        if name == "fork_rng":
            assert call.args or "devices" in given, f"{path}:{call.lineno}"
        if name == "isolate_rng":
            assert call.args or "include_cuda" in given, f"{path}:{call.lineno}"
        assert name not in ("get_rng_state_all", "set_rng_state_all", "manual_seed_all"), f"{path}:{call.lineno}"
