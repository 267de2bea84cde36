"""Another name of `data.values.check_values`."""

from olmoearth_jax.data.values import check_values as check_units

__all__ = ["check_units"]
