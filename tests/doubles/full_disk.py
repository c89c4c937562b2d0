"""A file on a full disk: it opens and closes, and takes no write."""

import errno


class Full:
    """Wraps an open file."""

    def __init__(self, file):
        self._file = file

    def write(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)
