"""Pretrained models for use: loading by name or folder, and embedding of samples."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from olmoearth_jax import modalities, platforms
from olmoearth_jax.checkpoints.folders import NoCheckpoint
from olmoearth_jax.inference import describe, domain
from olmoearth_jax.inference.labelled_arrays import embeddings_array
from olmoearth_jax.inference.prepare import ModelInput, Rules, prepare, ranges_of
from olmoearth_jax.inference.sample import Sample
from olmoearth_jax.interop import checkpoints, weights
from olmoearth_jax.model import frozen, latent_mim
from olmoearth_jax.model.frozen import FrozenEncoder
from olmoearth_jax.model.pooling import LOCATIONS, PLACES, Pooling
from olmoearth_jax.model.searchlight import WINDOW_PX
from olmoearth_jax.model.versions import version_of
from olmoearth_jax.proposals import known

log = logging.getLogger(__name__)

POOLINGS = PLACES
_TOKENS_AT_ONCE = {"cpu": 4_096, "gpu": 16_384}
"""Tokens per compiled call that `embed` aims at when no batch size is given: on a CPU few enough
for its caches, and calls run side by side."""
_MOST_WORKERS = 16


class PretrainedModel(FrozenEncoder):
    """The encoder of a pretrained model, ready for use; see `load_pretrained`.

    Attributes:
      config: the model config.
      name: what it was loaded by.
      version: 'v1', 'v1_1', 'v1_2' or 'v1_3'; decides how missing bands are filled.
      modalities: what the encoder was trained to see, in sample order.
      digest: SHA-256 of all trained parameters.
      dtype: type of the matrix products.
    """

    def __init__(
        self,
        loaded: checkpoints.Weights,
        name: str = "",
        dtype: Any = None,
        restrict_inputs: bool = True,
    ):
        super().__init__(loaded.config, loaded.params, dtype)
        self.name, self.digest = name, loaded.digest
        self.version = version_of(loaded.config)
        decode_only = loaded.decode_only
        if decode_only is None and restrict_inputs:
            log.warning(
                "%s does not record which modalities its encoder was trained on: all of %s are "
                "accepted", name or "the model", ", ".join(self.slots.names),
            )  # fmt: skip
        self.decode_only = tuple(decode_only or ()) if restrict_inputs else ()
        self.modalities = tuple(n for n in self.slots.names if n not in self.decode_only)
        self.ranges = ranges_of(self.modalities, loaded.normalization)
        self.rules = Rules(self.slots, self.version, self.ranges)

    def __repr__(self) -> str:
        return describe.model_line(self)

    def summary(self) -> None:
        """Prints what the model takes and gives, and its parameters."""
        print(describe.model_summary(self))

    @property
    def default_patch_size(self) -> int:
        """The patch size of `embed` where none is given, in pixels."""
        return min(8, self.config.encoder_config.max_patch_size)

    def embed(
        self,
        sample: Sample | Sequence[Sample] | ModelInput,
        patch_size: int | None = None,
        pooling: str = "instance",
        pooling_type: str = "mean",
        batch_size: int | None = None,
        location_size: int | None = None,
    ) -> np.ndarray:
        """Embeddings of samples.

        Args:
          sample: one (its batch may be of any size), several of equal size, or what `prepare`
            made of them for this patch size.
          patch_size: side in pixels of 10 m of what becomes one token; must divide the image. The
            largest of the model, at most 8, by default.
          pooling: 'instance' gives one vector per sample, 'spatial' one per patch, and
            'spatial_concat' keeps the band sets of each patch apart. Models of v1.3 also give
            'location', one vector per location of their attention pooler, and 'student', a short
            one; the first 64 channels of that are an embedding too.
          pooling_type: 'mean' or 'max' of the tokens that are pooled.
          batch_size: samples per compiled call; chosen from the number of tokens by default.
          location_size: pixels per side of a location; must divide the patch size, the default.

        Returns:
          float32 [B, D], [B, h, w, D] or [B, h, w, band sets, D]; of locations [B, H /
          location_size, W / location_size, D].

        Raises:
          ValueError: sizes, modalities or choices that do not fit.
        """
        known("pooling", pooling, POOLINGS)
        known("pooling_type", pooling_type, ("mean", "max"))
        if patch_size is None:
            patch_size = self.default_patch_size
        self.check_locations(pooling, patch_size, location_size)
        ready = self.prepare(sample, patch_size)
        _check_visible(ready)
        fast = not any(mask.any() for mask in ready.masks.values())
        pool = _chosen(Pooling(pooling_type, pooling), ready)  # pyright: ignore[reportArgumentType]
        call = frozen.Call(self.graph, patch_size, pool, fast, location_size)
        return _in_chunks(functools.partial(_embed, call, self.params), ready, batch_size)

    def embed_xarray(
        self,
        images: Any,
        patch_size: int | None = None,
        pooling: str = "spatial",
        pooling_type: str = "mean",
        location_size: int | None = None,
    ) -> Any:
        """Embeddings of one place with their coordinates.

        Args:
          images: a sample made by `Sample.from_xarray`, or what that takes.
          patch_size, pooling, pooling_type, location_size: as of `embed`.

        Returns:
          an xarray DataArray float32 of the dims (y, x, feature), coordinates at the centres of
          the patches (or locations) and the CRS coordinate of the images; (feature,) with
          pooling='instance'.

        Raises:
          ValueError: as of `embed` and `Sample.from_xarray`, or xarray is missing.
        """
        sample = images if isinstance(images, Sample) else Sample.from_xarray(images)
        if sample.batch_size != 1 or pooling == "spatial_concat":
            raise ValueError(
                "embed_xarray gives one place, one embedding per patch, or one in all; "
                "take embed for batches and for pooling='spatial_concat'"
            )
        patch = self.default_patch_size if patch_size is None else patch_size
        values = self.embed(sample, patch, pooling, pooling_type, location_size=location_size)[0]
        told = {"model": self.name, "model_digest": self.digest, "pooling": pooling,
                "patch_size": patch}  # fmt: skip
        return embeddings_array(values, location_size or patch, sample.place, told)

    def embed_domain(
        self,
        sample: Sample | ModelInput,
        patch_size: int = 2,
        location_size: int | None = None,
        output: str = "student",
        crop_px: int | None = None,
        overlap_px: int | None = None,
        window_px: int = WINDOW_PX,
    ) -> np.ndarray:
        """Map of embeddings of an area of any size without tile seams (models of v1.3).

        Every location sees what it would see in the middle of a window of the training size.

        Args:
          sample: one sample; all its modalities must have data at every pixel of the timesteps
            that they have at all.
          patch_size: side of a patch in pixels; must divide the window and the area.
          location_size: pixels per location, the patch by default.
          output: 'student' embeddings or the full 'location' tokens.
          crop_px: side of the crops that are encoded one by one, to bound memory; 256 pixels
            more than the overlap by default. The whole area if that is smaller.
          overlap_px: of neighbouring crops; by default so much that crops leave no trace.
          window_px: side of the window.

        Returns:
          float32 [H / location_size, W / location_size, D].

        Raises:
          ValueError: sizes that do not fit, or a model without attention pooler.
        """
        self.check_locations(output, patch_size, location_size)
        ready = self.prepare(sample, patch_size)
        if len(ready.timestamps) != 1:
            raise ValueError(f"embed_domain takes one sample, got {len(ready.timestamps)}")
        halo = domain.safe_halo(self.config.encoder_config, patch_size, window_px)
        overlap = 2 * halo if overlap_px is None else overlap_px
        side = max(ready.visible.shape[1:]) * patch_size
        crop = crop_px or overlap + 256 // patch_size * patch_size
        if crop >= side:
            crop, overlap = side, 0
        encoder = latent_mim.merge(self.graph, self.params)
        plan = domain.DomainPlan(patch_size, crop, overlap, window_px, location_size, output)
        return domain.embed_domain(encoder, ready, plan)

    def prepare(
        self, sample: Sample | Sequence[Sample] | ModelInput, patch_size: int
    ) -> ModelInput:
        """Normalised arrays and token masks of samples of equal size; checks sizes and names.

        Raises:
          ValueError: sizes or modalities that do not fit.
        """
        if isinstance(sample, ModelInput):
            return sample
        if not isinstance(sample, Sample):
            sample = Sample.concatenate(_samples(sample))
        names = self._names(sample)
        self._check_size(sample, names, patch_size)
        return prepare(sample, names, patch_size, self.rules)

    def check_locations(self, pooling: str, patch_size: int, location_size: int | None) -> None:
        """Checks that the model takes patches of a size, and has what a pooling asks for.

        Raises:
          ValueError: it does not.
        """
        self._check_patch(patch_size)
        pooler = self.config.encoder_config.attention_pooler_config
        wanted = pooling in LOCATIONS
        if wanted and pooler is None:
            raise ValueError(
                f"pooling {pooling!r} needs an attention pooler, which only models of v1.3 have; "
                "take 'spatial'"
            )
        if pooling == "student" and pooler is not None and not pooler.student_dims:
            raise ValueError("this model has no student embeddings; take pooling='location'")
        if location_size is None:
            return
        if not wanted:
            raise ValueError("location_size goes with pooling='location' or 'student'")
        if location_size < 1 or patch_size % location_size:
            raise ValueError(
                f"a location_size of {location_size} does not divide the patch size {patch_size}"
            )

    def _check_patch(self, patch_size: int) -> range:
        """The sizes of patches that the model takes; raises ValueError for another."""
        encoder = self.config.encoder_config
        sizes = range(encoder.min_patch_size, encoder.max_patch_size + 1)
        if not isinstance(patch_size, int) or patch_size not in sizes:
            raise ValueError(
                f"patch_size must be a whole number {sizes[0]}..{sizes[-1]}, got {patch_size!r}"
            )
        return sizes

    def _names(self, sample: Sample) -> tuple[str, ...]:
        """Modalities of the sample that the encoder takes; says which are left out."""
        for name in sample.data:
            if name not in self.slots.names:
                known = ", ".join(self.modalities)
                raise ValueError(f"this model does not take {name}; it takes {known}")
        if dropped := [n for n in sample.data if n in self.decode_only]:
            warnings.warn(
                f"left out {', '.join(dropped)}: the encoder was not trained to see them",
                stacklevel=4,
            )
        names = tuple(n for n in sample.data if n in self.modalities)
        if not names:
            raise ValueError(
                f"the sample holds nothing that the encoder takes: {', '.join(self.modalities)}"
            )
        return names

    def _check_size(self, sample: Sample, names: tuple[str, ...], patch_size: int) -> None:
        encoder, sizes = self.config.encoder_config, self._check_patch(patch_size)
        steps = sample.timestamps.shape[1]
        if steps > encoder.max_sequence_length:
            raise ValueError(
                f"the model takes at most {encoder.max_sequence_length} timesteps, got {steps}; "
                "choose or average some"
            )
        gridded = any(modalities.get(n).spatial for n in names)
        image: Any = sample.image_size if gridded else None
        if any(side % patch_size for side in image or ()):
            whole = " x ".join(str(side // patch_size * patch_size) for side in image)
            fits = ", ".join(str(p) for p in sizes if not any(s % p for s in image))
            raise ValueError(
                f"an image of {image[0]} x {image[1]} pixels cannot be cut into patches of "
                f"{patch_size}: crop it to {whole}, or use a patch size of {fits}"
            )


def _samples(given: Any) -> list[Sample]:
    """The samples of a list of them; says how to make one of anything else."""
    if type(given).__module__.startswith("xarray."):
        raise ValueError(
            f"a model takes samples, not a {type(given).__name__}: make one with "
            "Sample.from_xarray(images), or take embed_xarray(images)"
        )
    if isinstance(given, Mapping):
        what = f"a mapping of {', '.join(map(str, given))}"
    else:
        alone = hasattr(given, "shape") or not isinstance(given, Iterable)
        members: list[Any] = [given] if alone else list(given)
        odd = [s for s in members if not isinstance(s, Sample)]
        if not odd:
            return members
        shape = getattr(odd[0], "shape", None)
        what = type(odd[0]).__name__ + ("" if shape is None else f" of shape {list(shape)}")
    raise ValueError(
        f"a model takes samples, not {what}: values need the names of their bands and their dates. "
        "Make one with Sample.from_arrays({'sentinel2_l2a': array}, dates=['2024-06-15'], "
        "bands={'sentinel2_l2a': ['B02', ...]}); the array is [H, W, T, C]"
    )


def _check_visible(ready: ModelInput) -> None:
    empty = np.flatnonzero(~ready.visible.any((1, 2)))
    if len(empty):
        raise ValueError(f"samples {empty[:10].tolist()} of the batch hold no data at all")


def _chosen(pool: Pooling, ready: ModelInput) -> Pooling:
    """With the modalities that it takes, decided over the whole batch."""
    pool = pool.over(ready.masks)
    if pool.names == ():
        everywhere = " everywhere" if pool.place == "spatial_concat" else ""
        raise ValueError(f"no modality with a pixel grid has data{everywhere}")
    return pool


def _in_chunks(call: Any, ready: ModelInput, batch_size: int | None) -> np.ndarray:
    """Runs `call` over the batch in equal chunks; the last is filled up with its last sample.

    Chunks have the size of a power of two, so that few programs serve batches of any size.
    """
    total = len(ready.timestamps)
    tokens = sum(int(np.prod(m.shape[1:])) for m in ready.masks.values())
    batch_size = batch_size or max(1, _TOKENS_AT_ONCE.get(jax.default_backend(), 16_384) // tokens)
    size = min(1 << max(batch_size.bit_length() - 1, 0), 1 << (total - 1).bit_length())

    def chunk(start: int) -> np.ndarray:
        rows = np.minimum(np.arange(start, start + size), total - 1)
        part = ready.rows(rows)
        return np.asarray(call(one_core, part.data, part.masks, part.timestamps))

    # On a CPU calls run side by side, one core each if there are enough of them: cores that share
    # the products of one call wait for each other. Elsewhere two calls hide the transfers.
    workers, one_core = 2, False
    if jax.default_backend() == "cpu":
        workers = min(os.cpu_count() or 1, _MOST_WORKERS)
        one_core = total > workers * size

    out = [chunk(0)]  # alone: it compiles
    with ThreadPoolExecutor(workers) as pool:
        out.extend(pool.map(chunk, range(size, total, size)))
    return np.concatenate(out)[:total]


@functools.cache
def _compiled(one_core: bool) -> Any:
    options: Any = {"xla_cpu_multi_thread_eigen": False} if one_core else None
    return jax.jit(frozen.embed, static_argnums=0, compiler_options=options)


def _embed(call: frozen.Call, params: Any, one_core: bool, *batch: Any) -> jax.Array:
    """Encoder and pooling of one chunk, compiled once per shape, for one core or for all."""
    return _compiled(one_core)(call, params, *batch)


def load_weights(path_or_hub_id: str | Path, revision: str | None = None) -> checkpoints.Weights:
    """Weights of a reference folder, a checkpoint or run folder of ours, or a hub id.

    Raises:
      ValueError: nothing there, or not readable; the message says what was tried.
    """
    folder = weights.find(path_or_hub_id, revision)
    if weights.is_reference_folder(folder):
        return checkpoints.from_reference(folder, Path(path_or_hub_id).name)
    try:
        return checkpoints.read(folder, with_target=False)
    except NoCheckpoint:
        raise ValueError(
            f"{folder} holds neither published weights (config.json with weights.pth or "
            "model.safetensors) nor a checkpoint of ours (checkpoints/<step>)"
            f"{weights.other_names(folder)}"
        ) from None


def load_pretrained(
    path_or_hub_id: str | Path,
    *,
    dtype: Any = None,
    restrict_inputs: bool = True,
    revision: str | None = None,
) -> PretrainedModel:
    """Loads a pretrained model; there is no fallback to random weights.

    Args:
      path_or_hub_id: folder with published weights, folder of a run or a checkpoint of ours, a
        hub id, or a published name such as 'OlmoEarth-v1_2-Base'. The hub's cache is used, and
        HF_HUB_OFFLINE is honoured.
      dtype: type of the matrix products; float32 on CPU and bfloat16 elsewhere by default.
      restrict_inputs: leave out modalities that the encoder was not trained to see.
      revision: of the hub repository.

    Raises:
      ValueError: see `load_weights`; or JAX_PLATFORMS names what is not here.
    """
    platforms.check()
    loaded = load_weights(path_or_hub_id, revision)
    return PretrainedModel(loaded, Path(path_or_hub_id).name, dtype, restrict_inputs)
