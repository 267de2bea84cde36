"""Whole models: containers, construction and the split into plain parameter trees (section 10)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from olmoearth_jax import modalities
from olmoearth_jax.model import config as model_config
from olmoearth_jax.model import heads
from olmoearth_jax.model.config import EncoderConfig, ModelConfig
from olmoearth_jax.model.decoder import Predictor, Reconstructor
from olmoearth_jax.model.encoder import Encoder, slot_table
from olmoearth_jax.model.initialize import initial_value
from olmoearth_jax.model.layers import Linear
from olmoearth_jax.model.patch_embed import PatchEmbeddings
from olmoearth_jax.model.pooler import check_pooler
from olmoearth_jax.proposals import known

Params = dict[str, Any]
"""Nested dict of str to dict or float32 array."""


class Model(nnx.Module):
    """An encoder, decoders, a pixel reconstructor and the heads of v1.3. The target lives outside.

    'latent_mim' has one decoder, 'galileo' one per view, which start equal, and 'mae' one or none;
    all may have a reconstructor, and 'latent_mim' the heads.
    """

    def __init__(self, config: ModelConfig, dtype=jnp.float32):
        decoder, pixels = config.decoder_config, config.reconstructor_config
        self.encoder = Encoder(config.encoder_config, dtype)
        shared, own = (None, decoder) if config.kind == "galileo" else (decoder, None)
        self.decoder = None if shared is None else Predictor(shared, dtype)
        self.decoder_a = None if own is None else Predictor(own, dtype)
        self.decoder_b = None if own is None else Predictor(own, dtype)
        self.reconstructor = None if pixels is None else Reconstructor(pixels, dtype)
        self.supervision_head = heads.supervision_head(config)
        self.location_token_distillation_head = heads.distillation_head(config)

    def decoder_of(self, view: int) -> Predictor | None:
        """The predictor of view 0 or 1."""
        return self.decoder or (self.decoder_b if view else self.decoder_a)

    @property
    def decoder_depth(self) -> int:
        """Blocks of the deepest predictor, that of the reconstructor included."""
        found = [self.decoder_of(0), self.decoder_of(1)]
        if self.reconstructor is not None:
            found.append(self.reconstructor.decoder)
        return max(len(d.blocks) for d in found if d is not None)


class TargetProjection(nnx.Module):
    """The frozen part of an encoder that makes targets at exit depth 0."""

    def __init__(self, config: EncoderConfig, dtype=jnp.float32):
        self.patch_embeddings = PatchEmbeddings(
            slot_table(config),
            config.embedding_size,
            config.patch_embed_hidden_sizes,
            config.post_proj_hidden_sizes,
            dtype,
        )
        out = config.output_embedding_size
        self.embedding_projector = Linear(config.embedding_size, out, dtype) if out else None

    def project_output(self, x: jax.Array) -> jax.Array:
        """The output projection on every token, where configured."""
        if self.embedding_projector is None:
            return x
        return self.embedding_projector(x, jnp.float32)


KINDS = ("latent_mim", "mae", "galileo")


def check(config: ModelConfig) -> None:
    """Cross-checks the parts of a model config.

    Raises:
      ValueError: with the first disagreement found.
    """
    known("model kind", config.kind, KINDS)
    encoder, decoder = config.encoder_config, config.decoder_config
    if decoder is None and config.reconstructor_config is not None:
        decoder = config.reconstructor_config.decoder_config
    if config.decoder_config is None and config.kind != "mae":
        raise ValueError(f"a model of kind {config.kind!r} needs a decoder_config")
    check_pooler(config)
    heads.check_heads(config)
    for part in (encoder, decoder):
        if part is None:
            continue
        if part.position_encoding not in model_config.POSITION_ENCODINGS:
            raise ValueError(
                f"unknown position_encoding {part.position_encoding!r}; "
                f"{modalities.closest(part.position_encoding, model_config.POSITION_ENCODINGS)}"
            )
    if decoder is None:
        return
    if list(encoder.supported_modality_names) != list(decoder.supported_modality_names):
        raise ValueError(
            "encoder and decoder must support the same modalities, got "
            f"{encoder.supported_modality_names} and {decoder.supported_modality_names}"
        )
    for name in encoder.supported_modality_names:
        ours, theirs = (part.tokenization.band_sets(name) for part in (encoder, decoder))
        if ours != theirs:
            raise ValueError(
                f"encoder and decoder disagree on the band sets of {name!r}: {ours} and {theirs}"
            )
    if encoder.max_sequence_length != decoder.max_sequence_length:
        raise ValueError(
            "encoder and decoder disagree on max_sequence_length: "
            f"{encoder.max_sequence_length} and {decoder.max_sequence_length}"
        )
    width = encoder.output_embedding_size or encoder.embedding_size
    if decoder.encoder_embedding_size != width:
        raise ValueError(
            f"the decoder expects encoder tokens of width {decoder.encoder_embedding_size}, "
            f"but the encoder gives {width}"
        )


def abstract(config: ModelConfig, dtype=jnp.float32) -> Model:
    """The module tree with shapes instead of arrays: nothing is allocated."""
    check(config)
    return nnx.eval_shape(lambda: Model(config, dtype))


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """(graphdef, plain nested dict of parameters); list positions become the keys '0', '1', ..."""
    graphdef, state = nnx.split(module)
    return graphdef, _string_keys(nnx.to_pure_dict(state))


def merge(graphdef: nnx.GraphDef, params: Mapping[str, Any]) -> Any:
    """The module with these parameters; inverse of `split`, usable under jit."""
    return nnx.merge(graphdef, nnx.State(_graph_keys(params)))


def _string_keys(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    return {str(key): _string_keys(value) for key, value in tree.items()}


def _graph_keys(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return nnx.Param(tree)
    return {int(k) if k.isdecimal() else k: _graph_keys(v) for k, v in tree.items()}


_GRAPHS: dict[tuple[str, str], tuple[nnx.GraphDef, Params]] = {}
"""By the text of a config, which can be changed and so has no hash, and the compute dtype."""


def graph(config: ModelConfig, dtype=jnp.float32) -> tuple[nnx.GraphDef, Params]:
    """(graphdef, parameter tree of ShapeDtypeStruct) of a config.

    Args:
      dtype: compute dtype of matrix products; parameters are float32 always.
    """
    key = (repr(config), jnp.dtype(dtype).name)
    if key not in _GRAPHS:
        _GRAPHS[key] = split(abstract(config, dtype))
    return _GRAPHS[key]


def target_graph(config: ModelConfig, full: bool = False, dtype=jnp.float32):
    """(graphdef, abstract parameters) of the target encoder.

    Args:
      full: a whole encoder, needed where some token exit is deeper than 0; else only the patch
        projection (and the output projection).
    """
    kind = Encoder if full else TargetProjection
    return split(nnx.eval_shape(lambda: kind(config.encoder_config, dtype)))


def initial_params(config: ModelConfig, seed: int = 0) -> Params:
    """Random float32 NumPy parameters (spec section 11).

    Every tensor is drawn from its own stream, keyed by the seed and its path, so the values do
    not depend on what else the model holds.
    """
    _, shapes = graph(config)
    leaves = {path: leaf.shape for path, leaf in flatten(shapes)}
    params = unflatten(
        {
            path: initial_value(path, shape, leaves.get((*path[:-1], "kernel")), config, seed)
            for path, shape in leaves.items()
        }
    )
    if config.kind == "galileo":
        params["decoder_b"] = jax.tree.map(np.copy, params["decoder_a"])
    return params


def build(config: ModelConfig, seed: int = 0, dtype=jnp.float32) -> Any:
    """A model with initial parameters, as an nnx module."""
    params = jax.tree.map(jnp.asarray, initial_params(config, seed))
    return merge(graph(config, dtype)[0], params)


def target_params(params: Params, full: bool = False) -> Params:
    """The target's parameters at the start: those of the encoder, or its projection only."""
    encoder = params["encoder"]
    if full:
        return dict(encoder)
    return {k: encoder[k] for k in ("patch_embeddings", "embedding_projector") if k in encoder}


def flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[Any, Any]]:
    """[(path, leaf)] of a nested dict, in its own order."""
    out = []
    for key, value in tree.items():
        path = (*prefix, key)
        if isinstance(value, Mapping):
            out.extend(flatten(value, path))
        else:
            out.append((path, value))
    return out


def unflatten(leaves: Mapping[tuple[str, ...], Any]) -> Params:
    """Inverse of `flatten`."""
    out: Params = {}
    for path, value in leaves.items():
        node = out
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return out
