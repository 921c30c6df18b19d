"""The exceptions of vistoken. Every message names what was given and what is allowed."""

from __future__ import annotations


class VistokenError(Exception):
    """Root of all exceptions that vistoken raises on purpose."""


class ConfigError(VistokenError, ValueError):
    """A method's settings are wrong in themselves, whatever the model."""


class ScheduleError(VistokenError, ValueError):
    """Token counts that this model, image size or method cannot have."""


class UnsupportedBackboneError(VistokenError, TypeError):
    """The model is of no family that vistoken carries; says what was looked for and found."""


class UnsupportedMethodError(UnsupportedBackboneError):
    """The model is carried, but lacks something this method reads (a class token, for example)."""


class AlreadyWrappedError(VistokenError, RuntimeError):
    """The model carries a method already."""


class NotWrappedError(VistokenError, RuntimeError):
    """The model carries no method."""


class TapError(VistokenError, RuntimeError):
    """The attention of a block never passed through the tap, so a declared need did not arrive."""


class RecomputeError(VistokenError, RuntimeError):
    """Activation checkpointing asked for a forward pass that is no longer known."""


class BackendUnavailableError(VistokenError, RuntimeError):
    """An implementation was asked for by name that this device or model cannot run."""
