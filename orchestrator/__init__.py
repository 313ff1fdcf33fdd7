"""The single controller: reserves slices, drives every host, restarts what dies. Never imports JAX."""
