"""From files of text to tokens on disk. No JAX."""
