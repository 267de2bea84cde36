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


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
    """Programs are compiled in half the time; those that run once are not worth more.

    They are dropped at the end: other tests compare the bits of what they and other processes
    compiled.
    """
    import jax

    name = "jax_disable_most_optimizations"
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, False)
        jax.clear_caches()
