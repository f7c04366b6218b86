"""Compiles what the functions would launch for two GPUs, without one, and reads the machine code.

Triton must not interpret here, so the compiling happens in a process of its own:
`python tests/test_kernels_compile.py` prints what it finds."""

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT_TRITON = importlib.util.find_spec("triton") is None
pytestmark = pytest.mark.skipif(WITHOUT_TRITON, reason="triton is not installed")
# of the network's output, and of the latents where they differ
DTYPES = ["float32", "float16", "bfloat16", "bfloat16+float32"]
ARCHITECTURES = [80, 90]  # A100, H100


def recorded(kernel, launches):
    """A stand-in for the kernel. A launch appends (kernel, arguments by name, options) to launches,
    and runs nothing."""

    class Recorder:
        def __getitem__(self, grid):
            def launch(*args, num_warps, enable_fp_fusion, **constants):
                options = dict(num_warps=num_warps, enable_fp_fusion=enable_fp_fusion)
                arguments = dict(zip(kernel.arg_names, args), **constants)
                launches.append((kernel, arguments, options))

            return launch

    return Recorder()


def compiled(kernel, arguments, options, architecture):
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import mangle_type

    signature, constants, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if value is None or parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = mangle_type(value)
            if isinstance(value, torch.Tensor):  # torch allocates so
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", architecture, 32)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        code = triton.compile(source, target=target, options=options).asm
    loads = re.findall(r"\bld\.global\S*", code["ptx"])
    loads = [load for load in loads if ".nc" not in load]  # those belong to a table of the cosine
    layouts = dict(re.findall(r"(#\w+) = (#ttg.blocked<.*>)", code["ttgir"]))
    sums = re.findall(r"\}\) : \(tensor<\w+, (#\w+)>\) -> f32", code["ttgir"])
    return dict(
        kernel=kernel.__name__,
        architecture=architecture,
        noise="drawn" if arguments.get("seed") is not None else "given",
        registers=int(re.search(r"Used (\d+) registers", log.getvalue())[1]),
        spilled_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue()))),
        wide_loads=sum(".v4.b32" in load for load in loads),
        loads=len(loads),
        blocks=arguments["BLOCKS"],
        summed_as=[layouts[name] for name in sums],
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "TRITON_ALWAYS_COMPILE": "1",
        "TRITON_DUMP_PTXAS_LOG": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    output = subprocess.run(
        [sys.executable, __file__], env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    print("\n" + output)
    return [json.loads(line) for line in output.splitlines()]


def test_no_kernel_spills_registers_to_memory(found):
    assert len(found) == 48 and not any(row["spilled_bytes"] for row in found)


def test_everything_the_size_of_the_latents_is_read_sixteen_bytes_at_a_time(found):
    for row in found:
        # a row of coefficients, the seed or the policy's two numbers, the sums of the blocks
        scalars = 6 + row["blocks"]
        assert row["wide_loads"] >= (row["kernel"] != "_finish_kernel"), row
        assert row["loads"] - row["wide_loads"] <= scalars, row


def test_all_kernels_sum_the_squares_in_one_layout_and_so_in_one_order(found):
    for architecture in ARCHITECTURES:
        for dtype in DTYPES:
            compiled_for = architecture, dtype
            rows = [row for row in found if (row["architecture"], row["dtype"]) == compiled_for]
            layouts = [layout for row in rows for layout in row["summed_as"]]
            assert len(layouts) >= 7 and len(set(layouts)) == 1, (compiled_for, layouts)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch

    from kernels import ddim_step, ppo_loss

    launches = []
    ddim_step._finish_kernel = recorded(ddim_step._finish_kernel, launches)
    forward = recorded(ddim_step._forward_kernel, launches)
    ddim_step._forward_kernel = ppo_loss._forward_kernel = forward
    ppo_loss._loss_kernel = recorded(ppo_loss._loss_kernel, launches)
    ddim_step.use_triton = ppo_loss.use_triton = lambda latents: True
    row, ones = torch.ones(4), torch.ones(2)
    for dtype, latent in [(dtype, (4, 64, 64)) for dtype in DTYPES] + [("float32", (4, 128, 128))]:
        output_dtype, _, latent_dtype = dtype.partition("+")
        x = torch.zeros(2, *latent, dtype=getattr(torch, latent_dtype or output_dtype))
        output = torch.zeros(4, *latent, dtype=getattr(torch, output_dtype))
        ddim_step.fused_ddim_step(output, x, row, 5.0, seed=torch.zeros(2, dtype=torch.int64))
        ddim_step.fused_ddim_step(output, x, row, 5.0, noise=x)
        ddim_step.fused_ddim_step(output, x, row, 5.0, next_latents=x)
        ppo_loss.fused_ppo_loss(output, x, x, row, ones, ones, 1e-4, 5.0)
        for launch in launches:
            for architecture in ARCHITECTURES:
                found_here = compiled(*launch, architecture)
                print(json.dumps(dict(dtype=dtype, latent=latent, **found_here)), flush=True)
        launches.clear()
