"""A Ray cluster of simulated TPU hosts on this machine."""
