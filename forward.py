"""Forward-process RL: no sampler's likelihood, only noised finished pictures (AWM and DiffusionNFT).

    python forward.py --reward compress                       DiffusionNFT (arXiv 2509.16117)
    python forward.py --reward compress --loss awm            advantage weighted matching (2509.25050)
    python forward.py --reward compress --guidance-scale 1    no guidance at all, as published
    python forward.py --reward compress --advantages zero     the control: must not move the model
    python forward.py --resume runs/compress-nft

Sample pictures x_0 with the weights v_old, score them, noise them again to x_t = α x_0 + s ε, and
train the network v_θ at x_t, where v is the target that it was pretrained on:

    r     clip(A / (2 A_max) + 1/2, 0, 1)          how good a picture is: 1/2 is no better than others
    nft   ( r ‖v⁺ − v‖² + (1 − r) ‖v⁻ − v‖² ) / β,   v± = v_old ± β (v_θ − v_old)
    awm   −(2r − 1) exp(log p_θ − log p_old), clipped, + β ‖v_θ − v_old‖²,   log p = −‖v_θ − v‖²

With e = v_old − v and δ = v_θ − v_old, nft is ‖e‖²/β + 2 (2r − 1) ⟨e, δ⟩ + β ‖δ‖²: a term that is
linear in the advantage, and a trust region around the weights that sampled. awm is the same up to
second order, but with 2r − 1 + β before ‖δ‖². Where r = 1/2 the gradient at v_old is 0, so the model
cannot drift, as that of `rwr.py` does. Tutorial 11 derives both.

v is the network's own target: ε, VP's v, x_0, or the flow's ε − x_0. At a given x_t each is an affine
function of every other, so errors in one are errors in another times a number that depends on t alone:
the choice only weighs the timesteps. --weighting adaptive measures the errors in x_0, for every model.
After an epoch v_old moves to v_θ: v_old ← decay v_old + (1 − decay) v_θ, see `old_decay`.
"""

import torch

from ddpo import is_loss


def signal_and_noise(scheduler, timesteps):
    """(α, s), each (B, 1, 1, 1), of x_t = α x_0 + s ε: √ᾱ and √(1−ᾱ), or 1 − t and t of flow models."""
    if hasattr(scheduler, "alphas_cumprod"):
        alpha_bar = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    sigma = timesteps.view(-1, 1, 1, 1) / scheduler.config.num_train_timesteps  # shifted as in sampling
    return 1 - sigma, sigma


def noised(scheduler, clean, noise, timesteps):
    """(x_t, the network's target, |∂x̂_0 / ∂output| (B,)). clean: x_0, (B, C, H, W); timesteps: (B,)."""
    signal, sigma = signal_and_noise(scheduler, timesteps)
    kind = getattr(scheduler.config, "prediction_type", "flow")  # flow schedulers have but one
    target, slope = {"epsilon": (noise, sigma / signal),
                     "v_prediction": (signal * noise - sigma * clean, sigma),
                     "sample": (clean, torch.ones_like(sigma)),
                     "flow": (noise - clean, sigma)}[kind]
    return signal * clean + sigma * noise, target, slope.flatten()


def optimality(advantages, advantage_clip):
    """(B,) r of DiffusionNFT: the advantage, clipped to ±advantage_clip and mapped to [0, 1]."""
    return (advantages / advantage_clip / 2 + 0.5).clamp(0, 1)


def matching_error(output, target, slope=None):
    """(B,) mean_D (output − target)², what the network was pretrained on.

    slope, (B,), of `noised`: instead ‖x̂_0 − x_0‖² divided by mean |x̂_0 − x_0|, without its gradient
    (DiffusionNFT, sec. 3.3, adaptive weighting): then no timestep's errors outweigh those of others.
    """
    error = (output - target).flatten(1)
    if slope is None:
        return error.square().mean(1)
    error = slope[:, None] * error
    return error.square().mean(1) / error.abs().mean(1).detach().clamp(min=1e-5)


def nft_loss(output, old, target, r, beta, slope=None):
    """(B,) DiffusionNFT, Eq. 5, over β. output, old: v_θ and v_old at x_t, (B, C, H, W); r: (B,).

    A good picture draws v⁺ to its target, a bad one the mirror image v⁻: so it pushes v_θ away.
    """
    delta = beta * (output - old)
    positive = matching_error(old + delta, target, slope)
    negative = matching_error(old - delta, target, slope)
    return (r * positive + (1 - r) * negative) / beta


def awm_loss(output, old, target, r, beta, clip_range, slope=None):
    """(B,) AWM: the loss of DDPO-IS with −matching_error for log p, plus β ‖v_θ − v_old‖².

    Without the second term nothing would bound the loss of a bad picture, whose error is to grow.
    """
    log_prob, old_log_prob = (-matching_error(v, target, slope) for v in (output, old))
    return is_loss(log_prob, old_log_prob, 2 * r - 1, clip_range) + beta * matching_error(output, old)


def old_decay(updates, flat, rise, ceiling):
    """The decay of v_old after so many updates: 0 up to `flat`, then `rise` an update up to `ceiling`.

    Published: (0, 0.001, 0.5) for most rewards of DiffusionNFT, (75, 0.0075, 0.999) for text in
    pictures, (0, 0.001, 0.3) for AWM. 0 is on policy: the next pictures are those of v_θ.
    """
    return min(max(updates - flat, 0) * rise, ceiling)
