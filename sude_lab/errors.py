"""The one kind of error that is meant for the person at the keyboard."""


class UserError(ValueError):
    """An error whose message is one clear sentence that says what to do.

    The command line prints the message, without a traceback, and exits with code 2; in a notebook
    it is an ordinary `ValueError`. Line breaks, which messages quoted from libraries often carry,
    become spaces, so that one sentence stays one line. What a terminal would obey, control
    characters in a file's name for example, is shown in place of being sent; a message that quotes
    a whole file is cut in the middle.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str, most: int = 2000) -> str:
    """Return a text as one line that is safe to print, of about `most` characters at the most."""
    text = " ".join(text.split())
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
