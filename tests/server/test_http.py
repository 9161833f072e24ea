"""HTTP itself: framing, limits, keys, origins. Raw sockets, so that nothing is mended on the way."""
import json
import os
import signal
import socket
import ssl
import subprocess
import time
import unittest

from common import ROOT, SLOW, Orcd, free_port, raw, status_of

LIMIT = 8 << 20


def setUpModule():
    global server, slow_header, slow_header_t0
    server = Orcd("--ctx", "4096", "--max-batch", "4")
    slow_header_t0 = time.monotonic()  # looked at by the last test, so that its ten seconds pass meanwhile
    slow_header = socket.create_connection(("127.0.0.1", server.port))
    slow_header.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")


def tearDownModule():
    slow_header.close()
    server.stop()


def post(body, *headers, path=b"/v1/completions", length=None):
    head = [b"POST " + path + b" HTTP/1.1", b"Host: localhost", b"Connection: close", *headers]
    if length is not None:
        head.append(b"Content-Length: %d" % length)
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def chunked(body, size):
    out = b""
    for i in range(0, len(body), size):
        piece = body[i:i + size]
        out += b"%x\r\n" % len(piece) + piece + b"\r\n"
    return out + b"0\r\n\r\n"


GOOD = json.dumps({"prompt": "Once", "max_tokens": 2}).encode()


class Framing(unittest.TestCase):
    def check(self, data, *statuses, seconds=5 * SLOW):
        answer = raw(server, data, seconds)
        self.assertIn(status_of(answer), statuses, answer[:300])
        self.assertEqual(server.get("/health")[0], 200)
        return answer

    def test_content_length(self):
        self.check(post(GOOD, length=len(GOOD)), 200)

    def test_chunked(self):
        self.check(post(chunked(GOOD, 5), b"Transfer-Encoding: chunked"), 200)

    def test_chunks_of_one_byte(self):
        self.check(post(chunked(GOOD, 1), b"Transfer-Encoding: chunked"), 200)

    def test_length_and_chunked_together(self):
        self.check(post(chunked(GOOD, 9), b"Transfer-Encoding: chunked", length=len(GOOD)), 400)

    def test_two_different_lengths(self):
        self.check(post(GOOD, b"Content-Length: 3", length=len(GOOD)), 400)

    def test_other_transfer_encoding(self):
        self.check(post(GOOD, b"Transfer-Encoding: gzip"), 501)

    def test_length_no_number(self):
        self.check(post(GOOD, b"Content-Length: x"), 400, None)

    def test_negative_length(self):
        self.check(post(GOOD, b"Content-Length: -1"), 400, None)

    def test_length_beyond_64_bits(self):
        self.check(post(GOOD, b"Content-Length: 99999999999999999999999"), 400, 413, None)

    def test_body_at_the_limit(self):
        body = b" " * (LIMIT - len(GOOD)) + GOOD
        self.check(post(body, length=len(body)), 200)

    def test_body_one_over_the_limit(self):
        body = b" " * (LIMIT + 1 - len(GOOD)) + GOOD
        self.check(post(body, length=len(body)), 413, None)

    def test_announced_100_mb(self):
        t0 = time.monotonic()
        self.check(post(b"", length=100 << 20), 413)
        self.assertLess(time.monotonic() - t0, 2 * SLOW)

    def test_chunked_body_at_the_limit(self):
        body = b" " * (LIMIT - len(GOOD)) + GOOD
        self.check(post(chunked(body, 1 << 16), b"Transfer-Encoding: chunked"), 200)

    def test_chunked_body_over_the_limit(self):
        body = b" " * (LIMIT + 1 - len(GOOD)) + GOOD
        self.check(post(chunked(body, 1 << 16), b"Transfer-Encoding: chunked"), 413)

    def test_compressed_body(self):
        self.check(post(GOOD, b"Content-Encoding: gzip", length=len(GOOD)), 415)

    def test_header_too_long(self):
        self.check(post(GOOD, b"X-Long: " + b"a" * 50000, length=len(GOOD)), 400, 413, 431, None)

    def test_path_too_long(self):
        self.check(b"GET /" + b"a" * 50000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, 404, 413, 414, 431, None)

    def test_endless_header(self):
        self.check(b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: a\r\n" % i for i in range(9000)), 400, 413, 431, None)

    def test_garbage(self):
        for data in [b"\0\0\0\0\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9.9\r\n\r\n"]:
            raw(server, data, 0.3)
            self.assertEqual(server.get("/health")[0], 200)

    def test_missing_host(self):
        self.check(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n", 400, None)

    def test_expect_continue(self):
        s = socket.create_connection(("127.0.0.1", server.port), timeout=5)
        s.sendall(post(b"", b"Expect: 100-continue", length=len(GOOD)))
        self.assertIn(b"100 Continue", s.recv(1000))
        s.sendall(GOOD)
        answer = b""
        while piece := s.recv(65536):
            answer += piece
        self.assertEqual(status_of(answer), 200)
        s.close()

    def test_two_requests_at_once_on_a_connection(self):
        one = post(GOOD, length=len(GOOD)).replace(b"Connection: close\r\n", b"")
        answer = raw(server, one + post(GOOD, length=len(GOOD)))
        self.assertEqual(answer.count(b"HTTP/1.1 200"), 2)

    def test_security_headers(self):
        _, headers, _ = server.get("/health")
        self.assertEqual(headers["x-content-type-options"], "nosniff")
        self.assertEqual(headers["cache-control"], "no-store")
        self.assertNotIn("server", headers)

    def test_zz_slow_header_is_closed_after_ten_seconds(self):
        slow_header.settimeout(20)
        for _ in range(100):  # a byte now and then does not help
            try:
                slow_header.settimeout(0.3)
                if slow_header.recv(1000) == b"":
                    break
            except socket.timeout:
                try:
                    slow_header.sendall(b"X")
                except OSError:
                    break
            except OSError:
                break
        took = time.monotonic() - slow_header_t0
        self.assertGreater(took, 9)
        self.assertLess(took, 14 * SLOW)


class Crowd(unittest.TestCase):
    def test_requests_that_come_at_the_same_moment(self):
        """Connections are open; all ask while the server looks away. libmicrohttpd's own thread lets 128 wait."""
        ask = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        for n in (128, 129):
            clients = [socket.create_connection(("127.0.0.1", server.port), timeout=5 * SLOW) for _ in range(n)]
            for c in clients:
                self.addCleanup(c.close)
            server.get("/health")  # they are accepted
            time.sleep(0.1)
            os.kill(server.pid, signal.SIGSTOP)
            try:
                for c in clients:
                    c.sendall(ask)
            finally:
                os.kill(server.pid, signal.SIGCONT)
            self.assertEqual([status_of(c.recv(4096)) for c in clients], [200] * n)


class Routes(unittest.TestCase):
    def test_unknown_path(self):
        status, body = server.json("/v1/nothing", {})
        self.assertEqual(status, 404)
        self.assertEqual(set(body["error"]), {"message", "type", "param", "code"})

    def test_wrong_method(self):
        self.assertEqual(server.request("DELETE", "/v1/models")[0], 405)
        self.assertEqual(server.get("/v1/completions")[0], 405)

    def test_foreign_host(self):
        for host in [b"evil.example", b"127.0.0.1.evil.example", b"localhost.evil.example:80"]:
            answer = raw(server, b"GET /health HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
            self.assertEqual(status_of(answer), 403)

    def test_local_hosts(self):
        for host in [b"localhost", b"127.0.0.1:8080", b"[::1]:8080", b"LOCALHOST"]:
            answer = raw(server, b"GET /health HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
            self.assertEqual(status_of(answer), 200)

    def test_foreign_origin(self):
        for origin in ["http://evil.example", "null", "https://localhost.evil.example"]:
            self.assertEqual(server.get("/v1/models", headers={"Origin": origin})[0], 403)
        self.assertEqual(server.get("/v1/models", headers={"Origin": "http://localhost:3000"})[0], 200)

    def test_control_plane_answers_while_a_large_body_is_parsed(self):
        body = json.dumps({"content": "word " * 1_500_000}).encode()
        import threading
        t = threading.Thread(target=lambda: server.post("/tokenize", body))
        t.start()
        worst = 0
        while t.is_alive():
            t0 = time.monotonic()
            server.get("/health")
            worst = max(worst, time.monotonic() - t0)
        self.assertLess(worst, 0.25 * SLOW)


class Json(unittest.TestCase):
    def test_malformed(self):
        bad = ['', '{', '[', 'nul', '{"a":}', '{"a":1,}', "{'a':1}", '{"a":1}x', '"a"', '[]', '1', 'null', '{"a":01}',
               '{"a":1e999}', '{"a":"\\ud800"}', '{"prompt":1,"prompt":2}', '{"a":+1}', '{"a":.5}', '{"a":NaN}',
               '{"a":"\t"}', '{"a":99999999999999999999999}', '\ufeff{}', '{"a":"\\x"}', '[' * 100000,
               '{"a":' * 100000]
        for text in bad:
            t0 = time.monotonic()
            status, body = server.json("/v1/completions", text.encode("utf-8"))
            self.assertEqual(status, 400, text[:40])
            self.assertIn("message", body["error"])
            self.assertLess(time.monotonic() - t0, 0.5 * SLOW)

    def test_invalid_utf8(self):
        for data in [b'{"prompt":"\xff"}', b'{"prompt":"\xc0\x80"}', b'{"prompt":"\xed\xa0\x80"}']:
            self.assertEqual(server.post("/v1/completions", data)[0], 400)

    def test_the_connection_goes_on_after_an_error(self):
        bad = post(b"{", length=1).replace(b"Connection: close\r\n", b"")
        answer = raw(server, bad + post(GOOD, length=len(GOOD)))
        self.assertEqual([answer.count(b"HTTP/1.1 400"), answer.count(b"HTTP/1.1 200")], [1, 1])


class Keys(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.path = f"/tmp/orcd-keys-{os.getpid()}"
        with open(cls.path, "w") as f:
            f.write("# two keys\nfirst-key\n\nsecond-key\n")
        cls.server = Orcd("--ctx", "512", "--max-batch", "1", "--api-key-file", cls.path, key="first-key")

    @classmethod
    def tearDownClass(cls):
        cls.server.stop()
        os.unlink(cls.path)

    def test_every_route_but_health_needs_a_key(self):
        routes = [("GET", "/metrics"), ("GET", "/v1/models"), ("POST", "/v1/completions"),
                  ("POST", "/v1/chat/completions"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/nothing"),
                  ("POST", "/health")]
        for method, path in routes:
            for headers in [{"Authorization": ""}, {"Authorization": "Bearer wrong"}, {"Authorization": "first-key"},
                            {"Authorization": "Bearer first-key "}, {"Authorization": "Bearer "}]:
                status, h, body = self.server.request(method, path, {} if method == "POST" else None, headers=headers)
                self.assertEqual(status, 401, (method, path, headers))
                self.assertIn("error", json.loads(body))
                self.assertEqual(h["www-authenticate"], "Bearer")
        self.assertEqual(self.server.request("GET", "/health", headers={"Authorization": ""})[0], 200)

    def test_each_key_opens(self):
        for headers in [{"Authorization": "Bearer second-key"}, {"Authorization": "", "x-api-key": "second-key"},
                        {"Authorization": "bearer first-key"}]:
            self.assertEqual(self.server.get("/v1/models", headers=headers)[0], 200)

    def test_beyond_loopback_needs_a_key(self):
        from common import MODEL, ORCD
        r = subprocess.run([ORCD, "serve", MODEL, "--host", "0.0.0.0", "--port", str(free_port())],
                           capture_output=True, text=True, timeout=20)
        self.assertEqual(r.returncode, 1)
        self.assertIn("key", r.stderr)


class Tls(unittest.TestCase):
    def test_https(self):
        folder = f"/tmp/orcd-tls-{os.getpid()}"
        os.makedirs(folder, exist_ok=True)
        cert, key = os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem")
        try:
            made = subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
                                   "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout",
                                   key, "-out", cert], capture_output=True)
        except FileNotFoundError:
            self.skipTest("openssl is not installed")
        self.assertEqual(made.returncode, 0, made.stderr)
        s = Orcd("--ctx", "512", "--max-batch", "1", "--tls-cert", cert, "--tls-key", key, wait=False)
        try:
            context = ssl.create_default_context(cafile=cert)
            import http.client
            for _ in range(200):
                try:
                    c = http.client.HTTPSConnection("127.0.0.1", s.port, context=context, timeout=10)
                    c.request("POST", "/v1/completions", GOOD)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
            r = c.getresponse()
            self.assertEqual(r.status, 200, r.read())
            c.close()
        finally:
            s.stop()
