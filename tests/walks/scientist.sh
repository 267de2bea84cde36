# What somebody types who has images and labels: features, a map from labels, xarray.
set -eu

olmoearth export_sample --output=sample
olmoearth embed_image --model=local_output/first --input=sample/imagery.csv --output=features.tif \
  --dtype=int8 --patch_size=4
olmoearth finetune --model=local_output/first --inputs=sample/imagery.csv \
  --labels=sample/labels.geojson --label_column=landuse --output=runs/landuse --epochs=5
olmoearth predict --run=runs/landuse --inputs=sample/imagery.csv --output=maps/landuse

cat > look.py <<'PYTHON'
import numpy as np
import xarray as xr

import olmoearth_jax

print(dir(olmoearth_jax), olmoearth_jax.list_models("*v1_2*"))
model = olmoearth_jax.load_pretrained("local_output/first")
print(model)
model.summary()
bands = ["B02", "B03", "B04", "B08"]
images = xr.DataArray(
    np.random.default_rng(0).integers(300, 3000, (2, 4, 64, 64)),
    dims=("time", "band", "y", "x"),
    coords={
        "time": np.array(["2024-05-15", "2024-07-15"], "datetime64[ns]"),
        "band": bands,
        "y": 5_800_000.0 - 10 * np.arange(64),
        "x": 300_000.0 + 10 * np.arange(64),
    },
)
sample = olmoearth_jax.Sample.from_xarray(images, "sentinel2_l2a")
print(sample)
print(model.embed_xarray(sample, patch_size=4))
PYTHON
python look.py
