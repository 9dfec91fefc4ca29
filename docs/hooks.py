"""mkdocs hooks: pages and navigation made from the code, and docstrings converted to Markdown."""

import inspect
import re
from pathlib import Path

from griffe import Extension
from mkdocs.structure.files import File

import em_lightning
from em_lightning.cli import config_of, docstring, recipes, variants_of

ROOT = Path(__file__).parents[1]
START = ["index.md", "getting-started.md", "tutorial.ipynb", "theory.md", "when-is-it-em.md", "design.md"]
END = ["command-line.md", "mistakes.md", "comparison.md", "contributing.md", "changelog.md"]
KINDS = ("kernels", "competitions", "statistics", "activations", "losses")
UNLISTED = ("_version", "registry", "cli", "__init__")


class Docstrings(Extension):
    """Convert Sphinx roles to Markdown, and examples to sections."""

    def on_instance(self, *, obj, **arguments):
        """Convert the docstring of an object."""
        if obj.docstring:
            text = obj.docstring.value
            if obj.is_class and any(str(base).endswith("NamedTuple") for base in obj.bases):
                text = re.sub(r"^Args:$", "Attributes:", text, flags=re.MULTILINE)
            text = re.sub(r":math:`(.+?)`", r"\\(\1\\)", text, flags=re.DOTALL)
            text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def rooms():
    """Return the names of the packages and modules in the API reference."""
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
        sentence = (inspect.getdoc(cls) or "").partition("\n")[0]
        parts.append((key, cls, arguments, re.sub(r"(?::\w+:)?`+(.+?)`+", r"\1", sentence)))
    return parts


def parts_page():
    """Return the page of the classes in the registries."""
    text = "# Components by name\n\nKeys of the registries, in code (`KERNELS.build(key)`) and in configs.\n"
    for kind in KINDS:
        text += f"\n## {kind.capitalize()}\n\n| key | class | arguments | description |\n|---|---|---|---|\n"
        for key, cls, arguments, sentence in parts_of(kind):
            room = cls.__module__.split(".")[1]
            link = f"[{cls.__name__}](api/{room}.md)" if cls.__module__.startswith("em_lightning.") else cls.__name__
            code = f"`{arguments}`" if arguments else ""
            text += f"| `{key}` | {link} | {code} | {sentence.replace('|', '&#124;')} |\n"
    return text


def title(path):
    """Return the first heading of a page."""
    return re.search(r"^# (.+)$", path.read_text(), re.MULTILINE)[1]


def on_config(config):
    """Make the navigation from the files in docs/."""
    docs = ROOT / "docs"

    def folder(name):
        paths = sorted((docs / name).glob("*.md"), key=lambda path: (path.stem != "index", path.stem))
        return [{title(path): f"{name}/{path.name}"} for path in paths]

    reference = [{room: f"api/{room}.md"} for room in rooms()]
    config.nav = [
        *START,
        {"How to": folder("how-to")},
        {"What is inside": ["recipes.md", "parts.md"]},
        {"Results": folder("results")},
        *END,
        {"API reference": reference},
    ]
    return config


def on_files(files, config):
    """Add the pages made from the code."""
    readme = (ROOT / "README.md").read_text().replace("](docs/", "](").replace("](CHANGELOG.md)", "](changelog.md)")
    readme = re.sub(r"\[(.+?)\]\((?:CITATION.cff|LICENSE)\)", r"\1", readme)
    pages = {
        "index.md": readme,
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
        "recipes.md": recipes_page(),
        "parts.md": parts_page(),
        **{f"api/{room}.md": f"# em_lightning.{room}\n\n::: em_lightning.{room}\n" for room in rooms()},
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files
