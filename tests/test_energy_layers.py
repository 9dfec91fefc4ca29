"""Modules with one energy layer: loss terms, metrics, subclasses."""

import re
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from torch.nn import functional

from em_lightning import studies
from em_lightning.data import Digits
from em_lightning.studies import DecoderFreeEncoder, EMClassifier, EnergyLayer, SparseAutoencoder, linear_probe

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
]
MAKE = {
    "encoder": lambda **options: DecoderFreeEncoder(64, 12, **options),
    "autoencoder": lambda **options: SparseAutoencoder(64, 12, **options),
    "classifier": lambda **options: EMClassifier(64, 12, **options),
    "baseline": lambda **options: EMClassifier(64, 12, neg_log_softmin=False, weight=0.0, **options),
}


def fit(module, *data, epochs=2, **options):
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(module, *data)
    return trainer


def volume(a):
    """Return the variance and decorrelation terms of the papers, computed by plain loops."""
    a = a.double()
    variance = [float(np.var(unit.detach().numpy(), ddof=1)) for unit in a.T]
    correlation = np.corrcoef(a.detach().numpy().T)
    redundancy = sum(correlation[i, j] ** 2 for i in range(len(variance)) for j in range(len(variance)) if i != j)
    return -sum(np.log(v + 1e-6) for v in variance), redundancy


def test_encoder_loss_equals_the_published_formula():
    module, x = MAKE["encoder"](), torch.rand(100, 64)
    a = functional.relu(x @ module.prototypes.T + module.encoder.bias)
    variance, redundancy = volume(a)
    terms = module.step((x, None), "train")
    assert terms["free_energy"].item() == pytest.approx(-torch.logsumexp(-a, 1).sum().item(), rel=1e-5)
    assert terms["variance"].item() == pytest.approx(variance, rel=1e-4)
    assert terms["decorrelation"].item() == pytest.approx(redundancy, rel=1e-4)
    assert terms["loss"].item() == pytest.approx(sum(terms[k].item() for k in terms if k != "loss"), rel=1e-5)
    assert sum(p.numel() for p in DecoderFreeEncoder().parameters()) == 50_240


def test_autoencoder_loss_equals_the_published_formula():
    module, x = MAKE["autoencoder"](), torch.rand(100, 64)
    a = functional.relu(x @ module.prototypes.T + module.encoder.bias)
    back = a @ module.decoder.weight.T + module.decoder.bias
    expected = (back - x).square().mean() + 0.01 * a.abs().mean()
    torch.testing.assert_close(module.step((x, None), "train")["loss"], expected)
    torch.testing.assert_close(module(x.unflatten(1, (8, 8))), back)
    assert sum(p.numel() for p in SparseAutoencoder().parameters()) == 101_200


@pytest.mark.parametrize("nls", [True, False])
def test_classifier_loss_equals_the_published_formula(nls):
    module, x, labels = EMClassifier(64, 12, neg_log_softmin=nls), torch.rand(100, 64), torch.arange(100) % 10
    d = functional.relu(x @ module.prototypes.T + module.encoder.bias)
    y = d + torch.logsumexp(-d, 1, keepdim=True) if nls else d
    linear, norm = module.head
    logits = functional.layer_norm(y @ linear.weight.T + linear.bias, (10,), norm.weight, norm.bias)
    expected = functional.cross_entropy(logits, labels).item() + 1e-3 * sum(volume(d))
    assert module.step((x, labels), "train")["loss"].item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(module(x), logits)


@pytest.mark.parametrize("key", MAKE)
def test_training_lowers_the_loss_and_logs_the_metrics(key):
    module, data = MAKE[key](), Digits()
    batch = data.whole("train")
    before = module.step(batch, "train")["loss"].detach()
    trainer = fit(module, data, epochs=5)
    assert module.step(batch, "train")["loss"].detach() < before
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    with torch.no_grad():
        a = module.energies(data.whole("test").x).double()
    assert metrics["val/dead_units"] == (a.var(0) < 0.01).sum()
    assert metrics["val/min_variance"] == pytest.approx(a.var(0).min().item(), abs=1e-6)
    assert metrics["val/l0"] == pytest.approx((a > 0.01).sum(1).double().mean().item(), abs=1e-6)
    r = torch.softmax(-a, 1)
    assert metrics["val/entropy"] == pytest.approx(-(r * r.log()).sum(1).mean().item(), abs=1e-5)
    assert metrics["val/max_responsibility"] == pytest.approx(r.amax(1).mean().item(), abs=1e-5)
    cosines = functional.cosine_similarity(module.prototypes[:, None], module.prototypes[None], dim=-1)
    redundancy = cosines.fill_diagonal_(0).square().sum().item()
    assert metrics["val/weight_redundancy"] == pytest.approx(redundancy, rel=1e-4)
    if "classifier" in key or key == "baseline":
        right = module(data.whole("test").x).argmax(1) == data.whole("test").y
        assert metrics["val/accuracy"] == pytest.approx(right.double().mean().item(), abs=1e-6)
    assert "test/entropy" in trainer.test(module, data, verbose=False)[0]


def test_a_subclass_may_override_energies():
    class Squared(DecoderFreeEncoder):
        def energies(self, x):
            return self.encoder(x.flatten(1)).square()

    module = Squared(64, 6)
    assert fit(module, Digits()).callback_metrics["val/dead_units"] >= 0
    assert torch.equal(module(torch.ones(1, 64)), module.encoder(torch.ones(1, 64)).square())


def test_training_steps_are_logged_every_n_steps_and_at_the_end_of_an_epoch():
    class Counted(DecoderFreeEncoder):
        steps = ()

        def log(self, name, value, **options):
            if name == "train/loss":
                self.steps += (self.trainer.global_step,)
            super().log(name, value, **options)

    module = Counted(64, 12)
    trainer = fit(module, Digits(), epochs=1, log_every_n_steps=5, limit_val_batches=0)
    assert module.steps == (4, 9, 11)  # of 12 steps: every fifth, and the last of the epoch
    assert "train/variance" in trainer.callback_metrics


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_optimizer_argument_selects_the_class(optimizer):
    module = MAKE["encoder"](optimizer=optimizer, lr=1e-2)
    expected = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
    other = MAKE["encoder"](optimizer=optimizer, lr=1e-2)
    other.load_state_dict(module.state_dict())
    x = torch.rand(50, 64)
    ours, theirs = module.configure_optimizers(), expected(other.parameters(), lr=1e-2)
    for each, step in ((module, ours), (other, theirs)):
        for _ in range(3):
            step.zero_grad()
            each.step((x, None), "train")["loss"].backward()
            step.step()
    torch.testing.assert_close(module.prototypes, other.prototypes, rtol=1e-4, atol=1e-5)


def test_probe_equals_scikit_learn_regression():
    from sklearn.linear_model import LogisticRegression

    x, y = Digits().whole("train")
    test_x, test_y = Digits().whole("test")
    scale = x.flatten(1).std(0, unbiased=False)
    scaled = [(part.flatten(1) - x.flatten(1).mean(0)) / torch.where(scale > 0, scale, 1) for part in (x, test_x)]
    expected = LogisticRegression(max_iter=5000).fit(scaled[0], y).score(scaled[1], test_y)
    assert linear_probe(x.flatten(1), y, test_x.flatten(1), test_y) == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DecoderFreeEncoder(num_features=0), r"num_features=0\b"),
        (lambda: DecoderFreeEncoder(num_components=0), r"num_components=0\b"),
        (lambda: SparseAutoencoder(sparsity=-1), r"sparsity=-1\b"),
        (lambda: EMClassifier(num_classes=1), r"num_classes=1\b"),
        (lambda: EMClassifier(weight=-1), r"weight=-1\b"),
        (lambda: EMClassifier(optimizer="lion"), "optimizer='lion'.*adam.*sgd"),
        (lambda: DecoderFreeEncoder(free_energy=0, variance=0, decorrelation=0), "weight"),
    ],
)
def test_errors_name_the_argument_and_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_layer_without_loss_terms_raises():
    layer = EnergyLayer(4, 2)
    with pytest.raises(NotImplementedError, match="EnergyLayer.*loss_terms"):
        layer.step((torch.rand(3, 4), None), "train")


def test_subclass_in_the_docs_trains():
    page = Path(studies.__file__).parents[2] / "docs" / "how-to" / "reprint-published-tables.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    found = {}
    exec(compile(code, str(page), "exec"), found)
    assert list(found["terms"]) == ["loss", "free_energy", "variance", "decorrelation"]
    assert fit(found["module"], Digits()).callback_metrics["val/dead_units"] >= 0
