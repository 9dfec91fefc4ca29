"""What the README shows is what happens."""

import re
from pathlib import Path

import pytest
import torch

import em_lightning

ROOT = Path(em_lightning.__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Put a checkpoint where the README's run leaves one."""
    import lightning

    from em_lightning.modules import PointCloudGMM

    monkeypatch.chdir(tmp_path)
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, max_steps=0, accelerator="cpu")
    trainer.strategy.connect(PointCloudGMM(num_components=3))
    path = tmp_path / "lightning_logs/point_cloud_gmm/version_0/checkpoints/last.ckpt"
    trainer.save_checkpoint(path)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.strip().splitlines()[-1][:30] for block in BLOCKS])
def test_every_block_of_the_readme_runs(block, checkpoint):
    points, mask = torch.randn(2, 40, 3), torch.ones(2, 40, dtype=torch.bool)
    scope = {"points": points, "mask": mask}
    exec(compile(block, "README.md", "exec"), scope)
    if "Prototypes" in scope:
        module = scope["Prototypes"]()
        assert {"loss", "free_energy", "variance", "decorrelation"} == set(
            module.step((torch.randn(8, 784), None), "train")
        )
    if "mixture" in scope:
        assert scope["mixture"].means.shape[0] in (2, 8)


def test_what_the_readme_points_to_is_there():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_option_of_the_readme_is_one_of_the_command():
    from em_lightning.cli import folder_of, recipes

    for name in re.findall(r"em-lightning run (\w+)", README):
        assert name in recipes()
    for variant in re.findall(r"em-lightning run \w+ --config (\w+)", README):
        assert list(folder_of("configs").rglob(f"{variant}.yaml"))
