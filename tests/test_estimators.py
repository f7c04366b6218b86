"""Claims about the gradient estimators, on policies so simple that the true gradient is known.

The policy draws x ~ N(μ, σ² I) in two dimensions, the reward is r = −‖x − a‖². So
E[r] = −‖μ − a‖² − 2σ², and its gradient in μ is −2 (μ − a). An estimate is the mean of n gradients,
one a sample. It must lie within five standard errors of the truth, and these must be small enough
for that to mean something.
"""

import pytest
import torch

from ddpo import group_advantages, is_loss, sf_loss
from sample import ddim_step

N = 200_000
SIGMA = 0.5
TARGET = torch.tensor([1.0, -0.5], dtype=torch.float64)  # a
MEAN = torch.tensor([0.3, 0.4], dtype=torch.float64)  # μ of the policy that samples
NEVER = 1e9  # a clip range that clips nothing


def reward(x):
    return -(x - TARGET).square().sum(1)


def log_density(x, mean):
    """(n,) of N(mean, σ² I), but for the constant, which no gradient sees."""
    return -(x - mean).square().sum(1) / (2 * SIGMA**2)


def draw(mean, n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return mean + SIGMA * torch.randn(n, 2, dtype=torch.float64, generator=generator)


def one_each(mean):
    """(n, 2): the parameter as n leaves, so that each sample's gradient can be seen."""
    return mean.expand(N, 2).clone().requires_grad_()


def ascent(loss, *parameters):
    """Of each parameter the n gradients of −loss, i.e. of what is maximised."""
    return [-gradient for gradient in torch.autograd.grad(loss.sum(), parameters)]


def assert_mean_is(gradients, truth):
    error = gradients.std(0) / len(gradients) ** 0.5
    assert (error < 0.03 * truth.norm()).all()
    assert ((gradients.mean(0) - truth).abs() < 5 * error).all(), (gradients.mean(0), truth, error)


def test_the_score_function_estimates_the_policy_gradient():
    x, mean = draw(MEAN), one_each(MEAN)
    gradients, = ascent(sf_loss(log_density(x, mean), reward(x)), mean)
    assert_mean_is(gradients, -2 * (MEAN - TARGET))


@pytest.mark.parametrize("step", [[0.0, 0.0], [0.1, -0.1], [-0.15, 0.05]])
def test_importance_sampling_estimates_the_gradient_of_a_policy_that_has_moved_on(step):
    moved = MEAN + torch.tensor(step, dtype=torch.float64)
    x, mean = draw(MEAN), one_each(moved)  # drawn by the old policy
    gradients, = ascent(is_loss(log_density(x, mean), log_density(x, MEAN), reward(x), NEVER), mean)
    assert_mean_is(gradients, -2 * (moved - TARGET))


def test_the_score_function_off_policy_estimates_something_else():
    """E_old[r ∇log p] = (E_old[r (x − μ)]) / σ²: why --algorithm sf makes one update an epoch."""
    moved = MEAN + 0.3
    x, mean = draw(MEAN), one_each(moved)
    gradients, = ascent(sf_loss(log_density(x, mean), reward(x)), mean)
    expected_reward = -(MEAN - TARGET).square().sum() - 2 * SIGMA**2
    assert_mean_is(gradients, (MEAN - moved) * expected_reward / SIGMA**2 - 2 * (MEAN - TARGET))
    assert (gradients.mean(0) + 2 * (moved - TARGET)).norm() > 1


def test_a_log_prob_that_is_a_mean_over_the_latent_gives_the_dth_part_of_the_gradient():
    """Exactly so on policy, however μ depends on θ: here μ = c_x x + c_o θ, the sampler's step."""
    sigma = torch.tensor(SIGMA)
    coefficients = torch.tensor([0.9, -0.7, SIGMA, sigma.log()], dtype=torch.float64)
    state = torch.tensor([0.2, -0.1], dtype=torch.float64).expand(N, 2).reshape(N, 2, 1, 1)
    output = one_each(MEAN)
    shaped = output.view(N, 2, 1, 1)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(state.shape, dtype=torch.float64, generator=generator)
    x, old = ddim_step(shaped.detach(), state, coefficients, noise=noise)
    _, log_prob = ddim_step(shaped, state, coefficients, x)
    # ∂μ/∂θ ∂E[r]/∂μ, and D = 2
    truth = -0.7 * -2 * (0.9 * state[0].flatten() - 0.7 * MEAN - TARGET) / 2
    rewards = reward(x.flatten(1))
    for loss in (sf_loss(log_prob, rewards), is_loss(log_prob, old, rewards, 1e-4)):
        gradients, = torch.autograd.grad(-loss.sum(), output, retain_graph=True)
        assert_mean_is(gradients, truth)


def test_off_policy_that_mean_makes_the_ratio_its_own_dth_root():
    """ρ^(1/2) p_old is, but for its height Z = exp(−‖Δ‖²/(8σ²)), the Gaussian half-way between the
    two policies, so the estimate is one of a policy there. Near the old policy, where the clip
    keeps the new one, this hardly differs."""
    shift = torch.tensor([0.2, -0.2], dtype=torch.float64)
    moved, middle = MEAN + shift, MEAN + shift / 2
    x, mean = draw(MEAN), one_each(moved)
    log_prob, old = log_density(x, mean) / 2, log_density(x, MEAN) / 2
    gradients, = ascent(is_loss(log_prob, old, reward(x), NEVER), mean)
    height = torch.exp(-shift.square().sum() / (8 * SIGMA**2))
    expected_reward = -(middle - TARGET).square().sum() - 2 * SIGMA**2
    truth = height / 2 * ((middle - moved) * expected_reward / SIGMA**2 - 2 * (middle - TARGET))
    assert_mean_is(gradients, truth)


def test_each_step_of_a_trajectory_gets_the_whole_reward():
    """x_1 = θ_1 + σ z_1, x_0 = x_1 + θ_2 + σ z_2: both gradients are −2 (θ_1 + θ_2 − a)."""
    first, second = one_each(MEAN), one_each(-MEAN / 2)
    x_1 = draw(MEAN, seed=2)
    x_0 = draw(x_1 - MEAN / 2, seed=3)
    advantages = reward(x_0) + 1.5  # minus a baseline, which changes no mean
    loss = sf_loss(log_density(x_1, first), advantages)
    loss = loss + sf_loss(log_density(x_0, x_1 + second), advantages)
    for gradients in ascent(loss, first, second):
        assert_mean_is(gradients, -2 * (MEAN / 2 - TARGET))


def test_a_baseline_of_the_other_pictures_keeps_the_gradients_size_one_with_the_own_does_not():
    size = 4
    x, mean = draw(MEAN), one_each(MEAN)
    groups = reward(x).view(-1, size)
    others = (groups - (groups.sum(1, keepdim=True) - groups) / (size - 1)).flatten()
    truth = -2 * (MEAN - TARGET)
    unit = others.square().mean().sqrt()  # that of the reward
    advantages = group_advantages(reward(x), size).double() * unit
    gradients, = ascent(sf_loss(log_density(x, mean), advantages), mean)
    assert_mean_is(gradients.view(-1, size, 2).mean(1), truth)  # a group's four are not independent
    with_own = (groups - groups.mean(1, keepdim=True)).flatten()
    gradients, = ascent(sf_loss(log_density(x, mean), with_own), mean)
    assert_mean_is(gradients.view(-1, size, 2).mean(1), truth * (1 - 1 / size))
