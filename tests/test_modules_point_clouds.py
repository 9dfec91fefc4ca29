"""PointCloudClassifier, with and without a pyramid, and the poolings of PyG that a benchmark compares it with."""

from pathlib import Path

import lightning
import pytest
import torch
import yaml

from benchmarks.poolings import POOLINGS, PoolingClassifier
from em_lightning import cli
from em_lightning.studies import FAMILIES, ImagePointSets, PointCloudClassifier, PointSetBatch, ProceduralSurfaces

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "poolings.py"
LEVELS = [
    {"num_components": 8, "out_features": 16, "pitch": 0.3, "grid": 5, "blocks": 1},
    {"num_components": 3, "out_features": 32, "pitch": 0.5},
]


def clouds(features=3):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(6, 20, features, generator=generator)
    mask = torch.arange(20) < torch.tensor([20, 13, 20, 9, 1, 20])[:, None]
    return PointSetBatch(points, mask, torch.tensor([0, 1, 2, 3, 0, 1]))


def classifier(pooling, levels=(), **options):
    torch.manual_seed(0)
    return PoolingClassifier(
        4, pooling=pooling, levels=levels, **{"num_parameters": 90_000, "num_components": 4, **options}
    )


@pytest.mark.parametrize("levels", [(), LEVELS], ids=["points", "pyramid"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_invariant_to_order_and_padding(pooling, levels):
    module = classifier(pooling, levels).eval()
    points, mask, _ = clouds()
    logits = module(points, mask)
    assert logits.shape == (6, 4) and logits.isfinite().all()
    # PyG pads the sets, and rounding in its attention depends on the padded length.
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(module(points.flip(1), mask.flip(1)), logits, **close)
    torch.testing.assert_close(module(torch.where(mask.unsqueeze(-1), points, torch.nan), mask), logits, **close)
    torch.testing.assert_close(module(points[1:2, :13]), logits[1:2], **close)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_poolings_have_equally_many_parameters(pooling):
    sizes = sum(value.numel() for value in classifier(pooling, num_parameters=100_000).parameters())
    assert 98_500 <= sizes <= 100_000


@pytest.mark.parametrize("pooling", POOLINGS)
def test_steps_lower_the_loss_and_change_every_parameter(pooling):
    module = classifier(pooling, dropout=0.0, scale=0.0, shift=0.0, jitter=0.0)
    batch = clouds()
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = module.step(batch, "train")
        loss.backward()
        assert all(value.grad is not None for value in module.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_pyramid_learns_digits():
    lightning.seed_everything(0)
    data = ImagePointSets(num_points=48, batch_size=32)
    levels = [
        {"num_components": 12, "out_features": 24, "pitch": 0.25, "grid": 5, "num_iters": 2},
        {"num_components": 1, "out_features": 48, "pitch": 0.5, "grid": 4, "num_iters": 1},
    ]
    module = PointCloudClassifier(10, 2, pooling="max", levels=levels, hidden=32, lr=5e-3)
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    (scores,) = trainer.test(module, data, verbose=False)
    assert scores["test/accuracy"] > 0.6


def test_augmentation_is_a_linear_map_and_a_shift():
    module = classifier("max", distort=0.3, scale=0.1, shift=0.2, jitter=0.0)
    points = clouds().points
    moved = module.augment(points)
    for before, after in zip(points, moved, strict=True):
        columns = torch.cat([before, torch.ones(len(before), 1)], 1)
        fitted = torch.linalg.lstsq(columns, after).solution
        torch.testing.assert_close(columns @ fitted, after, atol=1e-4, rtol=1e-4)
        assert (fitted[3].abs() <= 0.2 + 1e-5).all()
        assert ((fitted[:3] - torch.eye(3)).abs() <= 1.1 * 1.3 - 1).all() and not torch.allclose(
            fitted[:3], torch.eye(3), atol=1e-3
        )
    still = classifier("max", scale=0.0, shift=0.0, jitter=0.0)
    torch.testing.assert_close(still.augment(points), points)


def test_procedural_surfaces_have_num_classes():
    names = list(FAMILIES)[:3]
    assert ProceduralSurfaces(families=names).num_classes == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pooling": "median"}, "pooling='median'.*em.*max"),
        ({"levels": [{"num_components": 3}]}, "out_features"),
    ],
)
def test_errors_name_the_argument_and_the_value(arguments, words):
    with pytest.raises((TypeError, ValueError), match=words):
        PointCloudClassifier(4, **arguments)


@pytest.mark.parametrize("variant", ["mnist", "shapes"])
def test_the_benchmark_is_a_recipe(variant, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["run", str(SCRIPT), "--config", variant, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["num_parameters"] == 100_000 and printed["model"]["jitter"] == 0.0
    assert {"em", "max", "mean", "attention", "set_transformer", "mem"} <= set(printed["table"]["rows"])


@pytest.mark.filterwarnings("ignore:.*args parameter is intended", "ignore:.*LeafSpec.*is deprecated")
def test_the_benchmark_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.fast_dev_run=true", "--data.num_points=16", "--model.pooling=set_transformer"]
    assert cli.main(["run", str(SCRIPT), *options]) == 0


@pytest.mark.parametrize("arguments", [{"num_parameters": 10}, {"pooling": "median"}])
def test_errors_of_the_comparison_name_the_argument_and_the_value(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        PoolingClassifier(4, **arguments)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_checkpoint_keeps_the_pooling(pooling, tmp_path):
    module = classifier(pooling)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "pooling.ckpt", weights_only=True)
    loaded = PoolingClassifier.load_from_checkpoint(tmp_path / "pooling.ckpt").eval()
    points, mask, _ = clouds()
    assert torch.equal(loaded(points, mask), module.eval()(points, mask))
