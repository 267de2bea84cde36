"""Conversion by several workers."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path
from subprocess import Popen

import pytest

from olmoearth_jax.data import blocks
from olmoearth_jax.data.convert import Settings, convert, tiles, tree
from olmoearth_jax.data.convert.tree import Cell
from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.h5_writer import Storage
from tests.data.shared import content, ended, start
from tests.data.trees import make_tree

TILES = 6


def _settings(folder: Path, out: Path, **more) -> Settings:
    return Settings(tree=folder, output_dir=out, storage=Storage("zstd", 1), **more)


@pytest.fixture(scope="module")
def tree_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    make_tree(folder, tiles=TILES)
    return folder


@pytest.fixture(scope="module")
def alone(tree_folder, tmp_path_factory) -> Path:
    """What one process makes, in one block."""
    return convert(_settings(tree_folder, tmp_path_factory.mktemp("alone"))).folder


def _worker(folder: Path, out: Path, index: int, *more: str):
    return start("tools.convert_to_h5", [*_flags(folder, out, index, 2), *more])


def _flags(folder: Path, out: Path, index: int, count: int) -> list[str]:
    given = [f"--tile_path={folder}", f"--output_dir={out}", "--compression_opts=1"]
    return [*given, f"--shard={index}", f"--of={count}"]


def _same(out: Path, alone: Path) -> Path:
    """The only dataset in `out`, which must be that of one process; nothing else is left."""
    (folder,) = out.rglob("24")
    assert [p.name for p in folder.parent.iterdir()] == ["24"]
    there, here = content(alone), content(folder)
    for held in (there, here):  # it names the folder
        del held["conversion.json"]
    assert here == there
    return folder


def test_two_workers_make_what_one_makes(tree_folder, alone, tmp_path):
    lines = [ended(w) for w in [_worker(tree_folder, tmp_path, n) for n in range(2)]]
    folder = _same(tmp_path, alone)
    last = {said[-1] for said in lines}
    assert str(folder) in last
    assert all(t == str(folder) or "nothing left to do here; others work on" in t for t in last)
    assert ended(_worker(tree_folder, tmp_path, 0))[-1] == str(folder)  # one that comes late


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_others_go_on_where_one_was_stopped(tree_folder, alone, tmp_path, stop):
    first = _worker(tree_folder, tmp_path, 0)
    while first.poll() is None and not list(tmp_path.rglob("sample_*.h5")):
        time.sleep(0.01)
    first.send_signal(stop)
    said, _ = first.communicate()
    if stop == signal.SIGTERM and first.returncode:
        assert first.returncode == 75 and "stopped; the same command goes on" in said
    ended(_worker(tree_folder, tmp_path, 1, "--wait"))
    _same(tmp_path, alone)


def _break(monkeypatch, after: int) -> list[int]:
    """Ends the conversion by an error after so many samples; the numbers of those written."""
    from olmoearth_jax.data.convert import run

    real, made = run.write_sample, []

    def write(path, *given):
        if len(made) == after:
            raise KeyboardInterrupt
        made.append(int(path.stem.split("_")[1]))
        real(path, *given)

    monkeypatch.setattr(run, "write_sample", write)
    return made


def test_finished_blocks_are_kept(tree_folder, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        made = _break(patch, 10)
        convert(_settings(tree_folder, tmp_path))
    assert made == list(range(10))
    assert convert(_settings(tree_folder, tmp_path)).written == 16
    _same(tmp_path, alone)


def test_a_changed_tile_is_scanned_again_alone_and_what_was_begun_goes(
    tree_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(blocks, "BLOCK", 4)
    folder, out = tmp_path / "tree", tmp_path / "out"
    shutil.copytree(tree_folder, folder)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _break(patch, 10)
        convert(_settings(folder, out))
    path = tree.raster_path(folder, _modality(), Cell("EPSG:32633", 101, -2000), 16)
    path.write_bytes(path.read_bytes() + b" ")
    real, seen = tiles.inspect, []

    def inspect(source, job, *given):
        seen.append(job.cell.col)
        return real(source, job, *given)

    monkeypatch.setattr(tiles, "inspect", inspect)
    done = convert(_settings(folder, out))
    assert seen == [101] and done.written == 24
    assert [p.name for p in done.folder.parent.iterdir()] == ["24"]


def _modality():
    from olmoearth_jax import modalities

    return modalities.get("sentinel1")


def test_tiles_that_could_not_be_read_are_looked_at_again(
    tree_folder, alone, tmp_path, monkeypatch
):
    monkeypatch.setattr(blocks, "BLOCK", 3)
    real, seen, sound = tiles.inspect, [], []

    def inspect(source, job, *given):
        seen.append(job.cell.col)
        if job.cell.col == 104 and not sound:
            raise ReadError("a.tif", "connection lost")
        return real(source, job, *given)

    monkeypatch.setattr(tiles, "inspect", inspect)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1 of 6 tiles cannot be used: a.tif: connection"):
            convert(_settings(tree_folder, tmp_path))
    assert seen == [*range(100, 106), 104]
    sound.append(True)
    convert(_settings(tree_folder, tmp_path))
    assert seen[7:] == [104]
    _same(tmp_path, alone)
    state = list((tmp_path / ".h5_conversion").rglob("*.json"))
    assert len(state) == 2  # no markers of earlier looks


def test_an_error_while_writing_is_forgiven_by_the_next_run(
    tree_folder, alone, tmp_path, monkeypatch
):
    monkeypatch.setattr(blocks, "BLOCK", 4)
    real = tiles.pieces

    def pieces(source, job, *given):
        if job.cell.col == 102:
            raise ReadError("a.tif", "has changed")
        return real(source, job, *given)

    with monkeypatch.context() as patch:
        patch.setattr(tiles, "pieces", pieces)
        for _ in range(2):
            with pytest.raises(ReadError, match="a.tif: has changed"):
                convert(_settings(tree_folder, tmp_path))
    assert len(list(tmp_path.rglob("sample_*.h5"))) == 20
    assert convert(_settings(tree_folder, tmp_path)).written == 4
    _same(tmp_path, alone)


def test_what_an_earlier_version_began_is_refused(tree_folder, alone, tmp_path):
    settings = _settings(tree_folder, tmp_path)
    partial = tmp_path / alone.relative_to(alone.parents[2]).parent
    partial = partial / f".24.{settings.digest()}.partial"
    partial.mkdir(parents=True)
    (partial / "finished.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"conversion of an earlier version.* delete that folder"):
        convert(settings)
    (partial / "finished.jsonl").unlink()
    convert(settings)
    _same(tmp_path, alone)


@pytest.mark.slow
def test_a_storm_of_kills_ends_in_the_same_bytes(tree_folder, alone, tmp_path):
    draw = random.Random(1)
    workers: dict[int, Popen[str]] = {}
    killed, begun = 0, time.monotonic()
    while not list(tmp_path.rglob("24")) and time.monotonic() - begun < 200:
        for n in range(3):
            if n in workers and workers[n].poll() is not None:
                ended(workers.pop(n))
            if n not in workers:
                workers[n] = start("tools.convert_to_h5", _flags(tree_folder, tmp_path, n, 3), 2)
        time.sleep(draw.uniform(0.5, 3))
        if killed < 12:
            victim = workers.pop(draw.randrange(3))
            victim.send_signal(signal.SIGKILL)
            victim.communicate()
            killed += 1
    for worker in workers.values():
        ended(worker)
    ended(start("tools.convert_to_h5", _flags(tree_folder, tmp_path, 0, 1), 2))
    _same(tmp_path, alone)
