"""One file per ablation: the question it answers and the settings it changes."""

from .. import common as common
