"""Which environment variables the processes of hosts inherit: an explicit list, so that what this shell happens to have
(a proxy, JAX_ENABLE_X64, XLA_FLAGS) changes neither whether a run starts nor its numbers.
"""

import os
from collections.abc import Iterable, Mapping

INHERITED = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV"),
    *("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"),
    # Storage in a cloud: credentials, certificates, emulators.
    *("CLOUDSDK_CONFIG", "STORAGE_EMULATOR_HOST", "SSL_CERT_FILE", "SSL_CERT_DIR"),
    *("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    "GCE_METADATA_HOST",
    "TPU_ML_PLATFORM",
)
# What tunes an accelerator, a library of storage, or Ray itself.
INHERITED_PREFIXES = (
    *("LC_", "CUDA_", "NVIDIA_", "NCCL_", "TPU_", "LIBTPU_", "XLA_PYTHON_CLIENT_", "OMP_", "MALLOC_"),
    *("GOOGLE_", "GCS_", "GCSFS_", "FSSPEC_", "AWS_", "TENSORSTORE_", "RAY_"),
)
# They would lead Ray's processes to another cluster, or belong to the job that this process is.
NOT_INHERITED = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
# On hosts that somebody else has started: what changes numerics, or sends their coordinator's calls to a proxy.
UNWANTED_PREFIXES = ("JAX_",)
UNWANTED = ("XLA_FLAGS", "http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
LOOPBACK = ("127.0.0.0/8", *(f"127.0.0.{n}" for n in range(1, 10)), "localhost")


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """What of this process's environment a host's processes inherit. Pure."""
    return {
        name: value
        for name, value in environment.items()
        if (name in INHERITED or name.startswith(INHERITED_PREFIXES)) and name not in NOT_INHERITED
    }


def unwanted(names: Iterable[str]) -> list[str]:
    """Of the variables of a host that somebody else has started, those that its training process must not see. Pure."""
    return [name for name in names if name.startswith(UNWANTED_PREFIXES) or name.lower() in map(str.lower, UNWANTED)]


def bypass_proxy(*hosts: str) -> None:
    """From now on this process and its children speak to these hosts, and to this machine, without a proxy."""
    for name in ("no_proxy", "NO_PROXY"):
        listed = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*listed, *LOOPBACK, *hosts]))
