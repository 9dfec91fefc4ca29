"""Mixture encoder and image classifier of the studies."""

import lightning
import numpy as np
import pytest
import torch
from scipy.stats import entropy, multivariate_normal
from sklearn.decomposition import PCA

from em_lightning.callbacks import SwapActivations
from em_lightning.data import Digits
from em_lightning.studies import ImageClassifier, MixtureEncoder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
]


def trainer(folder, **options):
    return lightning.Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1, **options,
    )  # fmt: skip


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
def test_energies_are_the_joint_log_densities_of_scikit_learns_mixture(covariance):
    x = Digits().whole("train").x.flatten(1)
    module = MixtureEncoder(64, 5, subspace=4, num_iters=0, covariance=covariance)
    torch.manual_seed(0)
    module.fit(x)
    start, mixture = module, module.mixture()
    projected = PCA(4).fit(x.double()).transform(x.double())
    signs = np.sign(((x - start.mean) @ start.basis).double().numpy() / projected)[0]
    weights, means = mixture.weights[0].double().numpy(), mixture.means[0].double().numpy() * signs
    full = np.einsum("i,kij,j->kij", signs, np.stack([np.eye(4)] * 5), signs)
    shapes = {
        "full": lambda c: c * np.outer(signs, signs),
        "tied": lambda c: np.repeat(c * np.outer(signs, signs), 5, 0),
        "diag": lambda c: full * c[:, None],
        "spherical": lambda c: full * c[:, None, None],
    }
    covariances = shapes[covariance](mixture.covariances[0].double().numpy())
    expected = -np.stack(
        [np.log(weights[k]) + multivariate_normal(means[k], covariances[k]).logpdf(projected) for k in range(5)],
        -1,
    )
    np.testing.assert_allclose(module.energies(x), expected, rtol=1e-3, atol=1e-3)
    assert module(x).exp().reciprocal().sum(-1) == pytest.approx(1.0, abs=1e-4)

    torch.manual_seed(0)
    fitted = MixtureEncoder(64, 5, subspace=4, num_iters=10, covariance=covariance)
    fitted.fit(x)
    losses = [each.loss_terms(x, None, each.energies(x), "test")["free_energy"] for each in (module, fitted)]
    assert losses[0].item() == pytest.approx(-np.logaddexp.reduce(-expected, -1).mean(), rel=1e-3)
    assert losses[1] < losses[0]


def test_the_trainer_fits_once_and_a_checkpoint_keeps_the_mixture(tmp_path):
    data, module = Digits(), MixtureEncoder(64, 6, subspace=4, num_iters=3, output="responsibilities")
    run = trainer(tmp_path)
    torch.manual_seed(1)
    run.fit(module, data)
    x = data.whole("test").x
    run.save_checkpoint(tmp_path / "mixture.ckpt")
    loaded = MixtureEncoder.load_from_checkpoint(tmp_path / "mixture.ckpt")
    assert torch.equal(loaded(x), module(x))
    torch.testing.assert_close(module(x).sum(-1), torch.ones(len(x)))
    before = module.prototypes.clone()
    trainer(tmp_path).fit(module, data)
    assert torch.equal(module.prototypes, before)
    assert run.test(module, data, verbose=False)[0]["test/dead_units"] == 0
    assert module.prototypes.shape == (6, 64)


def test_subspace_larger_than_the_items_raises():
    with pytest.raises(ValueError, match=r"subspace=65.*num_features=64"):
        MixtureEncoder(64, 4, subspace=65)


@pytest.mark.parametrize(("network", "dim"), [("mlp", -1), ("cnn", 1)])
def test_the_classifier_measures_the_activations_that_were_swapped_in(tmp_path, network, dim):
    data = Digits(batch_size=256)
    torch.manual_seed(0)
    module = ImageClassifier(data.shape, data.num_classes, network, width=6)
    run = trainer(tmp_path, callbacks=[SwapActivations("softmax_gated")])
    run.fit(module, data)
    measured = run.test(module, data, verbose=False)[0]
    assert module.network.activation2.dim == dim

    x, y = data.whole("test")
    first = module.network[:3] if network == "mlp" else module.network[:2]
    second = module.network[:5] if network == "mlp" else module.network[:4]
    with torch.no_grad():
        hidden = [part(x).double().movedim(1, -1).flatten(0, -2).numpy() for part in (first, second)]
        confidence, guess = module(x).softmax(-1).max(-1)
    for number, a in enumerate(hidden, 1):
        found = {name.rpartition("/")[2]: value for name, value in measured.items() if f"activation{number}" in name}
        variance = a.var(0, ddof=1)
        assert found["dead_units"] == (variance < 1e-3 * variance.mean()).sum()
        assert found["redundancy"] == pytest.approx((np.corrcoef(a.T) ** 2).sum() - a.shape[1], rel=1e-3)
        spectrum = np.linalg.eigvalsh(np.cov(a.T)).clip(0)
        assert found["effective_rank"] == pytest.approx(np.exp(entropy(spectrum)), rel=1e-4)
    hit = (guess == y).double().numpy()
    assert measured["test/accuracy"] == pytest.approx(hit.mean())
    bins = np.ceil(confidence.double().numpy() * 15)
    error = sum(abs((hit - confidence.numpy())[bins == b].sum()) for b in np.unique(bins)) / len(hit)
    assert measured["test/calibration_error"] == pytest.approx(error, rel=1e-4)


def test_wrong_arguments_of_the_classifier_raise():
    with pytest.raises(ValueError, match=r"network='rnn'.*mlp.*cnn"):
        ImageClassifier(network="rnn")
    with pytest.raises(ValueError, match=r"num_classes=1\b"):
        ImageClassifier(num_classes=1)
    with pytest.raises(ValueError, match=r"width=0\b"):
        ImageClassifier(width=0)
