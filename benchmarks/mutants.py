"""Mutation testing: apply small faults to the code one at a time and run the tests that cover the changed line.

    make coverage ARGS="--cov-context=test --junitxml=.coverage.xml"
    pip install cosmic-ray
    python benchmarks/mutants.py kernels competition losses --sample 500 --out mutants.jsonl
    python benchmarks/mutants.py --only mutants.jsonl --budget 1000 --out again.jsonl

Mutants are created by cosmic-ray's operators: replaced operators, numbers changed by one, negated conditions, empty
loops and so on. Annotations, docstrings, ``__all__`` and the ``*`` of a signature are not changed. For each mutant, a
fork of a process that has imported the large libraries runs the tests in a copy of the checkout, fastest first. The
mutant is killed if a test fails, or if a test takes more than 20 s and five times its usual time. It survives if the
tests pass within ``--budget`` seconds, as timed by the coverage run. ``--only`` runs the surviving mutants of another
run again.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARITHMETIC, ORDER, BITS = "(Add|Sub|Mul|Div|FloorDiv|Mod|Pow)", "(Eq|NotEq|Lt|LtE|Gt|GtE)", "(BitOr|BitAnd|BitXor)"
# The cosmic-ray operators that are used; those that give invalid code, such as bit shifts of floats, are excluded.
CHOSEN = re.compile(
    f"core/(ReplaceBinaryOperator_({ARITHMETIC}_{ARITHMETIC}|{BITS}_{BITS})|ReplaceUnaryOperator_(USub_UAdd|Delete_Not"
    f"|Delete_Invert)|ReplaceComparisonOperator_({ORDER}_{ORDER}|Is_IsNot|IsNot_Is)|Replace[A-Z][a-z]+With[A-Z][a-z]+"
    "|AddNot|ExceptionReplacer|NumberReplacer|ZeroIterationForLoop)"
)


def mutants_of(file: str) -> Iterator[dict]:
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    nodes = list(ast_nodes(get_ast((ROOT / file).read_text())))
    for name in sorted(filter(CHOSEN.fullmatch, operator_names())):
        operator = get_operator(name)()
        places = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(places):
            yield {"file": file, "operator": name, "occurrence": occurrence, "line": start[0]}


def effective(source: str) -> str:
    """Return a dump of the syntax tree without parts that have no effect at run time."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for field in {"annotation", "returns"} & set(node._fields):
            setattr(node, field, None)
        if isinstance(node, ast.arguments):
            node.args, node.posonlyargs, node.kwonlyargs = [*node.posonlyargs, *node.args, *node.kwonlyargs], [], []
            node.defaults, node.kw_defaults = [*node.defaults, *node.kw_defaults], []
        if isinstance(getattr(node, "body", None), list):
            node.body = [one for one in node.body if not idle(one)]
    return ast.dump(tree)


def idle(node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.If):
        return getattr(node.test, "id", "") == "TYPE_CHECKING"
    return isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"


def mutated(source: str, mutant: dict) -> str | None:
    """Return the mutated source, or None if it does not compile or has no effect."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    code = mutate_code(source, get_operator(mutant["operator"])(), mutant["occurrence"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(code, "mutant", "exec")
    except SyntaxError:
        return None
    return None if effective(code) == effective(source) else code


class Tests:
    """The tests with their durations and the lines that they cover."""

    def __init__(self, coverage_file: Path, report: Path) -> None:
        import coverage

        self.data = coverage.CoverageData(str(coverage_file))
        self.data.read()
        names = {context.rpartition("|")[0] for context in self.data.measured_contexts()} - {""}
        by_report = {name.replace("/", ".").replace(".py::", ".").replace("::", "."): name for name in names}
        self.seconds: dict[str, float] = {}
        for case in xml.etree.ElementTree.parse(report).iter("testcase"):
            name = by_report.get(f"{case.get('classname')}.{case.get('name')}")
            if name is not None:
                self.seconds[name] = float(case.get("time") or 0)

    def of(self, file: str, line: int) -> list[str]:
        """Return the tests, fastest first, that cover the statement at a line, or else its function, or the file."""
        lines = {
            number: {name for context in contexts if (name := context.rpartition("|")[0]) in self.seconds}
            for number, contexts in self.data.contexts_by_lineno(str(ROOT / file)).items()
        }
        for span in spans(ast.parse((ROOT / file).read_text()), line):
            found = set().union(*(lines.get(number, set()) for number in span))
            if found:
                return sorted(found, key=lambda name: (self.seconds[name], name))
        return []


def spans(tree: ast.Module, line: int) -> Iterator[range]:
    around = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and node.lineno <= line <= node.end_lineno]
    around.sort(key=lambda node: node.end_lineno - node.lineno)
    for node, outer in zip(around, [*around[1:], tree], strict=True):
        if isinstance(node, ast.ClassDef):
            break
        body = getattr(node, "body", None)
        if isinstance(node, ast.FunctionDef):  # a default value is evaluated once and used in the body
            yield range(body[0].lineno, node.end_lineno + 1)
        elif body or not isinstance(outer, (ast.ClassDef, ast.Module)):
            yield range(node.lineno, max(node.lineno, body[0].lineno - 1 if body else node.end_lineno) + 1)
    yield range(10**6)


class Chosen:
    """A pytest plugin that runs selected tests in order with a limit of processor time and records the last test."""

    def __init__(self, names: list[str], seconds: dict[str, float], told: Path) -> None:
        self.order = {name: place for place, name in enumerate(names)}
        self.seconds, self.told = seconds, told

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    def pytest_runtest_logstart(self, nodeid):
        limit = time.process_time() + max(20.0, 5 * self.seconds[nodeid])
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), resource.RLIM_INFINITY))
        self.told.write_text(nodeid)


def run(copy: Path, names: list[str], seconds: dict[str, float]) -> tuple[str, str]:
    """Run tests in a forked process; return the outcome and the last test that ran."""
    told = copy.parent / "told"
    told.write_text("")
    child = os.fork()
    if child == 0:
        code = 3
        try:
            os.setsid()
            output = os.open(copy.parent / "log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(output, 1), os.dup2(output, 2)
            os.chdir(copy)
            sys.path.insert(0, str(copy))
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            resource.setrlimit(resource.RLIMIT_AS, (14 << 30, 14 << 30))  # a mutant may allocate a tensor of any shape
            signal.alarm(1800)
            import pytest

            options = ["-x", "-q", "-p", "no:xdist", "-p", "no:cov", "-W", "ignore:Module already imported"]
            files = sorted({name.partition("::")[0] for name in names})
            code = pytest.main([*options, *files], plugins=[Chosen(names, seconds, told)])
        finally:
            os._exit(int(code))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.killpg(child, signal.SIGKILL)  # child processes of a killed test
    except ProcessLookupError:
        pass
    outcomes = {0: "survived", 1: "killed", 2: "killed while importing", -signal.SIGXCPU: "killed by time"}
    outcomes[-signal.SIGALRM] = "killed by time"
    return outcomes.get(status, "killed by a crash" if status < 0 else f"no result ({status})"), told.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", help="folders of em_lightning")
    parser.add_argument("--sample", type=int, help="size of a random sample of the mutants")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of tests per mutant")
    parser.add_argument("--only", type=Path, help="run the surviving mutants of this file again")
    parser.add_argument("--coverage", type=Path, default=ROOT / ".coverage", help="data of the coverage run")
    parser.add_argument("--report", type=Path, default=ROOT / ".coverage.xml", help="its JUnit report")
    parser.add_argument("--out", type=Path, required=True, help="output file, one JSON line per mutant")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    import cosmic_ray.plugins  # noqa: F401
    import lightning  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.mixture  # noqa: F401
    import torch
    import torch._dynamo
    import torch_geometric.nn  # noqa: F401

    torch.set_num_threads(1)  # threads do not survive a fork
    tests = Tests(arguments.coverage, arguments.report)
    if arguments.only:
        lines = map(json.loads, arguments.only.read_text().splitlines())
        mutants = [line for line in lines if line["outcome"] == "survived"]
    else:
        files = [path for each in arguments.packages for path in sorted((ROOT / "em_lightning" / each).rglob("*.py"))]
        mutants = [mutant for file in files for mutant in mutants_of(str(file.relative_to(ROOT)))]
        random.Random(arguments.seed).shuffle(mutants)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, open(arguments.out, "a") as out:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "lightning_logs", "site"))
        for mutant in mutants[: arguments.sample]:
            source = (ROOT / mutant["file"]).read_text()
            code = mutated(source, mutant)
            if code is None:
                continue
            names, spent = [], 0.0
            for name in tests.of(mutant["file"], mutant["line"]):
                spent += tests.seconds[name]
                if spent <= arguments.budget or not names:
                    names.append(name)
            (copy / mutant["file"]).write_text(code)
            mutant["outcome"], mutant["test"] = run(copy, names, tests.seconds) if names else ("survived", "no test")
            (copy / mutant["file"]).write_text(source)
            pairs = zip(source.splitlines(), code.splitlines(), strict=False)
            mutant["change"] = next(([a.strip(), b.strip()] for a, b in pairs if a != b), [])
            counts[mutant["outcome"]] += 1
            print(json.dumps(mutant), file=out, flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
