"""The memory of launch.embed does not grow with area, years or rasters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from olmoearth_jax.interop import checkpoints
from tests.inference.test_model import weights_of
from tests.maps import region

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys
from launch import embed
embed._index = lambda output: None  # what pyarrow takes at the end is another matter
embed.FLAGS(["embed", *sys.argv[1:]])
assert embed.main(["embed"]) == 0
# Not getrusage, whose peak is also that of the process which started this one.
print(next(x.split()[1] for x in open("/proc/self/status") if x.startswith("VmHWM")))
"""


def _peak(folder: Path, side: int, years: list[int]) -> int:
    """KiB at most in use while a square region is embedded."""
    from rasterio.transform import Affine

    folder.mkdir()
    checkpoints.write(weights_of(), folder / "model")
    rows = []
    for year in years:
        for month in (5, 8):
            path = folder / f"{year}_{month}.tif"
            corner = Affine(10, 0, 500_480, 0, -10, 5_600_640)
            region.write_raster(path, region.image(month, side, side), corner)
            date = f"{year}-{month:02d}"
            rows.append({"path": path.name, "date": date, "modality": "sentinel2_l2a"})
    (folder / "imagery.json").write_text(json.dumps(rows))
    flags = [a for a in region.ARGS if not a.startswith("--years")]
    done = subprocess.run(
        [sys.executable, "-c", RUN, f"--model={folder / 'model'}", *flags,
         f"--inputs={folder / 'imagery.json'}", f"--output={folder / 'out'}",
         f"--years={','.join(map(str, years))}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_in_area_and_years(tmp_path):
    small = _peak(tmp_path / "small", 512, [2023])
    years = _peak(tmp_path / "years", 512, [2021, 2022, 2023])
    large = _peak(tmp_path / "large", 1280, [2023])
    assert max(years, large) <= 1.1 * small, (small, years, large)
