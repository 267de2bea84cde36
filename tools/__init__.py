"""Command-line tools, each an absl app: ``python -m tools.<name>``."""

from olmoearth_jax import early as _answers

_answers.answer(_answers.of_command_line())
