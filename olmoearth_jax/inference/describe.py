"""Models and samples in words, for notebooks and terminals."""

from __future__ import annotations

from typing import Any

from olmoearth_jax import modalities

# Models and samples ask for their own words, so their types are not named here.
PretrainedModel = Any
Sample = Any


def model_line(model: PretrainedModel) -> str:
    """What a model is, in one line."""
    sizes = model.config.encoder_config
    return (
        f"<PretrainedModel {model.name or 'without name'}: {model.version}, "
        f"{_millions(_encoder_parameters(model))} M parameters, embeddings of "
        f"{model.embedding_size}, patches of {sizes.min_patch_size} to {sizes.max_patch_size} "
        f"pixels, takes {', '.join(model.modalities)}>"
    )


def _encoder_parameters(model: PretrainedModel) -> int:
    """Number of values in the encoder."""
    import jax

    return sum(int(leaf.size) for leaf in jax.tree.leaves(model.params))


def model_summary(model: PretrainedModel) -> str:
    """What a model takes and gives, on a few lines."""
    import jax

    encoder, pooler = (
        model.config.encoder_config,
        model.config.encoder_config.attention_pooler_config,
    )
    rows = [
        ("model", model.name or "without name"),
        ("version", model.version),
        ("digest", model.digest),
        ("products in", str(model.dtype)),
        ("blocks", f"{encoder.depth} of width {encoder.embedding_size}, {encoder.num_heads} heads"),
        ("patch size", f"{encoder.min_patch_size} to {encoder.max_patch_size} pixels of 10 m"),
        ("timesteps", f"up to {encoder.max_sequence_length}"),
        ("embeddings", f"{model.embedding_size} values"),
    ]
    if pooler is not None and pooler.student_dims:
        rows.append(("student", " or ".join(map(str, pooler.student_dims)) + " values"))
    for i, name in enumerate(model.modalities):
        bands = modalities.get(name).bands
        shown = " ".join(bands) if len(bands) <= 12 else f"{len(bands)} bands"
        rows.append(("takes" if i == 0 else "", f"{name}: {shown}"))
    if model.decode_only:
        rows.append(("never saw", ", ".join(model.decode_only)))
    rows.append(("parameters", f"{_encoder_parameters(model):,} in the encoder"))
    for part, tree in sorted(model.params.items()):
        rows.append(("", f"{sum(int(x.size) for x in jax.tree.leaves(tree)):>13,} {part}"))
    return "\n".join(f"{key:<12} {value}".rstrip() for key, value in rows)


def sample_line(sample: Sample) -> str:
    """What a sample holds, in one line."""
    size, count = sample.image_size, sample.batch_size
    parts = [f"{count} place{'s' * (count != 1)}"]
    if size is not None:
        parts.append(f"{size[0]} x {size[1]} pixels")
    if any(modalities.get(n).multitemporal for n in sample.data):
        parts.append(_dates(sample))
    for name in sample.data:
        lacking = sample.missing_bands.get(name, ())
        bands = modalities.get(name).num_bands - len(lacking)
        without = f" (without {', '.join(lacking)})" if 0 < len(lacking) <= 4 else ""
        parts.append(f"{name} {bands} band{'s' * (bands != 1)}{without}")
    if sample.normalized:
        parts.append("normalized")
    return f"<Sample {', '.join(parts)}>"


def _dates(sample: Sample) -> str:
    days = [f"{y:04d}-{m + 1:02d}-{d:02d}" for d, m, y in sample.timestamps.reshape(-1, 3).tolist()]
    steps = sample.timestamps.shape[1]
    first, last = min(days), max(days)
    span = first if first == last else f"{first} to {last}"
    return f"{steps} date{'s' * (steps != 1)} {span}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g}"
