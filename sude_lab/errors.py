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


def machine_failure(error: BaseException) -> str | None:
    """Say what happened where the machine is at fault, memory or device; None: it is not.

    PyTorch tells of these by a class of its own on a device, in words alone on the CPU.
    """
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "MPS backend out of memory" in text:
        return "The device ran out of memory"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return "The machine ran out of memory"
    device = ("CUDA error", "HIP error", "CUDNN_STATUS", "CUBLAS_STATUS", "NCCL error")
    if isinstance(error, RuntimeError) and any(words in text for words in device):
        return f"The device failed or is gone ({one_line(text, 160)})"
    return None


def one_line(text: str, most: int = 2000) -> str:
    """Return a text as one line that is safe to print, of about `most` characters at the most."""
    text = " ".join(text.split())
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
