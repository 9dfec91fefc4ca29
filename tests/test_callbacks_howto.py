"""The pages about the callbacks, run to the letter."""

import re
from pathlib import Path

import pytest
import torch
import user_models as users

PAGES = Path(__file__).parent.parent / "docs" / "how-to"
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:.*You defined a `validation_step` but have no `val_dataloader`",
    "ignore:The number of training batches",
    "ignore:`isinstance.treespec, LeafSpec.`",
)
@pytest.mark.parametrize(
    ("page", "printed"),
    [
        ("swap-activations", "encoder.1  ReLU    SignedActivation"),
        ("insert-em-operators", "Linear -> EMRefinement"),
        ("add-layerwise-em-losses", "em/encoder.1/free_energy"),
        ("schedule-the-temperature", "['encoder.1', 'encoder.3']"),
        ("watch-posteriors", "tensor("),
        ("audit-a-model", "cross-entropy"),
    ],
)
def test_page(page, printed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (PAGES / f"{page}.md").read_text(), re.S)
    names = {"Model": users.MLP, "model": users.MLP(), "data": users.MLP.data(), "x": torch.randn(8, 6), "quiet": QUIET}
    for block in blocks:
        exec(block, names)
    assert printed in capsys.readouterr().out
