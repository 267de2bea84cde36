"""Command-line tools, each an absl app: ``python -m tools.<name>``."""
