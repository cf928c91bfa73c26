"""What can go wrong for a user, one class per exit code of the command line."""


class GemmaError(Exception):
    """An error whose message is one sentence that names the fix; never shown as a traceback."""

    exit_code = 1


class UsageError(GemmaError):
    """Options or arguments that cannot be honoured."""

    exit_code = 2


class InputError(GemmaError):
    """A model or an input that is missing, unreadable or not supported."""

    exit_code = 3


class CorruptError(GemmaError):
    """A checkpoint or memory file whose content is not what was written."""

    exit_code = 4


class OutOfMemoryError(GemmaError):
    """The device has too little memory for what was asked."""

    exit_code = 5
