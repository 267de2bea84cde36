"""Band orders of evaluation data sets and the index lists into the model's order (section 13.1)."""

from __future__ import annotations

S2_13 = (
    "01 - Coastal aerosol",
    "02 - Blue",
    "03 - Green",
    "04 - Red",
    "05 - Vegetation Red Edge",
    "06 - Vegetation Red Edge",
    "07 - Vegetation Red Edge",
    "08 - NIR",
    "08A - Vegetation Red Edge",
    "09 - Water vapour",
    "10 - SWIR - Cirrus",
    "11 - SWIR",
    "12 - SWIR",
)
"""Band names of Level-1C-like sets, in their order on disk."""

S2_12 = tuple(b for b in S2_13 if not b.startswith("10 "))
"""Level-2A: without the cirrus band."""

LANDSAT_NAMES = (
    "01 - Coastal aerosol",
    "02 - Blue",
    "03 - Green",
    "04 - Red",
    "05 - NIR",
    "06 - SWIR1",
    "07 - SWIR2",
    "03 - Green",
    "09 - Cirrus",
    "10 - Tirs1",
    "10 - Tirs1",
)
"""Which named band fills each of the positions B1 ... B11 (no panchromatic, one thermal band)."""

S1 = ("vv", "vh")

FROM_S2_13 = (1, 2, 3, 7, 4, 5, 6, 8, 11, 12, 0, 9)
FROM_S2_12 = (1, 2, 3, 7, 4, 5, 6, 8, 10, 11, 0, 9)
FROM_LANDSAT = (7, 0, 1, 2, 3, 4, 5, 6, 8, 9, 10)
FROM_S1 = (0, 1)
