"""What a dry run says first: whether it fits, how long it takes, what to change."""

import dataclasses
import re
from pathlib import Path

import pytest

from launch import _app, _plan, _samples, dry_run
from olmoearth_jax import config_files, overrides
from olmoearth_jax.config import ConfigError
from olmoearth_jax.configlib.official import official
from olmoearth_jax.train import cards

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"data_loader.sampled_hw_p_list": [1, 2], "ladder.max_rungs": 2}


def small(**changes):
    return overrides.apply_values(config_files.load_file("configs/nano.py:smoke"), changes)


@pytest.fixture(scope="module")
def plan():
    cfg = overrides.apply_values(official("large"), SMALL)
    return _plan.plan(cfg, 8, _samples.Samples(1_138_828))


def with_memory(plan, monkeypatch, gib: float):
    """The same plan, of which the activations need so much that all is that much."""
    rows = plan.memory_rows()
    rest = sum(size for what, size in rows if not what.startswith("activations"))

    def grown(self, cfg=None):
        cfg = cfg or self.cfg
        keep = {"none": 1.0, "dots": 0.7, "block": 0.15}[cfg.remat]
        return [
            (what, (gib * cards.GIB - rest) * keep if what.startswith("activations") else size)
            for what, size in rows
        ]

    monkeypatch.setattr(_plan.Plan, "memory_rows", grown)
    return plan


def test_the_summary_comes_first_and_the_config_only_if_asked_for(capsys):
    cfg = small()
    assert dry_run.main(cfg) == 0
    out = capsys.readouterr().out
    assert out.startswith("summary\n") and cfg.to_json() not in out
    head = out.split("\n\n")[0]
    for part in ("20 of", "memory per device", "fits", "hours of training", "not measured"):
        assert part in head, head
    assert len(head.splitlines()) < 16 and max(map(len, head.splitlines())) < 110
    assert dry_run.main(cfg, full=True) == 0
    assert capsys.readouterr().out.index("no problems found in the config") > 0


@pytest.mark.parametrize(("stop", "steps"), [({"value": 7, "unit": "steps"}, 7), (None, 20)])
def test_a_run_ends_at_its_hard_stop(plan, stop, steps, capsys):
    cfg = small(**{"trainer.hard_stop": stop})
    assert dataclasses.replace(plan, cfg=cfg).steps == steps
    for line in dry_run._step(dataclasses.replace(plan, cfg=cfg, samples=_samples.Samples(40))):
        assert not line.strip().startswith("steps of the run") or line.endswith(f" {steps}")
    epochs = small(**{"trainer.hard_stop": {"value": 1, "unit": "epochs"}})
    lone = dataclasses.replace(plan, cfg=epochs, samples=_samples.Samples(None))
    assert lone.steps is None and dataclasses.replace(plan, cfg=epochs).steps == 20


@pytest.mark.parametrize(("warmup", "told"), [(20, False), (21, True), (8000, True)])
def test_a_rate_that_is_never_reached_is_told(plan, warmup, told):
    cfg = small(**{"train_module.scheduler.warmup": warmup})
    lines = dry_run._step(dataclasses.replace(plan, cfg=cfg, samples=_samples.Samples(40)))
    assert any("the run never reaches lr" in line for line in lines) == told


def test_unknown_cards_are_refused():
    with pytest.raises(_app.UserError, match="unknown --card=h1000.*h100"):
        dry_run.main(small(), card="h1000")


def test_problems_are_told_with_and_without_the_config(capsys):
    cfg = overrides.apply_values(small(), {"mesh.data": 0})
    with pytest.raises(ConfigError):
        dry_run.main(cfg, full=True)
    assert cfg.to_json() in capsys.readouterr().out


def test_hours_follow_from_steps_devices_and_rates(plan):
    text = "\n".join(_plan.summary(plan, "h200"))
    assert plan.steps == 300 * 2224
    per_step = re.search(r"samples per second, 8 x h200 +([\d,]+)", text)
    hours = re.search(r"hours of training +([\d,.]+)", text)
    together = re.search(r"hours x devices +([\d,.]+)", text)
    assert per_step and hours and together and "scaled, not measured" in text
    rate, spent = (float(m[1].replace(",", "")) for m in (per_step, hours))
    assert spent == pytest.approx(plan.steps * 512 / rate / 3600, rel=0.02)
    assert float(together[1].replace(",", "")) == pytest.approx(8 * spent, rel=0.02)
    lone = dataclasses.replace(plan, samples=_samples.Samples(None))
    text = "\n".join(_plan.summary(lone, "h200"))
    assert "unknown size" in text and "hours" not in text


@pytest.mark.parametrize(
    ("gib", "said"),
    [
        (55, "yes, 55.0 GiB of 79.6 GiB"),
        (70, "only with XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"),
        (90, "no: 90.0 GiB, and the card has 79.6 GiB"),
    ],
)
def test_it_says_whether_it_fits(plan, monkeypatch, gib, said):
    text = "\n".join(_plan.summary(with_memory(plan, monkeypatch, gib), "h100"))
    assert said in text
    assert ("to make it fit h100" in text) == (gib == 90)
    if gib == 90:
        assert "--config.remat=dots: about" in text and "rank_microbatch_size=16" in text
        assert "or a larger card: b200, h200" in text


def test_what_helps_is_listed_where_no_change_is_enough(plan, monkeypatch):
    text = "\n".join(_plan.summary(with_memory(plan, monkeypatch, 400), "l4"))
    assert "no single change is enough" in text and "--config.remat=block" in text
    assert "larger card" not in text


def test_without_a_card_all_are_asked(plan, monkeypatch):
    text = "\n".join(_plan.summary(with_memory(plan, monkeypatch, 70), None))
    assert re.search(r"fits +b200, h200\n", text)
    assert re.search(r"FRACTION=0.92 +h100, a100-80\n", text)
    assert re.search(r"does not fit +a100-40, l40s", text)


def test_advice_leaves_what_it_says(plan):
    """The memory of a change is that of a plan with it."""
    advice = dict(line.strip().split(": about ") for line in _plan._advice(plan, "b200")[:-1])
    for flag, value in (("--config.remat=dots", "dots"), ("--config.remat=block", "block")):
        cfg = dataclasses.replace(plan.cfg, remat=value)
        changed = dataclasses.replace(plan, cfg=cfg)
        assert advice[flag] == f"{changed.memory / cards.GIB:.1f} GiB"


def test_rates_are_the_measured_one_or_between_two_scalings():
    measured = cards.speed("h200", 0.4e12, official=True)
    assert measured == cards.Speed(477, 477, True)
    page = (ROOT / "docs" / "performance.md").read_text()
    assert f"| {cards.MEASURED_SAMPLES_PER_S:g} (" in page and "0.39 TFLOP" in page
    for name in cards.CARDS:
        other = cards.speed(name, 0.39e12, official=False)
        assert not other.measured and 0 < other.low <= other.high
        twice = cards.speed(name, 0.78e12, official=False)
        assert twice.low == pytest.approx(other.low / 2)
    assert cards.speed("h200", 0.39e12, official=False).high == pytest.approx(477)
