"""The four ways in which anything here can go wrong.

What to do next depends on these alone, never on the text. The text is for people: it names the thing (disk, file,
field) and the cure.
"""


class VMBackupError(Exception):
    """Base of the taxonomy. `reason` is a CamelCase word for conditions and events."""

    default_reason = "Error"

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or self.default_reason


class RefusedError(VMBackupError):
    """This will not be started as it was asked for: nothing was changed, and a human must change the request."""

    default_reason = "Refused"


class TransientError(VMBackupError):
    """It did not happen, and may work later: retry after a while, having observed again."""

    default_reason = "Transient"


class UnknownOutcomeError(VMBackupError):
    """It may or may not have happened, or may still happen: only an observation after the barrier tells."""

    default_reason = "Unknown"


class PermanentError(VMBackupError):
    """It did not happen, and trying again as it is will not help."""

    default_reason = "Permanent"
