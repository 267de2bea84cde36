"""Quick compilation for tests that compile much and compute little."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Programs without LLVM's costly passes.

    Here programs of one process are compared with each other, or are only run. Those compiled this
    way are dropped again: other tests compare the bits of processes.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()
