"""The commands: `python -m launch.<verb> --config=configs/<size>.py --run_name=<name>`."""

from olmoearth_jax import early as _answers

_asked = _answers.of_command_line()
# A training first sees to its signals; its config is looked at after that.
_answers.answer(_asked, with_config=_asked != "launch.train")
