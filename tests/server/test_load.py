"""Many at once: the same bytes as alone, nothing left behind, nobody starves."""
import http.client
import json
import os
import random
import subprocess
import time
import unittest

from common import ROOT, SLOW, Orcd, completion_text, in_threads
from timing import Watch, assert_within, load

STREAMS = 64


def setUpModule():
    global server
    server = Orcd("--ctx", "24576", "--max-batch", str(STREAMS))


def tearDownModule():
    server.stop()


def request(i):
    """Different prompts, lengths and ways to sample; even ones are greedy."""
    openings = ["Once upon a time", "The old king", "A fox and a crow", "In a deep forest", "There was a miller"]
    body = {"prompt": openings[i % 5] + " and" * (i // 5), "max_tokens": 24 + i % 17}
    return dict(body, temperature=0) if i % 2 == 0 else dict(body, seed=i, top_p=0.95, min_p=0.01)


class Equality(unittest.TestCase):
    def test_64_streams_equal_the_same_alone(self):
        together = in_threads([lambda i=i: completion_text(server, request(i))[0] for i in range(STREAMS)])
        alone = [completion_text(server, request(i))[0] for i in range(STREAMS)]
        self.assertEqual(together, alone)
        self.assertGreater(len(set(alone)), 30)

    def test_chats_among_others_equal_the_same_alone(self):
        def chat(i):
            status, body = server.json("/v1/chat/completions", {
                "messages": [{"role": "user", "content": f"What is {i} plus {2 * i}?"}], "temperature": 0,
                "max_tokens": 120})
            self.assertEqual(status, 200)
            m = body["choices"][0]["message"]
            return m["content"], m.get("reasoning")

        noise = [lambda i=i: completion_text(server, request(i))[0] for i in range(24)]
        together = in_threads([lambda i=i: chat(i) for i in range(12)] + noise)[:12]
        self.assertEqual(together, [chat(i) for i in range(12)])

    def test_many_requests_in_one(self):
        body = {"prompt": [f"The number {i} is" for i in range(16)], "n": 2, "max_tokens": 8, "seed": 4}
        status, a = server.json("/v1/completions", body)
        self.assertEqual(status, 200)
        self.assertEqual([c["index"] for c in a["choices"]], list(range(32)))
        for i in (0, 7, 15):
            one = server.json("/v1/completions", dict(body, prompt=body["prompt"][i]))[1]
            self.assertEqual([c["text"] for c in one["choices"]],
                             [c["text"] for c in a["choices"][2 * i:2 * i + 2]])


class Churn(unittest.TestCase):
    def test_random_cancels_and_disconnects(self):
        rng = random.Random(1)
        plan = [(rng.random(), rng.randrange(1, 30), rng.random() < 0.5) for _ in range(100)]
        reference = completion_text(server, request(3))[0]

        def one(i):
            wait, n, chat = plan[i]
            path = "/v1/chat/completions" if chat else "/v1/completions"
            body = {"messages": [{"role": "user", "content": "Tell me a story."}]} if chat else {"prompt": "Once"}
            s = server.stream(path, dict(body, max_tokens=500, stream=True, seed=i, n=1 + i % 3))
            if wait > 0.2:
                for _, event in s:
                    n -= 1
                    if n == 0 or event == "[DONE]":
                        break
            s.close()

        def some(k):
            for i in range(k, len(plan), 12):
                one(i)

        in_threads([lambda k=k: some(k) for k in range(12)])
        server.wait_idle()
        self.assertEqual(completion_text(server, request(3))[0], reference)

    def test_nothing_is_left_after_1000_requests(self):
        server = Orcd("--ctx", "512", "--max-batch", "8")  # little memory, so that all of it is soon in use
        self.addCleanup(server.stop)

        def some(k, n):
            for i in range(n):
                kind = (k + i) % 5
                if kind == 0:
                    server.json("/v1/chat/completions", {"messages": [{"role": "user", "content": f"Hi {i} {k}"}],
                                                         "max_tokens": 3})
                elif kind == 1:
                    server.json("/v1/completions", {"prompt": f"A {i}", "max_tokens": 3, "temperature": 9})
                elif kind == 2:
                    s = server.stream("/v1/completions", {"prompt": f"B {i}", "max_tokens": 200, "stream": True})
                    next(iter(s))
                    s.close()
                else:
                    completion_text(server, {"prompt": f"C {i} {k}", "max_tokens": 3})

        def all_at_once(n):
            in_threads([lambda k=k: some(k, n) for k in range(10)])
            server.wait_idle()
            time.sleep(0.5)  # the watcher and the network thread let go of the last sockets
            return server.n_fd(), server.n_thread(), server.rss()

        all_at_once(60)
        fd, thread, rss = all_at_once(20)
        fd2, thread2, rss2 = all_at_once(100)
        print(f"after 1000 requests: {fd2 - fd:+d} descriptors, {thread2 - thread:+d} threads, "
              f"{(rss2 - rss) / 1024:+.0f} KiB")
        self.assertEqual((fd2, thread2), (fd, thread))
        self.assertLess(rss2 - rss, SLOW * 8 << 20)


LOAD = os.path.join(ROOT, os.environ.get("ORCD_BUILD", "build"), "bench", "load")


@unittest.skipUnless(os.path.exists(LOAD), f"{LOAD} is missing: run make bench")
class Bench(unittest.TestCase):
    def load(self, *args):
        r = subprocess.run([LOAD, "-P", str(server.port), "-j", *args], capture_output=True, text=True, timeout=60 * SLOW)
        return r.returncode, json.loads(r.stdout)

    def test_load_counts_what_the_server_counts(self):
        before = server.metrics()
        code, r = self.load("-n", "6", "-r", "3", "-p", "20", "-g", "17")
        after = server.metrics()
        self.assertEqual((code, r["requests"], r["failed"]), (0, 18, 0))
        self.assertEqual(after["worker_tokens_generated_total"] - before["worker_tokens_generated_total"], 18 * 17)
        self.assertAlmostEqual(r["all"], 18 * 17 / r["seconds"], delta=0.01 * r["all"])
        self.assertLessEqual(r["first"], r["first_max"])
        self.assertLessEqual(r["gap"], r["gap_max"])

    def test_load_fails_when_answers_do(self):
        self.assertEqual(self.load("-n", "2", "-r", "1", "-p", "20", "-V", "100000000")[0], 1)


class Memory(unittest.TestCase):
    def test_streams_that_outgrow_the_memory_end_with_the_right_texts(self):
        """KV memory for an answer and a half: two begin, for 2,048 tokens each, the third waits; later one gives way."""
        small = Orcd("--ctx", "2800", "--max-batch", "3", "--kv-cache-size-mb", "9", kind="worker")
        self.addCleanup(small.stop)

        def ask(i):
            return {"prompt": f"Story {i}:", "max_tokens": 2600, "ignore_eos": True, "seed": i, "top_p": 0.9}

        def pages(pool, state):
            return small.metrics()[f'worker_kv_pages{{pool="{pool}",state="{state}"}}']

        self.assertLess(pages("full", "total"), 2 * 2600 / 64)
        together = in_threads([lambda i=i: completion_text(small, ask(i))[0] for i in range(3)])
        self.assertGreater(small.metrics()["worker_preemptions_total"], 0)
        small.wait_idle()
        for pool in ("full", "window"):
            self.assertEqual(pages(pool, "used"), pages(pool, "cached"))
        self.assertEqual(together, [completion_text(server, ask(i))[0] for i in range(3)])


class Latency(unittest.TestCase):
    def test_health_under_full_generation(self):
        clients = load(server.port, [dict(request(i), max_tokens=150) for i in range(32)])
        self.addCleanup(clients.wait)
        self.addCleanup(clients.stdin.close)
        while server.json("/health")[1]["running"] < 32:
            time.sleep(0.02)
        c = http.client.HTTPConnection("127.0.0.1", server.port)
        self.addCleanup(c.close)

        def longest():
            took = []
            for _ in range(200):
                t0 = time.monotonic()
                c.request("GET", "/health")
                r = c.getresponse()
                body = r.read()
                took.append(time.monotonic() - t0)
                self.assertEqual((r.status, json.loads(body)["state"]), (200, "busy"))
                time.sleep(0.005)
            took.sort()
            print(f"/health under 32 streams: median {took[100] * 1e3:.2f} ms, 95 % {took[190] * 1e3:.2f} ms")
            return took[-1]

        assert_within(self, 0.01, longest, "/health under 32 streams, of 200", [server.pid, clients.pid])

    def test_a_long_prompt_does_not_stall_running_streams(self):
        """A chunk of prefill (256 rows) may stand between two tokens of a stream, two may not. That every step has a
        token of every stream is exact; the time is that of a chunk of a prompt half as long, alone."""
        n, streams, rng = 20000, 8, random.Random(2)
        chunk = [0.0]

        def prompt(length):
            return [rng.randrange(300, 4000) for _ in range(length)]

        def longest():
            t0 = time.monotonic()
            usage = server.json("/v1/completions", {"prompt": prompt(n // 2), "max_tokens": 1})[1]["usage"]
            chunk[0] = (time.monotonic() - t0) / (n // 2 / 256)
            self.assertEqual(usage["prompt_tokens_details"]["cached_tokens"], 0)
            w = Watch(server.port)
            stream = [w.open("/v1/completions", {"prompt": f"Once {i}", "max_tokens": 20000, "stream": True,
                                                 "seed": i, "ignore_eos": True}) for i in range(streams)]
            w.run(lambda: all(len(w.times[s]) > 3 for s in stream))
            for s in stream:
                w.times[s].clear()
            before = server.metrics()
            late = w.open("/v1/completions", {"prompt": prompt(n), "max_tokens": 1, "stream": True})
            w.run(lambda: w.times[late], seconds=20)
            after = server.metrics()
            gaps = sorted(w.gaps(stream))
            w.close()
            server.wait_idle()
            steps, tokens = (after[k] - before[k] for k in ("worker_engine_steps_total",
                                                            "worker_tokens_generated_total"))
            print(f"beside 20,000 tokens of prompt: {steps:.0f} steps, {tokens:.0f} tokens of 8 streams, 99 % of "
                  f"{len(gaps)} gaps under {gaps[len(gaps) * 99 // 100] * 1e3:.0f} ms; a chunk alone takes "
                  f"{chunk[0] * 1e3:.0f} ms")
            self.assertGreaterEqual(tokens, streams * (steps - 3))
            return gaps[-1]

        assert_within(self, lambda: 2 * chunk[0], longest, "gap beside a long prompt", [server.pid])

    def test_the_prefill_of_a_100_turn_chat_stays_constant(self):
        messages, fresh = [{"role": "system", "content": "You are kind."}], []
        for turn in range(100):
            messages.append({"role": "user", "content": f"What is {turn} plus {turn % 7}?"})
            status, body = server.json("/v1/chat/completions", {"messages": messages, "temperature": 0,
                                                                "max_tokens": 60})
            self.assertEqual(status, 200, body)
            u = body["usage"]
            fresh.append(u["prompt_tokens"] - u["prompt_tokens_details"]["cached_tokens"])
            m = body["choices"][0]["message"]
            messages.append({"role": "assistant", "content": m["content"], "reasoning": m.get("reasoning")})
        print(f"100-turn chat: prompt of {u['prompt_tokens']} tokens at the end, prefilled per turn: first "
              f"{fresh[0]}, then {min(fresh[1:])} to {max(fresh[1:])}")
        self.assertLess(max(fresh[1:]), 150)
        self.assertLess(max(fresh[50:]), 1.5 * max(fresh[1:50]))
