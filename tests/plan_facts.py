"""What a compiler might have said of 27B on a v5p-1024: round numbers."""

from typing import Any

LARGE = ["model=gemma2_27b", "cluster.slice=v5p-1024", "mesh.fsdp=512", "data.sequence=8192", "train.batch=512"]
FACTS: dict[str, Any] = {
    "fits": True,
    "message": "",
    "parameters_bytes": 10,
    "optimizer_bytes": 20,
    "gradients_bytes": 10,
    "activations_bytes": 5,
    "needed_bytes": 100,
    "optimal_s": 3.3,
    "compile_s": 1.0,
    "programs_bytes": {"eval": 60, "init": 40},
    "cost": {
        "flops": 459e12,
        "hbm_bytes": 2765e9,
        "roofline_s": 30.0,
        "roofline_once_s": 3.0,
        "kernels_s": 1.0,
        "cycles_s": 25.0,
        "sent_bytes": {"fsdp": {"all-gather": 6e9}},
        "network_s": 0.5,
        "gradients_s": 0.1,
    },
}
