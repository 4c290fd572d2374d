"""docs/writing-a-pass.md: the pass, its step and its tests run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_documented_pass_and_its_three_tests_run_as_they_stand(tmp_path):
    text = (ROOT / "docs" / "writing-a-pass.md").read_text()
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, flags=re.S)
    assert [name for name, _ in blocks] == ["clip_outliers.py", "use.py", "test_clip_outliers.py"]
    for name, code in blocks:
        (tmp_path / name).write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr
