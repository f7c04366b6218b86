"""DDPO's maths at a denoising step as fused Triton kernels: ddim_step.py when sampling, ppo_loss.py
when training.

Each file holds the same function twice, in plain torch and in Triton. `use_triton` is the one place
that chooses, with one exception: where autograd needs a graph, which the kernels do not record,
ddim_step.py takes torch.
"""

import os

import torch

try:
    import triton
except ImportError:  # on macOS, for example: the torch path is then all that is needed
    triton = None

# --kernels sets it: "triton" or "torch" everywhere, or "auto": triton on a GPU, torch elsewhere
BACKEND = "auto"


def use_triton(latents):
    """Whether the kernels take these latents. float64, for checking the maths, goes to torch."""
    if BACKEND not in ("auto", "triton", "torch"):
        raise ValueError(f"kernels.BACKEND {BACKEND!r}: unknown; choose auto, triton or torch")
    if BACKEND == "torch" or latents.dtype == torch.float64:
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    runs_here = triton is not None and (latents.is_cuda or interpreted)
    if BACKEND == "triton" and not runs_here:
        raise ValueError(
            "kernels.BACKEND 'triton': needs triton installed and latents on a GPU, "
            f"not {latents.device}; choose auto"
        )
    return runs_here and (latents.is_cuda or BACKEND == "triton")
