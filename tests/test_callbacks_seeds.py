"""StepSeeds: a resumed run draws the same random numbers as an uninterrupted one."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from em_lightning.callbacks import StepSeeds
from em_lightning.data import ResumableLoader
from em_lightning.modules import EMModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:You defined a .validation_step",
    "ignore:The dirpath has changed",
    "ignore:The number of training batches",
    "ignore:`isinstance.treespec, LeafSpec.`",
)
STEPS_PER_EPOCH = 4  # 12 items in batches of 3


class Noisy(EMModule):
    """Dropout, noise, and items in random order."""

    def __init__(self):
        super().__init__(lr=0.1)
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.drawn = []

    def step(self, batch, stage):
        noise = torch.randn(())
        self.drawn.append((self.current_epoch, batch[0].sum().item(), noise.item()))
        return (self.net(batch[0]) + noise).square().mean()


def quiet_trainer(epochs, callbacks, **options):
    return lightning.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(folder, epochs, seeds, ckpt_path=None, before=0):
    torch.manual_seed(7)
    torch.rand(before)  # advance the generator, as the interrupted run did
    x = torch.arange(48.0).view(12, 4).cos()
    model = Noisy()
    torch.manual_seed(7 + before)
    keep = ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, every_n_train_steps=2)
    trainer = quiet_trainer(epochs, [seeds, keep], default_root_dir=folder)
    trainer.fit(model, DataLoader(TensorDataset(x), batch_size=3, shuffle=True), ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize("step", [4, 8])  # the ends of epochs
@pytest.mark.parametrize("seed", [None, 5])
def test_resumed_run_equals_uninterrupted_run(step, seed, tmp_path):
    uninterrupted = fit(tmp_path, 3, StepSeeds(seed))
    (checkpoint,) = tmp_path.glob(f"*step={step}.ckpt")
    resumed = fit(tmp_path / "again", 3, StepSeeds(seed), ckpt_path=checkpoint, before=9)
    assert resumed.drawn == uninterrupted.drawn[step:]
    for name, value in uninterrupted.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_steps_seeds_and_fits_differ(tmp_path):
    seeds = StepSeeds(5)
    first = fit(tmp_path / "a", 3, seeds)
    assert fit(tmp_path / "b", 3, seeds, before=3).drawn == first.drawn
    other = fit(tmp_path / "c", 3, StepSeeds(6))
    noise = [entry[-1] for entry in first.drawn + other.drawn]
    assert len(set(noise)) == len(noise) == 2 * 3 * STEPS_PER_EPOCH
    orders = {
        tuple(entry[1] for entry in first.drawn[STEPS_PER_EPOCH * epoch :][:STEPS_PER_EPOCH]) for epoch in range(3)
    }
    assert len(orders) == 3
    seeds.seed = None
    assert fit(tmp_path / "d", 3, seeds).drawn != first.drawn  # seed=None draws a new seed per fit


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed=-1"):
        StepSeeds(-1)


class Validated(Noisy):
    """Draws random numbers in validation as well."""

    def validation_step(self, batch, batch_idx):
        torch.rand(3)


class SaveAt(lightning.Callback):
    """Saves a checkpoint at one hook of the first epoch."""

    def __init__(self, hook, path):
        self.path = path
        setattr(self, hook, self.save)

    def save(self, trainer, pl_module):
        if not trainer.sanity_checking and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:Consider setting `persistent_workers", "ignore:.*smaller than the logging interval")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end", "last"])
def test_order_is_repeated_after_checkpoints_at_the_end_of_an_epoch(hook, workers, tmp_path):
    path = str(tmp_path / "last.ckpt")

    def run(epochs, ckpt_path=None):
        keep = [ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, enable_version_counter=False)]
        torch.manual_seed(7)
        x, model = torch.arange(48.0).view(12, 4).cos(), Validated()
        last = hook == "last"
        callbacks = [StepSeeds(5), *(keep if last else [SaveAt(hook, path)])]
        trainer = quiet_trainer(epochs, callbacks, enable_checkpointing=last)
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        loader = DataLoader(TensorDataset(x), batch_size=3, shuffle=True, **options)
        trainer.fit(model, loader, DataLoader(TensorDataset(x), batch_size=6), ckpt_path=ckpt_path)
        return model.drawn

    uninterrupted = run(3)[STEPS_PER_EPOCH:]
    run(1)
    assert run(3, path) == uninterrupted


class CountsSteps(Noisy):
    """Asks for the number of steps when it makes its optimizer, as code with a warm-up does."""

    def configure_optimizers(self):
        total = int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=total)]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [Noisy, CountsSteps])
@pytest.mark.parametrize("beside", [False, True])  # a loader without a state, before the other one
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")  # rightly
@pytest.mark.filterwarnings("ignore:Consider setting `persistent_workers", "ignore:.*smaller than the logging interval")
def test_a_loader_made_before_the_checkpoint_is_loaded_resumes_within_an_epoch(beside, kind, workers, tmp_path):
    items = TensorDataset(torch.linspace(0, 1, 48).view(12, 4))

    def run(max_steps, ckpt_path=None, folder=tmp_path / "straight"):
        model = kind()
        loader = ResumableLoader(items, 3, shuffle=True, num_workers=workers)
        if beside:
            model.step = lambda batch, stage: type(model).step(model, batch["own"], stage)
            loader = {"plain": DataLoader(items, 3), "own": loader}
        saved = ModelCheckpoint(folder, every_n_train_steps=1, save_on_train_epoch_end=False)
        quiet_trainer(2, [StepSeeds(3), saved, StopAt(max_steps)]).fit(model, loader, ckpt_path=ckpt_path)
        return model, saved.best_model_path

    straight, _ = run(8)
    for step in (2, 6):  # within the first and the second epoch
        first, path = run(step, None, tmp_path / f"first {step}")
        resumed, _ = run(8, path, tmp_path / f"resumed {step}")
        assert first.drawn + resumed.drawn == straight.drawn
        for mine, other in zip(resumed.parameters(), straight.parameters(), strict=True):
            assert torch.equal(mine, other)


class StopAt(lightning.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.step
