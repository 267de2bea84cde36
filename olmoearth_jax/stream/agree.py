"""Agreement of hosts on small integers through the coordination service's key-value store."""

from __future__ import annotations

import jax

from olmoearth_jax.stream.engine import Agree, alone

TIMEOUT_MS = 600_000


def host_agreement(name: str = "rung") -> Agree:
    """Largest value over all processes; no device collective, so it never waits for a step.

    Every process must call the returned function the same number of times.
    """
    if jax.process_count() == 1:
        return alone
    from jax._src import distributed  # the key-value client has no public name

    client = distributed.global_state.client
    assert client is not None
    mine, count = jax.process_index(), jax.process_count()
    calls = 0

    def agree(value: int) -> int:
        nonlocal calls
        calls += 1
        client.key_value_set(f"{name}/{calls}/{mine}", str(value))
        values = [value]
        for other in range(count):
            if other != mine:
                text = client.blocking_key_value_get(f"{name}/{calls}/{other}", TIMEOUT_MS)
                values.append(int(text))
        if calls > 2:  # everyone has read what is two calls old
            client.key_value_delete(f"{name}/{calls - 2}/{mine}")
        return max(values)

    return agree
