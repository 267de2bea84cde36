"""The commands: `python -m launch.<verb> --config=configs/<size>.py --run_name=<name>`."""
