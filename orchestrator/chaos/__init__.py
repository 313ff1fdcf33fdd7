"""Faults on purpose, to rehearse recovery."""
