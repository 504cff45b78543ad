"""Checks of arguments that are written once."""


def check_integers(minimum: int = 1, *, may_be_none: bool = False, **values: int | None) -> None:
    """
    Refuse values that are no integers of at least `minimum`; errors call them by their names.

    Raises a `ValueError`.
    """
    wanted = {0: "0 or a positive integer", 1: "a positive integer"}.get(minimum, f"an integer of {minimum} or more")
    for name, value in values.items():
        if value is None and may_be_none:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"`{name}` is {value!r}, but must be {wanted}. Pass {minimum} or more.")
