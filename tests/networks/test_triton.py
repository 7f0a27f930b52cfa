"""A dry run of the CUDA path on a machine without a GPU: the Triton kernels of whole steps, compiled for an H100.

Inductor lowers the steps for a device that is described to it, and ptxas, of Triton's wheel, assembles what it writes.
Nothing runs, and attention is the plain one, as no device is there to choose a fused one for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from types import SimpleNamespace

import pytest
import torch

from flowturbo.models import SiT, run_block
from flowturbo.networks.patches import Place, block_step
from flowturbo.networks.precision import cast
from flowturbo.refiner import VelocityRefiner
from flowturbo.transport import Guidance, Schedule

pytestmark = pytest.mark.slow
CONFIG = {"input_size": 8, "hidden_size": 128, "depth": 1, "num_heads": 4, "num_classes": 10}
ROWS = 2
H100 = {
    **{"name": "NVIDIA H100", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 80 << 30},
    **{"max_threads_per_multi_processor": 2048, "regs_per_multiprocessor": 65536, "warp_size": 32},
    **{"shared_memory_per_block_optin": 232448, "L2_cache_size": 50 << 20},
}


@pytest.fixture
def described(monkeypatch):
    """An H100 described to Inductor and Triton in place of a device. Skips where they take it otherwise."""
    triton = pytest.importorskip("triton")
    try:
        from torch._inductor.runtime import triton_helpers
        from torch._inductor.runtime.hints import DeviceProperties
        from triton.backends.compiler import GPUTarget
        from triton.runtime.driver import driver

        here = DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, warp_size=32)
        target = GPUTarget("cuda", 90, 32)
        monkeypatch.setattr(DeviceProperties, "create", classmethod(lambda kind, device: here))
        monkeypatch.setattr(triton_helpers, "set_driver_to_gpu", lambda: None)
        monkeypatch.setattr(torch.utils._triton, "has_triton", lambda *_: True)
        monkeypatch.setattr(
            driver, "_active", SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
        )
    except (ImportError, AttributeError, TypeError) as error:
        pytest.skip(f"this torch or triton is described a device otherwise: {error}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(**H100))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return triton, target


def on_cuda(value):
    return torch.empty(value.shape, dtype=value.dtype, device="cuda")


def lowered(schedule, number, mode):
    """What Inductor writes for step `number` of a schedule, in bfloat16 and guided."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.graph import CodeGen

    steps = Schedule.parse(schedule).plan()
    step, instants = steps[number], Guidance(1.5).instants(steps)[number]
    networks = {
        name: cast(kind(**CONFIG).eval().requires_grad_(False), torch.bfloat16)
        for name, kind in (("predictor", SiT), ("refiner", VelocityRefiner))
        if any(stage.network == name for stage in step.block.stages)
    }
    modules = [module for network in networks.values() for module in network.modules()]
    kept = [(module, name) for module in modules for name, value in module._parameters.items() if value is not None]
    for network in networks.values():
        for block in network.blocks:
            block.attn.fused = True
    with mode:
        weights = [on_cuda(module._parameters.pop(name)) for module, name in kept]
        patches = torch.empty(ROWS, 16, 4, 4, device="cuda")
        handed = [torch.empty(2 * ROWS, 16, 4, 4, device="cuda") for _ in step.takes]
        table = torch.empty(ROWS + 1, 6 * CONFIG["depth"] + 2, CONFIG["hidden_size"], device="cuda")
        number_of = torch.empty((), device="cuda")

        def run(weights, patches, handed, table, number_of):
            for (module, name), weight in zip(kept, weights):
                setattr(module, name, weight)
            places = [Place(instant._replace(t=table), None) for instant in instants]
            rows = [[None if w is None else number_of for w in row] for row in step.weights]
            used = {name: (network, run_block) for name, network in networks.items()}
            x, new, _ = block_step(step.block, used, 3, patches, handed, places, rows, number_of, None)
            return (x, *new)

        given = (weights, patches, handed, table, number_of)
        graph = make_fx(run, decomposition_table=select_decomp_table(), tracing_mode="fake")(*given)
        graph.graph.set_codegen(CodeGen())  # inputs and outputs one after the other, as Inductor takes them
        flat = [*weights, patches, *handed, table, number_of]
        with contextlib.ExitStack() as within:
            lowering = GraphLowering(graph, example_inputs=flat)
            for each in (
                V.set_fake_mode(mode),
                V.set_graph_handler(lowering),
                V.set_extern_kernel_nodes([]),
                V.set_debug_handler(DebugContext()),
            ):
                within.enter_context(each)
            lowering.run(*flat)
            code, _ = lowering.codegen()
    return getattr(code, "value", code)


@pytest.mark.parametrize(("letter", "schedule", "number"), [("H", "H1", 0), ("P", "H1P1", 1), ("R", "H1R1", 1)])
def test_the_kernels_of_a_step_compile_for_an_h100(described, tmp_path, letter, schedule, number):
    from torch._subclasses.fake_tensor import FakeTensorMode

    triton, target = described
    code = lowered(schedule, number, FakeTensorMode(allow_non_fake_inputs=True))
    quote = "'''"
    kernels = re.findall(rf"async_compile\.triton\('(\w+)', {quote}(.*?){quote}", code, re.DOTALL)
    assert len(kernels) >= 8
    assert "extern_kernels" in code  # the matrix products are cuBLAS's
    for name, source in kernels:
        path = tmp_path / f"{letter}_{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = getattr(module, name)
        config, names = kernel.configs[0], kernel.fn.arg_names
        constants = {**kernel.triton_meta.get("constants", {}), **config.kwargs}
        source = triton.compiler.ASTSource(
            kernel.fn,
            {n: kernel.triton_meta["signature"].get(n, "constexpr") for n in names},
            {(names.index(n),): value for n, value in constants.items() if n in names},
        )
        compiled = triton.compile(source, target=target, options={"num_warps": config.num_warps})
        assert ".target sm_90" in compiled.asm["ptx"]
        assert len(compiled.asm["cubin"]) > 1000
