"""The share of the card's rate that training uses: operations on real tokens, over its time."""

import functools

import jax
import numpy as np
import pytest

from olmoearth_jax import losses
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.losses import Objective
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.stream.token_counts import count_tokens
from olmoearth_jax.train import cards, progress
from olmoearth_jax.train.assemble import stream_engine
from olmoearth_jax.train.flops import training_flops
from olmoearth_jax.train.metrics import MetricWriter, is_timing, read_metrics
from olmoearth_jax.train.runfolder import RunFolder
from tests.stream.builders import make_group, make_spec, small_model


def _by_hand(model, count, views: int) -> float:
    """Multiplications and additions of every sample's tokens, one by one."""
    encoder, decoder, total = model.encoder_config, model.decoder_config, 0
    wide, inner = encoder.embedding_size, decoder.decoder_embedding_size
    hidden, inner_hidden = int(wide * encoder.mlp_ratio), int(inner * decoder.mlp_ratio)
    for view in range(views):
        for b in range(len(count.alive)):
            n, m = int(count.enc[view, b]), int(count.dec[view, b].sum())
            own = 4 * n * wide * wide + 2 * n * wide * hidden + 2 * n * n * wide
            queries = 2 * m * inner * inner + 2 * m * inner * inner_hidden
            read = queries + 2 * n * inner * inner + 2 * m * n * inner
            ends = n * wide * inner + m * inner * wide
            total += 2 * (encoder.depth * own + decoder.depth * read + ends)
    return 3 * total


def test_operations_are_those_of_real_tokens():
    model = small_model()
    group, strategy = make_group(np.random.default_rng(0), 4, 3, 2, holes=(1,))
    spec = make_spec(model, strategy, 4)
    config = ExperimentConfig(model=model)
    count = count_tokens(group, spec)
    patches = 0
    for number, slot in enumerate(spec.slots):
        pixels = slot.patch_side**2 * len(slot.channels)
        found = count.need[:, count.table.starts[number] : count.table.starts[number + 1]].sum()
        patches += int(found) * 2 * pixels * model.encoder_config.embedding_size
    expected = _by_hand(model, count, spec.views) + (3 * spec.views + 1) * patches
    assert training_flops(config, spec, [count]) == pytest.approx(expected, rel=1e-12)
    assert training_flops(config, spec, [count, count]) == pytest.approx(2 * expected, rel=1e-12)
    assert training_flops(config, spec, []) == 0


def test_a_micro_step_tells_its_operations():
    model = small_model()
    group, strategy = make_group(np.random.default_rng(0), 4, 2, 2)
    spec = make_spec(model, strategy, 4)
    config = ExperimentConfig(model=model, precision="float32")
    objective = Objective(losses.build({"type": "l2"}))
    mesh = make_mesh(devices=jax.devices()[:1])
    engine = stream_engine(config, spec, [spec.top_rung()], objective, mesh)
    assert "flops" not in engine.prepare([group])[0].host
    engine.flops = functools.partial(training_flops, config, spec)
    (prepared,) = engine.prepare([group])
    assert prepared.host["flops"] == training_flops(config, spec, [count_tokens(group, spec)])


class _Report:
    metrics = {"train/loss": 1.0, "train/good_micro_steps": 1}
    bad_ids: list[str] = []

    def __init__(self, host):
        self.host = host


def _records(folder, host, tflops):
    writer, lines = MetricWriter(RunFolder(folder).create(), tensorboard=False), []
    recorder = progress.Recorder(writer, last_step=9, say=lines.append, interval=3, tflops=tflops)
    for step in range(1, 4):
        recorder.add(step, _Report({"samples": 4.0, **host}), 0.0)
    recorder.drain()
    recorder.flush()
    writer.close()
    return read_metrics(folder), lines


def test_a_known_card_shows_the_share(tmp_path):
    records, lines = _records(tmp_path, {"flops": 5e9}, 989.0)
    last = records[-1]
    rate = last["throughput/model_tflops_per_s"]
    # As many operations a second as samples, by as many as a sample takes.
    assert rate == pytest.approx(last["throughput/samples_per_s"] / 4 * 5e9 / 1e12)
    assert last["throughput/mfu"] == pytest.approx(rate / 989.0)
    assert "MFU " in lines[-1] and is_timing("throughput/mfu")
    assert not any("flops" in name and not is_timing(name) for r in records for name in r)


@pytest.mark.parametrize(("host", "tflops"), [({"flops": 5e9}, None), ({}, 989.0)])
def test_what_is_not_known_is_not_shown(tmp_path, host, tflops):
    records, lines = _records(tmp_path, host, tflops)
    assert "throughput/mfu" not in records[-1] and "MFU" not in lines[-1]


def test_the_rate_is_that_of_all_devices():
    assert cards.rate_of("NVIDIA H200", 8) == 8 * cards.CARDS["h200"].tflops
    assert cards.rate_of("cpu", 8) is None
