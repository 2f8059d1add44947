"""Fixtures for all tests: random tiny models in ordinary Hugging Face folders."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tensorboard.summary.writer import event_file_writer
from xdist.scheduler.loadscope import LoadScopeScheduling

from opd_lightning.terminal.imports import without_collections
from tests import entry_points

# Read when the libraries are imported, so set before any test module is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads slow tiny models down
entry_points.read_once()

# Background jobs of shells and nohup ignore these signals, which is inherited; tests send them.
for _number, _action in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _action)

TinyModelDir = Callable[..., Path]

# 64 tokens: three special ones and 61 characters.
SPECIAL = ("<pad>", "<eos>", "<unk>")
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOP +-*/=:;?"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@cache
def _no_vllm() -> str | None:
    """Import vLLM, and leave what that makes out of later garbage collections."""
    from opd_lightning.serving.vllm_process import vllm_unavailable

    gc.collect()
    with without_collections(freeze=True):
        reason = vllm_unavailable()
    if reason is None:
        from tests.forked_server import run_as_written

        run_as_written()
    return reason


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs vLLM without it; vLLM is imported, nine CPU seconds, only for such tests."""
    if item.get_closest_marker("vllm") and (reason := _no_vllm()):
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def without_launcher_variables() -> Iterator[None]:
    """Remove the environment variables that Lightning's launcher leaves set.

    With them a later run of this process with two ranks would wait for a second rank that is
    never started.
    """
    yield
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session", autouse=True)
def _event_files_in_order() -> None:
    """Start TensorBoard's file counter at 100,000: it sorts files of the same second by name.

    As text "10" comes before "9", so that a run and its resumption would be read in wrong order.
    """
    while event_file_writer._global_uid.get() < 10**5:
        pass


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> TinyModelDir:
    """Return a function that makes a random Qwen3 folder, cached by its arguments.

    The arguments are those of `build_tiny_model`. Tests must not write to the folder.
    """
    made: dict[tuple[int, int, int, bool], Path] = {}

    def make(*, hidden_size: int = 64, layers: int = 2, seed: int = 0, tie: bool = True) -> Path:
        key = (hidden_size, layers, seed, tie)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("tiny_model")
            build_tiny_model(made[key], hidden_size=hidden_size, layers=layers, seed=seed, tie=tie)
        return made[key]

    return make


def build_tiny_model(folder: Path, *, hidden_size: int, layers: int, seed: int, tie: bool) -> None:
    """Write a random float32 Qwen3 and its character tokenizer to `folder`.

    The weights have a large deviation, so that next-token distributions are far from uniform. The
    global random state is not changed.

    Args:
        folder: Folder for config.json, weights and tokenizer.
        hidden_size: Width; heads are 32 wide, the smallest vLLM's CPU attention takes.
        layers: Number of transformer blocks.
        seed: Seed of the weights.
        tie: Whether head and embedding are tied.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    write_tokenizer(folder)
    config = Qwen3Config(
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        pad_token_id=SPECIAL.index("<pad>"),
        eos_token_id=SPECIAL.index("<eos>"),
        bos_token_id=None,
        initializer_range=0.15,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(folder)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single characters, with a chat template, to `folder`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = (*SPECIAL, *CHARACTERS)
    backend = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def untrained_lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a user's, with all labs as configs/lab names them, models untrained.

    Models have one layer: most of a step of such small ones is the overhead of its operations.
    """
    return _user(tmp_path_factory.mktemp("user"), layers=1)


@pytest.fixture(scope="session")
def deep_lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with models of two layers: for shards, figures on record, and what has to learn."""
    return _user(tmp_path_factory.mktemp("deep_user"), layers=2)


def _user(root: Path, *, layers: int) -> Path:
    (root / "configs").symlink_to(Path(__file__).parents[1] / "configs")
    write_untrained_lab(root / "lab", layers=layers)
    return root


def write_untrained_lab(folder: Path, *, layers: int = 1) -> None:
    """Write all labs, models untrained, to the folders `arithmetic`, `identity` and `skills`."""
    from opd_lightning.lab import arithmetic, identity, programs
    from opd_lightning.lab.arithmetic import generate_mixture
    from opd_lightning.lab.models import new_model
    from opd_lightning.lab.problems import interleaved, write_jsonl, write_rows

    lab = folder / "arithmetic"
    for role, hidden_size in (("teacher", 64), ("student", 32)):
        (lab / role).mkdir(parents=True)
        new_model(lab / role, layers=layers, hidden_size=hidden_size, seed=hidden_size)
    domains = ("add-2", "sub-2")
    for name, held_out in (("train", False), ("held_out", True)):
        problems = generate_mixture(domains, 16, seed=0, held_out=held_out)
        write_jsonl(lab / f"{name}.jsonl", problems)
    demonstrations = generate_mixture(domains, 16, seed=0, held_out=False)
    write_jsonl(lab / "demonstrations.jsonl", demonstrations, with_response=True)

    lab = folder / "identity"
    (lab / "base").mkdir(parents=True)
    new_model(lab / "base", layers=layers, hidden_size=32, seed=1)
    for name, rows in {"train": identity.training_rows(), **identity.probe_rows()}.items():
        write_rows(lab / f"{name}.jsonl", rows)

    lab = folder / "skills"
    (lab / "start").mkdir(parents=True)
    new_model(lab / "start", layers=layers, hidden_size=32, seed=2)
    for name, is_held_out in (("train", False), ("held_out", True), ("test", True)):
        drawn = interleaved(
            arithmetic.generate("add-3", 8, seed=0, held_out=is_held_out),
            programs.generate("program-2", 8, seed=0, held_out=is_held_out),
        )
        write_jsonl(lab / f"{name}.jsonl", drawn)


@pytest.fixture
def in_lab(untrained_lab: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to the folder of the untrained lab; tests write to their `tmp_path`."""
    monkeypatch.chdir(untrained_lab)
    return untrained_lab


@pytest.fixture
def in_deep_lab(deep_lab: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(deep_lab)
    return deep_lab


# Modules that share servers, an import of vLLM or a cluster, which take up to half a minute: run in
# one process.
SHARED = {
    "test_architectures.py": "vllm",
    "test_check.py": "vllm",
    "test_fit_vllm.py": "vllm",
    "test_hostile_clients.py": "vllm",
    "test_offline_remote.py": "vllm",
    "test_private_names.py": "vllm",
    "test_pushes.py": "vllm",
    "test_remote_teacher.py": "vllm",
    "test_rollouts_vllm.py": "vllm",
    "test_server_engine.py": "vllm",
    "test_vllm_errors.py": "vllm",
    "test_vllm_families.py": "vllm",
    "test_requeue.py": "slurm",
    "test_scripts.py": "slurm",
    "test_servers.py": "slurm",
}
SERVERS = ("_rollout_server", "_teacher_server")  # fixtures that a group shares


class ByModule(LoadScopeScheduling):
    """Scheduler of whole modules, so that module fixtures are made once; see `SHARED`.

    xdist's own groups do not work: it renames tests, which pytest 9.2 does not let it.
    """

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.split("::")[0]
        return SHARED.get(Path(module).name, module)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    return ByModule(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Adjust the order of pytest-randomly.

    Tests marked `last` go to the end of their module, or of its group if they end a server that
    the group shares. Groups of modules go first, then the directory with long tests, so that no
    worker is left with one at the end.
    """
    modules: dict[Path, int] = {}
    groups: dict[object, int] = {}
    for item in items:
        modules.setdefault(item.path, len(modules))
        groups.setdefault(SHARED.get(item.path.name, item.path), len(groups))
    integration = Path(__file__).parent / "integration"

    def place(item: pytest.Item) -> tuple[Any, ...]:
        shared = SHARED.get(item.path.name)
        last = item.get_closest_marker("last") is not None
        ends_server = last and bool({*SERVERS} & {*getattr(item, "fixturenames", ())})
        return (
            shared is None,
            integration not in item.path.parents,
            groups[shared or item.path],
            ends_server,
            modules[item.path],
            last,
        )

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import the tests without garbage collections, and leave what they made out of later ones.

    Each would pass over half a million objects: 0.6 s.
    """
    with without_collections(freeze=True):
        collected = yield
        gc.collect()
        return collected


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")
