"""The hosts of a run: processes, their keepers, where they are placed, whether their chips are sound."""
