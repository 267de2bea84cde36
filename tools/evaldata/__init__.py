"""Converters of published evaluation data, one per data set; see `tools.convert_evals`."""
