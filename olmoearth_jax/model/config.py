"""Typed model configs, with the member names and defaults of the published ``config.json`` files.

spec/model.md sections 12-13. One table of sizes (`SIZES`) serves every version.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from olmoearth_jax import modalities
from olmoearth_jax.modalities import BandSets, ModalityName, Tokenization
from olmoearth_jax.model.versions import VERSIONS
from olmoearth_jax.proposals import known

POSITION_ENCODINGS = ("absolute", "rope", "rope_mixed", "rope_3d", "rope_3d_mixed", "none")


@dataclasses.dataclass
class AttentionPoolerConfig:
    """Attention pooler of v1.3 and its location grid; spec/model_v1_3.md section 2.1."""

    pooler_dim: int = 16
    pooler_depth: int = 2
    num_heads: int | None = None
    per_depth_read_proj: bool = False
    attn_dim: int | None = None
    student_dims: list[int] | None = None
    student_output_norm: bool = False


@dataclasses.dataclass
class EncoderConfig:
    """Online (and target) encoder; see spec/model.md section 13 for every member."""

    supported_modality_names: list[ModalityName] = dataclasses.field(default_factory=list)
    embedding_size: int = 16
    max_patch_size: int = 8
    min_patch_size: int = 1
    num_heads: int = 2
    mlp_ratio: float = 1.0
    depth: int = 2
    drop_path: float = 0.1
    max_sequence_length: int = 12
    num_register_tokens: int = 0
    learnable_channel_embeddings: bool = True
    random_channel_embeddings: bool = False
    num_projection_layers: int = 1
    aggregate_then_project: bool = True
    frozen_patch_embeddings: bool = False
    qk_norm: bool = False
    output_embedding_size: int | None = None
    tokenization_overrides: BandSets = dataclasses.field(default_factory=dict)
    use_linear_patch_embed: bool = True
    band_dropout_rate: float = 0.0
    random_band_dropout: bool = False
    band_dropout_modalities: list[ModalityName] | None = None
    patch_embed_hidden_sizes: list[int] | None = None
    post_proj_hidden_sizes: list[int] | None = None
    position_encoding: str = "absolute"
    rope_base: float = 10000.0
    rope_coordinate_scale: float = 1.0
    rope_mixed_base: float = 10.0
    temporal_rope_dim_frac: float = 0.25
    rope_temporal_base: float | None = None
    rope_temporal_coordinate_scale: float = 1.0
    layer_scale_init: float | None = None
    attention_pooler_config: AttentionPoolerConfig | None = None

    @property
    def tokenization(self) -> Tokenization:
        return Tokenization.from_mapping(self.tokenization_overrides)


@dataclasses.dataclass
class PredictorConfig:
    """Cross-attention decoder; see spec/model.md sections 8 and 13."""

    supported_modality_names: list[ModalityName] = dataclasses.field(default_factory=list)
    encoder_embedding_size: int = 16
    decoder_embedding_size: int = 16
    depth: int = 2
    mlp_ratio: float = 1.0
    num_heads: int = 2
    max_sequence_length: int = 12
    drop_path: float = 0.0
    learnable_channel_embeddings: bool = True
    random_channel_embeddings: bool = False
    output_embedding_size: int | None = None
    qk_norm: bool = False
    tokenization_overrides: BandSets = dataclasses.field(default_factory=dict)
    position_encoding: str = "absolute"
    rope_base: float = 10000.0
    rope_coordinate_scale: float = 1.0
    rope_mixed_base: float = 10.0
    temporal_rope_dim_frac: float = 0.25
    rope_temporal_base: float | None = None
    rope_temporal_coordinate_scale: float = 1.0
    layer_scale_init: float | None = None
    use_attention_pooler: bool = False
    pooler_dim: int | None = None

    @property
    def tokenization(self) -> Tokenization:
        return Tokenization.from_mapping(self.tokenization_overrides)


@dataclasses.dataclass
class ReconstructorConfig:
    """Pixel decoder of the MAE model; spec/model.md section 9."""

    decoder_config: PredictorConfig = dataclasses.field(default_factory=PredictorConfig)
    supported_modality_names: list[ModalityName] = dataclasses.field(default_factory=list)
    max_patch_size: int = 8
    tokenization_overrides: BandSets = dataclasses.field(default_factory=dict)

    @property
    def tokenization(self) -> Tokenization:
        return Tokenization.from_mapping(self.tokenization_overrides)


@dataclasses.dataclass
class SupervisedMapConfig:
    """One map that is drawn from the location grid; spec/train_v1_3.md section 3.4."""

    task_type: str = "regression"
    """'classification', 'binary_classification' or 'regression'."""
    num_output_channels: int = 1
    weight: float = 1.0
    class_values: list[float] | None = None
    """Value of each class of a classification, in normalised units."""
    pos_weight: bool = False
    """Weigh the rare answer of each channel up (binary classification)."""
    regression_loss_type: str = "mse"


@dataclasses.dataclass
class SupervisionHeadConfig:
    """Heads that draw maps from the location grid, for training only."""

    modality_configs: dict[ModalityName, SupervisedMapConfig] = dataclasses.field(
        default_factory=dict
    )
    spatial_unfold: int | None = None
    """Pixels per side that a cell is drawn with; null means the largest patch size."""
    fix_class_values: bool = False
    """Look classes up in the units of the data set, and leave codes off the table out (ours)."""


@dataclasses.dataclass
class LocationTokenDistillationHeadConfig:
    """The student's way back to the location grid, for training only; section 4 there."""

    back_projection_hidden: int | None = None
    """Width between the two layers; null means a single layer."""
    gram_max_tokens: int = 2048
    """Most locations of a micro-batch that are compared with each other."""


@dataclasses.dataclass
class ModelConfig:
    """A whole model: kind 'latent_mim', 'mae' or 'galileo'."""

    kind: str = "latent_mim"
    encoder_config: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    decoder_config: PredictorConfig | None = dataclasses.field(default_factory=PredictorConfig)
    reconstructor_config: ReconstructorConfig | None = None
    projection_only_target: bool = False
    supervision_head_config: SupervisionHeadConfig | None = None
    location_token_distillation_head_config: LocationTokenDistillationHeadConfig | None = None


@dataclasses.dataclass(frozen=True)
class Size:
    """Width, depth and heads of encoder and decoder; the MLP ratio is 4 everywhere."""

    embedding_size: int
    depth: int
    num_heads: int
    decoder_depth: int
    decoder_num_heads: int

    mlp_ratio = 4.0


_SHAPES = {
    "nano": (128, 4, 8),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "giga": (1536, 40, 24),
}


def _size_table() -> dict[str, Size]:
    table: dict[str, Size] = {}
    for name, (width, depth, heads) in _SHAPES.items():
        decoders = {"": depth, "_shallow_decoder": 4, "_super_shallow_decoder": 2}
        if name == "nano":
            decoders = {"": 4}
        elif name == "small":
            decoders = {"_shallow_decoder": 4}
        for suffix, decoder_depth in decoders.items():
            table[name + suffix] = Size(width, depth, heads, decoder_depth, heads)
    table["tiny_more_heads"] = Size(192, 12, 8, 12, 8)
    table["base_many_heads_shallow_decoder"] = Size(768, 8, 16, 4, 12)
    table["base_many_heads_shallower_decoder"] = Size(768, 8, 16, 2, 12)
    return table


SIZES: dict[str, Size] = _size_table()
"""The one table of model sizes (spec/model.md section 12)."""

_OFFICIAL_SIZES = {
    "nano": "nano",
    "tiny": "tiny_shallow_decoder",
    "small": "small_shallow_decoder",
    "base": "base_shallow_decoder",
    "large": "large_shallow_decoder",
}
"""Size a published preset uses, by its short name."""

PUBLISHED_VERSIONS = {name: version.sizes for name, version in VERSIONS.items()}
"""Versions and sizes of all models that can be built."""


def official_model(
    size: str,
    version: str = "v1",
    modality_names: Sequence[str] = modalities.OFFICIAL_MODALITIES,
    faster: bool = False,
) -> ModelConfig:
    """The official model of a size and version.

    Args:
      size: 'nano', 'tiny', 'small', 'base' or 'large'.
      version: 'v1', 'v1_1', 'v1_2' or 'v1_3'.
      modality_names: trained modalities, in config order.
      faster: projection-only target, as in the fast recipe.

    Raises:
      ValueError: a pair that was never defined; the message lists the valid ones.
    """
    if size not in PUBLISHED_VERSIONS.get(version, ()):
        pairs = ", ".join(f"{s}:version={v}" for v, ss in PUBLISHED_VERSIONS.items() for s in ss)
        raise ValueError(f"no model {size!r} of version {version!r} was defined; valid: {pairs}")
    dims, about = SIZES[_OFFICIAL_SIZES[size]], VERSIONS[version]
    common = _common(version, list(modalities.resolve(modality_names)), dims.mlp_ratio)
    encoder = EncoderConfig(
        **common,
        embedding_size=dims.embedding_size,
        depth=dims.depth,
        num_heads=dims.num_heads,
        drop_path=0.1,
        use_linear_patch_embed=about.linear,
    )
    if about.linear:
        encoder.patch_embed_hidden_sizes = [12] if size == "nano" else [64]
        encoder.band_dropout_rate = 0.2
        encoder.random_band_dropout = True
        # Recent versions of the PyTorch package refuse names that the model does not support.
        encoder.band_dropout_modalities = [
            m for m in ("sentinel2_l2a", "landsat") if m in encoder.supported_modality_names
        ]
    decoder = PredictorConfig(
        **common,
        encoder_embedding_size=dims.embedding_size,
        decoder_embedding_size=dims.embedding_size,
        depth=dims.decoder_depth,
        num_heads=dims.decoder_num_heads,
    )
    if about.pooler:
        faster = True
        _add_pooler(encoder, decoder)
    return ModelConfig(
        encoder_config=encoder, decoder_config=decoder, projection_only_target=faster
    )


def _common(version: str, names: list[str], mlp_ratio: float) -> dict[str, Any]:
    """What encoder and decoder of a version share."""
    about = VERSIONS[version]
    common: dict[str, Any] = {"supported_modality_names": names, "mlp_ratio": mlp_ratio}
    if about.linear:
        overrides = modalities.SINGLE_BAND_SET_OVERRIDES
        common["tokenization_overrides"] = {k: v for k, v in overrides.items() if k in names}
    if about.rotary:
        common.update(
            position_encoding="rope_3d_mixed",
            rope_mixed_base=10000.0,
            rope_temporal_coordinate_scale=1 / 30,
        )
    return common


def _add_pooler(encoder: EncoderConfig, decoder: PredictorConfig) -> None:
    """What v1.3 adds to v1.2 (spec/model_v1_3.md section 1)."""
    width = encoder.embedding_size
    encoder.attention_pooler_config = AttentionPoolerConfig(
        pooler_dim=width,
        pooler_depth=1,
        attn_dim=width,
        per_depth_read_proj=True,
        student_dims=[128, 64],
        student_output_norm=True,
    )
    decoder.use_attention_pooler, decoder.pooler_dim = True, width
    decoder.position_encoding, decoder.rope_mixed_base = "rope", 10.0


def exit_depths(preset: str, modality_names: Sequence[str], depth: int) -> dict[str, int]:
    """Token exit depths by preset name: 'zero', 'half', 'full' or 'varied' (spec section 7)."""
    values = {"zero": 0, "half": depth // 2, "full": depth, "varied": depth}
    out = dict.fromkeys(modality_names, values[known("token exit preset", preset, values)])
    if preset == "varied":
        out.update({m: 0 for m in ("latlon", "worldcover") if m in out})
    return out
