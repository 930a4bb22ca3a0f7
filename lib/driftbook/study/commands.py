"""How a command of the project ends where something is wrong."""

import sys
from collections.abc import Callable
from functools import wraps


def command(wrong: int) -> Callable[[Callable], Callable[..., int]]:
    """A command that gives its exit status: what it returns or 0, and `wrong` where a ValueError
    ended it, whose sentence is printed.
    """

    def made(main: Callable) -> Callable[..., int]:
        @wraps(main)
        def ended(*arguments: str) -> int:
            try:
                return main(*arguments) or 0
            except ValueError as error:
                print(f"driftbook: {error}", file=sys.stderr)
                return wrong

        return ended

    return made
