"""orcd worker: the worker contract."""
import http.server
import json
import os
import random
import re
import signal
import subprocess
import threading
import time
import unittest

from common import MODEL, ORCD, WORKER_ID, Orcd, free_port, in_threads
from timing import assert_within


def setUpModule():
    global worker
    worker = Orcd("--ctx", "8192", "--max-batch", "2", "--log-json", kind="worker")


def tearDownModule():
    worker.stop()


def execute(**body):
    """Status, and the events or the error body."""
    headers = body.pop("headers", None)
    body = {"job_id": f"job-{random.getrandbits(60)}", "prompt": "Once upon a time", **body}
    s = worker.stream("/execute", body, headers)
    if s.status != 200:
        data = json.loads(s.response.read())
        s.close()
        return s.status, data
    events = list(s)
    s.close()
    return s.status, events


def text(events):
    return "".join(d["t"] for name, d in events if name == "token")


class Execute(unittest.TestCase):
    def test_events_in_order(self):
        status, events = execute(max_tokens=12, temperature=0, job_id="ordered")
        self.assertEqual(status, 200)
        names = [name for name, _ in events]
        self.assertEqual(names[0], "started")
        self.assertEqual(names[-1], "end")
        self.assertEqual(set(names[1:-1]), {"token"})
        self.assertEqual([d["i"] for n, d in events if n == "token"], list(range(len(names) - 2)))
        started, end = events[0][1], events[-1][1]
        self.assertEqual(started["job_id"], "ordered")
        self.assertRegex(started["started_at"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
        self.assertEqual(started["model"], "fable")
        self.assertEqual(started["seed"], end["seed"])
        self.assertEqual(end["tokens_out"], 12)
        self.assertEqual(end["stop_reason"], "MAX_TOKENS")
        self.assertGreater(end["decode_time_ms"], 0)

    def test_greedy_and_seeded_repeat(self):
        for more in [{"temperature": 0}, {"seed": 2**64 - 1}, {"seed": 7, "top_p": 0.9, "top_k": 50, "min_p": 0.01}]:
            a, b = execute(max_tokens=60, **more)[1], execute(max_tokens=60, **more)[1]
            self.assertEqual(text(a), text(b))
            if "seed" in more:
                self.assertEqual(a[-1][1]["seed"], more["seed"])

    def test_drawn_seed_repeats_the_text(self):
        a = execute(max_tokens=40)[1]
        b = execute(max_tokens=40, seed=a[0][1]["seed"])[1]
        self.assertEqual(text(a), text(b))

    def test_every_seed_of_64_bits(self):
        """Just beyond 2^63 the JSON library's own integers end."""
        for seed in (0, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 9913556989751108283, 10**19 - 1, 10**19, 2**64 - 1):
            status, events = execute(max_tokens=2, seed=seed)
            self.assertEqual((status, events[0][1]["seed"], events[-1][1]["seed"]), (200, seed, seed))
            text = f'{{"job_id":"9913556989751108283\\"","prompt":"a","max_tokens":1,"seed":{seed}}}'
            self.assertEqual(worker.post("/execute", text.encode())[0], 200)
        for seed in (2**64, 10**20):
            self.assertEqual(execute(max_tokens=2, seed=seed)[0], 400)

    def test_stop_string_across_tokens(self):
        whole = text(execute(max_tokens=60, temperature=0)[1])
        stop = whole[20:31]
        _, events = execute(max_tokens=60, temperature=0, stop=["never seen", stop])
        self.assertEqual(text(events), whole[:whole.index(stop)])
        self.assertEqual(events[-1][1]["stop_reason"], "STOP_SEQUENCE")
        self.assertEqual(events[-1][1]["stop_sequence_matched"], stop)

    def test_end_of_text(self):
        end = execute(max_tokens=2000, temperature=0, prompt="<|x|>")[1][-1][1]
        self.assertIn(end["stop_reason"], ("EOS", "MAX_TOKENS"))

    def test_metrics_on_request(self):
        _, events = execute(max_tokens=600, seed=3, metrics_interval_ms=250)
        found = [d for name, d in events if name == "metrics"]
        if events[-1][1]["decode_time_ms"] > 400:
            self.assertTrue(found)
        for m in found:
            self.assertEqual(set(m), {"tokens_out", "decode_time_ms", "tokens_per_sec", "vram_bytes"})
        self.assertNotIn("metrics", [n for n, _ in execute(max_tokens=5)[1]])

    def test_correlation_id(self):
        for given, want in [("abc-123", "abc-123"), ("with space", None), ("x" * 500, None), (None, None)]:
            s = worker.stream("/execute", {"job_id": f"c{random.random()}", "prompt": "a", "max_tokens": 1},
                              {"X-Correlation-Id": given} if given else None)
            got = s.response.getheader("X-Correlation-Id")
            list(s)
            s.close()
            self.assertEqual(got, want) if want else self.assertRegex(got, r"^req-\w{20,}$")

    def test_deadline(self):
        for past in ["2020-01-01T00:00:00Z", "1577836800", "1577836800000", "2020-01-01T00:00:00.5+00:00"]:
            status, body = execute(headers={"X-Deadline": past})
            self.assertEqual((status, body["code"], body["retriable"]), (504, "INFERENCE_TIMEOUT", True))
        status, body = execute(headers={"X-Deadline": "tomorrow"})
        self.assertEqual((status, body["errors"][0]["field"]), (400, "X-Deadline"))
        status, events = execute(headers={"X-Deadline": f"{time.time() + 0.3:.3f}"}, max_tokens=2048, seed=1)
        self.assertEqual(status, 200)
        if events[-1][0] != "end":  # otherwise the story was over sooner
            self.assertEqual(events[-1][1]["code"], "INFERENCE_TIMEOUT")

    def test_a_running_job_id_is_refused(self):
        s = worker.stream("/execute", {"job_id": "twice", "prompt": "Once upon a time", "max_tokens": 2048})
        next(iter(s))
        self.assertEqual(execute(job_id="twice")[0], 409)
        s.close()
        worker.wait_idle()
        for _ in range(50):  # the name is free a moment after the engine is
            status = execute(job_id="twice", max_tokens=1)[0]
            if status == 200:
                break
            time.sleep(0.01)
        self.assertEqual(status, 200)


class Validation(unittest.TestCase):
    def test_every_error_is_collected(self):
        status, _, body = worker.post("/execute", {
            "max_tokens": 2049, "temperature": 2.1, "top_p": -0.1, "top_k": -1, "min_p": 2, "repetition_penalty": 0,
            "stop": "x", "seed": "y", "metrics_interval_ms": 5})
        errors = {e["field"]: e for e in json.loads(body)["errors"]}
        self.assertEqual(status, 400)
        self.assertEqual(set(errors), {"job_id", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p",
                                       "repetition_penalty", "stop", "seed", "metrics_interval_ms"})
        self.assertEqual(errors["max_tokens"]["value"], 2049)
        self.assertEqual(errors["job_id"]["constraint"], "required")
        for e in errors.values():
            self.assertTrue(e["message"])

    def test_numbers_at_and_beyond_their_limits(self):
        vocabulary = worker.json("/health")[1]["vocab_size"]
        table = {"max_tokens": (1, 2048, True), "temperature": (0, 2, False), "top_p": (0, 1, False),
                 "min_p": (0, 1, False), "top_k": (0, vocabulary, True), "repetition_penalty": (0.01, 2, False)}
        for name, (low, high, whole) in table.items():
            small = {} if name == "max_tokens" else {"max_tokens": 1}
            for v in [low] + ([] if name == "max_tokens" else [high]):
                self.assertEqual(execute(**{name: v, **small})[0], 200, (name, v))
            for v in [-1, high + (1 if whole else 0.01), 2**31, 2**63, 2**64, 1e308, "5", [], {}, True]:
                status, body = execute(**{name: v, **small})
                self.assertEqual(status, 400, (name, v))
                if "errors" in body and body["errors"][0]["field"] != "body":
                    self.assertEqual(body["errors"][0]["field"], name)
        self.assertEqual(execute(max_tokens=1.5)[0], 400)

    def test_lengths(self):
        self.assertEqual(execute(job_id="x" * 128, max_tokens=1)[0], 200)
        self.assertEqual(execute(job_id="é" * 128, max_tokens=1)[0], 200)
        self.assertEqual(execute(job_id="x" * 129)[0], 400)
        self.assertEqual(execute(job_id="")[0], 400)
        self.assertEqual(execute(prompt="")[0], 400)
        self.assertEqual(execute(prompt="a" * 32769)[0], 400)
        status, body = execute(prompt="a b c d " * 4096, max_tokens=1)
        self.assertEqual(status, 400)
        self.assertEqual(body["errors"][0]["constraint"], "context")
        self.assertEqual(execute(stop=["a", "b", "c", "d"], max_tokens=1)[0], 200)
        self.assertEqual(execute(stop=["a"] * 5)[0], 400)
        self.assertEqual(execute(stop=["xyzzy " * 40])[0], 400)
        self.assertEqual(execute(stop=[""])[0], 400)

    def test_special_tokens_in_text_stay_text(self):
        status, body = worker.json("/tokenize", {"content": "<|start|>system<|message|>"})
        self.assertEqual(status, 200)
        self.assertTrue(all(t < 4080 for t in body["tokens"]))


class Cancel(unittest.TestCase):
    def test_cancel_within_100_ms_200_times(self):
        def longest():
            took = []
            for i in range(200):
                job = f"cancel-{i}"
                s = worker.stream("/execute", {"job_id": job, "prompt": "Once upon a time", "max_tokens": 2048,
                                               "seed": i})
                events = iter(s)
                for _ in range(1 + i % 5):
                    next(events)
                t0 = time.monotonic()
                self.assertEqual(worker.post("/cancel", {"job_id": job})[0], 202)
                name, last = list(events)[-1]
                took.append(time.monotonic() - t0)
                s.close()
                self.assertEqual((name, last["code"], last["retriable"]), ("error", "CANCELLED", False))
            took.sort()
            print(f"cancel to end of stream: median {took[100] * 1e3:.1f} ms, 95 % {took[190] * 1e3:.1f} ms")
            return took[-1]

        assert_within(self, 0.1, longest, "cancel to the end of the stream, of 200", [worker.pid])
        worker.wait_idle()

    def test_cancel_in_the_queue_is_a_status(self):
        running = [worker.stream("/execute", {"job_id": f"busy-{i}", "prompt": "Once upon a time", "max_tokens": 2048})
                   for i in range(2)]
        for s in running:
            next(iter(s))
        threading.Timer(0.15, lambda: worker.post("/cancel", {"job_id": "waiting"})).start()
        status, body = execute(job_id="waiting")
        for s in running:
            s.close()
        if status != 200:  # else one of the two stories ended early
            self.assertEqual((status, body["code"]), (499, "CANCELLED"))
        worker.wait_idle()

    def test_unknown_and_repeated(self):
        for _ in range(2):
            self.assertEqual(worker.post("/cancel", {"job_id": "nobody"})[0], 202)
        for bad in [{}, {"job_id": 5}, {"job_id": ""}]:
            self.assertEqual(worker.post("/cancel", bad)[0], 400)

    def test_client_gone_frees_the_place(self):
        for _ in range(10):
            s = worker.stream("/execute", {"job_id": f"g{random.random()}", "prompt": "a", "max_tokens": 2048})
            next(iter(s))
            s.close()
            t0 = time.monotonic()
            worker.wait_idle()
            self.assertLess(time.monotonic() - t0, 0.5)

    def test_full_queue(self):
        def one(i):
            s = worker.stream("/execute", {"job_id": f"q{i}", "prompt": "Once upon a time", "max_tokens": 100})
            answer = (s.status, s.response.getheader("Retry-After"))
            data = s.response.read()
            s.close()
            return answer, data

        answers = in_threads([lambda i=i: one(i) for i in range(30)])
        refused = [(h, d) for (status, h), d in answers if status == 503]
        self.assertTrue(refused)
        self.assertTrue(all(h for h, _ in refused))
        self.assertEqual(json.loads(refused[0][1])["code"], "QUEUE_FULL")
        self.assertEqual({s for (s, _), _ in answers}, {200, 503})


class Status(unittest.TestCase):
    def test_health_fields(self):
        h = worker.json("/health")[1]
        self.assertEqual((h["status"], h["worker_id"], h["model"], h["architecture"], h["resident"]),
                         ("healthy", WORKER_ID, "fable", "gpt-oss", True))
        self.assertEqual((h["tokenizer_kind"], h["vocab_size"], h["context_length"]), ("gguf-bpe", 4096, 8192))
        self.assertIn(h["state"], ("ready", "busy"))
        self.assertGreater(h["vram_bytes_used"], 10e6)
        self.assertTrue(h["quant_kind"])

    def test_metrics_names(self):
        execute(max_tokens=5)
        m = worker.metrics()
        for name in ["worker_vram_bytes", 'worker_requests_total{outcome="completed"}', "worker_tokens_in_total",
                     "worker_tokens_generated_total", "worker_inference_duration_ms_count", "worker_uptime_seconds",
                     "worker_active_experts", "worker_queue_depth", "worker_batch_size",
                     "worker_time_to_first_token_ms_count", "worker_inter_token_ms_count", "worker_queue_ms_count",
                     "worker_prefix_cache_hits_total", 'worker_kv_pages{pool="full",state="used"}']:
            self.assertIn(name, m)
        self.assertEqual(m["worker_active_experts"], 4)

    def test_metrics_are_well_formed(self):
        body = worker.get("/metrics")[2].decode()
        name = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
        for line in body.splitlines():
            self.assertRegex(line, rf'^(# (HELP|TYPE) {name} .+|{name}(\{{\w+="[^"]*"(,\w+="[^"]*")*\}})? \S+)$')
        typed = re.findall(r"^# TYPE (\S+)", body, re.M)
        self.assertEqual(len(typed), len(set(typed)))

    def test_log_is_json_and_holds_no_text(self):
        execute(prompt="Secretword and treasure", job_id="logged", max_tokens=5, temperature=0)
        time.sleep(0.2)
        lines = [json.loads(line) for line in worker.log().splitlines()]
        events = [line["event"] for line in lines]
        for wanted in ["startup", "model_load_start", "model_load_progress", "model_load_complete", "ready",
                       "execute_start", "execute_end"]:
            self.assertIn(wanted, events)
        self.assertTrue(all(line["worker_id"] == WORKER_ID for line in lines))
        mine = [line for line in lines if line.get("job_id") == "logged"]
        self.assertEqual([line["event"] for line in mine], ["execute_start", "execute_end"])
        self.assertTrue(all(line["correlation_id"] for line in mine))
        self.assertNotIn("Secretword", worker.log())


class Start(unittest.TestCase):
    def run_worker(self, *args):
        r = subprocess.run([ORCD, "worker", *args], capture_output=True, text=True, timeout=60)
        return r.returncode, r.stderr

    def args(self, **change):
        a = {"--worker-id": WORKER_ID, "--model": MODEL, "--gpu-device": "cpu", "--port": str(free_port()), **change}
        return [w for k, v in a.items() if v is not None for w in (k, v)]

    def test_usage_errors(self):
        for change in [{"--worker-id": None}, {"--worker-id": "nonsense"}, {"--worker-id": WORKER_ID + "0"},
                       {"--model": None}, {"--gpu-device": None}, {"--gpu-device": "-1"}, {"--gpu-device": "tpu"},
                       {"--port": None}, {"--port": "80"}, {"--port": "65536"}, {"--callback-url": "ftp://x"},
                       {"--inference-timeout-sec": "0"}, {"--max-tokens-out": "0"}]:
            code, err = self.run_worker(*self.args(**change))
            self.assertEqual(code, 2, (change, err))

    def test_failures_before_the_model_is_touched(self):
        import socket
        taken = socket.socket()
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for change in [{"--model": "/nowhere.gguf"}, {"--port": str(taken.getsockname()[1])}, {"--bind": "0.0.0.0"},
                       {"--bind": "192.0.2.1"}, {"--token-file": "/nowhere"}, {"--gpu-device": "999"}]:
            code, err = self.run_worker("--log-json", *self.args(**change))
            self.assertEqual(code, 1, (change, err))
            lines = [json.loads(line) for line in err.splitlines()]
            self.assertEqual([line["event"] for line in lines], ["startup", "error"], change)
            self.assertTrue(all(k in lines[-1] for k in ("code", "message", "device", "path")))
        taken.close()

    def test_a_broken_model(self):
        code, err = self.run_worker("--log-json", *self.args(**{"--model": ORCD}))
        self.assertEqual(code, 1)
        self.assertEqual(json.loads(err.splitlines()[-1])["code"], "MODEL_LOAD_FAILED")

    def test_too_little_memory(self):
        code, err = self.run_worker("--log-json", "--ctx", "131072", "--kv-cache-size-mb", "1", *self.args())
        self.assertEqual(code, 1, err)
        self.assertEqual(json.loads(err.splitlines()[-1])["code"], "INSUFFICIENT_VRAM")

    def test_callback_with_three_tries_and_staying_up(self):
        seen = []

        class Manager(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                seen.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
                self.send_response(500 if len(seen) < 3 else 200)
                self.end_headers()

            def log_message(self, *_):
                pass

        manager = http.server.HTTPServer(("127.0.0.1", 0), Manager)
        threading.Thread(target=manager.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{manager.server_port}/ready?pool=1"
        with Orcd("--ctx", "512", "--callback-url", url, kind="worker") as w:
            end = time.time() + 10
            while len(seen) < 3 and time.time() < end:
                time.sleep(0.05)
            self.assertEqual(len(seen), 3)
            path, body = seen[-1]
            self.assertEqual(path, "/ready?pool=1")
            self.assertEqual(body["worker_id"], WORKER_ID)
            self.assertEqual(body["model_ref"], MODEL)
            self.assertEqual(body["uri"], f"http://127.0.0.1:{w.port}")
            self.assertGreater(body["vram_bytes"], 1e6)
        manager.shutdown()
        with Orcd("--ctx", "512", "--callback-url", f"http://127.0.0.1:{free_port()}/", kind="worker") as w:
            end = time.time() + 10
            while "CALLBACK_FAILED" not in w.log() and time.time() < end:
                time.sleep(0.05)
            self.assertIn("CALLBACK_FAILED", w.log())
            self.assertEqual(w.get("/health")[0], 200)

    def test_shutdown(self):
        w = Orcd("--ctx", "512", kind="worker")
        self.assertEqual(w.post("/shutdown", {})[0], 202)
        self.assertEqual(w.process.wait(5), 0)
        w.stop()

    def test_token_file(self):
        path = f"/tmp/orcd-token-{os.getpid()}"
        with open(path, "w") as f:
            f.write("sesame\n")
        with Orcd("--ctx", "512", "--token-file", path, kind="worker", key="sesame") as w:
            for method, route in [("POST", "/execute"), ("POST", "/cancel"), ("POST", "/shutdown"), ("GET", "/metrics")]:
                self.assertEqual(w.request(method, route, {} if method == "POST" else None,
                                           headers={"Authorization": ""})[0], 401)
            self.assertEqual(w.post("/cancel", {"job_id": "x"})[0], 202)
        os.unlink(path)
