"""Signals, clients that do not read, sudden death."""
import json
import os
import shutil
import signal
import socket
import tempfile
import time
import unittest

from common import MODEL, SLOW, Orcd, completion_text

LONG = {"prompt": "Once upon a time", "max_tokens": 3000, "stream": True, "ignore_eos": True}


class Drain(unittest.TestCase):
    def setUp(self):
        self.server = Orcd("--ctx", "4096", "--max-batch", "4", "--drain-sec", str(2 * SLOW))

    def tearDown(self):
        if self.server.process.poll() is None:
            self.server.process.kill()
        self.server.process.wait()
        self.server.process.stdout.close()

    def ends(self, code, within):
        within *= SLOW
        t0 = time.monotonic()
        self.assertEqual(self.server.process.wait(within + 5), code)
        self.assertLess(time.monotonic() - t0, within)

    def test_running_requests_finish(self):
        s = self.server.stream("/v1/completions", dict(LONG, max_tokens=150))
        events = iter(s)
        next(events)
        os.kill(self.server.pid, signal.SIGTERM)
        time.sleep(0.15)
        rest = [d for _, d in events]
        self.assertEqual(rest[-1], "[DONE]")
        self.assertEqual(rest[-2]["choices"][0]["finish_reason"], "length")
        self.ends(0, 3)

    def test_new_requests_are_refused_meanwhile(self):
        s = self.server.stream("/v1/completions", LONG)
        next(iter(s))
        os.kill(self.server.pid, signal.SIGTERM)
        time.sleep(0.2)
        status, headers, body = self.server.post("/v1/completions", {"prompt": "x"})
        self.assertEqual((status, json.loads(body)["error"]["code"]), (503, "shutting_down"))
        self.assertIn("retry-after", headers)
        self.assertEqual(self.server.json("/health")[1]["state"], "draining")
        s.close()
        self.ends(0, 3)

    def test_what_takes_too_long_is_cut_with_an_error(self):
        s = self.server.stream("/v1/completions", LONG)
        events = iter(s)
        next(events)
        os.kill(self.server.pid, signal.SIGINT)
        rest = [d for _, d in events]
        self.assertEqual(rest[-1], "[DONE]")
        if "error" in rest[-2]:  # else 3,000 tokens took less than the drain time
            self.assertEqual(rest[-2]["error"]["code"], "shutting_down")
        self.ends(0, 5)

    def test_a_second_signal_ends_at_once(self):
        s = self.server.stream("/v1/completions", LONG)
        next(iter(s))
        os.kill(self.server.pid, signal.SIGTERM)
        time.sleep(0.3)
        os.kill(self.server.pid, signal.SIGTERM)
        self.ends(1, 1)

    def test_idle_ends_at_once(self):
        os.kill(self.server.pid, signal.SIGTERM)
        self.ends(0, 2)


class Clients(unittest.TestCase):
    def test_a_slow_reader_is_dropped_and_others_go_on(self):
        with Orcd("--ctx", "8192", "--max-batch", "17") as server:
            alone = completion_text(server, {"prompt": "The old king", "max_tokens": 100, "temperature": 0})[0]
            body = json.dumps({"prompt": "Once upon a time", "max_tokens": 8000, "n": 16, "logprobs": 20,
                               "ignore_eos": True, "stream": True, "seed": 1}).encode()
            slow = socket.socket()
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", server.port))
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) +
                         body)
            while server.json("/health")[1]["running"] < 16:
                time.sleep(0.02)
            rss = server.rss()
            again = completion_text(server, {"prompt": "The old king", "max_tokens": 100, "temperature": 0})[0]
            self.assertEqual(again, alone)
            t0 = time.monotonic()
            server.wait_idle(60)
            time.sleep(0.2)
            print(f"a client that does not read was dropped {time.monotonic() - t0:.1f} s later")
            m = server.metrics()
            page = 64 * 3 * 2 * 2 * 64 * 2  # fable: positions, layers of a pool, K and V, heads, values, bytes
            kv = sum(m[f'worker_kv_pages{{pool="{pool}",state="used"}}'] for pool in ("full", "window")) * page
            self.assertLess(server.rss() - rss - kv, SLOW * 24 << 20)
            self.assertEqual(m['worker_requests_total{outcome="cancelled"}'], 16)
            slow.close()

    def test_hanging_up_before_the_answer(self):
        with Orcd("--ctx", "4096", "--max-batch", "2") as server:
            body = json.dumps({"prompt": "Once", "max_tokens": 3000, "ignore_eos": True}).encode()
            for _ in range(20):
                s = socket.create_connection(("127.0.0.1", server.port))
                s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" %
                          len(body) + body)
                time.sleep(0.02)
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not an end
                s.close()
            t0 = time.monotonic()
            server.wait_idle()
            self.assertLess(time.monotonic() - t0, SLOW)

    def test_500_idle_connections_do_not_matter(self):
        with Orcd("--ctx", "4096", "--max-batch", "2") as server:
            idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(500)]
            for s in idle[::2]:
                s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
            t0 = time.monotonic()
            self.assertEqual(server.json("/v1/completions", {"prompt": "x", "max_tokens": 2})[0], 200)
            self.assertLess(time.monotonic() - t0, SLOW)
            for s in idle:
                s.close()


class Model(unittest.TestCase):
    """The model's file is cut off while it is mapped: 1.5 MB and an odd number of bytes are left."""

    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="orcd-test-")
        self.addCleanup(shutil.rmtree, self.dir)
        self.path = shutil.copy(MODEL, self.dir)

    def cut(self):
        os.truncate(self.path, 1500001)

    def test_streams_end_with_an_error_and_the_exit_code_is_70(self):
        server = Orcd("--ctx", "4096", "--max-batch", "2", "--no-repack", model=self.path)
        streams = [server.stream("/v1/completions", dict(LONG, seed=i)) for i in range(4)]  # two of them wait
        next(iter(streams[0]))
        self.cut()
        for s in streams:
            events = [d for _, d in s]
            self.assertEqual(events[-1], "[DONE]")
            self.assertIn("became shorter", events[-2]["error"]["message"])
            s.close()
        self.assertEqual(server.process.wait(5), 70)
        self.assertIn("MODEL_LOST", server.log())
        server.process.stdout.close()

    def test_an_idle_server_says_so_at_the_next_request(self):
        server = Orcd("--ctx", "4096", "--max-batch", "2", "--no-repack", model=self.path)
        self.cut()
        status, body = server.json("/v1/completions", {"prompt": "Once", "max_tokens": 4})
        self.assertEqual(status, 500)
        self.assertIn("became shorter", body["error"]["message"])
        self.assertEqual(server.process.wait(5), 70)
        server.process.stdout.close()

    def test_weights_in_memory_do_not_need_the_file(self):
        request = {"prompt": "Once upon a time", "max_tokens": 60, "temperature": 0}
        with Orcd("--ctx", "4096", "--max-batch", "2", model=self.path) as server:
            before = completion_text(server, request)[0]
            self.cut()
            self.assertEqual(completion_text(server, request)[0], before)
            self.assertEqual(server.json("/health")[1]["status"], "healthy")


class Death(unittest.TestCase):
    def test_kill_and_start_again_on_the_same_port(self):
        port = None
        for _ in range(5):
            s = Orcd("--ctx", "1024", "--max-batch", "2", *(["--port", str(port)] if port else []), wait=port is None)
            if port:
                s.port = port
                s.wait_ready()
            port = s.port
            stream = s.stream("/v1/completions", dict(LONG, max_tokens=900))
            next(iter(stream))
            s.process.kill()
            s.process.wait()
            s.process.stdout.close()
            stream.close()
