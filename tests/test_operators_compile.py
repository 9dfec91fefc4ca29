"""torch.export and torch.compile of the operator equal eager execution."""

import copy
import pickle

import pytest
import torch
from helpers import assert_close, clusters, parts, trained

from em_lightning import EMOperator

pytestmark = [
    # Dynamo reads the gradient of its inputs, and creates an instance of autograd.Function while it traces one.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.slow,
]
OPTIONS = {
    "default": {},
    "background": {"kernel": "student_t", "background": 0.1},
    "learned": {"init": "learned", "covariance": "spherical"},
    "lowrank": {"covariance": "lowrank", "rank": 1},
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def inputs(dtype=torch.float32, masked=False):
    """Return points (2, 40, 3) and, if asked for, a mask and weights."""
    x = clusters(2, 40, 3, dtype=dtype)
    if not masked:
        return (x,)
    return x, torch.rand(2, 40) < 0.8, 0.1 + torch.rand(2, 40, dtype=dtype)


@pytest.mark.parametrize(
    "name, residual, masked",
    [("default", True, True), ("default", False, False), ("background", True, True), ("learned", True, True)],
)
def test_export_equals_eager(name, residual, masked):
    operator = EMOperator(4, 3, residual=residual, **{"num_iters": 2, **OPTIONS[name]}).eval()
    trained(operator, 0.02)
    arguments = inputs(masked=masked)
    program = torch.export.export(operator, arguments)
    assert_close(program.module()(*arguments), operator(*arguments), rtol=1e-6, atol=1e-6)
    others = inputs(masked=masked)  # no value of the example is baked into the program
    assert_close(program.module()(*others), operator(*others), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name, masked, dtype, tolerance",
    [
        ("default", True, torch.float64, 1e-6),
        ("lowrank", True, torch.float64, 1e-6),
        ("default", False, torch.float32, 1e-4),
    ],
)
def test_a_compiled_operator_without_graph_breaks_equals_eager(name, masked, dtype, tolerance):
    operator = trained(EMOperator(4, 3, **{"num_iters": 2, **OPTIONS[name]}).to(dtype), 0.02)
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    x, *others = inputs(dtype, masked)
    x.requires_grad_()
    outcomes = []
    for call in (operator, compiled):
        mixture = call(x, *others)
        value = mixture.means.square().sum() + mixture.log_weights.sum()
        outcomes.append([*parts(mixture), torch.autograd.grad(value, x)[0]])
    *values, slope = outcomes[1]
    *expected, expected_slope = outcomes[0]
    for one, two in zip(values, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slope, expected_slope, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("residual", [False, True])
def test_an_operator_compiled_by_inductor_equals_eager(residual):
    operator = EMOperator(3, 3, num_iters=1, residual=residual).eval()
    (x,) = inputs()
    with torch.no_grad():
        found = torch.compile(operator, fullgraph=True)(x)
        assert_close(found, operator(x), rtol=1e-6, atol=1e-6)


def test_a_compiled_mixture_equals_eager():
    (x,) = inputs()
    mixture = EMOperator(4, 3, residual=False)(x)
    compiled = torch.compile(lambda points: mixture.log_prob(points), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mixture.log_prob(x), rtol=1e-6, atol=1e-6)


def test_copies_of_a_compiled_operator_equal_it():
    (x,) = inputs()
    operator = EMOperator(3, 3)
    operator.compile(backend="eager")
    for other in (copy.deepcopy(operator), pickle.loads(pickle.dumps(operator))):
        assert_close(other(x), operator(x), atol=1e-5)


class Tensors(torch.nn.Module):
    """Returns the mixture of an operator as a tuple, which torch.jit.trace requires."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, *arguments):
        return tuple(parts(self.operator(*arguments)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "name, residual, masked",
    [
        ("default", True, False),
        ("default", False, False),
        ("default", True, True),
        ("background", True, True),
        ("learned", True, False),
        ("lowrank", True, False),
    ],
)
def test_a_traced_operator_equals_eager(name, residual, masked):
    operator = EMOperator(4, 3, residual=residual, **{"num_iters": 2, **OPTIONS[name]}).eval()
    trained(operator, 0.02)
    program = torch.jit.trace(Tensors(operator), inputs(masked=masked), check_trace=False)
    others = inputs(masked=masked)  # no value of the example is baked into the program
    for one, two in zip(program(*others), parts(operator(*others)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
