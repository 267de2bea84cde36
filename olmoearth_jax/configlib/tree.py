"""The root of the configuration tree, its JSON form and its derived settings."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from olmoearth_jax.configlib import schema
from olmoearth_jax.configlib.data import CommonConfig, DataLoaderConfig, DatasetConfig
from olmoearth_jax.configlib.errors import ConfigError
from olmoearth_jax.configlib.trainer import (
    CompileConfig,
    LadderConfig,
    MeshConfig,
    TrainerConfig,
)
from olmoearth_jax.configlib.training import TrainModuleConfig
from olmoearth_jax.model.config import ModelConfig


@dataclasses.dataclass
class ExperimentConfig:
    """Everything that defines a run."""

    common: CommonConfig = field(default_factory=CommonConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    data_loader: DataLoaderConfig = field(default_factory=DataLoaderConfig)
    train_module: TrainModuleConfig = field(default_factory=TrainModuleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    init_seed: int = 12536
    """Seed of initialisation, drop path and band dropout."""
    engine: Literal["stream", "dense"] = "stream"
    """Packed token stream, or padded rows (slow; the oracle of the tests)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products; auto is bfloat16 on GPU and float32 on CPU."""
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    """Attention kernel; auto is cudnn where it applies and xla elsewhere."""
    remat: Literal["none", "dots", "block"] = "none"
    """Recomputed in the backward pass: nothing, all but matrix products, or whole blocks."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    fsdp_rules: list[list[Any]] = field(default_factory=list)
    """Pairs [regex on the parameter path, axis or null per dimension]; no match replicates."""
    ladder: LadderConfig = field(default_factory=LadderConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)

    @property
    def run_folder(self) -> Path:
        """Folder of checkpoints, logs and evaluations."""
        return Path(self.common.save_folder or Path("local_output") / self.common.run_name)

    @property
    def groups_per_step(self) -> int:
        """Groups of `rank_microbatch_size` samples in an optimizer step."""
        return self.data_loader.global_batch_size // self.train_module.rank_microbatch_size

    @property
    def samples_per_shape(self) -> int:
        """Contiguous samples that share patch size and grid."""
        return self.data_loader.shape_block(self.train_module.rank_microbatch_size)

    def validate(self) -> list[str]:
        """Every problem of the config, one sentence each; empty if it can be run."""
        from olmoearth_jax.configlib.validate import problems

        return problems(self)

    def check(self) -> ExperimentConfig:
        """This config.

        Raises:
          ConfigError: it has problems; all are listed.
        """
        found = self.validate()
        if found:
            raise ConfigError(found)
        return self

    def copy(self) -> ExperimentConfig:
        return copy.deepcopy(self)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dict of every setting."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Complete JSON text, which `from_json` reads back to an equal config."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExperimentConfig:
        """The config of a nested dict; members left out keep their defaults.

        Raises:
          ConfigError: unknown members or values of the wrong type, all listed.
        """
        own = (values.get("common") or {}).get("extra_modalities") or {}
        schema.register_modalities(own)  # before any list that names them is read
        return schema.convert(cls, values, "")

    @classmethod
    def from_json(cls, text: str) -> ExperimentConfig:
        """The config of a JSON text.

        Raises:
          ConfigError: not JSON, unknown members, or values of the wrong type.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as e:
            raise ConfigError(f"the config is not valid JSON: {e}") from e
        return cls.from_dict(values)


def load_json(path: str | Path) -> ExperimentConfig:
    """The config saved in a file, such as a run folder's config.json.

    Raises:
      ConfigError: no such file, or its content is not a config.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ConfigError(f"config file {str(path)!r} does not exist")
    return ExperimentConfig.from_json(path.read_text())
