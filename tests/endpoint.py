"""A server that speaks enough of the OpenAI protocol to answer questions, for tests."""

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = Callable[[str, int], tuple[int, object]]
"""From the last message and how often it was asked before: a status, and a text (or any other JSON body)."""


@contextmanager
def serving(reply: Reply):
    """Answer on a free port; gives (URL, requests as (headers, body))."""
    seen, counts, lock = [], {}, threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = body["messages"][-1]["content"]
            with lock:
                seen.append((dict(self.headers), body))
                before = counts.get(question, 0)
                counts[question] = before + 1
            status, text = reply(question, before)
            answer = {"choices": [{"message": {"content": text}}]} if isinstance(text, str) else text
            payload = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
