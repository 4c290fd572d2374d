"""Post-training quantization of diffusion denoisers as torch.fx graph transformations."""

from .analysis import Analysis as Analysis
from .analysis import analyze as analyze
from .api import calibrate as calibrate
from .api import compile as compile
from .api import convert as convert
from .api import fold_timesteps as fold_timesteps
from .api import load as load
from .api import prepare as prepare
from .api import save as save
from .config import ActivationSpec as ActivationSpec
from .config import AttentionSpec as AttentionSpec
from .config import Config as Config
from .config import LayerConfig as LayerConfig
from .config import ReconstructionSpec as ReconstructionSpec
from .config import RewriteSpec as RewriteSpec
from .config import TemporalSpec as TemporalSpec
from .config import WeightSpec as WeightSpec
from .errors import ArtifactError as ArtifactError
from .errors import BackendError as BackendError
from .errors import CalibrationError as CalibrationError
from .errors import CaptureError as CaptureError
from .errors import ConfigError as ConfigError
from .errors import GraphError as GraphError
from .errors import InputError as InputError
from .errors import TfmqError as TfmqError
from .modules import Compiled as Compiled
from .modules import Converted as Converted
from .modules import Prepared as Prepared
from .presets import PRESETS as PRESETS
from .report import Report as Report
from .report import report as report
from .schedulers import correct_scheduler as correct_scheduler
from .verification import Verification as Verification
from .verification import verify as verify

__version__ = "0.1.0"
