"""The data path: H5 files to batches (reading, cropping, normalising, index, order, pipeline)."""

from olmoearth_jax.exports import exported

__getattr__, __dir__ = exported(
    __name__,
    {
        "errors": "ReadError",
        "h5": "SampleFile open_sample",
        "h5_writer": "Storage write_sample",
        "index": "DatasetIndex",
        "pipeline": "TrainStream",
        "rasters": "Raster Stack Window read_folder read_manifest",
        "sample": "sample_dataset_dir",
        "transforms": "FlipAndRotate Mixup",
    },
)
