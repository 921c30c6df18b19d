"""From exceptions to exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable

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
