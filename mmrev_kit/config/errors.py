"""What is said to a person: errors whose message is all that its reader needs."""


class Told(Exception):
    """An error that the user can mend: the message says what, where, and what to do.

    In a notebook the message is shown without a traceback, and the cell has failed all the same; in a terminal the
    program ends with it and with exit status 2.
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]
