"""Which megatron-core this was tested with; another is refused by name, for it is not a library of
stable interfaces: what we build from (layer specs, schedules, the distributed optimizer) moves with
each minor version, and not always loudly.
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from rlef_mega.config import ConfigError

# from the first to before the second; pyproject.toml says the same
MEGATRON_CORE = ("0.16.1", "0.20")


def refuse_untested_megatron() -> None:
    """Raises ConfigError when megatron-core is missing, older or newer."""
    first, before = MEGATRON_CORE
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        raise ConfigError(
            f"megatron-core is not installed; pip install 'megatron-core>={first},<{before}'"
        ) from None
    # the minor version alone, so that a candidate of the first refused one is refused too
    if Version(found) < Version(first) or Version(found).release >= Version(before).release:
        raise ConfigError(
            f"megatron-core {found} was not tested with this version of rlef-mega; "
            f"pip install 'megatron-core>={first},<{before}' (from 0.17 on it needs Python 3.12)"
        )
