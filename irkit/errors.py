"""Every error that irkit raises for something that went wrong outside it: one hierarchy, one clear message.

The command line prints the message on one line, the server puts it into the client's own error shape,
a notebook shows it as it is.
"""


class IrkitError(Exception):
    """The base of all irkit errors; `str(error)` is a sentence for the user."""


class ModelFileError(IrkitError):
    """A model file is damaged or not what it says: the message names what is wrong, and where in the file."""


class UnsupportedModelError(IrkitError):
    """The file is sound but irkit cannot run it: the message names the key or format, and what is supported."""


class ModelNotFoundError(IrkitError):
    """No such model: the message says what was looked up, where, and which names come near."""


class OptionError(IrkitError, ValueError):
    """An option or argument is unknown, of the wrong type or out of bounds: the message names it.

    Attributes:
        option: Its name alone, where there is one to blame.
    """

    def __init__(self, message: str, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


class ContextFullError(IrkitError):
    """A prompt does not fit the context: the message gives both sizes in tokens."""


class PullError(IrkitError):
    """A model could not be fetched: the message says from where and why; nothing half-written is left in use."""


class BudgetError(IrkitError):
    """A request would take more memory than its budget: the message names both and what would fit."""


class BusyError(IrkitError):
    """A server has as much to do as it may take on: asking again a little later may help."""


class BackendError(IrkitError):
    """The compute backend that was asked for cannot be used here."""
