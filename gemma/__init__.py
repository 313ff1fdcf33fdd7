"""Gemma 2 as an SPMD program: what runs on every TPU host. Imports JAX, never Ray, Hydra or wandb."""
