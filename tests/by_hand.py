"""A server of OpenAI's completions by hand: `python by_hand.py FOLDER PORT ROWS CONTEXT`.

FOLDER/server.json says how it behaves: `first_s` and `between_s` before texts; `at_once`: so many
requests, of which none gets a text before all are there; `texts` in an answer instead of as many as
asked; `usage`: whether it counts them; `fails`: "end", "hang" (before it listens), "refuse" (the
first three requests, 429), "status" (500), "error" (within an answer) or "break" (off). As
llama.cpp's server does, it ends a connection that has carried an answer, and has not said so. What
the last one was started with and asked is kept in FOLDER/asked.jsonl.
"""

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    folder: Path
    says: dict
    lock = threading.Lock()
    all_there: threading.Barrier
    refused = 0
    used = False

    def do_GET(self):
        self.status(200 if self.path == "/health" else 404)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        fails = self.says.get("fails")
        if self.used:
            self.close_connection = True
            return
        with self.lock:
            refuses = fails == "refuse" and self.refused < 3
            Handler.refused += refuses
            note(self.folder, body | {"path": self.path, "key": self.headers["authorization"]})
        if refuses:
            self.status(429, ("retry-after", "0.01"))
        elif fails == "status":
            self.status(500)
        else:
            self.answer(body["max_tokens"], fails)

    def status(self, code, *headers):
        self.send_response(code)
        for name, value in (*headers, ("content-length", "6")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"a word")

    def answer(self, tokens, fails):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.used = True
        self.all_there.wait(60)
        texts = self.says.get("texts", tokens)
        for number in range(texts):
            time.sleep(self.says.get("between_s" if number else "first_s", 0))
            self.event(choices=[{"text": "x"}])
        if fails == "error":
            self.event(error={"message": "no memory"})
        if self.says.get("usage", True):
            usage = {"prompt_tokens": 1, "completion_tokens": texts}
            self.event(choices=[], usage=usage)
        if fails != "break":
            self.chunk("data: [DONE]\n\n")
        self.chunk("")

    def event(self, **part):
        self.chunk(f"data: {json.dumps(part)}\n\n")

    def chunk(self, text):
        self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())

    def log_message(self, *_):
        pass


def note(folder, line):
    with (folder / "asked.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def asked(folder):
    """What the server in `folder` was started with, and the bodies of its requests."""
    started, *bodies = map(json.loads, (folder / "asked.jsonl").read_text().splitlines())
    return started, bodies


def main():
    folder, port, *rest = sys.argv[1:]
    Handler.folder = Path(folder)
    Handler.says = json.loads((Handler.folder / "server.json").read_text())
    Handler.all_there = threading.Barrier(Handler.says.get("at_once", 1))
    own = sorted(name for name in os.environ if name.startswith("BY_HAND"))
    (Handler.folder / "asked.jsonl").unlink(missing_ok=True)
    note(Handler.folder, {"arguments": rest, "pid": os.getpid(), "environment": own})
    if Handler.says.get("fails") == "end":
        sys.exit("no such model")
    if Handler.says.get("fails") == "hang":
        time.sleep(3600)
    ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
