"""The exception types users meet. Every message names the node, module or argument concerned."""


class TfmqError(Exception):
    """Base of all errors raised on purpose by tfmq_fx."""


class ConfigError(TfmqError, ValueError):
    """An argument or configuration value that cannot be used."""


class CaptureError(TfmqError, RuntimeError):
    """The model cannot be turned into a graph, or the graph is not the same function."""


class StateError(CaptureError):
    """One call of the model changes the next: no graph of it can be right."""


class InputError(TfmqError, ValueError):
    """A call with inputs that the captured graph was not made for (shape, dtype, timestep)."""


class StaleError(TfmqError, RuntimeError):
    """The model that a converted one was made from holds other weights by now."""


class CalibrationError(TfmqError, RuntimeError):
    """Calibration data is missing or unusable (no data, NaN, Inf)."""


class GraphError(TfmqError, RuntimeError):
    """A graph breaks the rules of its stage: a bug in a pass or a graph edited by hand."""


class ArtifactError(TfmqError, RuntimeError):
    """A saved model cannot be written or read."""


class CoverageWarning(UserWarning):
    """Much of a model stays in floating point though its recipe asks for integers."""


class BackendError(TfmqError, RuntimeError):
    """A backend is unknown, not installed, or cannot run on this machine."""


class BackendWarning(UserWarning):
    """A backend does not answer as the reference does, and another one runs the model; or it could
    not be compared."""
