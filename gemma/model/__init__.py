"""Gemma 2: the transformer, its attention on each platform, how its arrays are sharded."""
