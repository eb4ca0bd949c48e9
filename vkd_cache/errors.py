"""Everything that can go wrong and is not a bug of ours, as one tree.

    VkdCacheError
    ├── ConfigError              a pipeline file, an option or a combination of them
    ├── SourceError              the data set: layout, keys, labels, a file that vanished
    │   └── BrokenImageError     one image that cannot be decoded; recorded, never fatal unless strict
    ├── CacheError
    │   ├── CacheFormatError     not a cache, or a format version we do not know
    │   │   └── CacheVersionError    whole, but of a newer format version
    │   ├── CacheMismatchError   a cache made from something else than this run asks for
    │   ├── IncompleteCacheError units that this run needs are not published
    │   └── CorruptCacheError    bytes that are not what was published, or pixels that are not what the teacher saw
    ├── StorageError             a store behind a URL that does not answer, or refuses, after all attempts
    ├── TeacherError             a teacher that cannot be built, loaded or tapped
    │   └── TeacherMemoryError   batches of a size that memory does not hold
    └── CheckpointError          a checkpoint that does not fit or cannot be read

A message says where, what was found, what was expected and what to do, in that order, so that it can be shown to a
user as it is: the command line prints it without a traceback.
"""


class VkdCacheError(Exception):
    """Base of every error that a user can cause."""


class ConfigError(VkdCacheError):
    """A pipeline file or option is wrong."""


class SourceError(VkdCacheError):
    """The data set cannot be used as it is."""


class BrokenImageError(SourceError):
    """One image cannot be decoded.

    `str(error)` is the reason, short and free of paths and addresses: it is stored in the unit's record, which has to
    be the same bytes wherever it is made.
    """


class CacheError(VkdCacheError):
    """A cache cannot be used."""


class CacheFormatError(CacheError):
    """Not a cache, or one of an unknown format version."""


class CacheVersionError(CacheFormatError):
    """A document of a newer format version, as it was written: nothing is damaged."""


class CacheMismatchError(CacheError):
    """The cache was made from something else than this run asks for."""


class IncompleteCacheError(CacheError):
    """Units that this run needs are not published."""


class CorruptCacheError(CacheError):
    """Stored bytes or replayed pixels differ from what was published."""


class StorageError(VkdCacheError):
    """An object store does not answer, or refuses, after all attempts."""


class TeacherError(VkdCacheError):
    """A teacher cannot be built, loaded or tapped."""


class TeacherMemoryError(TeacherError):
    """A batch of the teacher does not fit into memory."""


class CheckpointError(VkdCacheError):
    """A checkpoint cannot be read or does not fit the model."""
