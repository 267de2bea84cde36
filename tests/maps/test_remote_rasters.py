"""Rasters of a web server that sends readers elsewhere, or to files of this machine."""

import os
import subprocess
import sys

import numpy as np
import pytest
from rasterio.transform import Affine

from olmoearth_jax.data.raster_file import RasterError, RasterFile
from olmoearth_jax.data.remote import RemotePath
from tests.maps import region

# A process of its own, since GDAL holds Python's lock while it waits.
SERVER = """
import http.server, pathlib, sys
folder, secret = map(pathlib.Path, sys.argv[1:])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path, _, _ = self.path.strip("/").partition("?")
        if path.startswith("away"):
            self.send_response(302)
            self.send_header("Location", f"file://{secret}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        file = folder / path
        body = file.read_bytes() if path and file.is_file() else b""
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
    do_HEAD = do_GET
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def served(tmp_path):
    """(URL of a server, the file of this machine that it must not lead to)."""
    folder, secret = tmp_path / "served", tmp_path / "secret.tif"
    folder.mkdir()
    place = Affine(10, 0, 500_480, 0, -10, 5_600_640)
    for path, seed in ((secret, 1), (folder / "good.tif", 2)):
        region.write_raster(path, region.image(seed, 16, 16), place)
    (folder / "plain").write_bytes((folder / "good.tif").read_bytes())
    (folder / "list").write_text(virtual(secret))
    (folder / "list.jp2").write_text(virtual(secret))
    command = [sys.executable, "-c", SERVER, str(folder), str(secret)]
    quiet = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}", secret
        process.kill()


def virtual(path):
    """A VRT that shows a file."""
    source = (f"<SimpleSource><SourceFilename relativeToVRT='0'>{path}</SourceFilename>"
              "<SourceBand>1</SourceBand></SimpleSource>")  # fmt: skip
    band = f"<VRTRasterBand dataType='UInt16' band='1'>{source}</VRTRasterBand>"
    return f"<VRTDataset rasterXSize='16' rasterYSize='16'>{band}</VRTDataset>"


def test_geotiffs_of_any_name_are_read(served):
    for name in ("good.tif", "plain", "plain?signature=a.tif"):
        with RasterFile(f"{served[0]}/{name}") as file:
            np.testing.assert_array_equal(file.values(), region.image(2, 16, 16))


@pytest.mark.parametrize("name", ["away/x.tif", "away/x", "list", "list.jp2", "list?a=b.tif"])
def test_no_server_leads_to_a_file_of_this_machine(served, name):
    with pytest.raises(RasterError, match="cannot be read as a raster"):
        RasterFile(f"{served[0]}/{name}")


@pytest.mark.parametrize("lead", ["", "folder/"])
def test_a_name_is_no_content(served, lead):
    """As a hostile STAC item may have it as its href."""
    with pytest.raises(RasterError, match="cannot be read as a raster"):
        RasterFile(lead + virtual(served[1]))


def test_lists_are_not_read_from_this_machine_either(served):
    pytest.importorskip("aiohttp", reason="https:// needs the extra remote")
    assert RemotePath(f"{served[0]}/good.tif").read_bytes()[:2] == b"II"
    with pytest.raises(OSError, match="cannot be read"):
        RemotePath(f"{served[0]}/away/items.json").read_bytes()
