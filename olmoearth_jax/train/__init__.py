"""Training: optimiser, schedule, state, step and loop."""
