import re
from pathlib import Path

import torch

import em_lightning

PAGE = Path(em_lightning.__file__).parents[1] / "docs" / "how-to" / "fit-among-outliers.md"


def test_the_page_on_outliers_finds_them():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    found = {}
    exec(compile(code, str(PAGE), "exec"), found)
    assert (found["steps"] < 100).all()
    assert found["outliers"][:, :400].mean() < 0.1 < 0.6 < found["outliers"][:, 400:].mean()
    means = found["mixture"].means.mean(-1).sort(-1).values
    assert torch.allclose(means, torch.tensor([0.0, 8.0]).expand(8, -1), atol=0.4)
