"""Optional dependencies."""

from importlib.util import find_spec


def require_extra(extra: str, *packages: str) -> None:
    """
    Make sure that packages of an extra are installed.

    Args:
        extra (`str`):
            Name of the extra that brings the packages.
        packages (`str`):
            Names of modules that are needed.

    Raises:
        `ImportError`: If one of them is not installed.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(
            f"{', '.join(missing)} is needed here, but not installed. Install it with `pip install rewarddance_hf[{extra}]`."
        )
