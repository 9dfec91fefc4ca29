"""Optional dependencies: an import that needs one that is not installed raises an error that names the extra."""

import importlib.util

_USE_LIGHTNING = ("callbacks", "checkpoints", "cli.recipe", "data", "metrics", "modules", "scope", "studies")
_USE_MATPLOTLIB = ("layer_report", "mixture_report", "report", "style")
# Module of em_lightning: (library that it imports, EXTRA of ``pip install em-lightning[EXTRA]`` that installs it).
LIBRARY_AND_EXTRA = {
    **dict.fromkeys(_USE_LIGHTNING, ("lightning", "lightning")),
    "estimator": ("sklearn", "sklearn"),
    "operators.aggregation": ("torch_geometric", "pyg"),
    **dict.fromkeys(("plots", *map("studies.{}".format, _USE_MATPLOTLIB)), ("matplotlib", "plots")),
}


class ExtraChecker:
    """A finder for ``sys.meta_path`` that finds no module, and checks the extras before the other finders run."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        """Raise ImportError if the module ``name`` of this package needs a library that is not installed."""
        package, _, module = name.partition(".")
        library, extra = LIBRARY_AND_EXTRA.get(module, ("torch", ""))  # modules without an extra need torch only
        if package == "em_lightning" and importlib.util.find_spec(library) is None:
            distribution = f"em-lightning[{extra}]" if extra else "em-lightning"
            raise ImportError(f"{name} needs {library}: pip install '{distribution}'", name=library)
