"""mkdocs hooks: pages and navigation made from the code, and docstrings converted to Markdown."""

import importlib.util
import inspect
import os
import re
import sys
from pathlib import Path

from griffe import Extension
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the package of this checkout, whichever one is installed

import em_lightning  # noqa: E402
from em_lightning.cli.recipes import config_of, docstring, recipes, variants_of  # noqa: E402

LEARN = [
    "index.md",
    "getting-started.md",
    "tutorial.ipynb",
    "notebooks/*",
    "theory.md",
    "when-is-it-em.md",
    "comparison.md",
    "mistakes.md",
]
PROJECT = ["design.md", "contributing.md", "changelog.md"]
HOW_TO = ["how-to/index.md", "how-to/*", "command-line.md"]
EVIDENCE = ["which-part-helps.md", "support.md", "results/*"]
MATHJAX = ("LICENSE", "es5/tex-svg-full.js")  # the SVG output needs no fonts, which browsers do not load from files
KINDS = ("kernels", "competitions", "statistics", "activations", "losses")
UNLISTED = ("_version", "extras", "registry", "cli", "__init__")


class Docstrings(Extension):
    """Convert Sphinx roles to Markdown, and examples to sections."""

    def on_instance(self, *, obj, **arguments):
        """Convert the docstring of an object."""
        if obj.docstring:
            text = obj.docstring.value
            if obj.is_class and any(str(base).endswith("NamedTuple") for base in obj.bases):
                text = re.sub(r"^Args:$", "Attributes:", text, flags=re.MULTILINE)
            text = re.sub(r"^( *)\.\. math::(.*(?:\n\1 +\S.*)*)", display_formula, text, flags=re.MULTILINE)
            text = re.sub(r":math:`(.+?)`", r"\\(\1\\)", text, flags=re.DOTALL)
            text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def display_formula(directive):
    """Return a ``.. math::`` directive as a block between dollar signs."""
    indent, formula = directive[1], " ".join(directive[2].split())
    return f"{indent}$$\n{indent}{formula}\n{indent}$$\n"


def inline_formula(role):
    """Return a ``:math:`` role as a formula in a cell of a table, which may not contain a vertical bar."""
    formula = role[1].replace(r"\|", r"\Vert ").replace("|", r"\vert ")
    return rf"\({formula}\)"


def rooms():
    """Return the names of the packages and modules of em_lightning, its rooms, in the API reference."""
    paths = sorted((ROOT / "em_lightning").glob("*"))
    names = [path.stem for path in paths if path.suffix == ".py" or (path / "__init__.py").is_file()]
    return [name for name in names if name not in UNLISTED]


def recipes_page():
    """Return the page of the recipes: their docstrings and configs."""
    text = "# Recipes\n\n`em-lightning run NAME` runs a recipe, `em-lightning cp NAME` copies it for editing.\n"
    for name, script in recipes().items():
        first, _, rest = docstring(script).partition("\n")
        text += f"\n## {name}\n\n{first}\n\n```text\n{rest.strip()}\n```\n"
        for path in [config_of(script), *variants_of(script).values()]:
            text += f'\n??? note "{path.relative_to(ROOT)}"\n\n    ```yaml\n'
            text += "".join(f"    {line}\n" for line in path.read_text().splitlines()) + "    ```\n"
    return text


def parts_of(kind):
    """Return key, class, arguments and first sentence of each class in a registry."""
    registry, parts = getattr(em_lightning, kind.upper()), []
    for key in registry:
        cls = registry[key]
        parameters = inspect.signature(cls).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        arguments = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in named)
        described = cls.function if kind == "competitions" else cls  # a competition calls a documented function
        sentence = (inspect.getdoc(described) or "").partition("\n")[0]
        sentence = re.sub(r":math:`(.+?)`", inline_formula, sentence)
        parts.append((key, cls, arguments, re.sub(r"(?::\w+:)?`+(.+?)`+", r"\1", sentence)))
    return parts


def parts_page():
    """Return the page of the classes in the registries."""
    text = "# Components by name\n\nUse the key of a component in code, `KERNELS.build('huber')`, or in a config.\n"
    for kind in KINDS:
        text += f"\n## {kind.capitalize()}\n\n| key | class | arguments | description |\n|---|---|---|---|\n"
        for key, cls, arguments, sentence in parts_of(kind):
            room = cls.__module__.split(".")[1]
            link = f"[{cls.__name__}](api/{room}.md)" if cls.__module__.startswith("em_lightning.") else cls.__name__
            code = f"`{arguments}`" if arguments else ""
            text += f"| `{key}` | {link} | {code} | {sentence.replace('|', '&#124;')} |\n"
    return text


def pages_of(entries):
    """Return the paths of pages below docs/; ``folder/*`` stands for all pages of a folder, without repetitions."""
    pages = []
    for entry in entries:
        folder, star, _ = entry.partition("*")
        found = [path for path in sorted((ROOT / "docs" / folder).glob("*")) if path.suffix in (".md", ".ipynb")]
        names = [f"{folder}{path.name}" for path in found] if star else [entry]
        pages += [name for name in names if name not in pages]
    return pages


def on_config(config):
    """Make the navigation: four tabs of pages. Learn also has those pages of docs/ that no list above names."""
    how_to, evidence = pages_of(HOW_TO), pages_of(EVIDENCE)
    learn = [page for page in pages_of([*LEARN, "*"]) if page not in {*PROJECT, *how_to, *evidence}]
    config.nav = [
        {"Learn": [*learn, {"Project": PROJECT}]},
        {"How-to": how_to},
        {"Evidence": evidence},
        {"API": ["parts.md", "recipes.md", {"Reference": [{room: f"api/{room}.md"} for room in rooms()]}]},
    ]
    if "DOCS_VERSIONS" in os.environ:  # set where mike publishes several versions
        config.extra["version"] = {"provider": "mike"}
    return config


def mathjax_files(config):
    """Return the files of MathJax that the site needs, so that it renders formulas without network access."""
    package = importlib.util.find_spec("mathjax")
    if package is None:
        raise PluginError("MathJax is not installed: pip install 'em-lightning[docs]'")
    folder = Path(package.submodule_search_locations[0], "static", "mathjax")
    return [File.generated(config, f"mathjax/{Path(name).name}", abs_src_path=str(folder / name)) for name in MATHJAX]


def on_page_markdown(markdown, page, **arguments):
    """Link the page of effects from every how-to page."""
    if page.file.src_uri.startswith("how-to/"):
        markdown += "\n\nEffects and costs: [Which part helps, and when](../which-part-helps.md).\n"
    return markdown


def on_page_content(html, **arguments):
    """Mark printed tables, which have two spaces between columns, so that their lines are not wrapped."""
    printed = r'(<div class="(?:language-text|[^"]*jp-OutputArea-output)[^>]*>\s*)<pre>(.*?)</pre>'
    return re.sub(printed, mark_columns, html, flags=re.DOTALL)


def mark_columns(printed):
    """Return a printed block with the class ``columns`` on its ``pre`` if it is a table."""
    start, text = printed.groups()
    name = ' class="columns"' if re.search(r"[^\s.] {2,}\S", text) else ""
    return f"{start}<pre{name}>{text}</pre>"


def on_post_page(output, page, config):
    """Load MathJax on pages with formulas only."""
    return output if "arithmatex" in output else re.sub(r"<script src=\S*mathjax\S*></script>", "", output)


def on_files(files, config):
    """Add the pages made from the code."""
    readme = (ROOT / "README.md").read_text().replace("](docs/", "](").replace("](CHANGELOG.md)", "](changelog.md)")
    readme = re.sub(r"<!-- badges -->.*<!-- end of badges -->\n", "", readme, flags=re.DOTALL)
    pages = {
        "index.md": readme,
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
        "recipes.md": recipes_page(),
        "parts.md": parts_page(),
        **{f"api/{room}.md": f"# em_lightning.{room}\n\n::: em_lightning.{room}\n" for room in rooms()},
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    for name in ("CITATION.cff", "LICENSE"):  # linked from the home page
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for file in mathjax_files(config):
        files.append(file)
    return files
