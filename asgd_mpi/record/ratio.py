"""A mean or a share of what a run has counted; None, which is shown as n/a, if it is of nothing."""


def ratio(amount: float, whole: float | None) -> float | None:
    """Return amount / whole; None if there is no whole, or it is 0."""
    return amount / whole if whole else None
