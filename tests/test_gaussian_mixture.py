"""GaussianMixtureModule: equality with scikit-learn, data in blocks, resuming."""

import math
import warnings

import lightning
import numpy as np
import pytest
import torch
from helpers import assert_close, detached, parts
from lightning.pytorch.plugins import MixedPrecision
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch.utils.data import DataLoader, TensorDataset

from em_lightning import Mixture
from em_lightning.data import TabularDataModule
from em_lightning.mixture import COVARIANCES, MixturePrior, em_step, fit_blocks, information_criteria
from em_lightning.modules import GaussianMixtureModule, PointCloudGMM
from em_lightning.operators import EMOperator
from em_lightning.studies import GaussianBlobs

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
KINDS = sorted(COVARIANCES)


def trainer(folder, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"default_root_dir": folder, "accelerator": "cpu", "enable_checkpointing": False, **quiet, **options}
    return lightning.Trainer(**options)


def rows(size=700, features=3, components=3):
    centers = 4 * torch.randn(components, features, dtype=torch.float64)
    return centers[torch.randint(0, components, (size,))] + torch.randn(size, features, dtype=torch.float64)


def start_of(x, kind, components=3):
    return EMOperator(components, x.shape[1], covariance=kind, residual=False)(x[None], num_iters=0)


def sklearn_of(x, start, kind, iterations, tol=0.0):
    covariances = start.covariances[0].numpy()
    precisions = np.linalg.inv(covariances) if kind in ("full", "tied") else 1 / covariances
    fit = GaussianMixture(
        start.means.shape[1],
        covariance_type=kind,
        tol=tol,
        max_iter=iterations,
        weights_init=start.weights[0].numpy(),
        means_init=start.means[0].numpy(),
        precisions_init=precisions[0] if kind == "tied" else precisions,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return fit.fit(x.numpy())


def assert_same(mixture, fit, kind, atol=1e-8):
    assert np.allclose(mixture.weights[0].numpy(), fit.weights_, atol=atol)
    assert np.allclose(mixture.means[0].numpy(), fit.means_, atol=atol)
    covariances = mixture.covariances[0].numpy()
    assert np.allclose(covariances[0] if kind == "tied" else covariances, fit.covariances_, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_epochs_equal_scikit_learn(kind, tmp_path):
    x = rows()
    start = start_of(x, kind)
    module = GaussianMixtureModule(3, 3, covariance=kind, tol=0.0)
    module.start_from(start)
    fit = trainer(tmp_path, max_epochs=20)
    fit.fit(module, TabularDataModule(x, block_rows=100))
    expected = sklearn_of(x, start, kind, 20)
    assert_same(module.mixture, expected, kind)
    assert float(module.log_likelihood) == pytest.approx(expected.lower_bound_, abs=1e-10)
    assert fit.global_step == 20 * 7 and int(module.iterations) == 20
    (tested,) = fit.test(module, TabularDataModule(x, block_rows=100), verbose=False)
    for name in ("bic", "aic"):  # float32 has only seven digits
        assert tested[f"test/{name}"] == pytest.approx(getattr(expected, name)(x.numpy()), rel=1e-10)
        assert fit.callback_metrics[f"test/{name}"].dtype == torch.float64
    assert tested["test/log_likelihood"] == pytest.approx(expected.score(x.numpy()), abs=1e-6)


def test_stops_at_the_same_iteration_as_scikit_learn(tmp_path):
    x = rows()
    start = start_of(x, "full")
    module = GaussianMixtureModule(3, 3, tol=1e-4)
    module.start_from(start)
    fit = trainer(tmp_path, max_epochs=500)
    fit.fit(module, TabularDataModule(x, block_rows=100))
    expected = sklearn_of(x, start, "full", 500, tol=1e-4)
    assert module.converged and int(module.iterations) == expected.n_iter_ < 500
    assert float(fit.callback_metrics["train/log_likelihood"]) == pytest.approx(expected.lower_bound_, abs=1e-5)
    before = module.mixture.means.clone()
    trainer(tmp_path, max_epochs=500).fit(module, TabularDataModule(x, block_rows=100))
    assert torch.equal(before, module.mixture.means)


@pytest.mark.parametrize("method", ["em", "stochastic"])
def test_integer_weights_equal_repeated_rows(method, tmp_path):
    x = rows(300)
    counts = torch.randint(0, 4, (300,))
    start = start_of(x, "full")
    found = []
    for data in (TabularDataModule(x, counts.double()), TabularDataModule(x.repeat_interleave(counts, 0))):
        module = GaussianMixtureModule(3, 3, method=method, tol=0.0)
        module.start_from(start)
        trainer(tmp_path, max_epochs=4).fit(module, data)
        found.append(module)
    assert_close(found[0].mixture, found[1].mixture, atol=1e-9)
    assert float(found[0].log_likelihood) == pytest.approx(float(found[1].log_likelihood), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_em_finds_the_mixture_of_em(kind, tmp_path):
    data = GaussianBlobs(6000, 2, true_components=3, held_out_points=500, block_rows=500, shuffle=True)
    module = GaussianMixtureModule(3, 2, covariance=kind, method="stochastic", tol=0.0)
    fit = trainer(tmp_path, max_epochs=12)
    fit.fit(module, data)
    held_out = float(fit.callback_metrics["val/log_likelihood"])
    (tested,) = fit.test(module, data, verbose=False)
    assert held_out == pytest.approx(tested["test/log_likelihood"], abs=1e-5)
    best = fit_blocks(lambda: data.blocks(whole=True), detached(module.mixture), max_iters=50, tol=0.0).log_likelihoods
    assert best[-1] - 0.02 < best[0] < best[-1] and float(module.log_likelihood) == pytest.approx(best[0], abs=0.05)


def test_stochastic_em_equals_the_published_recursion(tmp_path):
    x = rows(400)
    start = start_of(x, "diag")
    module = GaussianMixtureModule(3, 3, covariance="diag", method="stochastic", step_exponent=0.6)
    module.start_from(start)
    trainer(tmp_path, max_epochs=2).fit(module, TabularDataModule(x, block_rows=100))

    weights, means, variances = (part[0].numpy() for part in (start.weights, start.means, start.covariances))
    averages = None
    for t in range(8):
        block = x.numpy()[100 * (t % 4) : 100 * (t % 4 + 1)]
        joint = np.log(weights) - 0.5 * (
            np.log(2 * np.pi * variances).sum(1) + ((block[:, None] - means) ** 2 / variances).sum(2)
        )
        shares = np.exp(joint - joint.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        new = [shares.mean(0), shares.T @ block / 100, shares.T @ block**2 / 100]
        gamma = (t + 1.0) ** -0.6
        averages = new if t == 0 else [(1 - gamma) * a + gamma * b for a, b in zip(averages, new, strict=True)]
        weights, means = averages[0], averages[1] / averages[0][:, None]
        variances = averages[2] / averages[0][:, None] - means**2 + 1e-6
    assert np.allclose(module.mixture.weights[0].numpy(), weights)
    assert np.allclose(module.mixture.means[0].numpy(), means)
    assert np.allclose(module.mixture.covariances[0].numpy(), variances)


def test_start_is_computed_on_a_random_sample(tmp_path):
    data = GaussianBlobs(4000, 2, true_components=4, held_out_points=100, block_rows=500)
    module = GaussianMixtureModule(4, 2, sample_size=1000, seed=5, num_starts=3)
    seen = []
    module.start_from = lambda *given: seen.append(given)
    fit = trainer(tmp_path, fast_dev_run=1)
    fit.fit(module, data)
    sample = data.blocks().sample(1000, 5).points.double()
    ((mixture, center, variance),) = seen
    operator = EMOperator(4, 2, init="kmeans++", num_starts=3, seed=5, residual=False).double().eval()
    assert_close(mixture, operator(sample[None], num_iters=0), atol=1e-12)
    assert torch.allclose(center, sample.mean(0)) and torch.allclose(variance, sample.var(0, correction=0))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_any_loader_of_rows_is_accepted(tmp_path):
    x, w = rows(120), torch.rand(120, dtype=torch.float64)
    reference = None
    for dataset in (TensorDataset(x, w), [(point, weight) for point, weight in zip(x, w, strict=True)]):
        module = GaussianMixtureModule(3, 3, seed=1)
        trainer(tmp_path, max_epochs=3).fit(module, DataLoader(dataset, batch_size=50))
        reference = module.mixture if reference is None else reference
        assert torch.equal(reference.means, module.mixture.means)
    plain = GaussianMixtureModule(3, 3)
    trainer(tmp_path, max_epochs=3).fit(plain, DataLoader(x, batch_size=50))
    (shares,) = trainer(tmp_path).predict(plain, DataLoader(x, batch_size=120))
    assert torch.allclose(shares, plain.mixture.posterior(x[None]).responsibilities[0])
    assert torch.allclose(plain(x).free_energy, -plain.log_prob(x))


def test_prior_gives_the_same_result_as_the_operator(tmp_path):
    x = rows(300)
    start = start_of(x, "full")
    counts = {"weight_concentration": 4.0, "mean_strength": 3.0, "covariance_strength": 20.0}
    module = GaussianMixtureModule(3, 3, prior=counts, tol=0.0)
    module.start_from(start, x.mean(0, keepdim=True), x.var(0, correction=0, keepdim=True))
    trainer(tmp_path, max_epochs=5).fit(module, TabularDataModule(x, block_rows=70))
    expected = EMOperator(3, 3, prior=MixturePrior(**counts), residual=False)(x[None], init=start, num_iters=5)
    assert_close(module.mixture, expected, atol=1e-9)


@pytest.mark.parametrize("method", ["em", "stochastic"])
@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_the_result_is_invariant_to_the_scale_of_the_weights(method, factor, tmp_path):
    x, weights = rows(300), torch.rand(300, dtype=torch.float64)
    found = []
    for own in (weights, factor * weights):
        module = GaussianMixtureModule(3, 3, method=method, prior={"covariance_strength": 5.0}, tol=0.0)
        trainer(tmp_path, max_epochs=5).fit(module, TabularDataModule(x, own, block_rows=100))
        found.append(module.mixture)
    torch.testing.assert_close(found[0].means, found[1].means)
    torch.testing.assert_close(found[0].covariances, found[1].covariances)


def test_bf16_mixed_does_not_change_em(tmp_path):
    x = rows(300).float()
    start = start_of(x.double(), "full")
    found = []
    for precision in ("32-true", "bf16-mixed"):
        module = GaussianMixtureModule(3, 3, tol=0.0)
        module.start_from(start)
        trainer(tmp_path, max_epochs=5, precision=precision).fit(module, TabularDataModule(x, block_rows=70))
        found.append(module.mixture)
    assert_close(*found, atol=0)


def test_fit_blocks_equals_em_step():
    x = rows(200)
    mixture = start = start_of(x, "tied")
    fit = fit_blocks(lambda: [(block, None) for block in x.split(60)], start, max_iters=4, tol=0.0)
    for _ in range(4):
        mixture = em_step(x[None], mixture)
    assert_close(fit.mixture, mixture, rtol=1e-5, atol=1e-8)
    assert len(fit.log_likelihoods) == 4 and not fit.converged
    assert fit.log_likelihoods[0] == pytest.approx(float(start.log_prob(x[None]).mean()))
    with pytest.raises(ValueError, match="nan"):
        fit_blocks(lambda: [(x * math.nan, None)], start)


def test_stops_at_the_first_change_below_tol():
    x = rows(300)
    fit = fit_blocks(lambda: [(x, None)], start_of(x, "full"))
    changes = np.abs(np.diff(fit.log_likelihoods))
    assert fit.converged and changes[-1] < 1e-3 <= changes[:-1].min()
    one = fit_blocks(lambda: [(x, None)], start_of(x, "diag", 1), max_iters=6, tol=0.0)
    assert len(one.log_likelihoods) == 6 and not one.converged  # tol=0 disables the stopping rule


@pytest.mark.parametrize("kind", KINDS)
def test_the_moments_of_a_mixture_are_those_of_its_rows(kind):
    x = rows(300)
    mixture = fit_blocks(lambda: [(x, None)], start_of(x, kind), max_iters=2, floor=0.0).mixture
    # EM keeps the mean of the rows and the sum of their variances.
    mean, variance = mixture.mean, mixture.variance
    np.testing.assert_allclose(mean[0], x.mean(0))
    if kind == "spherical":
        assert variance.sum().item() == pytest.approx(x.var(0, correction=0).sum().item())
    else:
        np.testing.assert_allclose(variance[0], x.var(0, correction=0))


@pytest.mark.parametrize("kind", KINDS)
def test_bic_and_aic_equal_scikit_learn(kind):
    x = rows(200)
    expected = sklearn_of(x, start_of(x, kind), kind, 5)
    found = [torch.as_tensor(part)[None] for part in (expected.weights_, expected.means_, expected.covariances_)]
    mixture = Mixture(found[0].log(), found[1], found[2][None] if kind == "tied" else found[2])
    found = information_criteria(mixture, float(mixture.log_prob(x[None]).sum()), 200.0)
    assert found.bic == pytest.approx(expected.bic(x.numpy())) and found.aic == pytest.approx(expected.aic(x.numpy()))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "newton"}, ["method='newton'", "stochastic"]),
        ({"sample_size": 0}, ["sample_size=0"]),
        ({"tol": -1.0}, ["tol=-1.0"]),
        ({"step_exponent": 0.5}, ["step_exponent=0.5"]),
        ({"prior": {"learnable": True}}, ["prior={'learnable': True"]),
        ({"num_components": 0}, ["num_components=0"]),
        ({"covariance": "round"}, ["covariance='round'"]),
        ({"init": "learned"}, ["init='learned'"]),
    ],
)
def test_errors_name_the_argument_and_the_value(options, words):
    with pytest.raises(ValueError) as caught:
        GaussianMixtureModule(**{"num_components": 2, "num_features": 2, **options})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("module", [GaussianMixtureModule, PointCloudGMM])
@pytest.mark.parametrize("covariance", ["lowrank", "ful"])
def test_covariances_that_a_module_lacks_are_refused(module, covariance):
    with pytest.raises(ValueError, match=rf"covariance='{covariance}'.*'full', 'diag', 'spherical', 'tied'$"):
        module(4, 3, covariance=covariance)


def test_invalid_data_raise(tmp_path):
    x = rows(50)
    module = GaussianMixtureModule(3, 3)
    module.start_from(start_of(x, "full"))
    x[7, 1] = math.nan
    with pytest.raises(ValueError, match="log-likelihood is nan"):
        trainer(tmp_path, max_epochs=1).fit(module, DataLoader(TensorDataset(x), batch_size=50))
    with pytest.raises(ValueError, match="nan.* in row 7"):
        trainer(tmp_path, max_epochs=1).fit(GaussianMixtureModule(3, 3), TabularDataModule(x))
    two = GaussianMixtureModule(3, 2)
    for _ in range(2):  # without and with a given start
        with pytest.raises(ValueError, match="3 columns.*num_features=2"):
            trainer(tmp_path, max_epochs=1).fit(two, TabularDataModule(rows(50)))
        two.start_from(start_of(rows(50, 2), "full"))
    with pytest.raises(ValueError, match="3 columns.*num_features=2"):
        trainer(tmp_path).predict(two, DataLoader(rows(50), batch_size=50))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_equals_scikit_learn_on_cpu(kind, precision, tmp_path):
    x = rows(5000)
    start = start_of(x, kind)
    module = GaussianMixtureModule(3, 3, covariance=kind, tol=0.0)
    module.start_from(start)
    fit = trainer(tmp_path, max_epochs=20, precision=precision, accelerator="gpu", devices=1)
    fit.fit(module, TabularDataModule(x.float(), block_rows=1000))
    expected = sklearn_of(x, start, kind, 20)
    assert_same(Mixture(*(part.cpu() for part in parts(module.mixture))), expected, kind, atol=1e-4)


@pytest.mark.parametrize("method", ["em", "stochastic"])
def test_a_gradient_scaler_changes_nothing(method, tmp_path):
    """Lightning replaces 16-mixed by bf16 on a CPU, so the plugin with its scaler is given."""
    levels = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]):
        lightning.seed_everything(0)
        data = GaussianBlobs(num_points=600, num_features=2, true_components=3, block_rows=256)
        module = GaussianMixtureModule(3, 2, method=method)
        trainer(tmp_path, max_epochs=3, plugins=plugins).fit(module, data)
        levels.append(float(module.log_likelihood))
    assert levels[0] == pytest.approx(levels[1])
