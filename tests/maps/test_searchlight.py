"""launch.embed --searchlight: every location as in the middle of its own window."""

import numpy as np
import pytest
from rasterio.transform import Affine

import olmoearth_jax
from olmoearth_jax.inference.sample import Sample
from olmoearth_jax.interop import checkpoints
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import (
    AttentionPoolerConfig,
    EncoderConfig,
    ModelConfig,
    PredictorConfig,
)
from tests.maps import region
from tests.maps.test_embed import run

pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")
T = Affine(10, 0, 500_480, 0, -10, 5_600_640)


def _write_model(folder):
    common = {"supported_modality_names": ["sentinel1"], "num_heads": 2, "depth": 1}
    pooler = AttentionPoolerConfig(pooler_dim=8, pooler_depth=1, student_dims=[6])
    config = ModelConfig(
        encoder_config=EncoderConfig(
            **common, embedding_size=16, max_patch_size=2, position_encoding="rope",
            attention_pooler_config=pooler,
        ),
        decoder_config=PredictorConfig(
            **common, position_encoding="rope", use_attention_pooler=True, pooler_dim=8
        ),
        projection_only_target=True,
    )  # fmt: skip
    params = latent_mim.initial_params(config, 4)
    checkpoints.write(checkpoints.Weights(config, params, None, {}, ()), folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("radar")
    _write_model(folder / "model")
    x = np.random.default_rng(2).uniform(-25, -5, (2, 2, 44, 52)).astype(np.float32)
    for k, name in enumerate(("a", "b")):
        region.write_raster(folder / f"{name}.tif", x[k], T, names=("vv", "vh"), nodata=None)
    (folder / "m.csv").write_text(
        "path,date,modality\na.tif,2024-05-10,sentinel1\nb.tif,2024-08-10,sentinel1\n"
    )
    given = [f"--model={folder / 'model'}", f"--inputs={folder / 'm.csv'}", "--years=2024",
             "--patch_size=2", "--pooling=student", "--searchlight", "--dtype=float32",
             "--shard_side=64", "--chunk=32", "--tile=188"]  # fmt: skip
    return folder, given, x


def test_values_are_those_of_the_whole_raster(world, tmp_path):
    """Tiles, shards and blocks leave no trace, also at the edges of the raster."""
    folder, given, x = world
    assert run(*given, "--tile=92", "--overlap=60", f"--output={tmp_path / 'a'}") == 0
    assert run(*given, "--block=32", f"--output={tmp_path / 'b'}") == 0
    model = olmoearth_jax.load_pretrained(folder / "model")
    months, bands = ["2024-05-15", "2024-08-15"], {"sentinel1": ["vv", "vh"]}
    sample = Sample.from_arrays({"sentinel1": x.transpose(2, 3, 0, 1)}, months, bands=bands)
    want = model.embed_domain(sample, 2)
    want /= np.linalg.norm(want, axis=-1, keepdims=True)
    for name in "ab":
        archive = olmoearth_jax.open_archive(tmp_path / name)
        assert archive.attrs["olmoearth:searchlight"] is True
        zone = archive.zone(32)
        row, col = (round(abs(v) / 20) for v in (zone.transform[5] - T.f, T.c - zone.transform[2]))
        got, valid = archive.window(zone, 0, slice(row, row + 22), slice(col, col + 26))
        assert valid.all()
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_gaps_fail_the_shard_and_are_never_tiled(world, tmp_path, capsys):
    folder, given, x = world
    holed = x[0].copy()
    holed[:, 20:23, 30:34] = -9999
    region.write_raster(tmp_path / "h.tif", holed, T, names=("vv", "vh"), nodata=-9999)
    (tmp_path / "m.csv").write_text(
        f"path,date,modality\n{tmp_path / 'h.tif'},2024-05-10,sentinel1\n"
        f"{folder / 'b.tif'},2024-08-10,sentinel1\n"
    )
    given = [a for a in given if not a.startswith("--inputs")]
    assert run(*given, f"--inputs={tmp_path / 'm.csv'}", f"--output={tmp_path / 'out'}") == 1
    assert "sentinel1 of 2024-05-15 has gaps, and --searchlight" in capsys.readouterr().err


def test_a_timestep_that_is_nowhere_may_be_missing(world, tmp_path):
    """One period has two images, the other one."""
    folder, given, _ = world
    images = ("a.tif", "2023-05-10"), ("b.tif", "2024-08-10"), ("a.tif", "2024-05-10")
    rows = [f"{folder / name},{date},sentinel1\n" for name, date in images]
    (tmp_path / "m.csv").write_text("path,date,modality\n" + "".join(rows))
    given = [a for a in given if not a.startswith(("--inputs", "--years"))]
    assert run(*given, "--years=2023,2024", f"--inputs={tmp_path / 'm.csv'}",
               f"--output={tmp_path / 'out'}") == 0  # fmt: skip
    archive = olmoearth_jax.open_archive(tmp_path / "out")
    _, valid = archive.points([[9.01, 50.555]])
    assert valid.all()


def test_what_does_not_go_with_it(world, tmp_path, capsys):
    _, given, _ = world
    out = f"--output={tmp_path / 'out'}"
    assert run(*given, out, "--pooling=spatial") == 2
    assert "--searchlight goes with --pooling=student" in capsys.readouterr().err
    assert run(*given, out, "--tile=20", "--overlap=4") == 2
    assert "leaves no trace of tiles from an --overlap of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
