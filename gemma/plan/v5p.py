"""What a TPU v5p chip is made of. Source: Cloud TPU v5p documentation, but for the clock."""

FLOPS = 459e12  # bf16, a second
HBM_BYTES = 95e9
FREE_SHARE = 0.85  # of HBM, for a server's weights and cache; the rest is for what is computed on the way
HBM_BYTES_PER_S = 2765e9
CLOCK_HZ = 1.75e9  # 459e12 / (2 cores x 4 MXUs x 128 x 128 multiply-adds x 2); the compiler's estimates count in it
# What the TPU compiler's cost model reckons with: measured by compiling one matrix product, and one addition.
COMPILER_FLOPS = 394e12
COMPILER_BYTES_PER_S = 2350.4e9
ICI_BYTES_PER_S = 600e9  # 4800 Gbit/s over six links: three torus axes, two ways
DCN_BYTES_PER_S = 6.25e9  # 50 Gbit/s a chip
SMALLEST_RING = 4  # chips along a torus axis, from which on it closes
