# What somebody types who brings parts: a masking strategy and a task (docs/new_masking.md,
# docs/new_task.md run in full elsewhere). my_masks.py and my_tasks.json are those of the pages.
set -eu

olmoearth dry_run --plugins=my_masks --config=nano:smoke \
  --config.data_loader.masking_config.strategy_config='{"type": "checker", "size": 2}'
python make_fields.py
olmoearth evaluate --baseline=raw_bands --tasks_json=my_tasks.json
