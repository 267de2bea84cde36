"""A checkpoint of before the optimiser was one of optax resumes as if nothing had happened."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax import losses
from olmoearth_jax.checkpoints import checkpoint, integrity
from olmoearth_jax.checkpoints.checkpoint import Checkpointer, RunInfo
from olmoearth_jax.losses import Objective
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.model.config import EncoderConfig, ModelConfig, PredictorConfig
from olmoearth_jax.stream.engine import Prepared
from olmoearth_jax.train import assemble
from olmoearth_jax.train.step import TrainProgram
from tests.train.steady import steady

OLD = Path(__file__).parent / "checkpoint_format_1.zip"
"""Step 3 of a run of 6 steps, and its parameters after the last."""

SIZES = {"supported_modality_names": ["worldcover"], "depth": 1, "num_heads": 1}
MODEL = ModelConfig(
    encoder_config=EncoderConfig(embedding_size=16, max_patch_size=2, **SIZES),
    decoder_config=PredictorConfig(encoder_embedding_size=16, decoder_embedding_size=16, **SIZES),
)
BIASES = {"params": ["*/bias"], "opts": {"lr": 0.02, "betas": [0.8, 0.99]}}


class Pull:
    """Pulls every parameter towards a goal; a group is its goal."""

    objective = Objective(losses.build({"type": "l2"}))

    def prepare(self, groups):
        host = {"encoded_tokens": 1.0, "decoded_tokens": 1.0, "stream_tokens": 2.0}
        made = [(np.float32(g["goal"]),) for g in groups]
        return [Prepared("only", lambda x=x: x, dict(host), []) for x in made]

    def loss(self, params, target, inputs, key, program_key):
        value = sum(jnp.sum(jnp.square(x - inputs[0])) for x in jax.tree.leaves(params))
        return value, {"base": value}


class Slowing(TrainProgram):
    """The rate of the run that was saved."""

    def step(self, state, groups, step, gate=lambda: None):
        self._peak = 0.01 / step
        return super().step(state, groups, step, gate)


def program(groups) -> TrainProgram:
    config = steady(MODEL, lr=0.01, weight_decay=0.1)
    config.train_module.optim_config.group_overrides = groups
    config.train_module.optim_config.count_offset = 1
    trainable = assemble.trainable_leaves(MODEL, False)
    return Slowing(config, Pull(), make_mesh(), trainable, 6)


@pytest.fixture
def old(tmp_path) -> Path:
    shutil.unpack_archive(OLD, tmp_path)
    return tmp_path


def test_an_old_checkpoint_resumes(old, tmp_path):
    p = program([BIASES])
    with Checkpointer(old, RunInfo(), save_interval=1) as saver:
        found = saver.restore_latest(p.abstract_state())
    assert found is not None and found[1]["format"] == 1
    state = found[0]
    for step in range(4, 7):
        state, report = p.step(state, [{"goal": step}, {"goal": -0.5}], step)
        assert float(report.metrics["train/dropped_micro_steps"]) == 0
    expected = np.load(old / "after_step_6.npz")
    leaves = integrity.leaf_paths(state["params"])
    assert {path.replace("/", ".") for path in leaves} == set(expected)
    for path, leaf in leaves.items():
        np.testing.assert_allclose(leaf, expected[path.replace("/", ".")], rtol=1e-6, atol=1e-8)
    # What is saved now has the same form, so that it also resumes with other groups.
    with Checkpointer(tmp_path / "new", RunInfo(), save_interval=1) as saver:
        assert saver.save(6, state) and saver.wait()
    metas = [checkpoint.read_meta(f) for f in (old / "3", tmp_path / "new" / "6")]
    assert metas[0]["items"] == metas[1]["items"] and metas[1]["format"] == 1
    other = program([])
    held = checkpoint.restore_state(tmp_path / "new" / "6", other.abstract_state())
    jax.tree.map(np.testing.assert_array_equal, held["params"], state["params"])
    other.step(held, [{"goal": 7}], 7)
