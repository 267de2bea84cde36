# What somebody types who wants to pretrain: from the first look to two runs compared.
set -eu

olmoearth
olmoearth train --help
olmoearth dry_run --config=base:version=v1_2 --devices=8 --card=h100 --num_samples=1138828
olmoearth make_synthetic_dataset --output_dir=data --num_samples=12
olmoearth verify_dataset --h5py_dir="$(dirname "$(find data -name sample_0.h5)")"

settings="--config=nano:smoke --config.trainer.max_duration.value=4
  --config.common.training_modalities=[sentinel2_l2a,openstreetmap_raster]
  --config.dataset.validation_fraction=0.4 --config.dataset.seed=3
  --config.data_loader.global_batch_size=8 --config.train_module.rank_microbatch_size=4
  --config.trainer.callbacks.validation.interval=2"
olmoearth dry_run $settings --run_name=first
olmoearth train $settings --run_name=first
olmoearth train $settings --run_name=first
olmoearth train $settings --run_name=second --config.train_module.optim_config.lr=0.001
olmoearth compare_runs local_output/first local_output/second
olmoearth eval_loss --checkpoint=local_output/first --batches=2
olmoearth evaluate --run_name=first --tasks=brandenburg_knn
olmoearth report --run=local_output/first
olmoearth inspect_checkpoint --checkpoint=local_output/first --noshow_config
