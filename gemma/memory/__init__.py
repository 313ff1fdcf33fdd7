"""Shared memory of a host that outlives its process, and how it travels to another host. No JAX."""
