"""PosteriorMonitor's curvature of layers, and the dominance of the task's gradient over the EM loss's."""

import pytest
import torch
import torch.nn.functional as F
import user_models as users

from em_lightning import EMLoss, softmin
from em_lightning.callbacks import LayerwiseEMLoss, PosteriorMonitor
from em_lightning.scope import curvature

pytestmark = users.QUIET
LOGGED = ("curvature_mean", "curvature_max", "dominance", "cosine", "task_curvature")


class Manual(users.Manual, users.MLP):
    pass


def fitted(tmp_path, kind, callbacks, epochs=2, **options):
    torch.manual_seed(0)
    model = kind()
    trainer = users.trainer(tmp_path, epochs, callbacks, **options)
    trainer.fit(model, users.MLP.data())
    return model, {name: float(value) for name, value in trainer.callback_metrics.items()}


def layer_loss():
    return LayerwiseEMLoss("encoder.1", weight=0.5, verbose=False)


def monitor(every=1):
    options = {"every_n_steps": every, "loss": EMLoss(), "task_curvature": True, "verbose": False}
    return PosteriorMonitor(["encoder.1", "encoder.3"], **options)


@pytest.mark.parametrize("kind", [users.MLP, Manual, users.TwoOptimizers])
@pytest.mark.parametrize("before", [(), (layer_loss,)])
def test_training_is_the_same_bitwise(tmp_path, kind, before):
    plain, _ = fitted(tmp_path, kind, [make() for make in before])
    watched, logged = fitted(tmp_path, kind, [*(make() for make in before), monitor()])
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert {f"em/encoder.3/{name}" for name in LOGGED} <= {*logged}


@pytest.mark.parametrize("kind", [users.MLP, Manual])
@pytest.mark.parametrize("layers", ["none", "before", "after"])
def test_values_equal_formulas(tmp_path, kind, layers):
    """Also beside a LayerwiseEMLoss, in either order: its loss is no part of the task's."""
    callbacks = {"none": [monitor()], "before": [layer_loss(), monitor()], "after": [monitor(), layer_loss()]}[layers]
    _, logged = fitted(tmp_path, kind, callbacks, 1, limit_train_batches=1)
    torch.manual_seed(0)
    model = users.MLP()
    x, y = next(iter(users.MLP.data()))
    d = model.encoder[:2](x)
    task, em = F.cross_entropy(model.head(model.encoder[2:](d)), y), EMLoss().total(d)
    (of_task,), (of_em,) = (torch.autograd.grad(loss, d, retain_graph=True) for loss in (task, em))
    values = curvature(softmin(d.detach()).responsibilities)
    expected = {
        "curvature_mean": values.mean(),
        "curvature_max": values.max(),
        "dominance": of_task.norm() / of_em.norm(),
        "cosine": F.cosine_similarity(of_task.flatten(), of_em.flatten(), dim=0),
    }
    for name, value in expected.items():
        assert logged[f"em/encoder.1/{name}"] == pytest.approx(value.item(), rel=1e-5), name
    hessian = torch.autograd.functional.hessian(
        lambda d: F.cross_entropy(model.head(model.encoder[2:](d)), y, reduction="sum"), d.detach()
    )
    norms = [torch.linalg.matrix_norm(hessian[n, :, n], 2).item() for n in range(len(d))]
    assert logged["em/encoder.1/task_curvature"] == pytest.approx(max(norms), rel=0.02)
    assert logged["em/encoder.1/task_curvature"] <= max(norms) * (1 + 1e-4)  # a Rayleigh quotient


class Linear(users.MLP):
    def training_step(self, batch, batch_idx):
        return self.encoder(batch[0]).mean()


class Rounding(torch.autograd.Function):
    """An operation without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad


class Rounded(users.MLP):
    def training_step(self, batch, batch_idx):
        return Rounding.apply(self.encoder(batch[0])).square().mean()


class Attention(users.MLP):
    def training_step(self, batch, batch_idx):
        d = self.encoder(batch[0])[None, None]
        return F.scaled_dot_product_attention(d, d, d).square().mean()


def test_the_curvature_of_a_linear_loss_is_zero(tmp_path):
    watch = PosteriorMonitor("encoder.3", every_n_steps=1, task_curvature=True, verbose=False)
    _, logged = fitted(tmp_path, Linear, [watch], 1)
    assert logged["em/encoder.3/task_curvature"] == 0


@pytest.mark.parametrize("kind", [Rounded, Attention])
def test_a_layer_below_an_operation_without_second_derivatives_is_skipped_with_a_warning(tmp_path, kind):
    watch = PosteriorMonitor("encoder.3", every_n_steps=1, task_curvature=True, verbose=False)
    with pytest.warns(
        UserWarning, match=r"PosteriorMonitor measures no task_curvature of 'encoder.3', and the run continues"
    ):
        fitted(tmp_path, kind, [watch], 1)


def test_it_measures_every_n_batches_and_leaves_nothing(tmp_path):
    class Counting(PosteriorMonitor):
        calls = 0

        def _compare(self, *args):
            self.calls += 1
            super()._compare(*args)

    callback = Counting("encoder.1", every_n_steps=4, loss=EMLoss(), verbose=False)
    model, _ = fitted(tmp_path, users.MLP, [callback], epochs=3)  # 3 batches each
    assert callback.calls == 3
    assert "training_step" not in vars(model) and not model.encoder[1]._forward_hooks
