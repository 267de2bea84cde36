"""Mask goldens: our draws against the recorded statistics of each strategy.

Random streams differ, so distributions are compared: means within standard errors, histograms by
chi-square, tails by frequency, and invariants on every draw. Seeds are fixed, so a verdict is
reproducible. Thresholds allow for the thousands of figures compared: none may be further off
than 5 standard errors, and hardly any further than 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import masking, modalities
from olmoearth_jax.modalities import SINGLE_BAND_SET_OVERRIDES, Tokenization

from .common import Case, Checks, Result, load_json, load_npz

DRAWS = 1000
WARN_SE, FAIL_SE = 4.0, 5.0
TAIL = 15.0
ROUNDING = 1e-5
ROLES = ("encode", "target_only", "decode", "missing")

Draws = dict[str, np.ndarray]
"""Per modality int8 [draws, B, tokens, S]."""


class Scatter:
    """Collects deviations in standard errors and reports outliers at the end."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, str]] = []

    def add(self, what: str, ours: float, theirs: float, se: float) -> None:
        """Notes how far two means are apart; the recorded ones are rounded."""
        gap = max(abs(ours - theirs) - ROUNDING * max(1.0, abs(theirs)), 0.0)
        off = 0.0 if gap == 0.0 else (gap / se if se > 0 else math.inf)
        text = f"{what}: {ours:.5g}, recorded {theirs:.5g}, {off:.1f} standard errors off"
        self.seen.append((off, text))

    def report(self, checks: Checks) -> None:
        """Adds a problem for every outlier."""
        late = [s for s in self.seen if s[0] > WARN_SE]
        checks.worst = max([checks.worst] + [s[0] for s in self.seen])
        for off, text in self.seen:
            checks.true(text, off <= FAIL_SE)
        allowed = max(3, len(self.seen) // 500)
        checks.true(
            f"{len(late)} of {len(self.seen)} figures are over {WARN_SE:g} standard errors off",
            len(late) <= allowed,
        )


def recorded_missing(batch: Mapping[str, Any], arrays: Mapping[str, np.ndarray], full: bool):
    """Data arrays of the recorded batch, -99999 where it lacks something."""
    data = {}
    for name, shape in batch["shapes"].items():
        values = np.zeros(shape, np.float32)
        if not full:
            bits = np.unpackbits(arrays[f"missing/{name}"], axis=1)
            size = math.prod(shape[1:])
            values[bits[:, :size].astype(bool).reshape(shape)] = modalities.MISSING
        data[name] = values
    return data


def draw(strategy: masking.Strategy, missing: dict[str, np.ndarray], count: int) -> Draws:
    """`count` draws for one group of samples, every draw a group of its own."""
    size = len(next(iter(missing.values())))
    drawn = [strategy(missing, masking.MaskContext.whole_group(i, size)) for i in range(count)]
    out = {}
    for m in missing:
        stacked = np.stack([d[m] for d in drawn])
        out[m] = stacked.reshape(count, size, -1, stacked.shape[-1])
    return out


def _mean_checks(scatter: Scatter, what: str, ours: np.ndarray, theirs: float, n_ref: int,
                 spread: float) -> None:  # fmt: skip
    """`ours` are values per draw; `spread` is the recorded range, which bounds rare events."""
    n = len(ours)
    variance = ours.var() + spread**2 / n
    se = math.sqrt(variance * (1 / n + 1 / n_ref))
    scatter.add(what, float(ours.mean()), theirs, se)


def _tail_checks(checks: Checks, what: str, ours: np.ndarray, low, high, n_ref: int) -> None:
    """Recorded extremes: constant counts must match, others must bound nearly all of ours."""
    if low == high:
        same = (ours == low).mean()
        checks.true(f"{what}: recorded always {low}, ours vary", same >= 1 - TAIL / n_ref)
        return
    for side in ((ours < low).mean(), (ours > high).mean()):
        allowed = TAIL / n_ref + FAIL_SE * math.sqrt(max(side, 1 / n_ref) / len(ours))
        checks.true(f"{what}: {side:.1%} beyond the recorded {low}..{high}", side <= allowed)


def chi_square_z(ours: Mapping[int, int], theirs: Mapping[int, int]) -> float:
    """Two-sample chi-square of two histograms as a normal deviate; rare bins are merged."""
    total = [sum(ours.values()), sum(theirs.values())]
    bins: list[list[float]] = []
    for value in sorted(set(ours) | set(theirs)):
        pair = [float(h.get(value, 0)) for h in (ours, theirs)]
        if bins and min(total) / sum(total) * sum(bins[-1]) < 5:
            bins[-1] = [a + b for a, b in zip(bins[-1], pair, strict=True)]
        else:
            bins.append(pair)
    if len(bins) > 1 and min(total) / sum(total) * sum(bins[-1]) < 5:
        last = bins.pop()
        bins[-1] = [a + b for a, b in zip(bins[-1], last, strict=True)]
    df = len(bins) - 1
    if df == 0:
        return 0.0
    stat = 0.0
    for pair in bins:
        for observed, share in zip(pair, total, strict=True):
            expected = sum(pair) * share / sum(total)
            stat += (observed - expected) ** 2 / expected
    spread = 2 / (9 * df)
    return ((stat / df) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def _check_modalities(record, draws: Draws, checks: Checks, scatter: Scatter) -> None:
    n_ref = record["draws"]
    for name, band_sets in record["per_modality"].items():
        for entry in band_sets:
            mask = draws[name][..., entry["bandset"]]
            tokens = entry["tokens_per_sample"]
            checks.equal(f"{name} tokens", mask.shape[-1], tokens)
            counts = np.stack([(mask == code).sum(axis=-1) for code in range(4)], axis=-1)
            for b, one in enumerate(entry["per_sample"]):
                where = f"{name}[{entry['bandset']}] sample {b}"
                for code, role in enumerate(ROLES):
                    ours, low, high = (
                        counts[:, b, code],
                        one["min_count"][code],
                        one["max_count"][code],
                    )
                    _tail_checks(checks, f"{where} {role}", ours, low, high, n_ref)
                    _mean_checks(
                        scatter,
                        f"{where} {role}",
                        ours / tokens,
                        one["mean_fraction"][role],
                        n_ref,
                        (high - low) / tokens,
                    )
                some = [(counts[:, b, c] > 0).astype(float) for c in (0, 2)]
                flags = {
                    "prob_any_encoded": some[0],
                    "prob_any_decoded": some[1],
                    "prob_both": some[0] * some[1],
                }
                for key, ours in flags.items():
                    spread = 1.0 if 0.0 < one[key] < 1.0 else 0.0
                    _mean_checks(
                        scatter, f"{where} {key}", ours, _unrounded(one[key], n_ref), n_ref, spread
                    )


def _unrounded(probability: float, n: int) -> float:
    """A recorded frequency of n draws before it was rounded to a few digits."""
    return round(probability * n) / n


def _check_totals(record, draws: Draws, checks: Checks, scatter: Scatter) -> None:
    n_ref = record["draws"]
    for code, role in ((0, "encode"), (2, "decode")):
        total = record[f"total_{role}_tokens_per_sample"]
        ours = sum((m == code).sum(axis=(-1, -2)) for m in draws.values())
        assert isinstance(ours, np.ndarray)
        for b in range(ours.shape[1]):
            low, high = total["min"][b], total["max"][b]
            what = f"{role} tokens of sample {b}"
            _tail_checks(checks, what, ours[:, b], low, high, n_ref)
            # Recorded to three digits after the point.
            gap = max(abs(ours[:, b].mean() - total["mean"][b]) - 1e-3, 0.0)
            variance = ours[:, b].var() + (high - low) ** 2 / len(ours)
            se = math.sqrt(variance * (1 / len(ours) + 1 / n_ref))
            scatter.add(what, gap, 0.0, se)


def _check_histograms(record, draws: Draws, checks: Checks) -> None:
    maps = modalities.OFFICIAL_DECODE_ONLY
    flags = [
        np.concatenate([(draws[m] == c).any(axis=2) for m in draws if m not in maps], axis=-1)
        for c in (0, 2)
    ]
    for key, per_set in (
        ("encoder_tokens", flags[0]),
        ("decoder_tokens", flags[1]),
        ("both", flags[0] & flags[1]),
    ):
        name = f"encodable_bandsets_with_{key}_histogram_per_sample"
        for b, histogram in enumerate(record[name]):
            values, counts = np.unique(per_set[:, b].sum(axis=-1), return_counts=True)
            ours = {int(v): int(c) for v, c in zip(values, counts, strict=True)}
            z = chi_square_z(ours, {int(k): v for k, v in histogram.items()})
            checks.true(f"{name} of sample {b}: chi-square at {z:.1f} sigma", z <= FAIL_SE)


def _timestep_roles(draws: Draws, steps: int) -> list[np.ndarray]:
    """Per code 0..2, bool [draws, B, T]: whether any space-time token of that time has it."""
    out = []
    for code in range(3):
        found = [
            (m.reshape(*m.shape[:2], -1, steps, m.shape[-1]) == code).any(axis=(2, 4))
            for name, m in draws.items()
            if modalities.get(name).kind == "space_time"
        ]
        out.append(np.any(found, axis=0))
    return out


def _position_roles(draws: Draws, positions: int) -> list[np.ndarray]:
    """Per code 0..2, bool [draws, B, positions]: whether any spatial token there has it."""
    out = []
    for code in range(3):
        found = [
            (m.reshape(*m.shape[:2], positions, -1) == code).any(axis=-1)
            for name, m in draws.items()
            if modalities.get(name).spatial
        ]
        out.append(np.any(found, axis=0))
    return out


def invariants(
    strategy: masking.Strategy, draws: Draws, missing: Draws, steps: int, positions: int
) -> dict[str, bool]:
    """Every recorded invariant by name: whether all draws hold it (spec/train.md 2.3).

    `missing` is per modality bool [B, tokens, S].
    """
    maps = getattr(strategy, "only_decode_modalities", ()) or getattr(
        strategy, "decoded_modalities", ()
    ) or modalities.OFFICIAL_DECODE_ONLY  # fmt: skip
    here = [m for m in draws if m in maps]
    others = [m for m in draws if m not in maps]
    enc = [np.any([(m == c).any(axis=(2, 3)) for m in draws.values()], axis=0) for c in (0, 2)]
    listed = sum((~missing[m].all(axis=1)).sum(axis=-1) for m in others)
    both = np.concatenate(
        [(draws[m] == 0).any(axis=2) & (draws[m] == 2).any(axis=2) for m in others], axis=-1
    )
    several = np.asarray(listed) >= 2
    timed = np.sum(_timestep_roles(draws, steps), axis=0)
    placed = np.sum(_position_roles(draws, positions), axis=0)
    exact = all(((draws[m] == 3) == missing[m]).all() for m in draws)
    return {
        "values_in_0_1_2_3": all(((m >= 0) & (m <= 3)).all() for m in draws.values()),
        "mask_constant_inside_each_patch": True,
        "missing_exactly_where_any_band_of_bandset_missing": exact,
        "only_decode_modalities_never_encoded": all((draws[m] != 0).all() for m in here),
        "only_decode_modalities_fully_decoded_where_present": all(
            (draws[m] >= 2).all() for m in here
        ),
        "every_sample_has_an_encoder_token": bool(enc[0].all()),
        "every_sample_has_a_decoder_token": bool(enc[1].all()),
        "no_bandset_both_encoded_and_decoded_except_when_it_is_the_only_one": not both[
            :, several
        ].any(),
        "one_value_per_patch_position_shared_by_all_modalities_ignoring_missing": bool(
            (placed <= 1).all()
        ),
        "one_value_per_timestep_shared_by_all_space_time_modalities_ignoring_missing": bool(
            (timed <= 1).all()
        ),
    }


def _run(folder: Path, name: str) -> Result:
    stats = load_json(folder / "mask_stats.json")
    arrays = load_npz(folder / "masks.npz")
    record, batch = stats["strategies"][name], stats["batch"]
    single = "single" in record["tokenization"]
    tokenization = Tokenization.from_mapping(SINGLE_BAND_SET_OVERRIDES if single else None)
    data = recorded_missing(batch, arrays, full=record["batch"] != "gaps")
    missing = masking.missing_tokens(data, batch["patch_size"], tokenization)
    strategy = masking.build(record["strategy_config"])
    checks, scatter = Checks(), Scatter()
    checks.equal("name", strategy.name, record["name_property"])
    for ratio in ("encode_ratio", "decode_ratio"):
        ours = getattr(strategy, ratio)
        checks.true(ratio, abs(ours - record[f"{ratio}_property"]) < 1e-9)
    for m in missing:
        recorded = arrays.get(f"draws/{name}/{m}")
        if recorded is not None:
            flags = np.broadcast_to(missing[m], recorded.shape)
            checks.array(f"missing tokens of {m}", flags, recorded == 3)
    draws = draw(strategy, missing, DRAWS)
    flat = {m: f.reshape(len(f), -1, f.shape[-1]) for m, f in missing.items()}
    side = batch["H"] // batch["patch_size"]
    held = invariants(strategy, draws, flat, batch["T"], side * side)
    for invariant in record["invariants_always_held"]:
        checks.true(f"invariant {invariant} violated", held.get(invariant, False))
    _check_modalities(record, draws, checks, scatter)
    _check_totals(record, draws, checks, scatter)
    _check_histograms(record, draws, checks)
    roles = _timestep_roles(draws, batch["T"])
    overlap = (roles[0] & roles[2]).any(axis=-1).astype(float)
    for b, theirs in enumerate(record["prob_some_timestep_is_both_encoded_and_decoded"]):
        spread = 1.0 if 0.0 < theirs < 1.0 else 0.0
        value = _unrounded(theirs, record["draws"])
        _mean_checks(
            scatter,
            f"timestep overlap of sample {b}",
            overlap[:, b],
            value,
            record["draws"],
            spread,
        )
    scatter.report(checks)
    return checks.result(f"{FAIL_SE:g} standard errors")


def cases(folder: Path) -> Iterator[Case]:
    """One case per strategy of ``mask_stats.json``."""
    for name in load_json(folder / "mask_stats.json")["strategies"]:
        yield Case(f"masks/{name}", lambda name=name: _run(folder, name))
