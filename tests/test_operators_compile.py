import copy
import pickle

import pytest
import torch

from em_lightning import EMOperator

# Dynamo looks at the gradient of what it is called with.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.mark.parametrize("kind, dtype", [("full", torch.float32), ("diag", torch.float64)])
def test_a_compiled_iteration_is_the_same(kind, dtype):
    torch._dynamo.reset()
    x = torch.randn(2, 40, 2, dtype=dtype).requires_grad_()
    operator = EMOperator(3, 2, num_iters=3, covariance=kind, prior={"learnable": True}).to(dtype)
    outcomes = []
    for compiles in (False, True):
        if compiles:
            operator.compile(backend="aot_eager")
        mixture = operator(x)
        value = mixture.log_prob(x).sum()
        outcomes.append([*mixture, *torch.autograd.grad(value, [x, *operator.prior.parameters()])])
    for one, two in zip(*outcomes, strict=True):
        assert torch.allclose(one, two, atol=1e-4 if dtype == torch.float32 else 1e-9)


def test_copies_are_not_compiled():
    x = torch.randn(2, 40, 3)
    operator = EMOperator(3, 3)
    operator.compile(backend="eager")
    for other in (copy.deepcopy(operator), pickle.loads(pickle.dumps(operator))):
        assert other._compiled is None and torch.allclose(other(x).means, operator(x).means, atol=1e-5)
    with pytest.raises(TypeError, match="by name"):
        operator.compile("default")
