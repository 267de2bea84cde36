"""The compiled step on an engine whose loss is known: bad micro-steps, fresh targets."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax import losses
from olmoearth_jax.losses import Objective, spread_of
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.model.config import EncoderConfig, ModelConfig, PredictorConfig
from olmoearth_jax.stream.engine import Prepared
from olmoearth_jax.train import assemble, compiling, signals
from olmoearth_jax.train.step import TrainProgram
from tests.train.steady import steady

NAMES = ["sentinel2_l2a", "worldcover"]
MODEL = ModelConfig(
    encoder_config=EncoderConfig(supported_modality_names=NAMES, depth=1),
    decoder_config=PredictorConfig(supported_modality_names=NAMES, depth=1),
)


class ScaledSum:
    """Loss = factor * sum of squared parameters; a group is its factor."""

    objective = Objective(losses.build({"type": "l2"}))

    def prepare(self, groups):
        host = {"encoded_tokens": 1.0, "decoded_tokens": 1.0, "stream_tokens": 2.0}
        made = [(np.float32(g["factor"]),) for g in groups]
        return [Prepared("only", lambda x=x: x, dict(host), []) for x in made]

    def loss(self, params, target, inputs, key, program_key):
        value = sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params))
        return inputs[0] * value, {"base": value}


def program(engine=None, on_compile=None, **changes) -> TrainProgram:
    config = steady(MODEL, lr=0.1, weight_decay=0.1, **changes)
    trainable = assemble.trainable_leaves(MODEL, True)
    return TrainProgram(config, engine or ScaledSum(), make_mesh(), trainable, 10, on_compile)


def groups(*factors):
    return [{"factor": f} for f in factors]


def host(tree):
    return jax.tree.map(np.array, tree)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_micro_step_is_left_out_whole(bad):
    p = program()
    good_state, good = p.step(p.init_state(), groups(1.0, 3.0), 1)
    state, report = p.step(p.init_state(), groups(1.0, bad, 3.0), 1)
    jax.tree.map(np.testing.assert_array_equal, host(state), host(good_state))
    assert float(report.metrics["train/dropped_micro_steps"]) == 1
    assert float(report.metrics["train/base"]) == float(good.metrics["train/base"])


def test_a_step_of_bad_micro_steps_changes_nothing_but_the_step_number():
    p = program()
    before = host(p.init_state())
    state, report = p.step(p.init_state(), groups(np.nan, np.inf), 1)
    after = host(state)
    assert after.pop("step") == before.pop("step") + 1
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert float(report.metrics["train/good_micro_steps"]) == 0
    assert {line.rsplit("(", 1)[1] for line in p.memory()} == {"micro-step)", "update)"}


def test_a_fresh_target_differs_in_every_projection():
    copied, drawn = program().init_state(), program(reinit_targets=True).init_state()
    jax.tree.map(np.testing.assert_array_equal, host(copied["params"]), host(drawn["params"]))
    kernels = 0
    for (path, a), b in zip(
        jax.tree.leaves_with_path(copied["target"]), jax.tree.leaves(drawn["target"]), strict=True
    ):
        if "kernel" in jax.tree_util.keystr(path):
            kernels += 1
            assert not np.allclose(a, b)
    assert kernels == 4  # one per band set


def test_spread_tells_a_sphere_from_a_point_in_each_group():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 50, 16)).astype(np.float32)
    x[1] = 3.0
    segment, valid = np.repeat([[0], [1]], 50, axis=1), rng.random((2, 50)) < 0.7
    found = np.asarray(spread_of(jnp.asarray(x), jnp.asarray(valid), jnp.asarray(segment), 3))
    unit = x[0][valid[0]] / np.linalg.norm(x[0][valid[0]], axis=-1, keepdims=True)
    expected = np.sqrt(np.square(unit - unit.mean(0)).sum(-1).mean())
    np.testing.assert_allclose(found, [expected, 0, 0], rtol=1e-5, atol=1e-3)


def test_inputs_are_packed_when_their_micro_step_is_due():
    events: list[str] = []

    class Watched(ScaledSum):
        def prepare(self, groups):
            made = super().prepare(groups)
            for number, micro_step in enumerate(made):

                def pack(number=number, inner=micro_step.pack):
                    events.append(f"pack {number}")
                    return inner()

                micro_step.pack = pack
            self.made = made
            return made

    engine = Watched()
    runner = program(engine)
    state, _ = runner.step(runner.init_state(), groups(1.0, 2.0, 3.0), 1)
    events.clear()
    runner.step(state, groups(1.0, 2.0, 3.0), 2, lambda: events.append("gate"))
    assert events == ["gate", "pack 0", "pack 1", "pack 2"]
    # Nothing waits on the device for longer than its micro-step.
    assert not any("inputs" in vars(micro_step) for micro_step in engine.made)


def test_programs_are_compiled_at_the_same_time(monkeypatch):
    together = threading.Barrier(2)

    class Ladder(ScaledSum):
        def every_program(self, groups, spare):
            (one,) = self.prepare(groups[:1])
            return [dataclasses.replace(one, key=key) for key in ("small", "large")]

        def loss(self, params, target, inputs, key, program_key):
            if threading.current_thread().name.startswith(signals.THREADS):
                together.wait(timeout=60)  # raises unless both programs are being traced
            return super().loss(params, target, inputs, key, program_key)

    monkeypatch.setattr(compiling, "compile_threads", lambda: 2)
    told: list[str] = []
    runner = program(Ladder(), lambda name, _: told.append(name))
    runner.compile_all(runner.init_state(), groups(1.0))
    assert runner.compile_count == 3 and sorted(told) == ["large", "small", "update"]
