"""Print the table of projects and checks, and the time that they take: ``python tests/projects/table.py``.

Runs test_projects.py in one process. A check of a project holds if its test passes. "swap", "insert", "layers" and
"all" are the four runs of test_project, which each fit, resume, load, restore, predict, test and undo.
"""

import sys
import time
from pathlib import Path

import pytest
import rich.console
import rich.table

COLUMNS = {
    "test_project": "",
    "test_audit_leaves_everything_as_it_was": "audit, ",
    "test_wrong_uses_are_named": "wrong uses",
}


class Results:
    """Collects outcomes by project and check."""

    def __init__(self):
        self.outcomes = {}
        self.others = {}

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        test, _, parameters = report.location[2].partition("[")
        project, _, mode = parameters.rstrip("]").partition("-")
        if test in COLUMNS and project:
            self.outcomes.setdefault(project, {})[COLUMNS[test] + mode] = report.outcome
        else:
            self.others[test] = report.outcome


def main():
    results, start = Results(), time.perf_counter()
    folder = Path(__file__).parent
    code = pytest.main(["-p", "no:terminal", str(folder / "test_projects.py")], [results])
    checks = list(dict.fromkeys(check for outcomes in results.outcomes.values() for check in outcomes))
    table = rich.table.Table("project", *checks)
    for project, outcomes in results.outcomes.items():
        table.add_row(project, *(outcomes.get(check, "-").replace("passed", "held") for check in checks))
    rich.console.Console(width=120).print(table)
    held = [outcome == "passed" for outcomes in results.outcomes.values() for outcome in outcomes.values()]
    print(f"{sum(held)} of {len(held)} checks held in {len(results.outcomes)} projects, ", end="")
    seconds = f"{time.perf_counter() - start:.0f} s, {time.process_time():.0f} s of processor time"
    print(f"{seconds}; others: {results.others}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
