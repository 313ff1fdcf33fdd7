"""Gemma 2 2B's train step compiled for an H100 that is not here: does it fit, how many kernels, what they spill.

python -m tests.bench.gpu_compile [--batch 1] [--sequence 8192] [--remat full] [--layers 26] [--attention xla]

Needs the extra `gpu` but no driver: XLA for CUDA compiles to SASS from a description of the chip. ptxas prints what it
thinks of each attention kernel. XLA measures nothing here, so its own kernels are not tuned.
"""

import argparse
import importlib
import os
import time
from dataclasses import replace
from pathlib import Path

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  name: "NVIDIA H100 80GB HBM3" device_vendor: "NVIDIA Corporation" device_address_bits: 64
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800 device_memory_size: 84942979072 memory_bandwidth: 3352320000000
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=8192)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--attention", choices=["best", "xla"], default="best")
    args = parser.parse_args()
    toolkit = Path(importlib.import_module("nvidia.cuda_nvcc").__path__[0])
    os.environ |= {
        "JAX_PLATFORMS": "cpu,cuda",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "PATH": f"{toolkit / 'bin'}:{os.environ['PATH']}",
        "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={toolkit} --xla_gpu_autotune_level=0 --xla_gpu_enable_cublaslt=false",
    }

    import jax
    import numpy as np
    import pytest
    from jax.experimental import topologies

    from gemma.model import attention_gpu
    from gemma.train.step import functions
    from tests.bench.gpu_speed import GEMMA2_2B
    from tests.bench.steps import program
    from tests.mosaic_on_cpu import pretend_hopper

    if args.attention == "xla":
        attention_gpu.available = lambda: False
    else:
        pretend_hopper(pytest.MonkeyPatch())
    described = topologies.get_topology_desc("1x1x1", "cuda", topology="1x1x1", target_config=H100)
    grid = np.array(described.devices[:1]).reshape(1, 1, 1)
    mesh = jax.sharding.Mesh(grid, ("replica", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    model = replace(GEMMA2_2B, layers=args.layers)
    sizes = program(model, batch=args.batch, sequence=args.sequence, dtype="bfloat16", remat=args.remat, loss_chunk=512)
    step = functions(sizes, mesh)
    started = time.monotonic()
    compiled = step.train.lower(step.state, step.batch).compile()
    memory = compiled.memory_analysis()
    print(
        f"compiled in {time.monotonic() - started:.0f} s: {memory.argument_size_in_bytes / 2**30:.1f} GiB state, "
        f"{memory.temp_size_in_bytes / 2**30:.1f} GiB temporary, "
        f"{compiled.as_text().count('mosaic_gpu_v2')} attention kernels in the program"
    )


if __name__ == "__main__":
    main()
