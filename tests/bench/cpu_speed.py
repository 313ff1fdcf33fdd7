"""Tokens/s on CPU of an 80M-parameter Gemma 2, ours beside MaxText's and transformers', interleaved.

python -m tests.bench.cpu_speed [--maxtext PYTHON] [--transformers PYTHON] [--rounds 3] [--steps 4]

PYTHON is an interpreter that has `maxtext[tpu]==0.2.5` (Python 3.12), or torch and transformers. Each contender is a
process of its own on two threads' worth of cores, f32, AdamW, clipped at norm 1, rows of 512 random tokens. A step's
time is that between two of its lines arriving here; the first step of a process is not counted.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).parents[2]
BATCH, SEQUENCE = 8, 512
# MaxText counts (local, global) pairs: 8 of its layers are 16.
MAXTEXT = """model_name=gemma2-2b override_model_config=true base_emb_dim=512 base_num_query_heads=8 base_num_kv_heads=4
head_dim=64 base_mlp_dim=2048 base_num_decoder_layers=8 vocab_size=32000 sliding_window_size=256 max_target_length=512
per_device_batch_size=8 hardware=cpu dataset_type=synthetic enable_checkpointing=false attention=dot_product
remat_policy=minimal skip_jax_distributed_system=true dtype=float32 run_name=x enable_goodput_recording=false"""


def ours(steps: int) -> None:
    from gemma.config import Model
    from tests.bench.steps import program, run

    model = Model(
        name="gemma2_80m",
        vocab=32000,
        width=512,
        layers=16,
        heads=8,
        kv_heads=4,
        head_size=64,
        hidden=2048,
        window=256,
        attention_cap=50.0,
        final_cap=30.0,
        query_scale=64**-0.5,
        context=8192,
        rope_base=10000.0,
        norm_eps=1e-6,
    )
    sizes = program(model, batch=BATCH, sequence=SEQUENCE, dtype="float32", remat="dots", loss_chunk=64)
    for step, (loss, _) in enumerate(run(sizes, steps)):
        print(f"completed step {step} loss {loss:.4f}", flush=True)


def transformers(steps: int) -> None:
    import torch  # type: ignore[import-not-found]
    from transformers import Gemma2Config, Gemma2ForCausalLM  # type: ignore[import-not-found]

    torch.set_num_threads(2)
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=256,
        attn_implementation="eager",
        use_cache=False,
    )
    model = Gemma2ForCausalLM(config).float().train()
    print(f"parameters {sum(p.numel() for p in model.parameters())}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        tokens = torch.randint(4, 32000, (BATCH, SEQUENCE))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"completed step {step} loss {loss.item():.4f}", flush=True)


def maxtext_command(python: str, steps: int, out: str) -> list[str]:
    where = "import importlib.util; print(importlib.util.find_spec('maxtext').submodule_search_locations[0])"
    package = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    options = [*MAXTEXT.split(), f"steps={steps}", f"base_output_directory={out}"]
    return [python, "-m", "maxtext.trainers.pre_train.train", f"{package}/configs/base.yml", *options]


def step_seconds(command: list[str], folder: Path) -> tuple[list[float], str]:
    """Seconds of each step after the first, and the parameter count as the contender prints it."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "2"}
    arrivals, parameters, lines = [], "?", []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:  # type: ignore[call-overload]
        for line in process.stdout:
            lines.append(line)
            if "completed step" in line:
                arrivals.append(time.monotonic())
            if found := re.search(r"parameters:? ([\d.]+(?: billion)?)", line):
                parameters = found.group(1)
    if process.returncode or len(arrivals) < 2:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(lines[-20:])}")
    return [after - before for before, after in zip(arrivals, arrivals[1:], strict=False)], parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maxtext", metavar="PYTHON")
    parser.add_argument("--transformers", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--child", choices=["ours", "transformers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return {"ours": ours, "transformers": transformers}[args.child](args.steps)
    with tempfile.TemporaryDirectory() as out:
        child = ["--steps", str(args.steps), "--child"]
        commands = {"ours": [sys.executable, "-m", "tests.bench.cpu_speed", *child, "ours"]}
        if args.maxtext:
            commands["maxtext"] = maxtext_command(args.maxtext, args.steps, out)
        if args.transformers:
            commands["transformers"] = [args.transformers, str(Path(__file__).resolve()), *child, "transformers"]
        for name in {"maxtext", "transformers"} - commands.keys():
            print(f"{name} is left out: give its interpreter as --{name} PYTHON")
        speeds: dict[str, list[float]] = {name: [] for name in commands}
        for round_ in range(args.rounds):
            for name in list(commands)[round_ % len(commands) :] + list(commands)[: round_ % len(commands)]:
                seconds, parameters = step_seconds(commands[name], TOP if name == "ours" else Path(out))
                found = [BATCH * SEQUENCE / s for s in seconds]
                speeds[name] += found
                shown = " ".join(f"{s:.0f}" for s in found)
                print(f"round {round_}: {name}, {parameters} parameters: {shown} tokens/s", flush=True)
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    for name, median in medians.items():
        print(f"{name}: median {median:.1f} tokens/s; ours is {medians['ours'] / median:.2f} x")
    return None


if __name__ == "__main__":
    main()
