"""Parts of the experiment configuration; import them through `olmoearth_jax.config`."""
