"""Checkpoints on disk: written by Orbax, checked before they are read."""

from olmoearth_jax.exports import exported

__getattr__, __dir__ = exported(
    __name__,
    {
        "checkpoint": "Checkpointer RunInfo load_item open_whole",
        "folders": "NoCheckpoint complete_steps find_checkpoint",
        "integrity": "parameter_digest",
    },
)
