"""The kernels against what they replace, on this machine's GPU:

    python benchmarks/kernels.py                prints the tables, writes benchmarks/kernels.json
    python benchmarks/kernels.py --table FILE   prints the tables of such a file again

Four ways to the same numbers: eager torch as such code is commonly written, which gathers ᾱ from a
table on the CPU; eager torch with the table of coefficients on the device; torch.compile of that;
and the fused kernel. GB/s counts the bytes that have to move (inputs once, outputs once), so a way
that moves more shows a lower figure. "of copy" divides by what a large copy_ reaches in the same
run. Small batches fit into the L2 cache and may exceed it.

Times are means over back-to-back calls: "µs" as called from Python, "µs in a graph" replayed from a
CUDA graph, where only the GPU's work counts. GB/s is based on the latter. The common code waits for
the GPU and cannot be captured.

Before it times anything it compares the kernels with float64. Without a GPU all of this runs in
Triton's interpreter on tiny inputs, to kernels-interpreter.json: the checks and the traffic of the
eager code hold, the times mean nothing.
"""

import argparse
import datetime
import json
import math
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not benchmarks/, where this file would be taken for the package kernels

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import triton

import kernels
from kernels import ddim_step, ppo_loss
from kernels.ddim_step import fused_ddim_step
from kernels.ppo_loss import fused_ppo_loss

from benchmarks.epoch import check_out

DEVICE = "cuda" if GPU else "cpu"
LATENT = (4, 64, 64) if GPU else (4, 8, 8)
# of the network's output, and of the latents where they differ
DTYPES = ["float32", "float16", "bfloat16", "bfloat16+float32"]
W, CLIP = 5.0, 1e-4
# Stable Diffusion's, on the CPU
ALPHA_BAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
STRIDE = 20  # timesteps between two of 50 steps


def inputs(batch, dtype, latent=LATENT):
    """One step of a batch of samples, each at a timestep of its own, as in the training loop."""
    output_dtype, _, latent_dtype = dtype.partition("+")
    latent_dtype = getattr(torch, latent_dtype or output_dtype)
    output_dtype = getattr(torch, output_dtype)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE)
    timesteps = torch.randint(1, 50, (batch,), generator=generator) * STRIDE + 1
    a, a_prev = ALPHA_BAR[timesteps], ALPHA_BAR[timesteps - STRIDE]
    sigma = ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
    c_x = (a_prev / a).sqrt()
    c_o = (1 - a_prev - sigma**2).sqrt() - c_x * (1 - a).sqrt()
    return dict(
        noise_pred=draw(2 * batch, *latent).to(output_dtype),
        latents=draw(batch, *latent).to(latent_dtype),
        noise=draw(batch, *latent).to(latent_dtype),
        timesteps=timesteps.to(DEVICE),
        advantages=draw(batch),
        coefficients=torch.stack([c_x, c_o, sigma, sigma.log()], dim=1).to(DEVICE),
    )


def common_step(noise_pred, latents, timesteps, noise=None, next_latents=None):
    """A stochastic DDIM step as it is usually written: predicted sample, direction and variance
    each on its own."""
    uncond, cond = noise_pred.chunk(2)
    noise_pred = uncond + W * (cond - uncond)
    a = ALPHA_BAR.gather(0, timesteps.cpu()).to(latents.device).view(-1, 1, 1, 1)
    a_prev = ALPHA_BAR.gather(0, (timesteps - STRIDE).cpu()).to(latents.device).view(-1, 1, 1, 1)
    predicted = (latents - (1 - a) ** 0.5 * noise_pred) / a**0.5
    variance = (1 - a_prev) / (1 - a) * (1 - a / a_prev)
    sigma = variance**0.5
    mean = a_prev**0.5 * predicted + (1 - a_prev - sigma**2) ** 0.5 * noise_pred
    if next_latents is None:
        next_latents = mean + sigma * noise
    residual = next_latents.detach() - mean
    constant = math.log(math.sqrt(2 * math.pi))
    log_prob = -(residual**2) / (2 * sigma**2) - torch.log(sigma) - constant
    return next_latents.to(latents.dtype), log_prob.mean(dim=(1, 2, 3))


def table_step(noise_pred, latents, coefficients, noise=None, next_latents=None):
    return ddim_step.reference(
        noise_pred, latents, coefficients, W, noise, next_latents=next_latents
    )


def loss_and_grad(step, noise_pred, old_log_prob, advantages, **step_inputs):
    """What the training loop does with either of the two, by autograd."""
    noise_pred = noise_pred.detach().requires_grad_()
    _, log_prob = step(noise_pred, **step_inputs)
    ratio = torch.exp(log_prob - old_log_prob)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
    return loss, torch.autograd.grad(loss.sum(), noise_pred)[0]


def ways(batch, dtype, compiled=True, latent=LATENT):
    """{(function, way): (call, whether it can be captured, bytes that have to move)}"""
    x = inputs(batch, dtype, latent)
    x0 = {key: x[key] for key in ("noise_pred", "latents", "coefficients")}
    common = {key: x[key] for key in ("noise_pred", "latents", "timesteps")}
    stored, old_log_prob = fused_ddim_step(**x0, guidance_scale=W, noise=x["noise"])
    # some ratios are clipped, some are not
    old_log_prob = old_log_prob + 2 * CLIP * torch.linspace(-1, 1, batch, device=DEVICE)
    policy = dict(old_log_prob=old_log_prob, advantages=x["advantages"])
    stored_step = dict(x0, next_latents=stored, **policy)
    common_stored_step = dict(common, next_latents=stored, **policy)
    seed, noise = torch.tensor([0, 0], device=DEVICE), x["noise"]
    by_hand = dict(x0, next_latents=stored, **policy, clip_range=CLIP, guidance_scale=W)

    nbytes = lambda *names: sum(x[name].nbytes for name in names)
    drawn = nbytes("noise_pred", "latents", "latents")  # x in, x' out
    step = drawn + nbytes("noise")
    # the output in and its gradient out
    loss = nbytes("noise_pred", "noise_pred", "latents", "latents")
    steps = {
        "eager, as common": (lambda: common_step(**common, noise=noise), False, step),
        "eager, table": (lambda: table_step(**x0, noise=noise), True, step),
    }
    losses = {
        "eager, as common": (lambda: loss_and_grad(common_step, **common_stored_step), False, loss),
        "eager, table": (lambda: loss_and_grad(table_step, **stored_step), True, loss),
    }
    if compiled:
        torch._dynamo.reset()
        compiled_step = torch.compile(table_step, dynamic=False)
        compiled_loss = torch.compile(ppo_loss.reference, dynamic=False)
        steps["compiled, table"] = lambda: compiled_step(**x0, noise=noise), True, step
        losses |= {
            "compiled, table": (lambda: loss_and_grad(compiled_step, **stored_step), True, loss),
            "compiled, gradient by hand": (lambda: compiled_loss(**by_hand), True, loss),
        }
    fused = dict(x0, guidance_scale=W)
    steps |= {
        "fused": (lambda: fused_ddim_step(**fused, noise=noise), True, step),
        "fused, noise drawn": (lambda: fused_ddim_step(**fused, seed=seed), True, drawn),
    }
    losses["fused"] = lambda: fused_ppo_loss(**by_hand), True, loss
    return {
        (function, way): found
        for function, found_ways in (("step", steps), ("loss", losses))
        for way, found in found_ways.items()
    }


def microseconds(call):
    """Mean over back-to-back calls, about 50 ms of them."""
    if not GPU:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    repeats = 3
    for _ in range(2):  # the first round warms up and says how many the second needs
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        mean = begin.elapsed_time(end) / repeats * 1e3
        repeats = max(10, min(2000, int(50_000 / mean)))
    return mean


def capture(call, repeats=1):
    side = torch.cuda.Stream()  # compilation and the allocator's first growth must not be captured
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph


def measure(call, capturable=True):
    """(µs, µs in a graph, launches), the last two only on a GPU. A launch is a kernel, a copy or a
    memset."""
    call()
    us = microseconds(call)
    if not GPU:
        return us, None, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    launches = sum(event.device_type == cuda for event in profile.events())
    if not capturable:
        return us, None, launches
    return us, microseconds(capture(call, repeats=10).replay) / 10, launches


class Traffic(TorchDispatchMode):
    """Counts the operations that torch runs, and the bytes of the tensors that they read and write.
    Views cost nothing."""

    operations = bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in function.name():
            self.operations += 1
            for leaf in tree_leaves((args, kwargs, result)):
                if isinstance(leaf, torch.Tensor):
                    self.bytes += min(leaf.nbytes, leaf.untyped_storage().nbytes())
        return result


def eager_traffic(dtype):
    """Operations and bytes a latent element of the eager ways, which depend on no machine."""
    batch, latent = 2, (4, 64, 64)
    rows = []
    for (function, way), (call, _, _) in ways(batch, dtype, compiled=False, latent=latent).items():
        if way.startswith("eager"):
            with Traffic() as traffic:
                call()
            rows.append(dict(
                function=function, way=way, dtype=dtype, operations=traffic.operations,
                bytes_per_element=round(traffic.bytes / (batch * math.prod(latent))),
            ))
    return rows


@triton.jit
def _empty_kernel(pointer):
    pass


def errors(dtype, batch=3, latent=LATENT):
    """Largest differences from float64, relative for the gradient, on inputs that the kernels read
    as they are; and whether the log-probability has the same bits in both kernels and under both
    divisions of the work."""
    x = inputs(batch, dtype, latent)
    x0 = {key: x[key] for key in ("noise_pred", "latents", "coefficients")}
    stored, log_prob = fused_ddim_step(**x0, guidance_scale=W, noise=x["noise"])
    old_log_prob = log_prob + 2 * CLIP * torch.linspace(-1, 1, batch, device=DEVICE)
    policy = dict(old_log_prob=old_log_prob, advantages=x["advantages"])
    by_hand = dict(x0, next_latents=stored, **policy, clip_range=CLIP, guidance_scale=W)
    _, scored, _, _, grad = fused_ppo_loss(**by_hand)
    drawn, _ = ddim_step.reference(*(x0[key].double() for key in x0), W, noise=x["noise"].double())
    exact = {
        key: value.double() if isinstance(value, torch.Tensor) else value
        for key, value in by_hand.items()
    }
    _, exact_log_prob, _, _, exact_grad = ppo_loss.reference(**exact)
    ddim_step.SPLIT = True
    _, split_step = fused_ddim_step(**x0, guidance_scale=W, noise=x["noise"])
    split_loss = fused_ppo_loss(**by_hand)[1]
    ddim_step.SPLIT = None
    return dict(
        dtype=dtype,
        next_latents=(stored - drawn).abs().max().item(),
        log_prob=(log_prob - exact_log_prob).abs().max().item(),
        grad=((grad - exact_grad).abs().max() / exact_grad.abs().max()).item(),
        same_bits=all(torch.equal(log_prob, other) for other in (scored, split_step, split_loss)),
    )


def graph_replay():
    """A captured step that advances its own seed, replayed. μ = 0 and σ = 1 here, so what it draws
    is the noise itself."""
    zeros = torch.zeros(8, *LATENT, device=DEVICE)
    row = torch.tensor([0.0, 0.0, 1.0, 0.0], device=DEVICE)
    seed = torch.tensor([7, 0], device=DEVICE)
    latest = {}

    def step():
        latest["noise"], _ = fused_ddim_step(zeros, zeros, row, seed=seed)
        seed[1] += 1

    graph = capture(step)
    seed[1] = 0
    noise = [(graph.replay(), latest["noise"].flatten().clone())[1] for _ in range(3)]
    seed[1] = 0
    graph.replay()
    replays = torch.stack(noise)
    correlation = torch.corrcoef(replays) - torch.eye(3, device=DEVICE)
    return dict(
        same_offset_same_noise=torch.equal(latest["noise"].flatten(), noise[0]),
        std=replays.std().item(),
        correlation_of_replays=correlation.abs().max().item(),
    )


def one_program_or_many():
    """µs with one program a sample, and with one a block and a second launch: what SPLIT and
    FEW_SAMPLES should follow. The loss of the larger sample takes two launches either way."""
    rows = []
    for latent in ((4, 64, 64), (4, 128, 128)) if GPU else ((4, 8, 8),):
        for batch in (1, 8, 64, 512) if GPU else (1,):
            for function in ("step", "loss"):
                for split in (False, True):
                    ddim_step.SPLIT = split
                    found = ways(batch, "float32", compiled=False, latent=latent)
                    call, _, _ = found[function, "fused"]
                    us, graph_us, launches = measure(call)
                    rows.append(dict(
                        function=function, latent=size(latent), batch=batch, split=split,
                        us=us, graph_us=graph_us, launches=launches,
                    ))
    ddim_step.SPLIT = None
    return rows


def size(latent):
    return "×".join(map(str, latent))


def run(batches, dtypes):
    kernels.BACKEND = "triton"
    record = dict(
        device=torch.cuda.get_device_name() if GPU else "interpreter: times mean nothing",
        latent=size(LATENT),
        torch=torch.__version__,
        triton=triton.__version__,
        command=" ".join(["python", "benchmarks/kernels.py", *sys.argv[1:]]),
        date=datetime.date.today().isoformat(),
    )
    record["errors"] = [errors(dtype) for dtype in dtypes]
    record["traffic"] = [row for dtype in dtypes for row in eager_traffic(dtype)]
    record["graph"] = graph_replay() if GPU else None
    pointer = torch.zeros(1, device=DEVICE)
    us, graph_us, _ = measure(lambda: _empty_kernel[(1,)](pointer))
    record["empty_launch_us"], record["empty_launch_graph_us"] = us, graph_us
    large = torch.zeros(2**28 if GPU else 2**10, device=DEVICE)  # 1 GiB, far beyond any cache
    target = torch.empty_like(large)
    copy_gb_s = 2 * large.nbytes / microseconds(lambda: target.copy_(large)) / 1e3
    record["copy_gb_s"] = copy_gb_s
    del large, target
    record["rows"] = []
    for dtype in dtypes:
        for batch in batches:
            found = ways(batch, dtype, compiled=GPU)
            for (function, way), (call, capturable, nbytes) in found.items():
                us, graph_us, launches = measure(call, capturable)
                gb_s = nbytes / (graph_us or us) / 1e3
                record["rows"].append(dict(
                    function=function, dtype=dtype, batch=batch, way=way,
                    us=us, graph_us=graph_us, launches=launches,
                    gb_s=gb_s, of_copy=gb_s / copy_gb_s,
                ))
    record["division"] = one_program_or_many()
    return record


def shown(value):
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return "–" if value is None else str(value)


def print_table(rows, **columns):
    print("\n| " + " | ".join(columns.values()) + " |\n|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(shown(row[key]) for key in columns) + " |")


def print_tables(record):
    of_machine = "{device}; latents {latent}; torch {torch}, triton {triton}; {date}; `{command}`"
    print(of_machine.format(**record))
    empty, empty_in_graph = shown(record["empty_launch_us"]), shown(record["empty_launch_graph_us"])
    print(f"an empty launch takes {empty} µs, {empty_in_graph} µs in a graph; "
          f"a large copy moves {shown(record['copy_gb_s'])} GB/s")
    print("\nLargest differences from float64, half precision's rounding of the results included:")
    print_table(
        record["errors"], dtype="dtype", next_latents="next latents", log_prob="log-prob",
        grad="gradient, relative", same_bits="log-prob: same bits everywhere",
    )
    if record["graph"]:
        found = ", ".join(f"{key} {shown(value)}" for key, value in record["graph"].items())
        print("\nReplayed from a graph: " + found)
    counted = dict(operations="operations", bytes_per_element="bytes per latent element")
    print_table(record["traffic"], function="", dtype="dtype", way="way", **counted)
    timed = dict(us="µs", graph_us="µs in a graph", launches="launches")
    print_table(
        record["rows"], function="", dtype="dtype", batch="B", way="way",
        **timed, gb_s="GB/s", of_copy="of copy",
    )
    print_table(
        record["division"], function="", latent="latent", batch="B", split="a program a block",
        **timed,
    )


if __name__ == "__main__":
    file, batches = "kernels-interpreter.json", [1, 2]
    if GPU:
        file, batches = "kernels.json", [1, 8, 64, 512, 4096]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=batches,
                        help=f"samples at once (default: {', '.join(map(str, batches))})")
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES, metavar="DTYPE",
                        help=f"{', '.join(DTYPES)} (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / file,
                        help=f"where the record is put (default: benchmarks/{file})")
    parser.add_argument("--table", type=Path,
                        help="print the tables of this JSON file and measure nothing")
    args = parser.parse_args()
    if not args.table:
        check_out(parser, args.out, partial=args.batch != batches or args.dtype != DTYPES)
    record = json.loads(args.table.read_text()) if args.table else run(args.batch, args.dtype)
    print_tables(record)
    if not args.table:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
