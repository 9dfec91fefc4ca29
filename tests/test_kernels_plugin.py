"""Install the package of docs/how-to/add-a-kernel.md with pip and run its tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from em_lightning.testing import KernelContract

ROOT = Path(__file__).parents[1]


def run(*command, cwd, path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Return the folder with the page's files, and the one that its package is installed in."""
    folder = tmp_path_factory.mktemp("package")
    page = (ROOT / "docs" / "how-to" / "add-a-kernel.md").read_text()
    for name, text in re.findall(r'^```\w+ title="(.+?)"\n(.*?)^```$', page, flags=re.DOTALL | re.MULTILINE):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    site = folder / "site"
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    run("-m", "pip", "install", *options, "--target", str(site), ".", cwd=folder, path=[])
    return folder, site


def test_the_kernel_is_found_by_name_in_a_fresh_process(package):
    folder, site = package
    output = run("use.py", cwd=folder, path=[site, ROOT])
    expected = re.search(r"# (\[\[.*\]\])", (folder / "use.py").read_text())
    assert output.strip() == expected[1]


def test_the_robust_kernel_fits(package):
    folder, _ = package
    output = run("exponential_power.py", cwd=folder, path=[ROOT])
    expected = re.search(r"# (torch.Size.*)", (folder / "exponential_power.py").read_text())
    assert output.strip() == expected[1]


def test_without_the_package_the_name_is_unknown(package):
    folder, _ = package
    code = "from em_lightning import KERNELS; print('cubic' in KERNELS, 'gaussian' in KERNELS)"
    assert run("-c", code, cwd=folder, path=[ROOT]).split() == ["False", "True"]


def test_the_contract_tests_pass(package):
    folder, site = package
    output = run("-m", "pytest", "tests", "-q", "-p", "no:cacheprovider", cwd=folder, path=[site, ROOT])
    count = sum(name.startswith("test_") for name in dir(KernelContract))
    assert re.search(rf"^{count} passed", output, flags=re.MULTILINE), output
