"""The one exception that is shown to a person without a traceback."""


class UserError(ValueError):
    """A mistake that the person at the keyboard can fix.

    The message is one line: the value found, the values allowed, the next thing to do.
    Every command prints it and leaves with `EXIT_USER`.
    """


EXIT_USER = 2
EXIT_SAVED = 75  # sysexits.h EX_TEMPFAIL: the run is saved, start it again
EXIT_INTERRUPTED = 130  # 128 + SIGINT
