"""Runs of the recipes that are killed and started again end where a run ends that was left alone, bit for bit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import em_lightning

ROOT = Path(em_lightning.__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
LINE = r"([\w]+): (\d+) kills .* all end bitwise the same, (\w+)"


def kills(*arguments, seed=0):
    """Return, for each case of benchmarks/kills.py, how many kills fell and what its weights and results come to."""
    script = ROOT / "benchmarks" / "kills.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(seed)}
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: (int(fallen), digest) for name, fallen, digest in re.findall(LINE, done.stdout)}


@pytest.mark.slow
def test_a_run_that_is_killed_ends_where_an_uninterrupted_one_does():
    (found,) = kills("gaussian_mixture", "--kills=2").values()
    assert found[0] == 2


@pytest.mark.nightly
def test_every_recipe_is_killed_twenty_times():
    found = kills("--kills=20")
    assert all(any(name.startswith(recipe) for name in found) for recipe in RECIPES)
    assert all(fallen == 20 for fallen, _ in found.values())


@pytest.mark.nightly
def test_the_same_seed_gives_the_same_weights_in_every_process():
    first, second = kills("--kills=0", seed=1), kills("--kills=0", seed=2)
    assert first == second and all(any(name.startswith(recipe) for name in first) for recipe in RECIPES)
