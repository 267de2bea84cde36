"""Config files: `--config=configs/<size>.py[:argument,...]`."""
