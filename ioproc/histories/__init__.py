"""The recorded histories that come with the package; docs/trace.md says what they are."""
from importlib import resources

from ..trace import Trace

__all__ = ["load", "names"]


def names() -> list[str]:
    """The names of all."""
    return sorted(entry.name.split(".")[0] for entry in resources.files(__name__).iterdir() if ".ioproc" in entry.name)


def load(name: str) -> Trace:
    """Load one by its name, such as ``"redis"``."""
    with resources.as_file(resources.files(__name__) / f"{name}.ioproc.xz") as path:
        return Trace.load(path)
