"""Published weights and configs in and out."""

from olmoearth_jax.exports import exported

__getattr__, __dir__ = exported(
    __name__,
    {
        "checkpoints": "Weights from_reference to_reference",
        "config_json": "from_json to_json",
        "torch_keys": "from_state_dict to_state_dict",
        "weights": "find published_name read_folder write_folder",
    },
)
