"""Build the wheel, install it outside the checkout, run its commands, and import it with PyTorch and numpy alone."""

import importlib.util
import itertools
import os
import re
import statistics
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path

import pytest

from em_lightning.cli.recipes import recipes
from em_lightning.extras import LIBRARY_AND_EXTRA, ExtraChecker

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [*PIP, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    subprocess.run(command, check=True, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel):
    folder = wheel.parent / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)], check=True)
    return folder


@pytest.fixture
def run(site, tmp_path):
    def run(*command):
        environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_wheel_contains_types_recipes_and_configs(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"em_lightning"}
    assert "em_lightning/py.typed" in names
    for name in recipes():
        assert f"em_lightning/recipes/{name}.py" in names and f"em_lightning/configs/{name}.yaml" in names
    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs == {name.removeprefix("em_lightning/") for name in names if name.endswith(".yaml")}


def test_the_installed_command_lists_copies_and_runs_recipes(run, site, tmp_path):
    command = site / "bin" / "em-lightning"
    assert "point_cloud_gmm" in run(command, "ls")
    copied = run(command, "cp", "point_cloud_gmm", "mine").split()
    assert copied[0] == "mine/point_cloud_gmm.py" and all((tmp_path / name).is_file() for name in copied)
    fast = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]
    run(command, "run", "point_cloud_gmm", *fast)
    run(command, "run", "mine/point_cloud_gmm.py", "--model.num_components=4", *fast)


def test_import_loads_only_torch_in_under_0_3_s(run, site):
    code = """
import time, torch
start = time.perf_counter()
import em_lightning
em_lightning.KERNELS
seconds = time.perf_counter() - start
import sys
print(em_lightning.__file__, seconds, *{"lightning", "pytorch_lightning", "torch_geometric"} & {*sys.modules})
"""
    file, *_ = printed = run("-c", code).split()
    assert Path(file).is_relative_to(site) and len(printed) == 2, printed
    assert statistics.median(float(run("-c", code).split()[1]) for _ in range(3)) < 0.3


def requirements(wheel):
    """Return the distributions that the wheel requires, by extra; None for the core."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(archive.read(name).decode())
    found = {}
    for line in fields.get_all("Requires-Dist"):
        extra = re.search(r"extra == .(\w+)", line)
        found.setdefault(extra and extra[1], set()).add(re.match(r"[\w-]+", line)[0])
    return found


def test_the_core_requires_torch_and_numpy_and_each_extra_its_library(wheel):
    found = requirements(wheel)
    assert found[None] == {"torch", "numpy"}
    distributions = {"sklearn": "scikit-learn", "torch_geometric": "torch-geometric"}
    for library, extra in LIBRARY_AND_EXTRA.values():
        assert distributions.get(library, library) in found[extra]
    assert found["all"] == set.union(*(found[extra] for _, extra in LIBRARY_AND_EXTRA.values()))


def closure(names):
    """Return the installed distributions among the given ones and their requirements."""
    found, pending = {}, [*names]
    while pending:
        name = pending.pop()
        if name not in found:
            try:
                found[name] = distribution(name)
            except ImportError:
                continue  # required on another platform or by an extra only
            needed = [line for line in found[name].requires or [] if "extra ==" not in line]
            pending += [re.match(r"[\w.-]+", line)[0] for line in needed]
    return found.values()


@pytest.fixture(scope="module")
def core_only(site, wheel):
    """Return a function that runs code where only the wheel and the distributions that its core requires exist."""
    folder = site.parent / "core"
    folder.mkdir()
    for each in closure(requirements(wheel)[None]):
        for top in {file.parts[0] for file in each.files} - {"..", "__pycache__"}:
            if not (folder / top).exists():  # several distributions may have modules in one namespace package
                (folder / top).symlink_to(each.locate_file(top))

    def run(code):
        code = f"import sys; sys.path += {[str(site), str(folder)]}\n{code}"
        return subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)

    return run


def test_the_core_runs_the_first_example_of_the_readme_without_a_warning(core_only):
    code, printed = re.findall(r"```(?:python|text)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[:2]
    done = core_only(code + "import em_lightning.surgery")
    assert done.returncode == 0 and (done.stdout, done.stderr) == (printed, "")


@pytest.mark.parametrize("module", LIBRARY_AND_EXTRA)
def test_a_missing_library_is_an_error_that_names_the_extra(core_only, module):
    prefixes = itertools.accumulate(module.split("."), "{}.{}".format)  # packages are imported before their modules
    first = next(name for name in prefixes if name in LIBRARY_AND_EXTRA)
    library, extra = LIBRARY_AND_EXTRA[first]
    done = core_only(f"import em_lightning.{module}")
    message = f"ImportError: em_lightning.{first} needs {library}: pip install 'em-lightning[{extra}]'"
    assert done.stderr.splitlines()[-1] == message


def test_a_missing_torch_is_an_error_without_an_empty_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"em_lightning.losses needs torch: pip install 'em-lightning'$"):
        ExtraChecker.find_spec("em_lightning.losses")


def test_the_command_line_names_the_extra_without_a_traceback(core_only):
    done = core_only("from em_lightning.cli import main; sys.exit(main(['run', 'point_cloud_gmm']))")
    assert done.returncode == 2 and done.stderr.startswith("em-lightning: ") and done.stderr.count("\n") == 1
    assert "pip install 'em-lightning[lightning]'" in done.stderr
