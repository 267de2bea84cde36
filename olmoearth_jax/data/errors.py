"""What a sample file that cannot be read raises."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from olmoearth_jax.data.remote import AnyPath


class ReadError(ValueError):
    """A sample file is missing, damaged, or not of the published form."""

    def __init__(self, path: str | AnyPath, problem: str):
        self.path, self.problem = f"{path}", problem
        super().__init__(self.path, problem)

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


@contextlib.contextmanager
def translate_errors(path: str | AnyPath) -> Iterator[None]:
    """Turns whatever goes wrong while reading `path` into a `ReadError` that names it.

    One bad file of many must never end a run, so that holds for every exception, too little memory
    for what it declares included; only the wish to stop passes.
    """
    try:
        yield
    except ReadError:
        raise
    except FileNotFoundError:
        raise ReadError(path, "file does not exist") from None
    except MemoryError as e:
        raise ReadError(path, "needs more memory than there is; it may be damaged") from e
    except Exception as e:
        raise ReadError(path, f"cannot be read, it may be damaged or incomplete ({e})") from e
