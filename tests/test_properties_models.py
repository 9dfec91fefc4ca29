"""Modules on batches of any size and magnitude, surgery on any model, and the arguments of callbacks."""

import math
from contextlib import nullcontext
from functools import partial

import drawing
import numpy as np
import pytest
import torch
from helpers import COVARIANCE_TYPES, detached
from hypothesis import given
from hypothesis import strategies as st
from test_properties_mixtures import log_joint, mixtures, shapes
from torch import nn

from benchmarks.poolings import PoolingClassifier
from em_lightning import ACTIVATIONS
from em_lightning.activations import Activation
from em_lightning.callbacks import (
    InsertEMOperator,
    LayerwiseEMLoss,
    PosteriorMonitor,
    SwapActivations,
    TemperatureSchedule,
)
from em_lightning.data import PointCloudBatch, TableBatch
from em_lightning.modules import (
    EMModule,
    GaussianMixtureModule,
    PointCloudGMM,
)
from em_lightning.studies import (
    AmortizedClustering,
    DecoderFreeEncoder,
    EMClassifier,
    EnergyLayer,
    SparseAutoencoder,
)
from em_lightning.surgery import (
    Change,
    NoMatchError,
    Site,
    Surgery,
    apply_plan,
    find_modules,
    insert_after,
    insert_em_operators,
    recorded_plan,
    replace_modules,
    set_temperature,
    swap_activations,
)
from recipes.swap_activations import ImageClassifier

# Modules.


def parts_of(mixture):
    return mixture.log_weights, mixture.means, mixture.covariances


def assert_learns(loss, module):
    """Assert that a loss is a finite scalar with finite gradients."""
    assert loss.shape == () and loss.isfinite(), loss
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for grad in torch.autograd.grad(loss, wanted, allow_unused=True):
        assert grad is None or grad.isfinite().all()


@pytest.mark.parametrize("kind", [EMClassifier, DecoderFreeEncoder, SparseAutoencoder])
@given(values=st.data())
def test_energy_layers_of_any_items(kind, values):
    items, features, components = (values.draw(st.integers(least, 4)) for least in (0, 1, 1))
    module = kind(num_features=features, num_components=components)
    assert isinstance(module, EnergyLayer) and isinstance(module, EMModule)
    # Documented: squares of energies must be in the range of float32.
    x = values.draw(drawing.tensors((items, features), torch.float32, -30, 15))
    y = torch.arange(items) % 10
    energies = module.energies(x).detach()
    weight, bias = (parameter.detach().double().numpy() for parameter in module.encoder.parameters())
    plain = np.maximum(x.double().numpy() @ weight.T + bias, 0.0)
    size = np.abs(x.double().numpy()) @ np.abs(weight).T + np.abs(bias)
    found = energies.double().numpy()
    assert (np.abs(found - plain) <= 1e-5 * size + 1e-30).all()
    out = module(x)
    assert out.isfinite().all() and len(out) == items
    if items:
        # Losses of the moments of units warn of a batch without variance.
        warned = items == 1 and kind is not SparseAutoencoder
        with pytest.warns(UserWarning, match=r"1 item\(s\) has variance 0") if warned else nullcontext():
            terms = module.step((x, y), "train")
        assert terms["loss"].item() == pytest.approx(sum(v.item() for k, v in terms.items() if k != "loss"), rel=1e-5)
        if x.abs().max() < 1e7:  # a slope of squared errors is a product of three
            assert_learns(terms["loss"], module)


@given(values=st.data())
def test_image_classifiers_of_any_images(values):
    network, items = values.draw(st.sampled_from(("mlp", "cnn"))), values.draw(st.integers(1, 3))
    side = values.draw(st.integers(8, 9))
    module = ImageClassifier(shape=(1, side, side), num_classes=3, network=network, width=4)
    x = values.draw(drawing.tensors((items, 1, side, side), torch.float32, -30, 9))
    logits = module(x)
    assert logits.shape == (items, 3) and logits.isfinite().all()
    assert_learns(module.step((x, torch.arange(items) % 3), "train"), module)


@given(values=st.data())
def test_mixtures_of_clouds_of_any_size(values):
    sets, items, components, features = shapes(values)
    x = values.draw(drawing.tensors((sets, items, features), torch.float32, -9, 9))
    mask, other = (values.draw(drawing.holes((sets, items))) for _ in range(2))
    mask, other = (torch.ones(sets, items, dtype=torch.bool) if one is None else one for one in (mask, other))
    module = PointCloudGMM(
        components,
        features,
        num_iters=2,
        exact_iters=2,
        init=values.draw(st.sampled_from(("farthest", "kmeans++"))),
    )
    indices = torch.arange(sets)
    batch = PointCloudBatch(
        points=x,
        mask=mask,
        held_out=x,
        held_out_mask=other,
        center=torch.zeros(sets, features),
        scale=torch.full((sets,), 2.0),
        label=indices,
        index=indices,
    )

    def same_draws(function, *args):  # of random starts
        torch.manual_seed(0)
        return function(*args)

    terms = same_draws(module.step, batch, "train")
    mixture = same_draws(module, x, mask)
    expected = mixture.log_prob(x)[other].sum() / max(int(other.sum()), 1)
    torch.testing.assert_close(terms["log_likelihood"], expected, rtol=1e-4, atol=1e-3)
    assert terms["loss"].isfinite()
    torch.testing.assert_close(same_draws(module.predict_step, batch, 0).means, 2 * mixture.means)


@given(values=st.data())
def test_classes_of_clouds_of_any_size(values):
    sets, items, components, features = shapes(values)
    x = values.draw(drawing.tensors((sets, items, features), torch.float32, -9, 4))
    mask = values.draw(drawing.holes((sets, items)))
    pooling = values.draw(st.sampled_from(("em", "max", "mean")))
    module = PoolingClassifier(3, features, pooling, components, 5000, num_iters=1, width=4).eval()
    logits = module(x, mask)
    assert logits.shape == (sets, 3) and logits.isfinite().all()
    # Padding has no effect.
    if mask is not None:
        torch.testing.assert_close(module(torch.where(mask.unsqueeze(-1), x, 7.0), mask), logits)


@given(values=st.data())
def test_amortized_clustering_of_any_sets(values):
    sets, items, components, features = shapes(values)
    # Points up to 1e3; components are about 0.5 wide, so float32 is precise enough for both.
    x = values.draw(drawing.tensors((sets, items, features), torch.float32, -9, 3))
    mask = values.draw(drawing.holes((sets, items)))
    module = AmortizedClustering(components, features, num_iters=1, num_starts=2)
    mixture = module(x, mask)
    found = module.log_prob(mixture, x, x, mask)
    assert found.isfinite().all(), found
    own = log_joint(x, detached(mixture))
    inside = np.log(np.exp(own - own.max(2, keepdims=True)).sum(2)) + own.max(2)
    extent = 10 * 0.5
    for b in range(sets):
        kept = x[b] if mask is None else x[b][mask[b]]
        center = kept.double().mean(0).numpy() if len(kept) else np.zeros(features)
        square = ((x[b].double().numpy() - center) ** 2).sum(1) / extent**2
        outside = -0.5 * square - features * math.log(extent * math.sqrt(2 * math.pi))
        n = len(kept)
        whole = np.logaddexp(inside[b] + (math.log(n) if n else -math.inf), outside) - math.log(n + 1)
        np.testing.assert_allclose(found[b].detach(), whole, rtol=1e-3, atol=2e-2)


@given(values=st.data())
def test_mixture_modules_of_any_rows(values):
    rows, components, features = (values.draw(st.integers(least, 6)) for least in (2, 1, 1))
    features, components = min(features, 3), min(components, 3)
    kind = values.draw(st.sampled_from(COVARIANCE_TYPES))
    size = 10.0 ** values.draw(st.integers(-9, 9))
    options = {"num_components": components, "num_features": features, "covariance": kind}
    options["covariance_floor"] = 1e-6 * size**2
    module = GaussianMixtureModule(**options)
    mixture = values.draw(mixtures(kind, 1, components, features, size=size))
    x = size * values.draw(drawing.tensors((rows, features), least=-2, most=1))
    variance = x.var(0, unbiased=False).unsqueeze(0)
    module.start_from(mixture, x.mean(0, keepdim=True), variance)
    joint = log_joint(x[None], mixture)[0]
    density = np.log(np.exp(joint - joint.max(1, keepdims=True)).sum(1)) + joint.max(1)
    np.testing.assert_allclose(module.log_prob(x), density, rtol=1e-6, atol=1e-5)
    weights = values.draw(drawing.counts((rows,)))
    w = np.ones(rows) if weights is None else weights.numpy()
    expected = -(w * density).sum() / w.sum() if w.sum() else 0.0
    for method in ("em", "stochastic"):
        other = GaussianMixtureModule(method=method, **options)
        other.start_from(mixture, x.mean(0, keepdim=True), variance)
        loss = other.learn(TableBatch(x, weights), 1.0)
        assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-5)
        assert all(part.isfinite().all() for part in parts_of(other.mixture))


# Surgery.


@st.composite
def networks(draw):
    """Draw a model of nested layers, some of them shared, with its input."""
    width = draw(st.integers(1, 4))
    shared = nn.ReLU()

    def block(depth):
        layers = []
        for _ in range(draw(st.integers(1, 3))):
            kind = draw(st.sampled_from(("linear", "relu", "shared", "tanh", "norm", *["nested"] * (depth < 2))))
            layers.append(
                {
                    "linear": lambda: nn.Linear(width, width),
                    "relu": nn.ReLU,
                    "shared": lambda: shared,
                    "tanh": nn.Tanh,
                    "norm": lambda: nn.LayerNorm(width),
                    "nested": lambda: block(depth + 1),
                }[kind]()
            )
        return nn.Sequential(*layers)

    model = block(0)
    if draw(st.booleans()):
        model.double()
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    x = draw(drawing.tensors((draw(st.integers(1, 3)), width), dtype, -9, 9))
    return model.train(draw(st.booleans())), x


def state_of(model):
    """Return what a surgery may not change: names, classes, weights, modes and hooks."""
    modules = model.named_modules()
    return (
        [(name, type(one), id(one), one.training, len(one._forward_hooks)) for name, one in modules],
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def assert_same_state(model, before):
    names, weights = state_of(model)
    assert names == before[0] and list(weights) == list(before[1])
    assert all(torch.equal(weights[name], before[1][name]) for name in weights)


@pytest.mark.filterwarnings("ignore:.* has 1 unit")
@given(values=st.data())
def test_swaps_of_any_model_are_undone(values):
    model, x = values.draw(networks())
    before, out = state_of(model), model(x)
    key = values.draw(st.sampled_from(list(ACTIVATIONS)))
    places = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.ReLU)]
    try:
        surgery = swap_activations(model, key, calls="any")
    except NoMatchError as error:
        assert not places and "matches" in str(error)
        assert_same_state(model, before)
        return
    assert isinstance(surgery, Surgery) and len(surgery.changes) == len(places)
    assert all(isinstance(change, Change) for change in surgery.changes)
    assert sorted(change.path for change in surgery.changes) == sorted(places)
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    assert len(find_modules(model, Activation)) == len(places)
    swapped = model(x)
    assert swapped.shape == out.shape and swapped.dtype == out.dtype and swapped.isfinite().all()
    temperature = 10.0 ** values.draw(st.integers(-3, 3))
    assert all(module.temperature == temperature for module in set_temperature(model, temperature).values())
    # The recorded plan lists every swap.
    assert len(recorded_plan(model)) == len(places) and all(place in surgery.report for place in places)
    surgery.undo()
    assert_same_state(model, before)
    assert torch.equal(model(x), out) and not recorded_plan(model)


@given(values=st.data())
def test_surgeries_are_undone_in_any_order(values):
    model, x = values.draw(networks())
    before, out = state_of(model), model(x)
    features = x.shape[-1]
    own = {id(module) for module in model.modules() if isinstance(module, nn.Linear)}  # and not those of operators

    def linear(module):
        return id(module) in own

    operations = {
        "swap": lambda: replace_modules(model, nn.ReLU, nn.Tanh, calls="any"),
        "insert": lambda: insert_after(model, linear, partial(nn.LayerNorm, normalized_shape=features), calls="any"),
        "operator": lambda: insert_em_operators(model, linear, 2, calls="any"),
        "again": lambda: replace_modules(model, nn.Tanh, nn.SiLU, calls="any"),
    }
    surgeries = []
    for name in values.draw(st.permutations(list(operations)))[: values.draw(st.integers(1, 4))]:
        try:
            surgeries.append(operations[name]())
        except NoMatchError:
            continue
    assert model(x).isfinite().all()
    plan = recorded_plan(model)
    for place in values.draw(st.permutations(range(len(surgeries)))):
        surgeries[place].undo()
    assert_same_state(model, before)
    assert torch.equal(model(x), out)
    if plan:
        apply_plan(model, plan)
        assert [entry["path"] for entry in recorded_plan(model)] == [entry["path"] for entry in plan]
        assert model(x).isfinite().all()


@given(values=st.data())
def test_selections_of_any_model(values):
    model, _ = values.draw(networks())
    pattern = values.draw(st.sampled_from(("*", "0*", "*.1", "nothing", "[", "?")))
    places = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    try:
        found = find_modules(model, pattern)
    except NoMatchError as error:
        assert "matches" in str(error)
        return
    assert all(isinstance(site, Site) and site.path in places for site in found)
    assert not any(a.path.startswith(b.path + ".") for a in found for b in found)
    assert all(site.parent.get_submodule(site.name) is site.module for site in found)


# Validation of the arguments of callbacks.

NUMBERS = st.one_of(st.floats(), st.integers(-3, 3), st.just("auto"), st.none())
BUILDERS = {
    TemperatureSchedule: {
        "start": st.floats(),
        "end": st.floats(),
        "steps": st.integers(-2, 9),
        "shape": st.sampled_from(("linear", "cosine", "exponential", "step")),
    },
    LayerwiseEMLoss: {
        "where": st.just("*"),
        "weight": NUMBERS,
        "every": st.integers(-1, 3),
        "ratio": st.floats(),
        "tap": st.sampled_from(("input", "output", "both")),
    },
    PosteriorMonitor: {
        "where": st.just("*"),
        "every_n_steps": st.one_of(st.integers(-1, 3), st.floats()),
        "tap": st.sampled_from(("input", "output", "both")),
    },
    SwapActivations: {
        "activation": st.sampled_from(("signed", "gated", "sined", 3, None, {"name": "gated"}, {"size": 1}))
    },
    InsertEMOperator: {
        "where": st.just("*"),
        "num_components": st.integers(-1, 3),
        "covariance": st.sampled_from(("diag", "round")),
    },
}


@pytest.mark.parametrize("build", BUILDERS)
@given(values=st.data())
def test_arguments_of_callbacks_are_accepted_or_named_in_an_error(build, values):
    arguments = {key: values.draw(strategy) for key, strategy in BUILDERS[build].items()}
    try:
        callback = build(**arguments)
    except (ValueError, TypeError) as error:
        assert any(key in str(error) or str(value) in str(error) for key, value in arguments.items()), error
        return
    assert isinstance(callback.state_key, str)
    if build is TemperatureSchedule:
        low, high = sorted((callback.start, callback.end))
        for step in (0, 1, callback.steps, 10**9):
            assert low * (1 - 1e-9) <= callback.value(step) <= high * (1 + 1e-9)
