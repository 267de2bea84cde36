"""Archives that lie in an object store: the same bytes, by the same rules, without renames."""

import contextlib
import json
import os
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

import olmoearth_jax
from olmoearth_jax import outputs
from olmoearth_jax.data import durable, remote, work_list
from olmoearth_jax.data.remote import ObjectPath, output_place, place_of
from tests.maps import region
from tests.maps.test_embed import objects, run
from tools import archive as tool


class Bucket(LocalFileSystem):
    """An object store on this machine, which other processes see: no renames, whole writes."""

    protocol = "bucket"

    def __init__(self, **given):
        super().__init__(**(given | {"auto_mkdir": True}))

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("bucket://"))

    def pipe_file(self, path, value, mode="overwrite", **_):
        place = Path(self._strip_protocol(path))
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = place.with_name(f".{uuid.uuid4().hex}")
        scratch.write_bytes(bytes(value))
        try:
            (os.link if mode == "create" else os.replace)(scratch, place)
        finally:
            scratch.unlink(missing_ok=True)

    def mv(self, *_, **__):
        raise PermissionError("object stores rename nothing")


@pytest.fixture(autouse=True)
def bucket():
    fsspec.register_implementation("bucket", Bucket, clobber=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("region")
    given = region.build(folder)
    assert run(*given, f"--output={folder / 'here'}") == 0
    return folder, given


def test_an_object_is_written_whole_once_or_anew(tmp_path):
    path = ObjectPath(f"memory://{uuid.uuid4().hex}/a/b.json")
    assert not path.is_file() and durable.read_json(path) is None
    assert durable.write_first(path, '{"a": 1}') and not durable.write_first(path, "{}")
    assert durable.read_json(path) == {"a": 1} and durable.size_of(path) == 8
    assert path.digest() == durable.digest_of_file(path)
    assert abs(durable.modified(path) - os.path.getmtime(tmp_path)) < 600
    durable.write_durably(path, "[]")
    assert path.read_text() == "[]" and type(path.parent) is type(path / "c") is ObjectPath
    path.unlink()
    path.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        path.unlink()
    with pytest.raises(OSError, match="b.json"):
        path.size()


def test_where_results_go(tmp_path, monkeypatch):
    assert place_of(str(tmp_path)) == tmp_path and output_place("~/x") == Path.home() / "x"
    monkeypatch.setattr(ObjectPath, "_open_system", lambda self: (None, ""))
    with pytest.raises(OSError, match="https://.*cannot be written to: give a folder, or a URL"):
        output_place("https://host/x")
    monkeypatch.undo()
    with pytest.raises(OSError, match="cannot open nonsense://x"):
        output_place("nonsense://x")
    with pytest.raises(ValueError, match="is a URL, but results go to a folder of this machine"):
        outputs.check(Path("s3://bucket/map.tif"))


def test_errors_keep_secrets(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no access to s3://me:secret@host/x?sig=secret")

    monkeypatch.setattr(remote.ObjectPath, "_system", lambda self: (fail, "x"))
    path = ObjectPath("s3://me:secret@host/x")
    with pytest.raises(OSError) as told:
        path.write(b"")
    assert "secret" not in str(told.value)


def test_an_archive_in_a_bucket_is_that_of_a_folder(world, tmp_path, capsys):
    folder, given = world
    url = f"bucket://{tmp_path}/there"
    assert run(*given, f"--output={url}", "--shard=1", "--of=2", "--nosteal") == 0
    assert tool.main(["archive", "status", url]) == 3
    left = tmp_path / "there" / "job" / "claims"
    assert not [*left.rglob("*.json")]
    assert run(*given, f"--output={url}") == 0
    assert objects(tmp_path / "there") == objects(folder / "here")
    assert (tmp_path / "there" / "index.parquet").is_file()
    for verb in ("status", "verify", "index"):
        assert tool.main(["archive", verb, url]) == 0
    there, here = (olmoearth_jax.open_archive(p) for p in (url, folder / "here"))
    point = [[9.02, 50.55]]
    for a, b in zip(there.points(point), here.points(point), strict=True):
        np.testing.assert_array_equal(a, b)
    assert tool.main(["archive", "preview", url]) == 2
    assert "copy bucket://" in capsys.readouterr().err
    # The same command does nothing again; another job is refused.
    before = objects(tmp_path / "there")
    assert run(*given, f"--output={url}") == 0 and objects(tmp_path / "there") == before
    assert run(*given[:-1], "--years=2023", f"--output={url}") == 2
    assert "holds another job" in capsys.readouterr().err


def test_a_shard_without_marker_is_done_again_and_a_damaged_one_is_told(world, tmp_path, capsys):
    folder, given = world
    url, job = f"bucket://{tmp_path}/there", tmp_path / "there" / "job"
    assert run(*given, f"--output={url}") == 0
    whole = objects(tmp_path / "there")
    markers = sorted((job / "done").rglob("*.json"))
    held = json.loads(markers[0].read_text())
    key = next(k for k in held["objects"] if "/embeddings/" in k)
    damaged = tmp_path / "there" / "embeddings.zarr" / key
    damaged.write_bytes(bytes(damaged.stat().st_size))
    assert tool.main(["archive", "verify", url]) == 1 and key in capsys.readouterr().out
    markers[0].unlink()
    assert run(*given, f"--output={url}") == 0 and objects(tmp_path / "there") == whole


def test_claims_hold_between_workers(tmp_path, monkeypatch):
    place = ObjectPath(f"bucket://{tmp_path}/work")
    mine = work_list.WorkList(place / "job", place, "d", ["a"])
    assert mine.claim("a") and mine.state("a") == "planned"
    monkeypatch.setattr(work_list, "_ME", "another")
    monkeypatch.setattr(work_list, "_HOST", "elsewhere")
    assert not mine.claim("a") and mine.claimed() == ["a"]
    os.utime(tmp_path / "work" / "job" / "claims" / "a.json", (0, 0))
    monkeypatch.setattr(Bucket, "modified", lambda self, path: _at(os.path.getmtime(path)))
    assert mine.claim("a")
    mine.release("a")
    assert not [*(tmp_path / "work" / "job" / "claims").iterdir()]


def _at(seconds):
    import datetime

    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def test_what_may_not_be_written_ends_the_run(tmp_path):
    place = ObjectPath(f"bucket://{tmp_path}/work")
    work = work_list.WorkList(place / "job", place, "d", ["a", "b"])

    def refused(unit):
        raise PermissionError("AccessDenied")  # without a number, as stores tell it

    with pytest.raises(PermissionError):
        work.run(refused)
    assert work.failure("a") is None
    with contextlib.suppress(FileNotFoundError):
        assert not os.listdir(tmp_path / "work" / "job" / "claims")
