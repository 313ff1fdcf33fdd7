"""What the user types: one thin file a command, `python -m launch.NAME key=value ...`. Never imports JAX."""
