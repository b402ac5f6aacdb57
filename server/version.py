"""The version of Farspan that runs: the installed distribution's, as replies and `farspan version` show."""

from importlib.metadata import PackageNotFoundError, version


def farspan_version() -> str:
    """The distribution's version; "source" where the checkout runs without being installed."""
    try:
        return version("farspan")
    except PackageNotFoundError:
        return "source"
