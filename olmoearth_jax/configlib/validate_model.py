"""Checks of the model part of a config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from olmoearth_jax import modalities
from olmoearth_jax.configlib.tree import ExperimentConfig
from olmoearth_jax.modalities import closest
from olmoearth_jax.model.config import POSITION_ENCODINGS, EncoderConfig, PredictorConfig

MODEL_KIND_NAMES = ("latent_mim", "mae", "galileo")


def model_problems(cfg: ExperimentConfig) -> Iterator[str]:
    """One sentence per problem of `cfg.model`."""
    model = cfg.model
    if model.kind not in MODEL_KIND_NAMES:
        yield f"model.kind: unknown kind {model.kind!r}; {closest(model.kind, MODEL_KIND_NAMES)}"
        return
    encoder, decoder = model.encoder_config, model.decoder_config
    yield from _encoder(encoder)
    if encoder.attention_pooler_config is not None and cfg.engine != "dense":
        yield (
            "model.encoder_config.attention_pooler_config (v1.3) is trained by engine=dense only: "
            "set --config.engine=dense"
        )
    path = "model.decoder_config"
    if model.reconstructor_config is not None and decoder is None:
        decoder, path = (
            model.reconstructor_config.decoder_config,
            "model.reconstructor_config.decoder_config",
        )
    if model.kind == "mae" and model.reconstructor_config is None:
        yield "model.reconstructor_config must be given for model.kind 'mae'"
    if decoder is None:
        if model.kind != "mae":
            yield f"model.decoder_config must be given for model.kind {model.kind!r}"
        return
    yield from _decoder(decoder, path)
    yield from _agreement(encoder, decoder, path)


def _encoder(encoder: EncoderConfig) -> Iterator[str]:
    path = "model.encoder_config"
    yield from _stack(encoder, encoder.embedding_size, path)
    if encoder.num_register_tokens < 0:
        yield f"{path}.num_register_tokens must be 0 or more, got {encoder.num_register_tokens}"
    if not 0 <= encoder.band_dropout_rate < 1:
        yield f"{path}.band_dropout_rate must be in [0, 1), got {encoder.band_dropout_rate}"
    if encoder.num_projection_layers < 1:
        yield f"{path}.num_projection_layers must be at least 1, got 0"
    for name in encoder.band_dropout_modalities or ():
        if name not in encoder.supported_modality_names:
            yield f"{path}.band_dropout_modalities has {name!r}, which the model does not support"
    if not encoder.use_linear_patch_embed and encoder.patch_embed_hidden_sizes:
        yield (
            f"{path}.patch_embed_hidden_sizes needs use_linear_patch_embed=true; "
            "set one or the other"
        )


def _decoder(decoder: PredictorConfig, path: str) -> Iterator[str]:
    yield from _stack(decoder, decoder.decoder_embedding_size, path)


def _stack(part: Any, width: int, path: str) -> Iterator[str]:
    """What encoder and decoder have in common."""
    names = part.supported_modality_names
    try:
        modalities.resolve(names)
    except ValueError as e:
        yield f"{path}.supported_modality_names: {e}"
    if not names:
        yield f"{path}.supported_modality_names is empty; name at least one modality"
    try:
        assert part.tokenization is not None
    except ValueError as e:
        yield f"{path}.tokenization_overrides: {e}"
    for name, low in (("depth", 0), ("num_heads", 1), ("max_sequence_length", 1)):
        if getattr(part, name) < low:
            yield f"{path}.{name} must be at least {low}, got {getattr(part, name)}"
    if not 0 <= part.drop_path < 1:
        yield f"{path}.drop_path must be in [0, 1), got {part.drop_path}"
    if part.mlp_ratio <= 0:
        yield f"{path}.mlp_ratio must be greater than 0, got {part.mlp_ratio}"
    yield from _heads(part, width, path)


def _heads(part: Any, width: int, path: str) -> Iterator[str]:
    field = "embedding_size" if path.endswith("encoder_config") else "decoder_embedding_size"
    if width < 1 or (part.num_heads > 0 and width % part.num_heads):
        yield (
            f"{path}.{field} ({width}) must be positive and divisible by num_heads "
            f"({part.num_heads})"
        )
        return
    encoding = part.position_encoding
    if encoding not in POSITION_ENCODINGS:
        yield (
            f"{path}.position_encoding must be one of ({', '.join(POSITION_ENCODINGS)}), "
            f"got {encoding!r}"
        )
    elif encoding in ("rope", "rope_mixed") and part.num_heads and (width // part.num_heads) % 4:
        yield (
            f"{path}: position_encoding {encoding!r} needs a head width divisible by 4, "
            f"got {width // part.num_heads}"
        )
    elif encoding == "absolute" and width % 4:
        yield f"{path}.{field} must be divisible by 4 for absolute encodings, got {width}"


def _agreement(encoder: EncoderConfig, decoder: PredictorConfig, path: str) -> Iterator[str]:
    width = encoder.output_embedding_size or encoder.embedding_size
    if decoder.encoder_embedding_size != width:
        yield (
            f"{path}.encoder_embedding_size ({decoder.encoder_embedding_size}) must equal the "
            f"width of the encoder's tokens ({width})"
        )
    for name in ("supported_modality_names", "tokenization_overrides", "max_sequence_length"):
        ours, theirs = getattr(encoder, name), getattr(decoder, name)
        if ours != theirs:
            yield f"model.encoder_config.{name} and {path}.{name} must be equal"
