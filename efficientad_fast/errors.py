"""Errors that a user can act on.

Every message names what was wrong, what was expected and what to do. The command line prints the message
without a traceback; anything else that escapes is a bug.
"""

from __future__ import annotations


class EfficientADError(Exception):
    """Base class of every error this package raises on purpose."""


class InputError(EfficientADError, ValueError):
    """An argument has the wrong type, shape, dtype or range."""


class ImageError(InputError):
    """An image could not be decoded, or holds what a network cannot take."""


class DatasetError(InputError):
    """A folder does not hold the images that were asked for."""


class DetectorFileError(InputError):
    """A detector file is missing, truncated or not ours."""


class OutputError(EfficientADError, OSError):
    """A file could not be written: the disk is full, or the like. What was there is as it was."""


class BackendError(EfficientADError, RuntimeError):
    """A compiled library or a backend cannot be used on this machine."""
