"""Heads that only training needs: maps from the location grid, and the student's way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
from flax import nnx

from olmoearth_jax import modalities
from olmoearth_jax.losses.distillation import Distillation
from olmoearth_jax.losses.supervision import Supervision, draw_map, draw_vector
from olmoearth_jax.model.config import ModelConfig, SupervisionHeadConfig
from olmoearth_jax.model.layers import LayerNorm, Linear
from olmoearth_jax.supervision_maps import MapTask, codes_of, data_values, record_of

WIDTH = "width_"
"""Prefix of the names of back-projections: a bare number would be the place in a list."""

SUPERVISION, DISTILLATION = "supervision_head", "location_token_distillation_head"
"""Where the heads stand in the parameter tree, and in the released names."""


def map_tasks(config: SupervisionHeadConfig) -> tuple[MapTask, ...]:
    """The maps of a head's config, in its order.

    Raises:
      ValueError: a map that can't be drawn so, or no table of classes to look them up rightly.
    """
    out = []
    for name, one in config.modality_configs.items():
        known: tuple[float, ...] = ()
        if one.task_type == "classification":
            known = _known_values(name, one.num_output_channels, config.fix_class_values)
        fixed = config.fix_class_values and bool(known)
        out.append(
            MapTask(
                modalities.get(name).name,
                one.task_type,
                one.num_output_channels,
                one.weight,
                known if fixed else tuple(one.class_values or ()),
                known,
                ignore_unknown=fixed,
                pos_weight=one.pos_weight,
                regression_loss_type=one.regression_loss_type,
            )
        )
    return tuple(out)


def _known_values(name: str, channels: int, needed: bool) -> tuple[float, ...]:
    """The classes' values in the units of the data set, () if the registry has other classes."""
    try:
        codes = codes_of(record_of(name))
    except ValueError:
        if needed:
            raise
        return ()
    if len(codes) == channels:
        return data_values(name, codes)
    if needed:
        raise ValueError(
            f"fix_class_values: {name!r} has {len(codes)} classes in its record, not {channels}"
        )
    return ()


def check_heads(config: ModelConfig) -> None:
    """Checks that the heads fit the model.

    Raises:
      ValueError: with the first fault found.
    """
    supervision, back = (
        config.supervision_head_config,
        config.location_token_distillation_head_config,
    )
    pooler = config.encoder_config.attention_pooler_config
    for name, head in ((SUPERVISION, supervision), (DISTILLATION, back)):
        if head is not None and (pooler is None or config.kind != "latent_mim"):
            raise ValueError(
                f"{name}_config belongs to a model of kind 'latent_mim' with an attention pooler; "
                "set it to null"
            )
    if supervision is not None:
        if not supervision.modality_configs:
            raise ValueError(f"{SUPERVISION}_config has no maps; set it to null for none")
        if supervision.spatial_unfold is not None and supervision.spatial_unfold < 1:
            raise ValueError(f"spatial_unfold must be at least 1, got {supervision.spatial_unfold}")
        map_tasks(supervision)
    if back is not None:
        if pooler is None or not pooler.student_dims:
            raise ValueError(f"{DISTILLATION}_config needs student_dims of the attention pooler")
        if back.back_projection_hidden is not None and back.back_projection_hidden < 1:
            raise ValueError(
                "back_projection_hidden must be positive or null, got "
                f"{back.back_projection_hidden}"
            )
        Distillation(tuple(pooler.student_dims), back.gram_max_tokens)


def supervision_of(config: ModelConfig) -> Supervision | None:
    """The loss on the maps of a model's heads, None without heads."""
    head = config.supervision_head_config
    return None if head is None else Supervision(map_tasks(head))


def distillation_of(config: ModelConfig) -> Distillation | None:
    """The loss of a model's student, None without a distillation head."""
    head = config.location_token_distillation_head_config
    pooler = config.encoder_config.attention_pooler_config
    if head is None or pooler is None or not pooler.student_dims:
        return None
    return Distillation(tuple(pooler.student_dims), head.gram_max_tokens)


def supervision_head(config: ModelConfig) -> SupervisionHead | None:
    """The heads that a model's config asks for."""
    head, pooler = config.supervision_head_config, config.encoder_config.attention_pooler_config
    if head is None or pooler is None:
        return None
    unfold = head.spatial_unfold or config.encoder_config.max_patch_size
    return SupervisionHead(map_tasks(head), pooler.pooler_dim, unfold)


def distillation_head(config: ModelConfig) -> DistillationHead | None:
    """The back-projections that a model's config asks for."""
    head = config.location_token_distillation_head_config
    pooler = config.encoder_config.attention_pooler_config
    if head is None or pooler is None or not pooler.student_dims:
        return None
    widths = sorted(set(pooler.student_dims))
    return DistillationHead(widths, head.back_projection_hidden, pooler.pooler_dim)


class SupervisionHead(nnx.Module):
    """One linear head per map, on every cell of the location grid (spec/train_v1_3.md 3.1)."""

    def __init__(self, tasks: Sequence[MapTask], width: int, unfold: int):
        self.maps = tuple((t.name, t.channels) for t in tasks)
        self.unfold = unfold
        self.heads = nnx.Dict(
            {name: Linear(width, channels * self._pixels(name)) for name, channels in self.maps}
        )

    def _pixels(self, name: str) -> int:
        """Values that a cell gives per channel."""
        return self.unfold**2 if modalities.get(name).spatial else 1

    def __call__(
        self, grid: jax.Array, sizes: Mapping[str, tuple[int, int]]
    ) -> dict[str, jax.Array]:
        """The maps, float32 [B, H, W, 1, C] each ([B, C] for a modality without pixels).

        Args:
          grid: float [B, h, w, D].
          sizes: (H, W) of the targets; maps that are not listed are not drawn.
        """
        out = {}
        for name, _ in self.maps:
            head = self.heads[name]
            if not modalities.get(name).spatial:
                out[name] = draw_vector(grid, head.kernel[...], head.bias[...])
            elif name in sizes:
                out[name] = draw_map(
                    grid, head.kernel[...], head.bias[...], self.unfold, sizes[name]
                )
        return out


class BackProjection(nnx.Module):
    """From a prefix of the student to the width of the grid: one layer, or two with a norm."""

    def __init__(self, width: int, hidden: int | None, out: int):
        self.linear = Linear(width, out) if hidden is None else None
        self.first = None if hidden is None else Linear(width, hidden)
        self.norm = None if hidden is None else LayerNorm(hidden)
        self.last = None if hidden is None else Linear(hidden, out)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, width] -> float32 [n, out]."""
        if self.linear is not None:
            return self.linear(x)
        assert self.first is not None and self.norm is not None and self.last is not None
        return self.last(jax.nn.relu(self.norm(self.first(x))))


class DistillationHead(nnx.Module):
    """The back-projections by width (spec/train_v1_3.md 4.3)."""

    def __init__(self, widths: Sequence[int], hidden: int | None, out: int):
        self.back_projections = nnx.Dict(
            {f"{WIDTH}{w}": BackProjection(w, hidden, out) for w in sorted(widths, reverse=True)}
        )

    @property
    def by_width(self) -> dict[int, BackProjection]:
        """The back-projections by the number of channels that they take."""
        return {int(k.removeprefix(WIDTH)): v for k, v in self.back_projections.items()}
