"""The audit: which operations of a model are EM."""

import functools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import user_models as users
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from em_lightning import ACTIVATIONS, COMPETITIONS, EMOperator, audit
from em_lightning.scope import curvature
from em_lightning.surgery import insert_em_operators

pytestmark = pytest.mark.filterwarnings("ignore:.*enable_nested_tensor", "ignore:.*outside the scope")


class Calls(nn.Module):
    """Runs a function on the output of a layer."""

    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.function = function

    def forward(self, x):
        return self.function(self.layer(x))


def only(findings):
    (finding,) = findings
    return finding


def test_classifier_has_em_at_its_output_alone():
    model = users.MLP()
    x, y = next(iter(users.MLP.data()))
    findings = audit(model, (x, y))
    assert [one.path for one in findings if one.em] == ["head"]
    head = only(findings.at("head"))
    assert (head.operation, head.hypotheses) == ("cross-entropy", "axis 1: 3") and head.error < 1e-6
    values = curvature(model(x).softmax(1))
    assert head.curvature == pytest.approx((values.mean().item(), values.max().item()), rel=1e-5)
    assert head.soft == pytest.approx(torch.special.entr(model(x).softmax(1)).sum(1).exp().mean().item(), rel=1e-5)
    assert only(findings.at("encoder.1")).reason == "elementwise, no normalization, hard zeros"
    assert only(findings.at("encoder.0")).reason == "affine: scores, neither exponentiated nor normalized"


def test_attention_is_a_posterior_over_keys():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    padding = torch.arange(5) > torch.tensor([[4], [2]])
    findings = audit(model, None, lambda: model(torch.randn(2, 5, 8), src_key_padding_mask=padding))
    assert [one.path for one in findings if one.em] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert findings.at("layers.0.self_attn")[0].hypotheses == "keys: 5"
    assert findings.at("layers.0")[0].operation == "relu"  # the function


@torch.no_grad()
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_that_would_use_fused_kernels_is_seen(need_weights):
    """Frozen layers in eval mode, and layers under no_grad, have fused kernels that compute their softmax inside."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)
    x = torch.randn(2, 5, 8)
    found = audit(attention, None, lambda: attention(x, x, x, need_weights=need_weights))
    assert [(one.operation, one.em) for one in found] == [("attention", True)]
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    found = audit(encoder, None, lambda: torch.no_grad()(encoder)(x))
    assert [one.path for one in found if one.em] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert torch.backends.mha.get_fastpath_enabled()


def test_scaled_dot_product_attention_by_hand():
    q = torch.randn(2, 5, 4)
    finding = only(audit(Calls(lambda _: F.scaled_dot_product_attention(q, q, q)), torch.randn(2, 4)).at(""))
    assert finding.em and finding.operation == "softmax"


def test_gate_of_a_mixture_of_experts():
    findings = audit(Calls(lambda z: z.softmax(-1).topk(2).values), torch.randn(3, 4))
    found = {one.operation: one for one in findings}
    assert found["softmax"].em and not found["topk"].em and "hard selection" in found["topk"].reason


def test_activation_functions_have_rows_but_gates_of_recurrent_layers_do_not():
    def forward(z):
        return F.leaky_relu_(torch.tanh(F.gelu(z))).sigmoid() + F.silu(z)

    findings = audit(nn.Sequential(Calls(forward), nn.SELU(), nn.GRU(6, 2)), torch.randn(3, 4))
    assert [(one.path, one.operation) for one in findings] == [
        *(("0", name) for name in ("gelu", "tanh", "leakyrelu", "sigmoid", "silu")),
        *(("0.layer", "linear"), ("1", "selu"), ("2", "gru")),
    ]
    assert all("functional=True" in one.advice and "target=" in one.advice for one in findings[:5])


@pytest.mark.parametrize(
    ("function", "em"),
    [
        (lambda z: z.log_softmax(-1), True),
        (lambda z: torch.logsumexp(z, 0), True),
        (lambda z: torch.logsumexp(z, (0, 1)), True),
        (lambda z: z.exp(), False),  # not normalized
        (lambda z: z / z.sum(-1, keepdim=True), False),  # not exponentiated
        (lambda z: z.sigmoid(), False),
        (lambda z: F.one_hot(z.argmax(-1)), False),
    ],
)
def test_functions(function, em):
    findings = audit(Calls(function), torch.randn(3, 4))
    assert any(one.em for one in findings) == em


@pytest.mark.parametrize("key", list(ACTIVATIONS))
def test_activations_of_the_library(key):
    activation = ACTIVATIONS.build(key)
    finding = only(audit(nn.Sequential(activation), torch.randn(5, 6)))
    assert finding.error < 1e-5 and finding.normalized
    assert ("units do not compete" in finding.reason) == (not activation.competes)
    assert finding.em == (key != "sparsemin")


@pytest.mark.parametrize("key", list(COMPETITIONS))
def test_competitions_of_the_library(key):
    findings = audit(nn.Sequential(COMPETITIONS.build(key)), torch.rand(5, 6))
    finding = only(findings)
    assert finding.normalized and finding.em == (key not in ("hardmin", "sparsemin", "entmin"))
    if not finding.em:
        assert "not exponentiated" in finding.reason


def test_axis_of_a_competition_is_that_of_its_call():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.competition = COMPETITIONS.build("softmin")

        def forward(self, x):
            return self.competition(x, dim=0)

    finding = only(audit(Model(), torch.rand(5, 3)))
    assert finding.hypotheses == "axis 0: 5" and finding.em


@pytest.mark.parametrize("key, name", [("softmin", "energies"), ("softmax_gated", "z")])
def test_first_argument_may_be_given_by_name(key, name):
    module = (COMPETITIONS if key in COMPETITIONS else ACTIVATIONS).build(key)
    model = Calls(lambda z: module(**{name: z}))
    model.add_module("last", module)
    assert only(audit(model, torch.randn(3, 4)).at("last")).em


def test_inserted_operator():
    model = nn.Sequential(nn.Linear(4, 8))
    insert_em_operators(model, "0", 3)
    findings = audit(model, torch.randn(10, 4))
    assert {one.operation for one in findings if one.em} == {"E-step", "Softmin"}


class Counter:
    """An environment with a method that changes its state."""

    def __init__(self):
        self.steps = 0

    def step(self):
        self.steps += 1


class Stateful(users.MLP):
    """A model whose training step changes buffers, metrics, attributes, generators and the batch."""

    def build(self):
        super().build()
        self.teacher = nn.Linear(6, 3).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3).eval()
        self.register_buffer("queue", torch.empty(0))
        self.accuracy = MulticlassAccuracy(3)
        self.environment = Counter()
        self.generator = torch.Generator().manual_seed(0)
        self.losses = []
        self.kept = None

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            self.teacher.weight.lerp_(torch.ones(3, 6), 0.5)
            self.norm.train()(self.teacher(x))
        if not len(self.queue):
            self.queue = torch.randn(5, 3)
        self.environment.step()
        torch.randn(2, generator=self.generator)
        self.kept = self(x) * random.random() * np.random.rand()  # not a leaf of the graph
        self.accuracy(self.kept, y)
        self.losses.append(F.cross_entropy(self.kept, y))
        batch[0].zero_()
        self.log("loss", self.losses[-1])
        return self.losses[-1]


def randomness():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize("again", [False, True])
def test_everything_is_left_as_it_was(again):
    model = Stateful()
    batch = next(iter(users.MLP.data()))
    if again:  # the state then holds tensors with a graph
        model.log = lambda *_: None
        model.training_step([part.clone() for part in batch], 0)
    x, queue, kept = batch[0].clone(), model.queue, model.kept
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    state = randomness(), model.generator.get_state().tolist()
    counts = model.environment.steps, len(model.losses), model.accuracy.update_count
    attributes = {name: list(vars(module)) for name, module in model.named_modules()}
    modes = {name: module.training for name, module in model.named_modules()}
    audit(model, batch)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(batch[0], x) and model.queue is queue and model.kept is kept
    assert (randomness(), model.generator.get_state().tolist()) == state
    assert (model.environment.steps, len(model.losses), model.accuracy.update_count) == counts
    assert attributes == {name: list(vars(module)) for name, module in model.named_modules()}
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_given_function_runs_on_the_copy():
    model = users.ResNet18().train()
    part, statistics = model.net.layer1, model.net.bn1.running_mean.clone()
    x = next(iter(users.ResNet18.data()))[0]
    findings = audit(model, None, lambda: part.train()(model.net.bn1.train()(model.net.conv1(x))))
    assert {"net.bn1", "net.layer1.0.bn2"} <= {one.path for one in findings if one.checked}
    assert torch.equal(model.net.bn1.running_mean, statistics)
    assert part[0].bn1.num_batches_tracked == 0


def test_manual_optimization_steps_optimizers_of_the_copy():
    model, batch = users.TwoOptimizers(), next(iter(users.MLP.data()))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    findings = audit(model, batch)
    assert any(one.operation == "cross-entropy" and one.em for one in findings)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not {"optimizers", "manual_backward", "log"} & set(vars(model))


def test_data_of_a_model_is_not_copied():
    class Uncopied(torch.utils.data.TensorDataset):
        def __deepcopy__(self, memo):
            raise MemoryError

    model = users.MLP()
    model.train_data = Uncopied(torch.randn(8, 6), torch.zeros(8).long())
    model.loader = torch.utils.data.DataLoader(model.train_data, batch_size=4)
    assert only(audit(model, next(iter(model.loader))).at("head")).em


def test_state_that_cannot_be_copied_is_refused_and_a_part_can_be_audited():
    model = users.MLP()
    model.batches = iter(users.MLP.data())
    with pytest.raises(TypeError, match=r"MLP cannot be copied .*audit\(model.encoder"):
        audit(model, next(iter(users.MLP.data())))
    assert len(audit(model.encoder, torch.randn(4, 6))) == 4


class Experts(nn.Module):
    """Routes items to two experts by the sign of a feature; with ``skip``, calls no expert that gets no items."""

    def __init__(self, skip, competition):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 3), competition()) for _ in range(2))
        self.skip = skip

    def forward(self, x):
        items = [x[x[:, 0] > 0], x[x[:, 0] <= 0]]
        chosen = [(e, part) for e, part in zip(self.experts, items, strict=True) if len(part) or not self.skip]
        return torch.cat([getattr(result := e(part), "responsibilities", result) for e, part in chosen])


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("competition", [lambda: nn.Softmax(-1), lambda: COMPETITIONS.build("softmin")])
def test_an_expert_without_items_is_reported_as_not_checked(skip, competition):
    findings = audit(Experts(skip, competition), torch.rand(6, 4))
    seen, unseen = only(findings.at("experts.0.1")), only(findings.at("experts.1.1"))
    assert seen.em and not unseen.em and not unseen.checked
    assert "not checked" in unseen.reason and "normal" not in unseen.reason
    row = next(line for line in str(findings).splitlines() if line.startswith("experts.1.1 "))
    assert "yes" not in row and " no  " not in row


def test_an_operation_that_gets_items_in_its_second_call_is_checked():
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1))
    findings = audit(model, None, lambda: (model(torch.rand(0, 4)), model(torch.rand(2, 4))))
    assert only(findings.at("1")).em


class Contrastive(users.MLP):
    def training_step(self, batch, batch_idx):
        z = F.normalize(self(batch[0]), dim=1)
        return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)))


class Criterion(users.MLP):
    def build(self):
        super().build()
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch, batch_idx):
        return self.criterion(self(batch[0]), batch[1])


class Compared(Contrastive):
    """Logits from a layer that has no weights."""

    def build(self):
        super().build()
        self.compare = Calls(lambda z: z @ z.T)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.compare(batch[0][:, :4]), torch.arange(8))


@pytest.mark.parametrize(
    ("model", "path", "prototypes"),
    [(users.MLP, "head", True), (Criterion, "head", True), (Contrastive, "", False), (Compared, "compare", False)],
)
def test_prototypes_are_named_where_a_layer_has_one_weight_vector_per_class(model, path, prototypes):
    findings = audit(model(), next(iter(users.MLP.data())))
    loss = only([one for one in findings if one.operation == "cross-entropy"])
    assert loss.em and loss.path == path and ("prototypes of the classes" in loss.reason) == prototypes
    assert "r - onehot" in loss.reason


def test_batches_are_passed_by_their_type():
    class Model(nn.Module):
        def forward(self, x, scale=1.0):
            return (x["x"] if isinstance(x, dict) else x).softmax(-1) * scale

    x = torch.randn(3, 4)
    for batch in (x, (x, 2.0), {"x": x}, {"x": x, "scale": 2.0}, {"x": x, "label": 3}):
        assert only(audit(Model(), batch)).em


def test_table_reads():
    lines = str(audit(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Softmax(-1)), torch.randn(2, 4))).splitlines()
    assert " ".join(lines[0].split()) == (
        "layer module operation hypotheses exp norm soft curvature dF/dd - r EM reason"
    )
    assert lines[2].split()[:3] == ["1", "ReLU", "relu"] and lines[2].endswith("hard zeros")
    assert "yes" in lines[3]


# A softmax that the model computes itself, by exponentials and their sums.


def stable(z):
    e = (z - z.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def in_place(z):
    e = (z - z.amax(-1, keepdim=True)).exp_()
    return e.div_(e.sum(-1, keepdim=True) + 1e-12)


def masked(z):
    e = z.exp() * (torch.arange(6) != 2)
    return e / e.sum(-1, keepdim=True)


def over_a_map(z):
    e = z.view(3, 1, 2, 3).exp()
    return e / e.sum((2, 3), keepdim=True)


def transposed(z):
    e = z.exp()
    return (e.T / e.sum(-1)).T


def of_rows_by_index(z):
    index = torch.tensor([1, 0, 1])
    e = z.exp()
    sums = torch.zeros(2, 6).index_add(0, index, e)
    return e / sums[index]


def computed_twice(z):
    return z.exp() / z.exp().sum(1, keepdim=True)


def scattered(z):
    index = torch.tensor([4, 4, 0, 1, 1, 1]).expand_as(z)
    e = z.exp()
    return e / torch.zeros(3, 5).scatter_add(1, index, e).gather(1, index)


@pytest.mark.parametrize(
    ("function", "hypotheses"),
    [
        (stable, "axis 1: 6"),
        (in_place, "axis 1: 6"),
        (computed_twice, "axis 1: 6"),
        (masked, "axis 1: 6"),
        (over_a_map, "axes 2, 3: 6"),
        (transposed, "axis 0: 6"),
        (lambda z: F.normalize(z.exp(), p=1, dim=0), "axis 0: 3"),
        (of_rows_by_index, "axis 0 by index, largest group: 2"),
        (scattered, "axis 1 by index, largest group: 3"),
    ],
)
def test_a_softmax_by_hand_is_seen(function, hypotheses):
    finding = only(audit(Calls(function), torch.randn(3, 4)).at(""))
    assert finding.em and (finding.operation, finding.hypotheses) == ("exp / sum", hypotheses)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_of_short_types_is_not_taken_for_a_deviation(dtype):
    def attention(z):
        scores = (z @ z.T).to(dtype)
        return scores.softmax(-1), stable(scores)

    findings = audit(Calls(attention), torch.randn(200, 4)).at("")
    assert [one.operation for one in findings if one.em] == ["softmax", "exp / sum"]


def test_the_values_of_a_softmax_by_hand_are_those_of_the_function():
    model, x = Calls(stable), torch.randn(3, 4)
    by_hand = only(audit(model, x).at(""))
    model.function = functools.partial(torch.softmax, dim=-1)
    function = only(audit(model, x).at("layer"))
    assert (by_hand.soft, *by_hand.curvature) == pytest.approx((function.soft, *function.curvature), rel=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z.exp() * torch.arange(6) / (z.exp() * torch.arange(6)).sum(-1, keepdim=True),  # weights, not a mask
        lambda z: z.exp() / z.exp().mean(-1, keepdim=True),
        lambda z: (z.exp()[:, 0] / z.exp().sum(-1)).log(),
        lambda z: z.exp() @ torch.ones(6, 2),
        lambda z: z.exp() / (z.exp() @ torch.ones(6))[0],  # of Sinkhorn's iterations
    ],
)
def test_a_sum_of_exponentials_of_another_form_is_called_not_checked(function):
    findings = audit(Calls(function), torch.randn(3, 4))
    finding = only(findings.at(""))
    assert finding.operation == "exp" and not finding.checked and not finding.em
    row = next(line for line in str(findings).splitlines() if line.startswith("(root)"))
    assert "not checked" in row and " no " not in row and "yes" not in row  # in no column


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z.exp() / torch.ones(6)[torch.tensor([True] * 5 + [False])].sum(),
        lambda z: z.T[:2].exp() / z.T.exp()[torch.arange(6) < 2],  # by an index of another length
        lambda z: z.exp() / torch.ones(2)[torch.tensor(1)],
        lambda z: z.exp() / z.exp().sum(0)[None, torch.arange(6)],
        lambda z: z[:, ::2].exp_().div_(z[:, 1::2].abs().sum(-1, keepdim=True)),  # not dense
        lambda z: z.exp().double() / z.exp().sum(-1, keepdim=True),
        lambda z: z.exp().relu() / 2,
        lambda z: (1j * z).exp().real / (1j * z).exp().sum(-1, keepdim=True).real,
        lambda z: torch.sparse.mm(z.exp().to_sparse(), z.T.exp()) / 2,
        lambda z: z.exp().half() / z.exp().half().sum(-1, keepdim=True),
    ],
)
def test_quotients_of_any_form_do_not_end_the_audit(function):
    audit(Calls(function), torch.randn(3, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda z: torch.randn_like(z) * (0.5 * z).exp(),  # a deviation
        lambda z: (z.exp() + z.square() - 1 - z).sum(),  # a divergence
        lambda z: z.log_softmax(-1).exp().mean(0),  # a softmax that is seen already
        lambda z: (z.mean().exp() * z) @ z.T,  # a learned temperature
    ],
)
def test_other_exponentials_are_not_mentioned(function):
    assert not [one for one in audit(Calls(function), torch.randn(3, 4)) if one.operation == "exp"]


def test_an_operator_of_another_library_is_called_not_checked():
    from torch.library import Library

    library = Library("audited", "DEF")
    library.define("scores(Tensor z) -> Tensor")
    library.impl("scores", lambda z: z.softmax(-1), "CompositeExplicitAutograd")
    findings = audit(Calls(torch.ops.audited.scores), torch.randn(3, 4))
    assert [one.operation for one in findings.at("") if not one.checked] == ["audited::scores"]


def test_each_axis_of_an_operation_has_a_row_with_its_calls():
    findings = audit(Calls(lambda z: z.softmax(0) + z.softmax(1) + z.relu().relu() + z.softmax(1)), torch.randn(3, 4))
    rows = {(one.path, one.operation, one.hypotheses): one.calls for one in findings}
    softmaxes = {("layer", "softmax", "axis 0: 3"): 1, ("layer", "softmax", "axis 1: 6"): 2}
    assert rows == {("", "relu", ""): 2, **softmaxes}
    assert "relu (2 calls)" in str(findings) and "softmax (2 calls)" in str(findings)


@pytest.mark.parametrize(
    "make",
    [
        lambda nn: nn.GATConv(4, 3, heads=2),
        lambda nn: nn.GATv2Conv(4, 3),
        lambda nn: nn.TransformerConv(4, 3, heads=2),
        lambda nn: nn.SAGEConv(4, 3, aggr=nn.SoftmaxAggregation(learn=True)),
        lambda nn: nn.GENConv(4, 3, aggr="softmax"),
    ],
)
def test_attention_over_the_neighbours_of_a_node_is_seen(make):
    geometric = pytest.importorskip("torch_geometric.nn")
    edges = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 1, 1, 2, 0]])
    conv = make(geometric)
    loops = isinstance(conv, geometric.GATConv | geometric.GATv2Conv)  # they add an edge from each node to itself
    findings = [one for one in audit(conv, (torch.randn(5, 4), edges)) if one.operation == "exp / sum"]
    assert only(findings).em and only(findings).hypotheses == f"axis 0 by index, largest group: {4 if loops else 3}"


@pytest.mark.parametrize("sorted_rows", [False, True])
def test_attention_over_the_nodes_of_a_graph_is_seen(sorted_rows):
    geometric = pytest.importorskip("torch_geometric.nn")
    aggregation, x = geometric.SoftmaxAggregation(t=0.5), torch.randn(7, 4)
    given = {"ptr": torch.tensor([0, 3, 7])} if sorted_rows else {"index": torch.tensor([0, 1, 0, 1, 1, 1, 0])}
    finding = only(audit(aggregation, {"x": x, **given}))
    assert finding.em and finding.hypotheses == "axis 0 by index, largest group: 4"
    groups = [x[:3], x[3:]] if sorted_rows else [x[given["index"] == group] for group in (0, 1)]
    perplexities = [torch.special.entr((0.5 * rows).softmax(0)).sum(0).exp() for rows in groups]
    assert finding.soft == pytest.approx(torch.stack(perplexities).mean().item(), rel=1e-5)


def test_a_large_graph_with_a_hub_takes_little_memory():
    geometric = pytest.importorskip("torch_geometric.nn")
    edges = torch.stack([torch.arange(20_000) % 5_000, torch.arange(20_000) % 400])
    edges[1, :3_000] = 7
    finding = only(
        [one for one in audit(geometric.GATConv(4, 2), (torch.randn(5_000, 4), edges)) if one.operation == "exp / sum"]
    )
    assert finding.em


# Wrong uses.


def test_an_audit_without_a_batch_says_what_it_needs():
    for model in (users.MLP(), nn.Linear(4, 3)):
        with pytest.raises(TypeError, match=r"batch=None.*run="):
            audit(model, None)

    class Fixed(nn.Module):
        def forward(self):
            return torch.ones(2, 3).softmax(-1)

    assert only(audit(Fixed(), ())).em


def test_a_compiled_model_is_audited_like_the_model():
    model, batch = users.MLP(), next(iter(users.MLP.data()))
    assert str(audit(torch.compile(model), batch)) == str(audit(model, batch))


def test_names_that_the_forward_lacks_are_named():
    class Two(nn.Module):
        def forward(self, x, y):
            return (x + y).softmax(-1)

    for model, batch in (
        (nn.Linear(4, 3), {"y": torch.randn(2, 4)}),
        (Two(), {"x": torch.ones(2), "z": torch.ones(2)}),
    ):
        wrong = max(batch)
        with pytest.raises(TypeError, match=rf"^{wrong} must be of the arguments .*{type(model).__name__}.forward"):
            audit(model, batch)


@pytest.mark.parametrize("num_points", [1, 20])
def test_an_operator_with_a_background_is_checked_on_its_own_points(num_points):
    operator, x = EMOperator(2, 3, background=0.1, residual=False), torch.randn(4, num_points, 3)
    (finding,) = audit(operator, x)
    assert finding.em and finding.hypotheses == "components: 3"
