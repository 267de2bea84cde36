"""Benchmarks; each prints one JSON line with the settings, the device and the figures."""
