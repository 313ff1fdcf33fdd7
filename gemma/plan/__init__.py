"""What a program needs and how fast it can be, from the compiler and from arithmetic. No JAX when imported."""
