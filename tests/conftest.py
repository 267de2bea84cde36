"""Settings of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden-text",
        action="store_true",
        help="rewrite the files under tests/golden_text instead of comparing with them",
    )


@pytest.fixture
def quick_compile() -> Iterator[None]:
    """Programs are compiled in half the time; those that run once are not worth more."""
    import jax

    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)
