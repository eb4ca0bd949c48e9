"""Where a stage keeps local copies of what it reads from behind URLs."""

from vkd_cache.config import SourceConfig
from vkd_cache.local_copies import LocalCopies, open_copies


def copies_of(source: SourceConfig) -> LocalCopies:
    """The folder and the bound that [source] gives, for tars and for units of a cache alike."""
    return open_copies(source.local_dir, source.local_gb)
