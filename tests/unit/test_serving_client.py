"""The client against real HTTP servers on loopback: patience, order, shares, one-line errors."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from opd_lightning.errors import ServerAwayError, UserError
from opd_lightning.serving import connection
from opd_lightning.serving.client import Servers
from opd_lightning.serving.connection import Connection
from tests.fuzz.stand_in import Reply, StandIn, reply
from tests.http_server import Answer, Server

KEY = "a-secret-key"

Start = Callable[..., Server]
Client = Callable[..., Servers]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Server] = []

    def make(answer: Answer, port: int = 0) -> Server:
        started.append(Server(answer, port))
        return started[-1]

    yield make
    for server in started:
        server.stop()


@pytest.fixture
def client() -> Iterator[Client]:
    made: list[Servers] = []

    def make(*servers: Server | str, **options: Any) -> Servers:
        urls = [s if isinstance(s, str) else s.url for s in servers]
        made.append(Servers(urls, **options))
        return made[-1]

    yield make
    for servers in made:
        servers.close()


def echo(body: dict[str, Any]) -> tuple[int, Any]:
    return 200, {"n": body.get("n")}


def numbers(servers: Servers, count: int) -> list[Any]:
    futures = servers.submit("/ask", [{"n": n} for n in range(count)])
    return [future.result(timeout=20)["n"] for future in futures]


def test_answers_come_in_order(start: Start, client: Client) -> None:
    def slow_first(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.2 if body["n"] == 0 else 0)
        return echo(body)

    assert numbers(client(start(slow_first)), 50) == list(range(50))


def test_several_share_the_load(start: Start, client: Client) -> None:
    one, other = start(echo), start(echo)
    assert numbers(client(one, other), 100) == list(range(100))
    assert 30 <= len(one.asked) <= 70
    assert len(one.asked) + len(other.asked) == 100


def test_a_busy_or_broken_moment_is_waited_out(start: Start, client: Client) -> None:
    codes = iter([503, 500])
    server = start(lambda body: (next(codes, 200), {"n": body["n"]}))
    assert numbers(client(server), 3) == [0, 1, 2]
    assert len(server.asked) == 5


def test_a_server_that_comes_late_is_waited_for(start: Start, client: Client) -> None:
    early = start(echo)
    early.stop()
    servers = client(early.url)
    threading.Timer(0.5, lambda: start(echo, early.http.server_port)).start()
    began = time.monotonic()
    assert numbers(servers, 20) == list(range(20))
    assert time.monotonic() - began > 0.5


def test_the_work_of_a_dead_server_moves(start: Start, client: Client) -> None:
    living, dead = start(echo), start(echo)
    servers = client(living, dead)
    assert numbers(servers, 4) == list(range(4))
    dead.stop()
    assert numbers(servers, 40) == list(range(40))


def test_a_server_that_dies_at_work_is_left(start: Start, client: Client) -> None:
    def hang_up(body: dict[str, Any]) -> tuple[int, Any]:
        raise ConnectionAbortedError

    assert numbers(client(start(echo), start(hang_up)), 40) == list(range(40))


def test_patience_ends(start: Start, client: Client) -> None:
    gone = start(echo)
    gone.stop()
    began = time.monotonic()
    with pytest.raises(ServerAwayError, match=f"{gone.url}.*no answer for 0.5 s.*start it"):
        numbers(client(gone.url, patience=0.5), 30)
    assert 0.4 < time.monotonic() - began < 30, "or it has waited for its usual patience"


def test_a_request_that_breaks_its_server_is_given_up(start: Start, client: Client) -> None:
    def poisoned(body: dict[str, Any]) -> tuple[int, Any]:
        return (
            (500, {"error": {"message": "index\nout of range"}}) if body["n"] == 7 else echo(body)
        )

    servers = client(start(poisoned), patience=2.0)
    futures = servers.submit("/ask", [{"n": n} for n in range(10)])
    with pytest.raises(ServerAwayError, match=r"5 times at one request.*500: index out of range"):
        futures[7].result(timeout=20)
    assert futures[9].result(timeout=20) == {"n": 9}


def test_a_slow_request_counts_as_failed(start: Start, client: Client) -> None:
    def sleeps_once(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(1 if len(server.asked) == 1 else 0)
        return echo(body)

    server = start(sleeps_once)
    assert numbers(client(server, timeout=0.2), 1) == [0]
    assert len(server.asked) == 2


def test_a_mistake_is_not_tried_again(start: Start, client: Client) -> None:
    server = start(lambda body: (400, {"error": {"message": "too\nlong", "code": 400}}))
    with pytest.raises(UserError, match=r"/ask: answered 400: too long$"):
        numbers(client(server), 1)
    assert len(server.asked) == 1


def test_another_model_is_named(start: Start, client: Client) -> None:
    def serves_b(body: dict[str, Any]) -> tuple[int, Any]:
        return (200, {"data": [{"id": "b"}]}) if body["path"] == "/v1/models" else (404, {})

    with pytest.raises(UserError, match="got model 'a' to ask, but it serves 'b'"):
        client(start(serves_b)).post_all("/ask", {"model": "a"})


@pytest.mark.parametrize("answer", [[], {"m": 1}, {"n": None}, "n", 3])
def test_an_answer_of_another_form_is_told_in_one_line(
    start: Start, client: Client, answer: Any
) -> None:
    server = start(lambda body: (200, answer))
    with pytest.raises(UserError, match=rf"{server.url}/ask: its answer does not fit") as refused:
        client(server).post_all("/ask", read=lambda told: told["n"] + 1)
    assert "\n" not in str(refused.value)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (reply(b"[" * 100_000), "answered no JSON"),
        (reply(b"[" * 100_000, 400), "answered 400"),
        (Reply(b"HTTP/1.1 400 No\r\nContent-Type: a; charset=rot13\r\n\r\nno", keep=False), "no"),
        (Reply(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nno", keep=False), "decompressed"),
        (reply({"n": 1}, trickle=0.05), "took too long"),
        (Reply(b"", keep=False), "broke the connection"),
    ],
)
def test_bytes_that_are_no_answer(client: Client, sent: Reply, told: str) -> None:
    server = StandIn()
    server.replies["/ask"] = sent
    servers = client(f"http://{server.place}", patience=0.2, timeout=0.5)
    with pytest.raises((UserError, ServerAwayError), match=told) as refused:
        servers.post_all("/ask")
    assert server.place in str(refused.value)
    server.close()


def test_an_answer_without_an_end_is_not_kept(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ANSWER_BYTES", 1000)
    server = StandIn()
    server.replies["/ask"] = reply({"n": "x" * 1000})
    with pytest.raises(UserError, match="more than 1000 bytes"):
        client(f"http://{server.place}").post_all("/ask")
    server.close()


def test_the_key_is_sent_and_never_shown(
    start: Start, client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def guarded(body: dict[str, Any]) -> tuple[int, Any]:
        return (200, {}) if body["key"] == f"Bearer {KEY}" else (401, {"error": "no"})

    server, file = start(guarded), tmp_path / "key"
    file.write_text(KEY + "\n")
    file.chmod(0o600)
    servers = client(server, key_file=str(file))
    caplog.set_level("DEBUG")
    assert servers.post_all("/ask") == [{}]
    assert servers.get_all("/ask") == [{}]
    assert KEY not in caplog.text + repr(vars(servers))
    with pytest.raises(UserError, match=r"answered 401.*key_file or OPD_SERVER_KEY"):
        client(server).post_all("/ask")


def test_the_key_may_come_from_the_environment(
    start: Start, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPD_SERVER_KEY", KEY)
    server = start(echo)
    client(server).get_all("/ask")
    assert server.asked[0]["key"] == f"Bearer {KEY}"


@pytest.mark.parametrize("key", ["\u043a\u043b\u044e\u0447", "two\nlines"])
def test_a_bad_key_in_the_environment(
    start: Start, client: Client, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPD_SERVER_KEY", key)
    with pytest.raises(UserError, match="OPD_SERVER_KEY: expected the key alone") as caught:
        client(start(echo)).get_all("/ask")
    assert key not in str(caught.value)


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_time_limit_that_no_request_keeps(timeout: float) -> None:
    with pytest.raises(UserError, match=f"timeout is {timeout} seconds, expected more than 0"):
        Servers(["http://127.0.0.1:1"], timeout=timeout)


@pytest.mark.parametrize(
    ("content", "mode", "told"),
    [(KEY, 0o644, "others may"), ("a b", 0o600, "the key alone"), (None, 0, "cannot read")],
)
def test_bad_key_files(
    client: Client, tmp_path: Path, content: str | None, mode: int, told: str
) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)
    with pytest.raises(UserError, match=told):
        client("http://127.0.0.1:1", key_file=str(file)).get_all("/")


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://x",
        f"http://me:{KEY}@x:1",
        "http://x?k=1",
        "http://x:99999",
        "http://x:port",
        "http://[::1",
        "http://",
    ],
)
def test_bad_addresses(url: str) -> None:
    with pytest.raises(UserError, match="address") as caught:
        Servers([url])
    assert KEY not in str(caught.value)


def test_an_address_file_is_read_when_it_is_needed(
    start: Start, client: Client, tmp_path: Path
) -> None:
    server, file = start(echo), tmp_path / "address"
    servers = client(str(file), server, patience=20)
    file.write_text(server.url + "\n")
    assert servers.urls == [server.url, server.url]
    assert numbers(servers, 3) == [0, 1, 2]


def test_an_address_file_is_read_again_when_its_server_is_lost(
    start: Start, client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger="opd_lightning")
    first, file = start(echo), tmp_path / "address"
    file.write_text(first.url + "\n")
    servers = client(str(file), patience=20)
    first.stop()
    futures = servers.submit("/ask", [{"n": n} for n in range(3)])
    time.sleep(0.5)
    file.unlink()  # a server that ends takes it away
    time.sleep(0.5)
    file.write_text("nonsense")
    time.sleep(0.5)
    second = start(echo)
    assert second.url != first.url
    file.write_text(second.url + "\n")
    assert [future.result(timeout=20)["n"] for future in futures] == [0, 1, 2]
    assert servers.urls == [second.url]
    assert f"{first.url} is at {second.url} now" in caplog.text


def test_post_all_asks_each(start: Start, client: Client) -> None:
    both = start(lambda _: (200, {"who": 0})), start(lambda _: (200, {"who": 1}))
    assert client(*both).post_all("/ask", {"n": 1}) == [{"who": 0}, {"who": 1}]
    assert [len(server.asked) for server in both] == [1, 1]


def test_post_all_waits_for_each(start: Start, client: Client) -> None:
    living, dead = start(echo), start(echo)
    dead.stop()
    with pytest.raises(ServerAwayError, match=dead.url):
        client(living, dead, patience=0.3).post_all("/ask", {"n": 1})


def test_a_cancelled_request_is_not_sent(start: Start, client: Client) -> None:
    gone = start(echo)
    gone.stop()
    servers = client(gone.url)
    first, *rest = servers.submit("/ask", [{"n": n} for n in range(3)])
    for future in rest:
        future.cancel()
    back = start(echo, gone.http.server_port)
    assert first.result(timeout=20) == {"n": 0}
    assert len(back.asked) == 1


def test_a_cancelled_request_leaves_no_connection_in_use(start: Start) -> None:
    """At each of the moments at which it may be cancelled, such as while it connects."""
    url = start(echo).url

    async def cancel_and_ask(moment: int) -> None:
        connection = Connection(url, None, 5.0)
        task = asyncio.ensure_future(connection.request("POST", "/ask", {"n": 0}))
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert await connection.request("POST", "/ask", {"n": 1}) == {"n": 1}
        await connection.close()

    for moment in range(30):
        asyncio.run(cancel_and_ask(moment))


def test_close_lets_nobody_wait(start: Start, client: Client) -> None:
    def slow(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.5)
        return echo(body)

    server = start(slow)
    servers = client(server)
    with ThreadPoolExecutor() as pool:
        futures = servers.submit_each("/ask", [{"n": 1}])
        waiting = pool.submit(wait, futures, timeout=20.0)
        time.sleep(0.1)
        servers.close()
        assert not waiting.result().not_done, "woken, not timed out"
    assert futures[0].cancelled()
    assert numbers(servers, 1) == [0]


def test_several_threads_may_ask(start: Start, client: Client) -> None:
    servers, found = client(start(echo)), []
    threads = [
        threading.Thread(target=lambda: found.append(numbers(servers, 20))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [list(range(20))] * 4
