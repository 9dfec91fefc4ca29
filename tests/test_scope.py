"""The audit: which operations of a model are EM."""

import pytest
import torch
import torch.nn.functional as F
import user_models as users
from torch import nn

from em_lightning import ACTIVATIONS, COMPETITIONS, audit
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


def test_scaled_dot_product_attention_by_hand():
    q = torch.randn(2, 5, 4)
    finding = only(audit(Calls(lambda _: F.scaled_dot_product_attention(q, q, q)), torch.randn(2, 4)).at(""))
    assert finding.em and finding.operation == "softmax"


def test_gate_of_a_mixture_of_experts():
    findings = audit(Calls(lambda z: z.softmax(-1).topk(2).values), torch.randn(3, 4))
    found = {one.operation: one for one in findings}
    assert found["softmax"].em and not found["topk"].em and "hard selection" in found["topk"].reason


@pytest.mark.parametrize(
    ("function", "em"),
    [
        (lambda z: z.log_softmax(-1), True),
        (lambda z: torch.logsumexp(z, 0), True),
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


def test_inserted_operator():
    model = nn.Sequential(nn.Linear(4, 8))
    insert_em_operators(model, "0", 3)
    findings = audit(model, torch.randn(10, 4))
    assert {one.operation for one in findings if one.em} == {"E-step", "Softmin"}


def test_model_is_left_as_it_was():
    model = users.ResNet18().train()
    model.net.bn1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = next(iter(users.ResNet18.data()))
    state = torch.get_rng_state()
    audit(model, batch)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not model.net.bn1.training and "log" not in vars(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_table_reads():
    lines = str(audit(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Softmax(-1)), torch.randn(2, 4))).splitlines()
    assert lines[0].split() == [
        "layer",
        "module",
        "operation",
        "hypotheses",
        "exp",
        "norm",
        "soft",
        "dF/dd",
        "-",
        "r",
        "EM",
        "reason",
    ]
    assert lines[2].split()[:3] == ["1", "ReLU", "relu"] and lines[2].endswith("hard zeros")
    assert "yes" in lines[3]
