"""Options that name several things."""


def listed(text: str) -> list[str]:
    """What `text` names between commas, each once.

    >>> listed("a, b,,a")
    ['a', 'b']
    """
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
