"""From exceptions to exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vistoken.errors import ConfigError, ScheduleError, UnsupportedBackboneError, VistokenError

OK, FAILED, USAGE = 0, 1, 2
WRONG_REQUEST = (ConfigError, ScheduleError, UnsupportedBackboneError)
"""Errors that another command line would avoid."""


def guarded(run: Callable[[], object]) -> int:
    """Call `run` and return the exit code; vistoken's own errors print without a traceback.

    Returns:
        0 when it ran through, 1 when it failed, 2 when the request itself was wrong.
    """
    try:
        run()
    except VistokenError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE if isinstance(error, WRONG_REQUEST) else FAILED
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return FAILED
    return OK


@contextmanager
def loading(name: str) -> Iterator[None]:
    """What transformers raises while it loads a model, in vistoken's own errors.

    Raises:
        ConfigError: transformers finds none.
        UnsupportedBackboneError: a model of another kind.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"model {name}: transformers cannot load it ({str(error).splitlines()[0]})"
        ) from error
    except ValueError as error:
        raise UnsupportedBackboneError(
            f"model {name}: no vision-language model of transformers ({str(error).splitlines()[0]})"
        ) from error
