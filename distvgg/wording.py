"""Numbers with their nouns, in lines for the user."""


def counted(n: float, noun: str) -> str:
    """Returns a number with its noun: `1 process`, `2 processes`, `1.5 cores`."""
    if n != 1:
        noun += "es" if noun.endswith(("s", "ch")) else "s"
    return f"{n:,.3g} {noun}" if n % 1 else f"{n:,.0f} {noun}"
