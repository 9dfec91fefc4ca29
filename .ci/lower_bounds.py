"""Print the lower bounds of the requirements in pyproject.toml as exact versions, for pip's option -c."""

import re
from pathlib import Path

text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
# From the dependencies of the core up to the extra `dev`, whose tools need not be the oldest.
required = text[text.index("dependencies = [") : text.index("dev = [")]
for name, version in re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)', required):
    print(f"{name}=={version}")
