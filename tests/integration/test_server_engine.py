"""A real `opd serve` on loopback, as an engine and as something to break into."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd_lightning.cli import main
from opd_lightning.errors import EngineMismatchError, ServerAwayError, UserError
from opd_lightning.models.source import ModelSource
from opd_lightning.rollouts import Engine, Request, Sampling, VLLMServerEngine
from opd_lightning.rollouts.push_folder import SUBFOLDER, PushFolder
from opd_lightning.serving.accepted import ROUTES
from tests.engine_contract import (
    MAX_LENGTH,
    NUCLEUS,
    REQUESTS,
    WHOLE,
    EngineContract,
    assert_scored_by,
    one_setting_each,
    reference_model,
    samplings,
)
from tests.processes import call_ranks
from tests.servers import WAITS, RunningServer, is_running

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]
PUSHED = ("--weights", "pushed", "--max_length", str(MAX_LENGTH))

DEVELOPMENT_ROUTES = [
    ("POST", "/collective_rpc"),
    ("POST", "/sleep"),
    ("POST", "/wake_up"),
    ("POST", "/pause"),
    ("POST", "/resume"),
    ("POST", "/init_weight_transfer_engine"),
    ("POST", "/start_weight_update"),
    ("POST", "/update_weights"),
    ("POST", "/finish_weight_update"),
    ("POST", "/update_weight_version"),
    ("GET", "/weight_info"),
    ("POST", "/weight_checker"),
    ("POST", "/reset_prefix_cache"),
    ("POST", "/shutdown_weight_transfer_engine"),
    ("GET", "/get_world_size"),
    ("GET", "/server_info"),
]
OTHER_ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/ping"),
    ("POST", "/inference/v1/generate"),
    ("POST", "/v1/completions"),
]


@pytest.fixture(scope="module")
def server(rollout_server: RunningServer) -> RunningServer:
    return rollout_server


def engine_of(server: RunningServer, folder: Path, **options: Any) -> VLLMServerEngine:
    return VLLMServerEngine(
        [str(server.address_file)],
        key_file=str(server.key_file),
        push_folder=str(folder / "push"),
        **WAITS,
        **options,
    )


@pytest.fixture(scope="module")
def engine(
    server: RunningServer, tiny_model_dir: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VLLMServerEngine]:
    folder = tmp_path_factory.mktemp("engine")
    engine = engine_of(server, folder)
    engine.start(ModelSource(str(tiny_model_dir())), max_length=MAX_LENGTH)
    yield engine
    engine.close()
    assert not os.listdir(folder / "push")


class TestVLLMServerEngine(EngineContract):
    """The contract, over HTTP."""

    @pytest.mark.slow
    @one_setting_each
    def test_logprobs_for_each_setting(
        self, engine: Engine, model: Any, sampling: Sampling
    ) -> None:
        super().test_logprobs_for_each_setting(engine, model, sampling)

    @pytest.mark.slow  # thousands of requests
    @samplings(WHOLE, NUCLEUS)
    def test_frequencies_match_the_distribution(
        self, engine: Engine, model: Any, sampling: Sampling
    ) -> None:
        super().test_frequencies_match_the_distribution(engine, model, sampling)

    @pytest.mark.slow  # hundreds of requests
    def test_more_prompt_tokens_than_are_computed_at_once(self, engine: Engine) -> None:
        super().test_more_prompt_tokens_than_are_computed_at_once(engine)

    @pytest.mark.slow  # hundreds of requests
    def test_an_eos_on_the_last_token_is_an_eos(self, engine: Engine) -> None:
        super().test_an_eos_on_the_last_token_is_an_eos(engine)


def test_its_log_has_no_bars(server: RunningServer) -> None:
    # vLLM ends the lines of a traceback with "\r\n"; a bar goes back by "\r" alone.
    assert not re.search(rb"\r(?!\n)", server.log.read_bytes())


def test_one_version_is_on_disk_at_most(
    server: RunningServer, tiny_model_dir: Any, tmp_path: Path
) -> None:
    push = tmp_path / "push"
    for left in ("weights-7-dead", "draft-8-dead"):
        (push / SUBFOLDER / left).mkdir(parents=True)
    (push / "mine.txt").touch()
    engine = engine_of(server, tmp_path)
    engine.start(ModelSource(str(tiny_model_dir())), max_length=MAX_LENGTH)
    assert os.listdir(push) == ["mine.txt"]
    for version in (0, 1):
        engine.load_weights(version, reference_model(tiny_model_dir()).named_parameters())
        (folder,) = (push / SUBFOLDER).iterdir()
        assert folder.name.startswith(f"weights-{version}-")
    engine.close()
    assert os.listdir(push) == ["mine.txt"]


def test_weights_that_somebody_else_pushed_end_the_run(
    server: RunningServer, engine: VLLMServerEngine, tiny_model_dir: Any, tmp_path: Path
) -> None:
    model = reference_model(tiny_model_dir())
    engine.load_weights(5, model.named_parameters())
    other = engine_of(server, tmp_path)
    other.start(ModelSource(str(tiny_model_dir())), max_length=MAX_LENGTH)
    # Nor are weights of an earlier run those that the server began with.
    with pytest.raises(EngineMismatchError, match="expected 'default'"):
        other.generate(REQUESTS[:1], Sampling(max_new_tokens=1))
    other.load_weights(5, model.named_parameters())
    with pytest.raises(EngineMismatchError, match=r"has weights '5-.*expected '5-") as caught:
        engine.generate(REQUESTS, Sampling(max_new_tokens=8))
    assert "\n" not in str(caught.value)
    other.close()


def test_a_push_that_fails_half_way_leaves_a_server_that_writes_nothing(
    server: RunningServer, tiny_model_dir: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = reference_model(tiny_model_dir())
    engine = engine_of(server, tmp_path)
    engine.start(ModelSource(str(tiny_model_dir())), max_length=MAX_LENGTH)
    engine.load_weights(1, model.named_parameters())
    with monkeypatch.context() as patch:
        # As on a machine that does not share the folder.
        patch.setattr(PushFolder, "write", lambda *_: tmp_path / "elsewhere")
        with pytest.raises(UserError, match="no weights in"):
            engine.load_weights(2, model.named_parameters())
    assert engine.version == 1
    with pytest.raises(EngineMismatchError, match=r"has weights '2-.*expected '1-"):
        engine.generate(REQUESTS, Sampling(max_new_tokens=8))
    engine.load_weights(2, model.named_parameters())
    assert len(engine.generate(REQUESTS, Sampling(max_new_tokens=8))) == len(REQUESTS)
    engine.close()


def test_names_that_do_not_fit_never_reach_the_server(
    engine: VLLMServerEngine, tiny_model_dir: Any
) -> None:
    weights = list(reference_model(tiny_model_dir()).named_parameters())
    engine.load_weights(5, weights)
    with pytest.raises(UserError, match="'surprise'"):
        engine.load_weights(6, [*weights, ("surprise", torch.zeros(1))])
    assert engine.version == 5
    assert engine.generate(REQUESTS[:1], Sampling(max_new_tokens=1))


def test_another_model_or_limit_is_refused(
    server: RunningServer, tiny_model_dir: Any, tmp_path: Path
) -> None:
    engine = engine_of(server, tmp_path)
    with pytest.raises(UserError, match=r"serves opd-.*expected opd-.*start it with that model"):
        engine.start(ModelSource(str(tiny_model_dir(seed=1))), max_length=MAX_LENGTH)
    with pytest.raises(UserError, match="a context of 64 tokens, expected at least 65"):
        engine.start(ModelSource(str(tiny_model_dir())), max_length=MAX_LENGTH + 1)
    engine.close()


def test_a_run_on_wrong_servers_ends_before_weights_load(
    server: RunningServer,
    teacher_server: RunningServer,
    in_lab: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr("opd_lightning.models.student.load_causal_lm", refuse)

    def told(server: RunningServer, student: str) -> str:
        configs = [
            str(ROOT / "configs" / name) for name in ("lab/opd.yaml", "engine/vllm_server.yaml")
        ]
        engine = "--data.engine.init_args"
        with pytest.raises(SystemExit) as ended:
            main(
                [
                    *("fit", "--config", configs[0], "--config", configs[1]),
                    *(f"{engine}.servers=[{server.url}]", f"{engine}.key_file={server.key_file}"),
                    f"--model.init_args.student.path=lab/arithmetic/{student}",
                    "--trainer.logger=false",
                ]
            )
        assert ended.value.code == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("opd: error:")]
        return line

    assert "start it with that model" in told(server, "student")
    assert "--weights pushed" in told(teacher_server, "teacher")


def _rank(rank: int, rendezvous: str, address: str, key: str, push: str, models: Any) -> None:
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    engine = VLLMServerEngine([address], key_file=key, push_folder=push, **WAITS)
    engine.start(ModelSource(str(models[0])), max_length=MAX_LENGTH)
    for version, folder in enumerate((models[1], models[0])):
        model = reference_model(folder)
        given = 0

        def weights(model: Any = model) -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal given
            for pair in model.named_parameters():
                dist.all_reduce(torch.ones(1))  # as gathering shards would
                given += 1
                yield pair

        engine.load_weights(version, weights())
        assert given == len(list(model.parameters()))
        assert len(os.listdir(push)) == 1
        sampling = Sampling(max_new_tokens=8)
        requests = REQUESTS[: 3 + 4 * rank]  # ranks need not ask for equally much
        assert_scored_by(model, requests, engine.generate(requests, sampling), sampling)
    with pytest.raises(UserError, match="'surprise'"):
        engine.load_weights(9, [("surprise", torch.zeros(1))])
    dist.barrier()
    engine.close()
    dist.destroy_process_group()


def test_ranks_share_a_server_and_one_pushes(
    server: RunningServer, tiny_model_dir: Any, tmp_path: Path
) -> None:
    files = (str(server.address_file), str(server.key_file), str(tmp_path / "push"))
    models = (tiny_model_dir(), tiny_model_dir(seed=1))
    arguments = (f"file://{tmp_path}/rendezvous", *files, models)
    call_ranks(_rank, *arguments, count=2, timeout=280)


# Authorisation -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client


@pytest.mark.parametrize(("method", "path"), [*DEVELOPMENT_ROUTES, *OTHER_ROUTES])
def test_without_the_key_no_route_answers(
    server: RunningServer, client: httpx.Client, method: str, path: str
) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-Api-Key": server.key}):
        answer = client.request(method, path, headers=headers, json={})
        assert (answer.status_code, answer.content) == (401, b"")
    # Made to fail where it exists, so that nothing is changed.
    known = client.delete(path, headers={"Authorization": f"Bearer {server.key}"})
    assert known.status_code == (405 if path in ROUTES else 404)


def test_health_needs_no_key(client: httpx.Client) -> None:
    assert client.get("/health").status_code == 200
    assert client.post("/health").status_code == 401


def test_it_listens_on_loopback_alone(server: RunningServer) -> None:
    port = int(server.url.rpartition(":")[2])
    listening = [
        line.split()[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
    ]
    assert listening == [f"0100007F:{port:04X}"]


def test_the_key_is_in_its_file_and_nowhere_else(
    server: RunningServer, engine: VLLMServerEngine
) -> None:
    key = server.key.encode()
    assert server.key_file.stat().st_mode & 0o777 == 0o600
    assert key not in server.log.read_bytes()
    children = server.children()
    assert children
    for pid in [server.process.pid, *children]:
        for name in ("cmdline", "environ"):
            assert key not in Path(f"/proc/{pid}/{name}").read_bytes()
    assert server.key not in f"{vars(engine)} {engine!r} {vars(engine.servers)}"


def routes(weights: Any, monkeypatch: pytest.MonkeyPatch, key_file: Path) -> set[str]:
    """Of the app that vLLM builds for `opd serve --weights ...`."""
    from vllm.entrypoints.launchers.app import build_app

    from opd_lightning.serving import authentication, keys, serve, server

    with monkeypatch.context() as patch:
        keys.make_key_file(key_file)
        patch.setenv(authentication.KEY_FILE_VARIABLE, str(key_file))
        for name in ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            patch.setenv(name, "1")  # the user's, or what another test leaves
        serve.set_environment(weights, 1)
        app = build_app(server._parse(serve.vllm_arguments(weights)), ("generate",))
    return {path for route in app.routes if (path := getattr(route, "path", None))}


def test_fixed_weights_have_no_development_routes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    development = {path for _, path in DEVELOPMENT_ROUTES}
    assert development <= routes("pushed", monkeypatch, tmp_path / "key")
    fixed = routes("fixed", monkeypatch, tmp_path / "key")
    assert not development & fixed
    assert "/inference/v1/generate" in fixed


@pytest.mark.last
def test_ending_it_ends_its_children(server: RunningServer) -> None:
    children = server.children()
    assert server.end() == 0
    until = time.monotonic() + 10
    while left := [pid for pid in children if is_running(pid)]:
        assert time.monotonic() < until, left
        time.sleep(0.1)
    assert not server.address_file.exists()


# Several servers ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_lost_servers_work_moves(tiny_model_dir: Any, tmp_path: Path) -> None:
    model = reference_model(tiny_model_dir())
    servers = [
        RunningServer(tiny_model_dir(), tmp_path, *PUSHED, name=name) for name in ("one", "two")
    ]
    try:
        engine = VLLMServerEngine(
            [str(server.wait().address_file) for server in servers],
            key_file=str(servers[0].key_file),
            push_folder=str(tmp_path / "push"),
            patience=3.0,
        )
        engine.start(ModelSource(str(tiny_model_dir())), max_length=MAX_LENGTH)
        engine.load_weights(0, model.named_parameters())
        sampling = Sampling(max_new_tokens=48)
        requests = [Request(REQUESTS[1].prompt_ids, seed) for seed in range(1000)]
        whole = engine.generate(requests, sampling)
        shares = [_answered(server) for server in servers]
        assert min(shares) > 0.3 * sum(shares), "the servers share the work"

        threading.Timer(0.3, servers[0].kill).start()
        again = engine.generate(requests, sampling)
        assert servers[0].process.poll() is not None, "it was killed after the work was done"
        assert [c.response_ids for c in again] == [c.response_ids for c in whole]

        threading.Timer(0.3, servers[1].kill).start()
        with pytest.raises(ServerAwayError, match="for 3 s"):
            engine.generate(requests, sampling)
        engine.close()
    finally:
        for server in servers:
            server.kill()


def _answered(server: RunningServer) -> float:
    """Requests that it finished, by its own count."""
    metrics = httpx.get(
        f"{server.url}/metrics", headers={"Authorization": f"Bearer {server.key}"}
    ).text.splitlines()
    return sum(float(m.split()[-1]) for m in metrics if m.startswith("vllm:request_success_total"))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["vllm_server", "vllm_server_transfer"])
def test_a_run_trains_on_servers(
    config: str, in_lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lab").symlink_to(in_lab / "lab")
    monkeypatch.chdir(tmp_path)
    Path("servers").mkdir()
    server = RunningServer(
        Path("lab/arithmetic/student"),
        Path("servers"),
        *("--weights", "pushed"),
        name="rollouts-0",  # where the configuration looks for it
    )
    try:
        server.wait()
        configs = ("lab/opd.yaml", f"engine/{config}.yaml")
        main(
            [
                "fit",
                *(word for name in configs for word in ("--config", str(ROOT / "configs" / name))),
                "--trainer.logger.init_args.save_dir=run",
                "--trainer.max_steps=3",
                "--data.prompts_per_step=16",
                "--data.sampling.max_new_tokens=16",
                "--trainer.enable_progress_bar=false",
            ]
        )
        key = server.key.encode()
    finally:
        server.kill()
    events = EventAccumulator("run")
    events.Reload()
    # The engine had the student's weights at every step, or training would have stopped.
    assert len(events.Scalars("optim/gradient_norm")) == 3
    assert max(event.value for event in events.Scalars("engine/logprob_gap_max")) < 1e-4
    written = [file for file in Path("run").rglob("*") if file.is_file()]
    assert written
    assert not [file for file in written if key in file.read_bytes()]
    assert sorted(file.name for file in Path("servers").rglob("*")) == [
        "key",
        *(["push"] if config == "vllm_server" else []),
        "rollouts-0.address",  # left behind by a server that was killed
        "rollouts-0.log",
    ]
