"""Every exception and warning that tokenpass raises itself."""


class TokenpassError(Exception):
    """Base class of the errors below."""


class OptionError(TokenpassError, ValueError):
    """An option that does not exist, has a wrong value, or contradicts another one."""


class BrokenInvariantError(TokenpassError):
    """A pass produced a graph that its own checks reject; the rewrite is undone."""


class NotUnderstoodError(TokenpassError):
    """A graph holds something that cannot be traced again; it is left as it is, with a refusal."""


class NothingRecordedError(TokenpassError, RuntimeError):
    """Asked about a compiled model that has not run yet, or that tokenpass did not compile."""


class TokenpassWarning(UserWarning):
    """Something the user should know: nothing converted, a rewrite undone."""


def described(error: BaseException) -> str:
    """Kind and first line of an exception that somebody else's code raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
