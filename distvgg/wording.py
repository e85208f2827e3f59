"""Numbers with their nouns, in lines for the user."""


def counted(n: float, noun: str) -> str:
    """Returns a number with its noun: `1 process`, `2 processes`, `1.5 cores`.

    Args:
        n: to the hundredth, if it is not whole.
        noun: whose plural ends in s, or in es after s and tch.
    """
    if n != 1:
        noun += "es" if noun.endswith(("s", "tch")) else "s"
    return f"{round(float(n), 2):,g} {noun}" if n % 1 else f"{int(n):,} {noun}"
