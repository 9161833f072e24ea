"""What the server tests share: an orcd process, plain HTTP, event streams, raw sockets."""
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
ORCD = os.environ.get("ORCD", os.path.join(ROOT, "orcd"))
MODEL = os.path.join(ROOT, "models", "fable.gguf")
SLOW = 8 if "-san-" in ORCD else 1  # a sanitizer's build: so much more time and memory
if SLOW > 1:  # what was freed counts as memory for a while: a short one
    os.environ.setdefault("ASAN_OPTIONS", "quarantine_size_mb=8:thread_local_quarantine_size_kb=64")
WORKER_ID = "01234567-89ab-cdef-0123-456789abcdef"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Orcd:
    """`orcd serve` or `orcd worker`, ready when the constructor returns. One thread computes: on a busy machine two
    wait for each other, and what is tested here is the server."""

    def __init__(self, *args, kind="serve", key=None, model=MODEL, wait=True, threads=1):
        self.key = key
        self.dir = tempfile.mkdtemp(prefix="orcd-test-")
        self.log_path = os.path.join(self.dir, "log")
        self.port = free_port()
        if kind == "serve":
            command = [ORCD, "serve", model, "--port", str(self.port), "--threads", str(threads), *args]
        else:
            command = [ORCD, "worker", "--worker-id", WORKER_ID, "--model", model, "--gpu-device", "cpu",
                       "--port", str(self.port), "--threads", str(threads), *args]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=open(self.log_path, "w"), cwd=ROOT)
        self.pid = self.process.pid
        if wait:
            self.wait_ready()

    def wait_ready(self, seconds=30):
        end = time.time() + seconds
        while time.time() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"orcd ended with {self.process.returncode}: {self.log()}")
            try:
                if self.get("/health")[0] == 200:
                    return
            except OSError:
                time.sleep(0.02)
        raise RuntimeError("orcd does not answer")

    def log(self):
        with open(self.log_path) as f:
            return f.read()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise
        if self.process.stdout:
            self.process.stdout.close()
        if self.process.returncode not in (0, -signal.SIGKILL):  # a sanitizer has something to say
            raise AssertionError(f"orcd ended with {self.process.returncode}: {self.log()[-4000:]}")

    # ---- HTTP ----

    def headers(self, more=None):
        h = {"Content-Type": "application/json"}
        if self.key:
            h["Authorization"] = "Bearer " + self.key
        h.update(more or {})
        return h

    def request(self, method, path, body=None, headers=None, timeout=300):
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
            c.request(method, path, data, self.headers(headers))
            r = c.getresponse()
            return r.status, dict((k.lower(), v) for k, v in r.getheaders()), r.read()
        finally:
            c.close()

    def get(self, path, **more):
        return self.request("GET", path, **more)

    def post(self, path, body, **more):
        return self.request("POST", path, body, **more)

    def json(self, path, body=None, **more):
        status, _, data = self.request("POST" if body is not None else "GET", path, body, **more)
        return status, json.loads(data)

    def stream(self, path, body, headers=None, timeout=300):
        return Stream(self, path, body, headers, timeout)

    def metrics(self):
        out = {}
        for line in self.get("/metrics")[2].decode().splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                out[name] = float(value)
        return out

    def wait_idle(self, seconds=10):
        end = time.time() + seconds * SLOW
        while time.time() < end:
            h = self.json("/health")[1]
            if h["running"] == 0 and h["waiting"] == 0:
                return
            time.sleep(0.02)
        raise AssertionError("the engine did not become idle")

    # ---- the process ----

    def rss(self):
        with open(f"/proc/{self.pid}/status") as f:
            return int(re.search(r"VmRSS:\s+(\d+)", f.read()).group(1)) * 1024

    def n_fd(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def n_thread(self):
        return len(os.listdir(f"/proc/{self.pid}/task"))


class Stream:
    """A POST whose answer is read as server-sent events: (event name or None, data) while they come."""

    def __init__(self, server, path, body, headers=None, timeout=300):
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
        self.connection.request("POST", path, json.dumps(body).encode(), server.headers(headers))
        self.response = self.connection.getresponse()
        self.status = self.response.status
        self.times = []

    def __iter__(self):
        name = None
        while True:
            line = self.response.readline()
            if not line:
                return
            line = line.decode("utf-8").rstrip("\n")
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                self.times.append(time.monotonic())
                yield name, line[6:] if line[6:] == "[DONE]" else json.loads(line[6:])
                name = None

    def close(self):
        """Hang up at once."""
        if self.connection.sock:
            self.connection.sock.close()
        self.response.close()
        self.connection.close()


def completion_text(server, body):
    """The text of a streamed /v1/completions, and the times of its events."""
    s = server.stream("/v1/completions", dict(body, stream=True))
    assert s.status == 200, s.response.read()
    text = ""
    for _, d in s:
        if d != "[DONE]":
            assert "error" not in d, d
            for c in d["choices"]:
                text += c["text"]
    s.close()
    return text, s.times


def in_threads(functions):
    """Run all at once; the results in order. The first exception is raised."""
    result = [None] * len(functions)
    failed = []

    def run(i):
        try:
            result[i] = functions[i]()
        except BaseException as e:  # noqa: reported to the caller
            failed.append(e)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if failed:
        raise failed[0]
    return result


def raw(server, data, seconds=5, half_close=False):
    """Send bytes on a fresh connection and return everything that comes back until it closes or time is up."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as s:
        try:
            s.sendall(data)
            if half_close:
                s.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        out = b""
        try:
            while True:
                piece = s.recv(65536)
                if not piece:
                    break
                out += piece
        except OSError:
            pass
        return out


def status_of(answer):
    m = re.match(rb"HTTP/1\.1 (\d+)", answer)
    return int(m.group(1)) if m else None
