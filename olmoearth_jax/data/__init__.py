"""The data path: H5 files to batches (reading, cropping, normalising, index, order, pipeline)."""
