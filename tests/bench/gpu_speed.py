"""MFU of Gemma 2's train step on one GPU, or on whatever JAX finds: needs JAX, Flax and Optax, nothing else.

python -m tests.bench.gpu_speed [--batch 1] [--sequence 8192] [--remat full] [--steps 10] [--layers 26]
                                [--tiny]

Gemma 2 2B, bf16 compute, float32 master weights and AdamW, random tokens. MFU by `step_flops` of `gemma.plan.flops`
(causal, window aware) against the dense bf16 peak of an H100. On a GPU attention is XLA's, as on CPUs. `--tiny` is a
model that runs anywhere, to try this file.
"""

import argparse
import statistics
from dataclasses import replace

import jax

from gemma.config import Model
from gemma.plan.flops import step_flops
from tests.bench.steps import program, run

PEAK_FLOPS_H100 = 989e12
GEMMA2_2B = Model(
    name="gemma2_2b",
    vocab=256128,
    width=2304,
    layers=26,
    heads=8,
    kv_heads=4,
    head_size=256,
    hidden=9216,
    window=4096,
    attention_cap=50.0,
    final_cap=30.0,
    query_scale=0.0625,
    context=8192,
    rope_base=10000.0,
    norm_eps=1e-6,
)
TINY = {"vocab": 512, "width": 128, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 256, "window": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=8192)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", type=int, default=GEMMA2_2B.layers)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    model = replace(GEMMA2_2B, **TINY) if args.tiny else replace(GEMMA2_2B, layers=args.layers)
    print(f"on {jax.devices()[0].device_kind}")
    sizes = program(model, batch=args.batch, sequence=args.sequence, dtype="bfloat16", remat=args.remat, loss_chunk=512)
    times = []
    for step, (loss, seconds) in enumerate(run(sizes, args.steps)):
        print(f"step {step}: loss {loss:.4f}, {seconds:.3f} s", flush=True)
        times.append(seconds)
    median = statistics.median(times[1:] or times)
    mfu = step_flops(model, args.batch, args.sequence) / median / PEAK_FLOPS_H100
    print(f"median {median:.3f} s, {args.batch * args.sequence / median:,.0f} tokens/s, MFU {mfu:.1%} of an H100")


if __name__ == "__main__":
    main()
