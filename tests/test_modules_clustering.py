"""Amortized clustering: generated mixture sets, the trained module and its report."""

import json

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from em_lightning.mixture import Mixture, MixturePrior
from em_lightning.studies import AmortizedClustering, ClusteringReport, MixtureSets


def small(**arguments):
    return MixtureSets(
        **{"train_batches": 4, "val_sets": 8, "test_sets": 8, "held_out": 50, "train_held_out": 50, **arguments}
    )


def test_sets_have_the_moments_of_their_mixtures():
    data = MixtureSets(num_components=3, min_points=2000, max_points=2000, test_sets=20, batch_size=20, held_out=2000)
    batch = next(iter(data.test_dataloader()))
    assert batch.mask.all() and (batch.truth.means.abs() <= 4).all()
    torch.testing.assert_close(batch.truth.weights.sum(1), torch.ones(20))
    shares = torch.nn.functional.one_hot(batch.labels, 3).float().mean(1)
    assert (shares - batch.truth.weights).abs().max() < 0.06
    centers = batch.truth.means.gather(1, batch.labels.unsqueeze(-1).expand(-1, -1, 2))
    assert abs(float((batch.points - centers).std()) - 0.3) < 0.005
    fitted, fresh = (batch.truth.log_prob(x).mean() for x in (batch.points, batch.held_out))
    assert abs(fitted - fresh) < 0.03


def test_batches_are_a_function_of_seed_split_epoch_and_index():
    data = small()
    first, again = next(iter(data.val_dataloader())), next(iter(small().val_dataloader()))
    assert torch.equal(first.points, again.points)
    assert not torch.equal(first.points, next(iter(data.test_dataloader())).points)
    assert not torch.equal(first.points, next(iter(small(seed=1).val_dataloader())).points)
    assert first.mask.sum(1).min() >= 100 and (first.points[~first.mask] == 0).all()
    loader = data.train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        epochs.append(torch.cat([batch.points.flatten() for batch in loader]))
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"min_points": 10, "max_points": 5}, "max_points=5"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_wrong_arguments_of_the_data_raise(arguments, words):
    with pytest.raises(ValueError, match=words):
        MixtureSets(**arguments)


@pytest.mark.parametrize("name", ["prior_scale", "prior_lr"])
def test_wrong_arguments_of_the_module_raise(name):
    with pytest.raises(ValueError, match=f"{name}=0.0"):
        AmortizedClustering(**{name: 0.0})


def test_untrained_module_equals_em_with_the_prior():
    batch = next(iter(small().val_dataloader()))
    module = AmortizedClustering(init="farthest")
    found = module(batch.points, batch.mask)
    expected = module.operator.classical()(batch.points, batch.mask)
    for name in ("log_weights", "means", "covariances"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_open_world_equals_one_more_component():
    batch = next(iter(small().val_dataloader()))
    module = AmortizedClustering(prior_scale=0.3).double()
    points, x = batch.points.double(), batch.held_out.double()
    mixture = module(points, batch.mask)
    size = batch.mask.sum(1, keepdim=True).double()
    center = torch.stack([one[mask].mean(0) for one, mask in zip(points, batch.mask, strict=True)])
    weights = torch.cat([mixture.weights * size / (size + 1), 1 / (size + 1)], 1)
    means = torch.cat([mixture.means, center[:, None]], 1)
    covariances = torch.cat([mixture.covariances, torch.full_like(size, 9.0)], 1)
    expected = Mixture(weights.log(), means, covariances).log_prob(x)
    torch.testing.assert_close(module.log_prob(mixture, x, points, batch.mask), expected)


def test_prior_learns_the_scale_of_clusters():
    prior = MixturePrior(mean_strength=0.0, covariance_strength=50.0, covariance=[1.0, 1.0], learnable=True)
    assert sorted(dict(prior.named_parameters())) == ["log_covariance", "log_spread"]
    batch = next(iter(small().val_dataloader()))
    module = AmortizedClustering(residual=False, init="farthest", prior_scale=1.0)
    loss = module.step(batch, "train")["loss"]
    loss.backward()
    assert module.operator.prior.log_spread.grad > 0  # clusters are smaller than the prior scale
    assert all(value.grad.isfinite().all() for value in module.parameters())


def test_run_lowers_the_loss_and_writes_tables(tmp_path):
    torch.manual_seed(0)
    module, data = AmortizedClustering(num_iters=4, num_starts=2, prior_scale=1.0, prior_lr=0.2), small(val_sets=64)
    trainer = Trainer(
        max_epochs=5,
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accelerator="cpu",
        callbacks=[ClusteringReport(classical=False)],
    )
    before = trainer.validate(module, data, verbose=False)[0]["val/gap_to_oracle"]
    trainer.fit(module, data)
    assert trainer.callback_metrics["val/gap_to_oracle"] > before + 0.1
    results = json.loads((tmp_path / "results.json").read_text())
    oracle, trained = results["rows"][:2]
    assert oracle["method"] == "oracle" and trained["method"] == "trained operator"
    assert trained["LL1 - oracle"] == pytest.approx(trained["LL1"] - oracle["LL0"])
    assert 0 < trained["adjusted Rand"] <= 1


def test_table_compares_classical_em_with_the_truth(tmp_path, capsys):
    data = small(num_components=2, min_points=30, max_points=40, test_sets=4)
    report = ClusteringReport()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=1,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        accelerator="cpu",
        callbacks=[report],
        **quiet,
    )
    module = AmortizedClustering(num_components=2, num_iters=2)
    trainer.fit(module, data)
    assert module.training
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert len(rows) == 1 + 10 + 1 + 3

    (batch,) = data.test_dataloader()
    expected = []
    truth = batch.truth
    parts = (batch.points, batch.mask, truth.log_weights, truth.means, truth.covariances)
    for x, mask, log_weights, means, variances in zip(*parts, strict=True):
        one = [
            float(weight) + multivariate_normal(mean, variance * np.eye(2)).logpdf(x[mask].numpy())
            for weight, mean, variance in zip(log_weights, means.numpy(), variances.numpy(), strict=True)
        ]
        expected.append(logsumexp(one, axis=0).mean())
    assert rows["oracle"]["LL0"] == pytest.approx(np.mean(expected), abs=1e-4)
    steps = [rows[f"EM from farthest points, {n}"]["LL0"] for n in ("1 step", "25 steps", "50 steps")]
    assert steps == sorted(steps)  # one start: the likelihood is monotone
    with_prior = rows["MAP with known sigma, farthest points, 25 steps"]
    assert with_prior["held out"] > rows["EM from farthest points, 25 steps"]["held out"]
    assert rows["EM from k-means++, 100 steps"]["LL1 - oracle"] == pytest.approx(
        rows["EM from k-means++, 100 steps"]["LL1"] - rows["oracle"]["LL0"]
    )
    best = max(list(rows)[1:11], key=lambda name: rows[name]["held out"])
    assert f"{best}, the best of the others: {rows[best]['held out - oracle']:+.4f}." in capsys.readouterr().out
