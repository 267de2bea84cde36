"""Using pretrained models: samples in raw units, embeddings, maps."""

from olmoearth_jax.exports import exported

__getattr__, __dir__ = exported(
    __name__,
    {
        "domain": "embed_domain",
        "model": "PretrainedModel load_pretrained load_weights",
        "prepare": "ModelInput",
        "quantize": "Quantizer dequantize_int8 quantize_int8",
        "sample": "Sample",
    },
)
