"""The one kind of error that is meant for the person at the keyboard."""


class UserError(ValueError):
    """An error whose message is one clear sentence that says what to do.

    The command line prints the message, without a traceback, and exits with code 2; in a notebook
    it is an ordinary `ValueError`. Line breaks, which messages quoted from libraries often carry,
    become spaces, so that one sentence stays one line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
