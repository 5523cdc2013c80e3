"""The one exception that is shown to a person without a traceback."""

from collections.abc import Collection


class UserError(ValueError):
    """A mistake that the person at the keyboard can fix.

    The message is one line: the value found, the values allowed, the next thing to do.
    Every command prints it and leaves with `EXIT_USER`.
    """


EXIT_USER = 2
EXIT_SAVED = 75  # sysexits.h EX_TEMPFAIL: the run is saved, start it again
EXIT_INTERRUPTED = 130  # 128 + SIGINT


def check_choices(group: str, config: object, **allowed: Collection[str]) -> None:
    """Raise UserError where a field of `config`, called `group`, is none of its allowed values."""
    for name, choices in allowed.items():
        if (value := getattr(config, name)) not in choices:
            raise UserError(f"{group}.{name}={value!r} is unknown; there are {', '.join(choices)}")
