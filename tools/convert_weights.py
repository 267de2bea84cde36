"""Converts weights between the reference's layout and ours, strictly and without loss.

    python -m tools.convert_weights import --source=DIR --target=DIR
    python -m tools.convert_weights export --checkpoint=DIR --target=DIR

The reference's layout is a folder with config.json and weights.pth or model.safetensors (PyTorch
is not needed); --source may also be a published name such as OlmoEarth-v1_2-Nano. Prints the digest
of the parameters last. Ready-made checkpoints and training runs can both be exported.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging

from olmoearth_jax import commands, outputs
from olmoearth_jax.interop import checkpoints, weights
from olmoearth_jax.interop.weights import (
    CONFIG_FILE,
    NOTICE_FILE,
    SAFETENSORS_FILE,
    TORCH_FILE,
)
from olmoearth_jax.modalities import closest

_FILES = (CONFIG_FILE, TORCH_FILE, NOTICE_FILE)
VERBS = ("import", "export")


def import_weights(source: str, target: str, overwrite: bool = False) -> list[str]:
    """Writes a checkpoint from reference weights; returns the lines to print."""
    outputs.check(Path(target).expanduser() / NOTICE_FILE, overwrite=overwrite)
    loaded = checkpoints.from_reference(weights.find(source), Path(source).name)
    step_folder = checkpoints.write(loaded, target, Path(source).name)
    return [f"checkpoint: {step_folder}", *_lines(loaded)]


def export_weights(checkpoint: str, target: str, overwrite: bool = False) -> list[str]:
    """Writes a reference folder from a checkpoint; returns the lines to print."""
    _check_target(Path(target).expanduser(), overwrite)
    loaded = checkpoints.read(checkpoint)
    files = checkpoints.to_reference(loaded, target)
    return [*(f"written: {path}" for path in files), *_lines(loaded)]


def _check_target(folder: Path, overwrite: bool) -> None:
    """Refuses to write weights over a run, or over weights that are no export of ours."""
    config = folder / CONFIG_FILE
    if weights.is_run(folder) or (config.is_file() and _of_a_run(config)):
        raise ValueError(f"{folder} is the folder of a run; export to another one")
    # An export holds the attribution and no safetensors, which would go as out of date.
    exported = outputs.is_ours(folder / NOTICE_FILE)
    names = (SAFETENSORS_FILE,) if exported else (*_FILES, SAFETENSORS_FILE)
    held = [f for f in names if (folder / f).exists()]
    if held and not overwrite:
        raise ValueError(
            f"{folder} holds a {held[0]} that is no export of this program; give another "
            "--target, or --overwrite to replace it"
        )
    outputs.check_folder(folder)


def _of_a_run(config: Path) -> bool:
    try:
        return {"trainer", "train_module"} <= set(json.loads(config.read_text()))
    except (ValueError, TypeError, RecursionError, OSError):
        return False


def _lines(loaded: checkpoints.Weights) -> list[str]:
    decode_only = "not recorded" if loaded.decode_only is None else ", ".join(loaded.decode_only)
    return [
        f"model: {loaded.config.kind}, modalities "
        f"{', '.join(loaded.config.encoder_config.supported_modality_names)}",
        f"decode-only modalities: {decode_only or '(none)'}",
        f"digest: {loaded.digest}",
    ]


def define_flags() -> None:
    flags.DEFINE_string("source", None, "Import: folder or published name.")
    flags.DEFINE_string(
        "checkpoint", None, "Export: run folder, checkpoints folder or step folder."
    )
    flags.DEFINE_string("target", None, "Folder to write.")
    flags.DEFINE_bool("overwrite", False, "Replace files that are not of this program.")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    absl_logging.set_verbosity(absl_logging.ERROR)
    verb = argv[1] if len(argv) > 1 else ""
    if verb not in VERBS or len(argv) > 2:
        raise app.UsageError(f"Say what to do: import or export. {closest(verb, VERBS)}")
    if not given.target:
        raise app.UsageError(f"{verb} needs --target.")
    try:
        if verb == "import":
            if not given.source:
                raise app.UsageError("import needs --source.")
            lines = import_weights(given.source, given.target, given.overwrite)
        else:
            if not given.checkpoint:
                raise app.UsageError("export needs --checkpoint.")
            lines = export_weights(given.checkpoint, given.target, given.overwrite)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print("\n".join(lines))


if __name__ == "__main__":
    define_flags()
    commands.run(main)
