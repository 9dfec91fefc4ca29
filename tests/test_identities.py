"""The identities of implicit EM in docs/theory.md."""

import torch
from torch.nn import functional

from em_lightning.activations import GatedActivation, SignedActivation
from em_lightning.competition import softmin
from em_lightning.kernels import DotProductKernel, GaussianKernel, StudentTKernel


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradient_of_log_sum_exp_is_minus_the_responsibility():
    d = torch.randn(10, 5, dtype=torch.float64, requires_grad=True)
    loss = torch.logsumexp(-d, -1).sum()
    (gradient,) = torch.autograd.grad(loss, d)
    close(gradient, -softmin(d).responsibilities)


def test_gradient_of_cross_entropy_is_responsibility_minus_onehot():
    logits = torch.randn(10, 5, dtype=torch.float64, requires_grad=True)
    label = torch.randint(5, (10,))
    loss = functional.cross_entropy(logits, label, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    close(gradient, softmin(-logits).responsibilities - functional.one_hot(label, 5))


def test_responsibility_weighted_updates_reach_the_prototypes():
    x = torch.randn(20, 3, dtype=torch.float64)
    prototypes = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    posterior = softmin(GaussianKernel()(x, prototypes))
    (gradient,) = torch.autograd.grad(posterior.free_energy.sum(), prototypes)
    r = posterior.responsibilities
    # Zero if and only if the prototypes are the means of the M-step.
    close(gradient, r.sum(0).unsqueeze(-1) * prototypes - r.T @ x)


def test_posterior_mean_of_signed_gaussian_hypotheses_is_tanh():
    m, s, z = 0.7, 1.3, torch.randn(50, dtype=torch.float64)
    energies = GaussianKernel(scale=s)(z.unsqueeze(-1), torch.tensor([[m], [-m]], dtype=torch.float64))
    r_plus, r_minus = softmin(energies).responsibilities.unbind(-1)
    close(r_plus - r_minus, torch.tanh(m * z / s**2))
    close(SignedActivation({"name": "gaussian", "scale": s}, margin=m)(z), torch.tanh(m * z / s**2))


def test_on_off_hypotheses_are_silu_and_softplus():
    z, temperature = torch.randn(50, dtype=torch.float64), 0.6
    on, off = -z, torch.zeros_like(z)
    posterior = softmin(torch.stack([on, off], -1), temperature)
    mean = posterior.responsibilities[..., 0] * z
    close(mean, z * torch.sigmoid(z / temperature))
    close(-posterior.free_energy, temperature * functional.softplus(z / temperature))
    close(GatedActivation()(z), functional.silu(z))


def test_on_off_tends_to_relu():
    z = torch.randn(50, dtype=torch.float64)
    posterior = softmin(torch.stack([-z, torch.zeros_like(z)], -1), temperature=1e-4)
    torch.testing.assert_close(-posterior.free_energy, z.relu(), rtol=0, atol=1e-4)
    torch.testing.assert_close(GatedActivation(temperature=1e-4)(z), z.relu(), rtol=0, atol=1e-4)


def test_attention_is_dot_product_energy_and_posterior_mean():
    query, key, value = (torch.randn(2, 4, n, 8, dtype=torch.float64) for n in (5, 7, 7))
    energies = DotProductKernel(scale=8**-0.5)(query, key)
    close(softmin(energies).mean(value), functional.scaled_dot_product_attention(query, key, value))


def test_masked_attention_equals_infinite_energies():
    query, key, value = (torch.randn(2, 4, 6, 8, dtype=torch.float64) for _ in range(3))
    energies = DotProductKernel(scale=8**-0.5)(query, key)
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    mean = softmin(energies.masked_fill(hidden, torch.inf)).mean(value)
    close(mean, functional.scaled_dot_product_attention(query, key, value, is_causal=True))


def mixture_of(components, log_weights):
    categorical = torch.distributions.Categorical(logits=log_weights)
    return torch.distributions.MixtureSameFamily(categorical, components)


def test_free_energy_of_a_gaussian_mixture_is_minus_its_log_likelihood():
    x, means = torch.randn(30, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    log_weights = torch.randn(4, dtype=torch.float64).log_softmax(-1)
    kernel = GaussianKernel(scale=0.8)
    posterior = softmin(kernel(x, means) + kernel.log_normalizer(3), log_prior=log_weights)
    normal = torch.distributions.Independent(torch.distributions.Normal(means, 0.8), 1)
    close(-posterior.free_energy, mixture_of(normal, log_weights).log_prob(x))
    energies = -log_weights - normal.log_prob(x.unsqueeze(-2))
    close(softmin(energies).responsibilities, posterior.responsibilities)


def test_free_energy_of_a_student_mixture_is_minus_its_log_likelihood():
    x, means = torch.randn(30, 1, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
    log_weights = torch.randn(4, dtype=torch.float64).log_softmax(-1)
    kernel = StudentTKernel(df=3.0, scale=0.8, density=True)
    posterior = softmin(kernel(x, means) + kernel.log_normalizer(1), log_prior=log_weights)
    student = torch.distributions.StudentT(torch.tensor(3.0).double(), means.squeeze(-1), 0.8)
    close(-posterior.free_energy, mixture_of(student, log_weights).log_prob(x.squeeze(-1)))
