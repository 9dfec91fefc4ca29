"""The composition study: stacked networks, instruments of the report, constants of the theory, explicit EM."""

import json
import math
from pathlib import Path

import lightning
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import composition, explicit_em
from benchmarks.composition import Arm, StackedNetworks
from em_lightning import EMLoss, cli
from em_lightning.activations import NegLogSoftminActivation
from em_lightning.callbacks import LayerwiseEMLoss
from em_lightning.competition import softmin
from em_lightning.data import Digits
from em_lightning.scope import curvature

ROOT = Path(__file__).parents[1]

ARMS = {"joint": {"weight": 0.3}, "stop": {"weight": 1.0, "stop": True}, "plain": {"weight": 0.0, "activation": False}}


def networks(arms=None, rates=(0.1, 0.01), **options):
    torch.manual_seed(0)
    return StackedNetworks(arms or ARMS, list(rates), 64, 6, **options).double()


class Alone(nn.Module):
    """One network of the study in plain PyTorch."""

    def __init__(self, stacked, run, num_layers=1):
        super().__init__()
        rate, arm = divmod(run, len(stacked.arms))
        self.arm = list(stacked.arms.values())[arm]
        self.rate = stacked.rates[rate]
        widths = [64, *[6] * num_layers, 10]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.norm = nn.LayerNorm(10)
        for layer, weights, biases in zip(self.layers, stacked.weights, stacked.biases, strict=True):
            layer.weight.data.copy_(weights[rate][arm])
            layer.bias.data.copy_(biases[rate][arm, 0])
        self.double()

    def loss(self, x, labels):
        h, aux, self.energies = x, 0.0, []
        for layer in self.layers[:-1]:
            d = torch.relu(layer(h))
            self.energies.append(d)
            z = (d - d.mean(0)) / (d.var(0).clamp_min(1e-30).sqrt() + 1e-8)
            correlation = z.T @ z / (len(z) - 1)
            redundancy = correlation.square().sum() - correlation.diagonal().square().sum()
            aux = aux - torch.logsumexp(-d, 1).mean() - (d.var(0) + 1e-6).log().sum() + redundancy
            y = d + torch.logsumexp(-d, 1, keepdim=True) if self.arm.activation else d
            h = y.detach() if self.arm.stop else y
        self.task = F.cross_entropy(self.norm(self.layers[-1](h)), labels)
        self.aux = self.arm.weight * aux
        return self.task + self.aux


def batches(count):
    torch.manual_seed(1)
    return [(torch.rand(40, 64, dtype=torch.float64), torch.randint(10, (40,))) for _ in range(count)]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_each_run_trains_like_a_network_alone(optimizer, num_layers):
    stacked = networks(optimizer=optimizer, num_layers=num_layers)
    alone = [Alone(stacked, run, num_layers) for run in range(len(stacked.runs))]
    cls = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    others = [cls(network.parameters(), lr=network.rate) for network in alone]
    ours = stacked.configure_optimizers()
    for x, labels in batches(3):
        ours.zero_grad()
        total = stacked.step((x, labels), "val")["loss"]
        total.backward()
        ours.step()
        losses = []
        for network, other in zip(alone, others, strict=True):
            other.zero_grad()
            losses.append(network.loss(x, labels))
            losses[-1].backward()
            other.step()
        torch.testing.assert_close(total, sum(losses), rtol=1e-6, atol=0)
    x, labels = batches(1)[0]
    energies, _ = stacked(x)
    for run, network in enumerate(alone):
        network.loss(x, labels)
        for found, expected in zip(energies, network.energies, strict=True):
            torch.testing.assert_close(found[run], expected, rtol=1e-5, atol=1e-6)


def test_measured_gradients_equal_those_of_a_network_alone():
    stacked = networks()
    x, labels = batches(1)[0]
    alone = [Alone(stacked, run) for run in range(len(stacked.runs))]
    stacked.trainer = type("Fit", (), {"global_step": 0, "max_epochs": 1, "current_epoch": 0})()
    stacked.step((x, labels), "train")
    ratio, cosine = stacked.gradients[:, 0]
    for run, network in enumerate(alone):
        network.loss(x, labels)
        if network.arm.stop or not network.arm.weight:
            assert ratio[run] == (0.0 if network.arm.stop else math.inf)
            continue
        (d,) = network.energies
        task, aux = (torch.autograd.grad(loss, d, retain_graph=True)[0] for loss in (network.task, network.aux))
        assert ratio[run].item() == pytest.approx((task.norm() / aux.norm()).item(), rel=1e-4)
        expected = F.cosine_similarity(task.flatten(), aux.flatten(), dim=0).item()
        assert cosine[run].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated", "ignore:.*does not have many workers")
def test_the_stop_arm_equals_the_callback_with_detach(tmp_path):
    stacked = networks({"stop": Arm(stop=True)}, rates=[0.1], num_layers=2)

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            first, second, last = Alone(stacked, 0, num_layers=2).layers
            nls = NegLogSoftminActivation
            self.net = nn.Sequential(first, nn.ReLU(), nls(), second, nn.ReLU(), nls(), last, nn.LayerNorm(10)).double()

        def training_step(self, batch):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model, data = Model(), batches(4)
    callback = LayerwiseEMLoss(nn.ReLU, EMLoss(reduction="mean"), detach=True, verbose=False)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **quiet
    )
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=None))
    optimizer = stacked.configure_optimizers()
    for batch in data:
        optimizer.zero_grad()
        stacked.step(batch, "val")["loss"].backward()
        optimizer.step()
    for layer, weights in zip((0, 3, 6), stacked.weights, strict=True):
        torch.testing.assert_close(model.net[layer].weight, weights[0][0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("epoch, trained", [(0, 0), (1, 0), (2, 1), (3, 1)])
def test_greedy_training_reaches_one_layer_per_part_of_the_epochs(epoch, trained):
    stacked = networks({"greedy": Arm(stop=True, greedy=True)}, num_layers=2)
    stacked.trainer = type("Fit", (), {"global_step": 1, "max_epochs": 4, "current_epoch": epoch})()
    stacked.step(batches(1)[0], "train")["loss"].backward()
    for layer in (0, 1):
        assert bool((stacked.weights[layer][0].grad != 0).any()) == (layer == trained)


@pytest.mark.parametrize("norm, dim", [("layer", -1), ("batch", -2)])
def test_norm_standardizes_what_is_passed_on(norm, dim):
    h = networks({"joint": Arm()}, norm=norm).pass_on(3 * torch.rand(2, 50, 6, dtype=torch.float64))
    torch.testing.assert_close(h.mean(dim), torch.zeros_like(h.mean(dim)), rtol=0, atol=1e-5)
    torch.testing.assert_close(h.var(dim, unbiased=False), torch.ones_like(h.mean(dim)), rtol=1e-3, atol=0)


def test_row_stochastic_head_averages_its_inputs():
    stacked = networks(head="row_stochastic", head_norm=False)
    h = torch.rand(6, 5, 6, dtype=torch.float64)
    logits = stacked.logits(h)
    assert (logits >= h.amin(-1, keepdim=True)).all() and (logits <= h.amax(-1, keepdim=True)).all()
    ones = torch.ones(6, 5, 10, dtype=torch.float64)
    torch.testing.assert_close(stacked.logits(torch.ones_like(h)), ones)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rates": []}, "num_rates"),
        ({"rates": [-1.0]}, "rates"),
        ({"num_layers": 0}, "num_layers"),
        ({"kernel": "gelu"}, "kernel"),
        ({"norm": "group"}, "norm"),
        ({"head": "mlp"}, "head"),
    ],
)
def test_arguments_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        networks(**options)


def test_layer_values_tell_ties_from_competition():
    d = torch.tensor([[[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 0.0, 9.0], [0.0, 1.0, 9.0, 9.0], [0.0, 1e-3, 9.0, 9.0]]])
    values = {name: float(value) for name, value in composition.layer_values(d).items()}
    expected = curvature(softmin(d[0]).responsibilities)
    assert values["curvature_max"] == pytest.approx(expected.max().item())
    assert values["curvature_max_untied"] == pytest.approx(expected[2:].max().item())
    assert values["untied"] == 0.5 and values["saturated"] == 0.5 and values["two_tied"] == 0.5


def test_convergence_is_95_percent_of_the_change():
    series = [0.0, -5.0, -9.4, -9.6, -10.0, -10.0, -10.0, -10.0, -10.0]
    assert composition.converged(series) == 3
    assert composition.converged([1.0, 1.0, 1.0]) == 0


def test_task_curvature_equals_the_hessian_of_a_batch():
    stacked = networks({"joint": Arm(0.1)}, rates=[0.1])
    x, labels = batches(1)[0]
    (d,) = stacked(x[:4])[0]

    def loss(flat):
        logits = stacked.logits(stacked.pass_on(flat.view_as(d)))
        return F.cross_entropy(logits[0], labels[:4], reduction="sum")

    hessian = torch.autograd.functional.hessian(loss, d.detach().flatten())
    expected = torch.linalg.eigvalsh(hessian).abs().max().item()
    (found,) = composition.task_curvature(stacked, d.detach(), labels[:4])
    assert found == pytest.approx(expected, rel=1e-3)


def test_probes_read_the_scale_only_where_features_are_raw():
    data = Digits().whole("train")
    features = data.x.flatten(1)[None].repeat(2, 1, 1)
    features[1] *= 1e-3
    raw, standardized = composition.probes(features, data.y, features, data.y, epochs=5, rate=1e-2)
    assert raw[0] > raw[1] + 0.2
    assert standardized[0].item() == pytest.approx(standardized[1].item(), abs=0.02)
    assert standardized[0] > 0.9


def test_norm_of_the_free_energys_hessian_is_at_most_one_half_and_the_bound_is_tight():
    generator = torch.Generator().manual_seed(0)
    d = 10 * torch.rand(1000, 6, dtype=torch.float64, generator=generator)
    assert curvature(softmin(d).responsibilities).max() <= 0.5
    two_equal = torch.tensor([[0.0, 0.0, 800.0]], dtype=torch.float64)
    assert curvature(softmin(two_equal).responsibilities).item() == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("kernel, constant", [("linear", 0.5), ("softplus", 0.75)])
def test_hessian_in_the_weights_is_bounded_by_the_mean_squared_norm_of_the_items(kernel, constant):
    """1/2 E|x~|^2 for energies linear in W, and .75 max |x~|^2 for softplus, whose second derivative is at most 1/4."""
    x = explicit_em.with_ones(Digits().whole("train").x[:50, :, :3, :3]).double()
    energy = {"linear": lambda z: z, "softplus": F.softplus}[kernel]
    squares = x.square().sum(1)
    bound = constant * (squares.mean() if kernel == "linear" else squares.max())
    for scale in (0.0, 1.0, 10.0):
        torch.manual_seed(0)
        weights = scale * torch.randn(4, x.shape[1], dtype=torch.float64)
        hessian = torch.autograd.functional.hessian(
            lambda flat: -torch.logsumexp(-energy(x @ flat.view(4, -1).T), 1).mean(), weights.flatten()
        )
        assert torch.linalg.eigvalsh(hessian).abs().max() <= bound


def test_jacobian_of_the_excess_energy_has_norm_sqrt_k_times_the_norm_of_r():
    torch.manual_seed(0)
    for scale in (0.0, 1.0, 20.0):
        d = scale * torch.rand(7, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda d: d + torch.logsumexp(-d, 0), d)
        r = softmin(d).responsibilities
        expected = math.sqrt(7) * r.norm()
        torch.testing.assert_close(torch.linalg.matrix_norm(jacobian, 2), expected, rtol=1e-10, atol=0)
        assert expected <= math.sqrt(7) + 1e-12


@pytest.mark.parametrize("volume", explicit_em.VOLUMES)
@pytest.mark.parametrize("seed", range(3))
def test_explicit_em_never_increases_the_objective(volume, seed):
    """The proof: L(W') <= Q(W' | r) <= Q(W | r) = L(W), each relation verified."""
    torch.set_default_dtype(torch.float64)
    try:
        x = explicit_em.with_ones(Digits().whole("train").x[:300].double())
        weights, terms = explicit_em.start(x, 8, seed), explicit_em.VOLUMES[volume]
        for _ in range(30):
            found = explicit_em.iterate(weights, x, terms)
            assert found.before == pytest.approx(float(explicit_em.objective(weights, x, terms)), abs=1e-9)
            assert found.surrogate <= found.before
            assert found.after <= found.surrogate + 1e-9
            weights = found.weights
        assert found.step > 0 and found.after < float(explicit_em.objective(explicit_em.start(x, 8, seed), x, terms))
    finally:
        torch.set_default_dtype(torch.float32)


def test_least_squares_of_the_m_step_bounds_the_weighted_energies():
    torch.manual_seed(0)
    z, c = 3 * torch.randn(1000), 3 * torch.rand(1000) + 1e-3
    assert (z.relu() <= z / 2 + z.square() / (4 * c) + c / 4 + 1e-6).all()
    torch.testing.assert_close(z.relu(), z / 2 + z.square() / (4 * z.abs()) + z.abs() / 4)


def test_matching_undoes_a_permutation():
    x = explicit_em.with_ones(Digits().whole("train").x[:100])
    weights = explicit_em.start(x, 5, 0)
    terms = explicit_em.VOLUMES["published"]
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(explicit_em.matched(weights, weights[order], x), weights)
    assert explicit_em.barrier(weights, weights, x, terms) == pytest.approx(0.0, abs=1e-4)


def run_study(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    return cli.main(["run", str(ROOT / "benchmarks" / "composition.py"), *arguments])


@pytest.mark.parametrize("config", sorted((ROOT / "benchmarks" / "composition").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_of_the_study_runs(config, tmp_path, monkeypatch):
    arguments = ["--config", config.stem, "--trainer.fast_dev_run=true"]
    if "MNIST1D" in config.read_text():
        pytest.importorskip("mnist1d")
    elif "data.MNIST" in config.read_text():
        root = ROOT.parent / "shared" / "data" / "mnist"
        arguments += ["--data.root", str(root) if root.is_dir() else pytest.skip("needs MNIST beside the project")]
    assert run_study(monkeypatch, tmp_path, *arguments) == 0


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")
def test_a_run_of_the_study_reports_every_run(tmp_path, monkeypatch):
    small = ["--trainer.max_epochs=2", "--model.rates=[0.1]", "--report.probe_epochs=1", "--model.num_layers=2"]
    assert run_study(monkeypatch, tmp_path, *small) == 0
    (path,) = tmp_path.rglob("results.json")
    found = json.loads(path.read_text())
    assert [row["run"] for row in found["rows"]] == ["joint .001, 0.1", "joint .03, 0.1", "joint 1, 0.1", "stop, 0.1"]
    assert found["values"]["stop, 0.1: layer 2 ratio late"] == 0.0
    assert 0 < found["values"]["joint 1, 0.1: layer 1 curvature_max"] <= 0.5
