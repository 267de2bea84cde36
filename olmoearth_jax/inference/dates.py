"""Dates of a sample; they live in `olmoearth_jax.dates`."""

from olmoearth_jax.dates import check_timestamps, newest, parse_date, parse_dates  # noqa: F401
