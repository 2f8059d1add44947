"""slurm/README.md lists the variables that the job scripts read, and no others."""

import re
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[2] / "slurm"
SHARED = ("common.sh", "beside.sh")
SCRIPTS = sorted(path.name for path in SLURM.glob("*.sbatch"))

# Set by SLURM or the shell, or for other programs.
NOT_OURS = r"SLURM_\w+|SECONDS|PWD|SRUN_CPUS_PER_TASK|NCCL_SOCKET_IFNAME|GLOO_SOCKET_IFNAME"


def listed() -> dict[str, set[str]]:
    """Return the variables in the tables, by heading."""
    sections = re.split(r"^## ", (SLURM / "README.md").read_text(), flags=re.MULTILINE)[1:]
    return {
        section.splitlines()[0]: set(re.findall(r"^\| `([A-Z_]+)` \|", section, re.MULTILINE))
        for section in sections
    }


def of(script: str) -> set[str]:
    """Return the variables that the README lists for a script."""
    tables = [v for heading, v in listed().items() if script in heading or "every" in heading]
    return set().union(*tables)


def read_by(*files: str) -> set[str]:
    """Return the variables in the code, without comments."""
    code = "\n".join(re.sub(r"(^|\s)#.*", "", (SLURM / file).read_text()) for file in files)
    names = re.findall(r"\$\{?!?([A-Z][A-Z_]+)\b|\bnumber ([A-Z_]+) ", code)
    names += [(name, "") for name in re.findall(r"\(\((?:[^)]*\W)?([A-Z][A-Z_]+)\b", code)]
    return {a or b for a, b in names if not re.fullmatch(NOT_OURS, a or b)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_variable_is_listed(script: str) -> None:
    assert read_by(script) <= of(script)


def test_every_variable_of_the_shared_files_is_listed_somewhere() -> None:
    assert read_by(*SHARED) <= set().union(*listed().values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_listed_is_read(script: str) -> None:
    assert of(script) <= read_by(script, *SHARED)


def test_all_scripts_are_named() -> None:
    readme = (SLURM / "README.md").read_text()
    assert [p.name for p in SLURM.iterdir() if f"`{p.name}`" not in readme] == ["README.md"]


def test_callbacks_that_a_config_has_in_a_comment_are_added(tmp_path: Path) -> None:
    lines = ("# callbacks.RngState", "- class_path: callbacks.SlurmRequeue # callbacks.RngState")
    config = tmp_path / "run.yaml"
    config.write_text("\n".join(lines))
    words = f'. {SLURM}/common.sh; CONFIG={config}; read_run; echo "${{settings[@]}}"'
    told = subprocess.run(["bash", "-euc", words], capture_output=True, text=True, check=True)
    added = [word for word in told.stdout.split() if word.startswith("--trainer.callbacks")]
    assert added == ["--trainer.callbacks+=callbacks.RngState"]
