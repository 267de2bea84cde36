"""Config files against their saved text.

`pytest tests/config --update-golden-text` rewrites it, so that a change of a default is a change
of these files.
"""

import importlib
import json
from pathlib import Path

import pytest

from olmoearth_jax import check
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.model.config import PUBLISHED_VERSIONS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "golden_text"

CASES = [
    *(
        f"{size}:version={version}"
        for version, sizes in PUBLISHED_VERSIONS.items()
        for size in sizes
    ),
    "base:version=v1_2,faster",
    "base:version=v1_3,smoke",
    *(f"{size}:smoke" for size in ("nano", "tiny", "small", "base", "large")),
    *(f"ablations.{p.stem}" for p in sorted((ROOT / "configs/ablations").glob("[a-z]*.py"))),
]


def config_of(case: str) -> ExperimentConfig:
    name, _, argument = case.partition(":")
    values = importlib.import_module(f"configs.{name}").get_config(argument)
    return ExperimentConfig.from_dict(values.to_dict())


def text_of(case: str) -> str:
    """The config as text; ablations and smoke runs by what they change."""
    values = flat(config_of(case).to_dict())
    if values["dataset.h5py_dir"] is not None:
        values["dataset.h5py_dir"] = "<the packaged sample>"
    name, _, argument = case.partition(":")
    if name.startswith("ablations.") or "smoke" in argument:
        named = [v for v in PUBLISHED_VERSIONS if v != "v1" and v in case]
        version = named[0] if named else "v1_2" if name == "small" else "v1"
        size = "base" if name.startswith("ablations.") else name
        base = flat(config_of(f"{size}:version={version}").to_dict())
        gone = [k for k in base if k not in values]
        values = {k: v for k, v in values.items() if k not in base or base[k] != v}
        gone = [k for k in gone if not any(_related(k, v) for v in values)]
        values.update(dict.fromkeys(gone, "(gone)"))
    return "".join(f"{path} = {json.dumps(value)}\n" for path, value in values.items())


def _related(path: str, other: str) -> bool:
    """Whether one path is above the other, so that its line tells of both."""
    return path.startswith(other + ".") or other.startswith(path + ".")


def flat(values: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


@pytest.mark.parametrize("case", CASES)
def test_config_text_is_the_saved_one(case: str, request: pytest.FixtureRequest) -> None:
    stem = case.replace("ablations.", "ablation_").replace("version=", "")
    path = FOLDER / f"config_{stem.replace(':', '_').replace(',', '_')}.txt"
    if request.config.getoption("--update-golden-text"):
        path.write_text(text_of(case))
    assert text_of(case) == path.read_text()


@pytest.mark.parametrize("case", CASES)
def test_config_is_valid_and_survives_json(case: str) -> None:
    config = config_of(case)
    assert check.problems(config) == []
    assert ExperimentConfig.from_json(config.to_json()) == config
