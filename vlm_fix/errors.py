"""The one exception of the package: a sentence a user can act on."""

LONGEST = 1500  # characters: what was given may be quoted in it, however long it is


class VlmFixError(ValueError):
    """Bad input or an unsupported combination; the message is one sentence that names the fix, on one line."""

    def __init__(self, message: str = "") -> None:
        message = " ".join(map(str.strip, lines)) if len(lines := message.splitlines()) > 1 else message.rstrip("\r\n")
        super().__init__(message if len(message) <= LONGEST else f"{message[:900]} [...] {message[-500:]}")
