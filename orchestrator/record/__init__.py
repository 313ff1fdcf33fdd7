"""All that a run writes down: its directory, metrics, events, goodput, wandb, the screen."""
