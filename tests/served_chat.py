"""A chat completions server of one function, and what tests ask it about."""

from typing import Any

from opd_lightning.types import Message, Prompt
from tests.http_server import Answer, Server

MODELS = {"data": [{"id": "judge"}]}


def prompt(question: str = "1+1", answer: str | None = "2") -> Prompt:
    message: Message = {"role": "user", "content": question}
    return Prompt(id=question, messages=(message,), answer=answer, origin="p.jsonl:1")


def reply(text: str, **more: Any) -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"content": text}, **more}]}


def text_of(asked: dict[str, Any]) -> str:
    return str(asked["messages"][0]["content"])


class Serving:
    """Starts servers of the model "judge", and stops them in the end."""

    def __init__(self) -> None:
        self.servers: list[Server] = []

    def __call__(self, answer: Answer) -> Server:
        def both(asked: dict[str, Any]) -> tuple[int, Any]:
            return (200, MODELS) if asked["path"] == "/v1/models" else answer(asked)

        self.servers.append(Server(both))
        return self.servers[-1]

    def stop(self) -> None:
        for server in self.servers:
            server.stop()
