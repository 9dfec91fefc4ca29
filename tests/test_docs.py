"""Run every code block of the README and the documentation.

The output of a Python block, or the error that it raises, is compared with the following ``text`` block. Commands run
unchanged, with two exceptions: ``em-lightning run`` runs with ``fast_dev_run`` and without ``--seeds``, and commands
that install, build or serve something are only checked, because other tests or CI run them. A block below
``<!-- not run: REASON -->`` is skipped.
"""

import contextlib
import doctest
import io
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from em_lightning import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(
    r'^(?P<skip><!-- not run: .+ -->\n)?```(?P<language>\w+)(?: title="(?P<title>.+?)")?\n(?P<code>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)
FAST = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]
PLUGIN = DOCS / "how-to" / "add-a-kernel.md"  # run by tests/test_kernels_plugin.py
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
TETRAHEDRON = "OFF\n4 4 0\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n3 0 1 3\n3 0 2 3\n3 1 2 3\n"


class Block(NamedTuple):
    language: str
    code: str
    title: str | None
    skip: bool
    line: int


def blocks_of(page):
    text = page.read_text()
    found = [
        Block(m["language"], m["code"], m["title"], bool(m["skip"]), text[: m.start()].count("\n") + 1)
        for m in FENCE.finditer(text)
    ]
    assert text.count("```") == 2 * len(found), f"{page.name}: a block is indented or has no language"
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change to a folder with meshes, an archive in the format of GeometricShapes, a model and a finished run."""
    import lightning

    from em_lightning.modules import PointCloudGMM

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for variable in ("LOGGER", "ENABLE_PROGRESS_BAR", "ENABLE_MODEL_SUMMARY"):
        monkeypatch.setenv(f"PL_TRAINER_{variable}", "False")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "MY_MESHES").mkdir()
    for i in range(5):
        (tmp_path / "MY_MESHES" / f"mesh{i}.off").write_text(TETRAHEDRON)
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        for split in ("train", "test"):
            for name in ("tetrahedron", "pyramid"):
                archive.writestr(f"raw/{name}/{split}/{name}.off", TETRAHEDRON)
    (tmp_path / "networks.py").write_text(
        "import torch\n\nclass MyModel(torch.nn.Linear):\n    def __init__(self):\n        super().__init__(784, 10)\n"
    )
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, max_steps=0, accelerator="cpu")
    trainer.strategy.connect(PointCloudGMM())
    trainer.save_checkpoint(tmp_path / "lightning_logs/point_cloud_gmm/version_0/checkpoints/last.ckpt")
    return tmp_path


def in_process(arguments):
    """Run the command line, in a subprocess if it starts processes itself; return its exit code and output."""
    if any("strategy" in argument for argument in arguments):
        command = [sys.executable, "-m", "em_lightning.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = end.code
    return code, printed.getvalue()


def without_seeds(arguments):
    joined = re.sub(r"--seeds[= ]\S+", "", shlex.join(arguments))
    return shlex.split(joined)


def run_command(line):
    """Run or check one line of a shell block and return its output."""
    words = shlex.split(line, comments=True)
    program, arguments = Path(words[0]).name, words[1:]
    if program == "em-lightning":
        if arguments[0] == "run" and "--help" not in arguments and "--print_config" not in arguments:
            arguments = [*without_seeds(arguments), *FAST]
        code, printed = in_process(arguments)
        return printed if code == 0 else [line for line in printed.splitlines() if line.startswith("em-lightning")][-1]
    if program == "make":
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "tensorboard":
        command = [sys.executable, "-m", "tensorboard.main", "--inspect", *arguments]
        assert subprocess.run(command, capture_output=True).returncode == 0
    elif program == "torchrun":
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout
    elif words == ["python", "docs/make_images.py"]:
        subprocess.run([sys.executable, ROOT / "docs" / "make_images.py", "pictures"], check=True)
        assert Path("pictures/activations.png").stat().st_size > 10_000
    elif words[:2] == ["pip", "install"]:
        extra = re.fullmatch(r"(?:em-lightning|\.)(?:\[(\w+)\])?", words[2])[1]
        assert extra is None or f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(), line
    elif words == [".ci/run"]:
        pass  # run by CI
    else:
        raise AssertionError(f"no check is implemented for the command {line!r}")
    return ""


def run_python(code, names, name):
    """Execute a block and return its output, followed by the expected error, if any."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(code, name, "exec"), names)
        except Exception as error:
            if not isinstance(names.get("expected"), str) or "Error: " not in names["expected"]:
                raise
            return f"{printed.getvalue()}{type(error).__name__}: {error}"
    return printed.getvalue()


@pytest.mark.filterwarnings(
    "ignore:.*You defined a `validation_step` but have no `val_dataloader`",
    "ignore:.*args parameter is intended",
    "ignore:.*`weights_only` was not set",
    "ignore:Checkpoint directory .* exists and is not empty",
)
@pytest.mark.parametrize("page", [page for page in PAGES if page != PLUGIN], ids=lambda page: page.stem)
def test_page(page, folder):
    if page.stem == "export-a-model":
        pytest.importorskip("onnxruntime")
    blocks = blocks_of(page)
    names = {}
    if page.parent.name == "how-to" and page.stem != "index" or page.stem == "mistakes":
        run_python(blocks_of(DOCS / "how-to" / "index.md")[0].code, names, "index.md")
    for block, after in zip(blocks, [*blocks[1:], None], strict=False):
        names["expected"] = after.code if after and after.language == "text" and not after.title else None
        if block.skip:
            continue
        if block.title:
            Path(block.title).parent.mkdir(exist_ok=True)
            Path(block.title).write_text(block.code)
        elif block.language == "python":
            printed = run_python(block.code, names, f"{page.name}:{block.line}")
        elif block.language == "sh":
            lines = [line for line in block.code.replace("\\\n", "").splitlines() if line.partition("#")[0].strip()]
            printed = "".join(run_command(line) for line in lines)
        elif block.language != "text":
            raise AssertionError(f"{page.name}:{block.line}: blocks in {block.language} are not run; add a title")
        if names["expected"] is not None and block.title is None:
            same = doctest.OutputChecker().check_output(names["expected"], printed, OPTIONS)
            assert same, f"{page.name}:{block.line}: expected\n{names['expected']}\ngot\n{printed}"


def test_every_mistake_has_a_message():
    text = (DOCS / "mistakes.md").read_text()
    sections = re.split(r"^\*\*(\d+)\. ", text, flags=re.MULTILINE)[1:]
    assert [int(number) for number in sections[::2]] == list(range(1, len(sections) // 2 + 1)) and len(sections) >= 50
    assert all("```text\n" in section for section in sections[1::2])


def test_every_torchrun_with_restarts_gets_a_new_store():
    """Otherwise restarted ranks may find the addresses of the ended ones (pytorch/pytorch#135712)."""
    blocks = [block.code for page in PAGES for block in blocks_of(page) if "--max-restarts" in block.code]
    assert blocks and all("export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\ntorchrun " in code for code in blocks)


PROGRAMS = ("em-lightning", "python", "tensorboard", "make")
COMMANDS = [
    pytest.param(page, " ".join(code.split()), id=f"{page.stem}: {code[:60]}")
    for page in PAGES
    for code in re.findall(r"`([^`]+)`", FENCE.sub("", page.read_text()))
    if Path(code.split()[0]).name in PROGRAMS and len(code.split()) > 1
]


@pytest.mark.parametrize("page, command", COMMANDS)
def test_inline_commands_are_valid(page, command, folder):
    """The recipe, config, keys and options of a command inside a sentence must exist."""
    words = shlex.split(command)
    program, arguments = Path(words[0]).name, words[1:]
    if program == "em-lightning" and arguments[0] == "run":
        if not arguments[1:] or arguments[1].isupper():
            return  # a mention of the command without arguments
        arguments = [str(ROOT / word) if word.startswith("benchmarks/") else word for word in arguments]
        code, printed = in_process([*without_seeds(arguments), "--print_config"])
        assert code == 0, printed
    elif program == "em-lightning":
        assert arguments[0] in ("ls", "cp", "audit", "ls | cp | run | audit")
    elif program == "make":
        run_command(command)
    elif program == "python" and arguments[0].startswith(("benchmarks/", "tests/", "-m")):
        script = arguments[1].replace(".", "/") + ".py" if arguments[0] == "-m" else arguments[0]
        source = (ROOT / script.replace("em_lightning/cli.py", "em_lightning/cli/__main__.py")).read_text()
        for option in re.findall(r" --([\w-]+)", command):
            assert option in source, f"{script} has no option {option}"
    else:
        made = [f"python docs/make_{name}.py" for name in ("images", "howto_images", "tables")]
        assert command in made or program == "tensorboard"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_point_to_existing_files(page):
    made = {"recipes.md", "parts.md", "changelog.md", "api"}  # generated by docs/hooks.py, checked by make docs
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http", "../../actions/")) and target.removeprefix("../").split("/")[0] not in made:
            assert (page.parent / target).exists(), target


def test_the_generated_table_of_the_readme_is_up_to_date():
    sys.path.insert(0, str(DOCS))
    try:
        from make_tables import README, updated
    finally:
        sys.path.remove(str(DOCS))
    assert README.read_text() == updated(README.read_text()), "run python docs/make_tables.py"


def test_the_tests_of_the_support_table_exist():
    text = (DOCS / "support.md").read_text()
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert named and not [name for path, name in named if f"def {name}(" not in (ROOT / path).read_text()]
    table, _, listed = text.partition("| platform |")
    used = {int(number) for number in re.findall(r"\((\d+)\)", table)}
    assert used == {int(number) for number in re.findall(r"^\| (\d+) \|", listed, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_code_fits_into_the_page(page):
    long = [(b.line, line) for b in blocks_of(page) if b.language == "python" for line in b.code.splitlines()]
    assert not [(number, line) for number, line in long if len(line) > 88]


NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")


def decimals_in(text):
    """Return the numbers of a text that have decimals, with their signs, as printed."""
    return [number for number in NUMBER.findall(text) if "." in number]


def figures_of(text):
    """Yield each row or paragraph of a page, its links to results, and its numbers with decimals, as printed."""
    prose = re.sub(r"Python 3\.\d+|`[^`]*`", "", FENCE.sub("", text))
    for part in re.split(r"\n\n|\n(?=\|)", prose):
        links = re.findall(r"\]\((docs/results/\w+\.md)", part)
        numbers = decimals_in(re.sub(r"\]\([^)]*\)", "]", part))
        if numbers:
            yield part, links, numbers


def is_among(number, text):
    """Return whether a text has a number, with at least as many decimals, that rounds to a printed one."""
    places = len(number.partition(".")[2])
    half = 0.5 * 10.0**-places + 1e-9
    others = (other for other in decimals_in(text) if len(other.partition(".")[2]) >= places)
    return any(abs(float(number) - float(other)) <= half for other in others)


def missing_of(numbers, links):
    """Return the numbers that are missing in the section of the linked pages that has most of them."""
    sections = [section for link in links for section in re.split(r"\n(?=#)", (ROOT / link).read_text())]
    return min(([number for number in numbers if not is_among(number, section)] for section in sections), key=len)


README_FIGURES = [*figures_of((ROOT / "README.md").read_text())]


@pytest.mark.parametrize("part, links, numbers", README_FIGURES, ids=lambda x: "")
def test_every_figure_of_the_readme_is_in_the_results_that_its_row_links(part, links, numbers):
    """docs/index.md is the README."""
    assert links, f"no link to docs/results in: {part}"
    missing = missing_of(numbers, links)
    assert not missing, f"{missing} not in one section of {links}: {part}"


def test_a_wrong_figure_is_found():
    ((_, links, numbers),) = figures_of("`0.5` under Python 3.11\n\n| [a](docs/results/robust.md) | 1.0304 | 9 % |\n")
    assert links == ["docs/results/robust.md"] and numbers == ["1.0304"]
    assert is_among("1.030", "| 1.0304 | 23 |") and not is_among("1.031", "| 1.0304 |") and not is_among("23.0", "23")
    assert not is_among("0.50", "0.5") and not is_among("-0.5", "0.5")
    # Some changed figures are elsewhere in the same section.
    found = []
    for _, links, numbers in README_FIGURES:
        for i, number in enumerate(numbers):
            places = len(number.partition(".")[2])
            for step in (1, -1, 3, 10):
                changed = f"{float(number) + step * 10.0**-places:.{places}f}"
                found.append(bool(missing_of([*numbers[:i], changed, *numbers[i + 1 :]], links)))
    assert sum(found) > 0.75 * len(found)
