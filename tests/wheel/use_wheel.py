"""Install a wheel in an empty environment outside the checkout and use it there: `make dist`.

    python tests/wheel/use_wheel.py dist [options of pip install]

PyTorch is taken at the tested version; other dependencies come with the wheel.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

CHECK = """
import opd_lightning, opd_lightning_callbacks, importlib.util
assert "site-packages" in opd_lightning.__file__ and importlib.util.find_spec("callbacks") is None
"""


def main(folder: str, *options: str) -> None:
    (wheel,) = Path(folder).resolve().glob("*.whl")
    options = tuple(str(Path(o).resolve()) if Path(o).is_file() else o for o in options)
    # Nothing of the checkout or of another environment may be found.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    with tempfile.TemporaryDirectory() as empty:

        def run(*command: str, **more: str) -> str:
            print("+", *command[:6], file=sys.stderr)
            return subprocess.run(
                command, cwd=empty, env=env | more, check=True, stdout=subprocess.PIPE, text=True
            ).stdout

        run(sys.executable, "-m", "venv", "env")
        python, opd = f"{empty}/env/bin/python", f"{empty}/env/bin/opd"
        run(python, "-m", "pip", "install", "-q", *options, "torch==2.13.0", str(wheel))
        run(python, "-c", CHECK)
        assert "fit" in run(opd, "--help")
        assert "lab/sdft" in run(opd, "configs", "list")
        run(opd, "configs", "copy", "lab/sdft")
        printed = run(opd, "fit", "--config", "configs/lab/sdft.yaml", "--print_config")
        assert "class_path: callbacks.EMATeacherUpdate" in printed
    print(f"{wheel.name}: installed and used in an empty environment")


if __name__ == "__main__":
    main(*sys.argv[1:])
