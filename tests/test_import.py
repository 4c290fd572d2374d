"""Importing the package changes nothing global, imports nothing heavy that is not needed, and
says nothing."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

STATE = """
import logging, sys, random, warnings
import numpy, torch, torch._inductor.config, torch.fx

def state():
    levels = {n: l.level for n, l in logging.Logger.manager.loggerDict.items()
              if isinstance(l, logging.Logger) and not n.startswith("tfmq_fx")}
    return {
        "dtype": torch.get_default_dtype(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
                 torch.get_float32_matmul_precision()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "seeds": (torch.get_rng_state().tolist(), random.getstate(),
                  str(numpy.random.get_state())),
        "freezing": torch._inductor.config.freezing,
        "cuda": torch.cuda.is_initialized(),
        "functions": (torch.is_tensor, torch.compile, torch.nn.Module.__call__,
                      torch.fx.GraphModule.__init__, torch.arange),
        "root": (logging.root.level, list(logging.root.handlers)),
        "hooks": (sys.excepthook, sys.displayhook, warnings.showwarning),
    }, levels

before, levels = state()
import tfmq_fx
import tfmq_fx.evaluation.cli, tfmq_fx.evaluation.digits, tfmq_fx.evaluation.demo
after, later = state()
assert before == after, [k for k in before if before[k] != after[k]]
assert all(later[n] == level for n, level in levels.items())
assert logging.getLogger("tfmq_fx").level == logging.NOTSET
assert not logging.getLogger("tfmq_fx").handlers
"""


def python(script, *options):
    command = [sys.executable, *options, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_importing_changes_nothing_global_and_prints_nothing():
    done = python(STATE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "tfmq" not in done.stderr


def test_importing_leaves_out_what_only_some_calls_need():
    heavy = ["diffusers", "torchao", "openvino", "matplotlib", "sklearn", "tests", "scipy"]
    heavy += ["networkx", "torch._dynamo", "torch._inductor", "triton"]
    heavy += ["sympy", "torch.fx.experimental.symbolic_shapes"]  # with torch, where torch has them
    done = python(
        "import sys, torch; before = set(sys.modules); import tfmq_fx; "
        f"print([n for n in {heavy} if n in sys.modules.keys() - before])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_importing_warns_of_nothing():
    mark = "what torch says is its own\n"
    script = f"import sys, torch; sys.stderr.write({mark!r}); import tfmq_fx"
    done = python(script, "-W", "error")
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr.partition(mark)[2]) == ("", "")


def test_a_call_leaves_torch_as_it_was():
    script = STATE + (
        "m = torch.nn.Linear(2, 2)\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__(); self.m = m\n"
        "    def forward(self, x, t): return self.m(x) * t[:, None]\n"
        "before, _ = state()\n"
        "f = tfmq_fx.fold_timesteps(Net().eval(), 3, (torch.zeros(2, 2), torch.tensor([1, 1])))\n"
        "f(torch.zeros(2, 2), 1)\n"
        "after, _ = state()\n"
        "assert before == after, [k for k in before if before[k] != after[k]]\n"
    )
    done = python(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
