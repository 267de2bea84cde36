"""Checkpoints on disk: written by Orbax, checked before they are read."""
