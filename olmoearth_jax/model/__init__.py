"""The model: parameters and layers, on tokens of any layout (spec/model.md)."""

from olmoearth_jax.exports import exported

__getattr__, __dir__ = exported(
    __name__,
    {
        "config": "ModelConfig EncoderConfig PredictorConfig official_model",
        "encoder": "Encoder slot_table",
        "decoder": "Predictor",
        "frozen": "FrozenEncoder",
        "latent_mim": "Model build initial_params flatten unflatten",
        "pooling": "Pooling",
        "tokens": "SlotTable Tokens",
        "uniform_batch": "UniformBatch forward_batch",
        "versions": "VERSIONS version_of",
    },
)
