"""Questions to an endpoint: patience, refusals, keys, and verdicts that hold in both orders."""

import gzip
import logging
import socket
import threading
import time
from contextlib import suppress

import pytest

from tests.endpoint import serving
from trainer.rl.judge import Endpoint, JudgeError, compare, verdict


def ask(url: str, *questions: str, **settings) -> list[str | None]:
    endpoint = Endpoint(url, "judge", backoff=0.001, **settings)
    return endpoint.ask([[{"role": "user", "content": q}] for q in questions])


def test_answers_come_in_the_order_of_the_questions_with_what_was_asked_for():
    with serving(lambda question, before: (200, question.upper())) as (url, seen):
        assert ask(url, *"abcdefgh", max_concurrent=4) == list("ABCDEFGH")
    assert {body["model"] for _, body in seen} == {"judge"}
    assert {body["temperature"] for _, body in seen} == {0}


def test_a_busy_endpoint_is_asked_again_and_what_stays_unanswered_is_missing():
    def reply(question, before):
        return (200, "yes") if question == "soon" and before == 2 else (503, {})

    with serving(reply) as (url, seen):
        assert ask(url, "soon", "never", max_attempts=3) == ["yes", None]
    assert len(seen) == 6


def test_an_answer_without_text_is_missing():
    with serving(lambda question, before: (200, "x" if question == "a" else {"choices": []})) as (url, _):
        assert ask(url, "a", "b") == ["x", None]


def test_a_malformed_answer_is_asked_for_again():
    with serving(lambda question, before: (200, "x" if before else {"choices": 3})) as (url, seen):
        assert ask(url, "a") == ["x"]
    assert len(seen) == 2


@pytest.fixture
def raw():
    """A server that answers by a function of the connection, after the question was read; gives its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def answer_with(respond):
        def serve():
            with suppress(OSError):
                while not ended.is_set():
                    connection, _ = listener.accept()
                    with suppress(OSError), connection:
                        connection.recv(65536)
                        respond(connection, ended)

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    yield answer_with
    ended.set()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def dribble(connection, ended):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while not ended.wait(0.02):
        connection.sendall(b" ")


def dribble_headers(connection, ended):
    while not ended.wait(0.02):
        connection.sendall(b"H")


def flood(connection, ended):
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not ended.is_set():
        connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


def compressed(connection, ended):
    body = gzip.compress(b" " * 10_000_000)
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)


def nested(connection, ended):
    body = b"[" * 100_000
    connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


@pytest.mark.parametrize(
    ("respond", "reason"),
    [
        (dribble, "TimeoutError"),
        (dribble_headers, "TimeoutError"),
        (flood, "an answer of more than 1,048,576 bytes"),
        (compressed, "a compressed answer, which was not asked for"),
        (nested, "an answer without text"),
    ],
)
def test_what_no_endpoint_should_do_ends_in_time_and_is_named(respond, reason, raw):
    started = time.monotonic()
    with pytest.raises(JudgeError, match=f"answered none of 1 questions .{reason}"):
        ask(raw(respond), "a", timeout=0.3, max_attempts=2)
    assert time.monotonic() - started < 5


def test_a_redirect_is_named(raw):
    def respond(connection, ended):
        connection.sendall(b"HTTP/1.1 307 Moved\r\nLocation: http://elsewhere/v1\r\nContent-Length: 0\r\n\r\n")

    with pytest.raises(JudgeError, match="redirects to http://elsewhere/v1; give that address as the url"):
        ask(raw(respond), "a")


@pytest.mark.parametrize("url", ["http://[::bad/v1", "localhost:8000/v1", "http:///v1"])
def test_an_address_that_cannot_be_asked_is_refused(url):
    assert "the judge's url" in (Endpoint(url, "judge").url_problem() or "")


def test_a_password_in_the_address_is_in_no_message():
    with pytest.raises(JudgeError, match=r"^http://127.0.0.1:1/v1 answered none"):
        ask("http://user:hunter2@127.0.0.1:1/v1", "a", max_attempts=1)


def test_no_question_is_a_line_of_the_log(caplog):
    with serving(lambda question, before: (200, "x")) as (url, _), caplog.at_level(logging.INFO):
        ask(url.replace("//", "//user:hunter2@"), "a")
    assert caplog.text == ""


def test_a_refusal_and_silence_are_errors():
    with serving(lambda question, before: (401, {"error": "no such key"})) as (url, seen):
        with pytest.raises(JudgeError, match=r"answers status 401.*no such key"):
            ask(url, "a")
        assert len(seen) == 1
    with pytest.raises(JudgeError, match=r"answered none of 1 questions \(ConnectError\); is it up"):
        ask(url, "a", max_attempts=2)


def test_the_key_comes_from_the_environment_and_is_not_part_of_an_error(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret-7")
    forbidding = serving(lambda question, before: (403, {"error": "forbidden"}))
    with forbidding as (url, seen), pytest.raises(JudgeError) as refused:
        ask(url, "a", key_variable="JUDGE_KEY")
    assert seen[0][0]["Authorization"] == "Bearer secret-7"
    assert "secret-7" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("A is short. [[A]]", 0), ("[[B]].", 1), ("**[[B]]**", 1), ("A", None), ("[[A]] or [[B]]", None), (None, None)],
)
def test_a_verdict_is_one_mark(text, expected):
    # What is unclear is missing, not guessed.
    assert verdict(text) == expected


def test_a_judge_that_favours_a_place_decides_nothing():
    def favours_first(question, before):
        return 200, "[[A]]"

    def favours_long(question, before):
        first, second = question.split("[Answer A]\n")[1].split("\n\n[Answer B]\n")
        return 200, "[[A]]" if len(first) > len(second) else "[[B]]"

    prompts, pairs = [[{"role": "user", "content": "?"}]] * 2, [("long one", "short"), ("a", "bcd")]
    with serving(favours_first) as (url, _):
        assert compare(Endpoint(url, "judge"), prompts, pairs) == [None, None]
    with serving(favours_long) as (url, _):
        assert compare(Endpoint(url, "judge"), prompts, pairs) == [0, 1]
