"""Define the exceptions and warnings of the library, which name the node, module or argument."""


class TfmqError(Exception):
    """Base of all errors raised on purpose by tfmq_fx."""


class ConfigError(TfmqError, ValueError):
    """An argument or configuration value that cannot be used."""


class CaptureError(TfmqError, RuntimeError):
    """The model cannot be turned into a graph, or the graph is not the same function."""


class StateError(CaptureError):
    """A call of the model changes the result of the next one, so no graph of it can be right."""


class FrozenError(TfmqError, AttributeError):
    """A captured model is asked for a part of its source that it lacks, or to change like it."""


class InputError(TfmqError, ValueError):
    """A call has inputs that the captured graph does not support (shape, dtype, timestep)."""


class StaleError(TfmqError, RuntimeError):
    """The weights of the source model have changed since its conversion."""


class CalibrationError(TfmqError, RuntimeError):
    """Calibration data is missing or unusable (no data, NaN, Inf)."""


class GraphError(TfmqError, RuntimeError):
    """A graph breaks the rules of its stage: a bug in a pass or a graph edited by hand."""


class ArtifactError(TfmqError, RuntimeError):
    """A saved model cannot be written or read."""


class CoverageWarning(UserWarning):
    """Much of a model stays in floating point although its recipe quantizes it."""


class BackendError(TfmqError, RuntimeError):
    """A backend is unknown, not installed, or cannot run on this machine."""


class BackendWarning(UserWarning):
    """A backend's results differ from the reference, so another one runs the model; or they could
    not be compared."""
