"""What of a working tree must not travel with a run, nor stay in its manifest: secrets, and what is no source code."""

import re
from pathlib import Path

MOST_BYTES = 2_000_000  # of a file: no source of ours is nearly as long
NAMES = re.compile(
    r"\.env(\..*)?|.*\.env|\.?envrc|\.netrc|_netrc|\.pypirc|\.npmrc|\.pgpass|\.htpasswd|\.git-credentials|kubeconfig.*"
    r"|.*\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk|asc|gpg|kubeconfig|secret|secrets)|id_(rsa|dsa|ecdsa|ed25519)(?!\.pub).*"
)
WORDS = re.compile(r"secret|credential|passw|api[-_]?key|private[-_]?key|service[-_]?account|tokens?(?!iz)")
CODE = (".py", ".pyi", ".md", ".sh")  # whose names may speak of secrets and tokens
BINARY = (
    *(".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".npy", ".npz", ".msgpack", ".h5", ".gguf", ".onnx", ".parquet"),
    *(".arrow", ".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".tar", ".so", ".model", ".pkl", ".pickle"),
)
CONTENTS = {
    "a private key": rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY",
    "a service account's key": rb"\"private_key\"\s*:\s*\"|\"type\"\s*:\s*\"service_account\"",
    "an AWS key": rb"\b(AKIA|ASIA)[0-9A-Z]{16}\b|aws_secret_access_key\s*[=:]\s*['\"]?[A-Za-z0-9/+]{40}",
    "a Google key": rb"\bAIza[0-9A-Za-z_-]{35}|\bya29\.[0-9A-Za-z_-]{20,}|\bGOCSPX-[0-9A-Za-z_-]{20,}",
    "a GitHub token": rb"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{20,}",
    "a GitLab token": rb"\bglpat-[A-Za-z0-9_-]{20,}",
    "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}",
    "an API key": rb"\bsk-[A-Za-z0-9_-]{20,}[A-Za-z0-9]|\bsk_live_[A-Za-z0-9]{16,}|\b(npm_|pypi-)[A-Za-z0-9_-]{30,}",
    "a Slack token": rb"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "a wandb key": rb"(?i)wandb[_-]?api[_-]?key['\"]?\s*[=:]\s*['\"]?[0-9a-z]{40}|\bwandb_v1_[A-Za-z0-9_]{20,}",
    "a web token": rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
}
FOUND = {what: re.compile(pattern) for what, pattern in CONTENTS.items()}


def by_name(name: str) -> str:
    """Why a path is left out whatever it holds; nothing where it is not. Pure."""
    path = Path(name.lower())
    if NAMES.fullmatch(path.name) or (path.suffix not in CODE and WORDS.search(path.name)):
        return "its name is that of a secret"
    return "weights, data or an archive, no source code" if path.suffix in BINARY else ""


def by_content(content: bytes) -> str:
    """The same of what a file, or a part of a diff, holds. Pure."""
    return next((f"it holds {what}" for what, pattern in FOUND.items() if pattern.search(content)), "")


def why_left_out(top: Path, name: str) -> str:
    """The same of a file below `top`; one that is gone is judged by its name."""
    path = top / name
    if why := by_name(name):
        return why
    try:
        if path.stat().st_size > MOST_BYTES:
            return f"it has {path.stat().st_size / 1e6:.1f} MB, no source code"
        content = path.read_bytes()
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return "binary, no source code" if b"\0" in content else by_content(content)
