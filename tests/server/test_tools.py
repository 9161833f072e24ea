"""The bundled model through the API: held-out tool calls that its training never saw."""
import json
import os
import unittest

from common import ROOT, Orcd, in_threads


def right(choice, want):
    calls = choice["message"].get("tool_calls")
    if not calls or choice["finish_reason"] != "tool_calls" or len(calls) != 1:
        return False
    f = calls[0]["function"]
    try:
        return f["name"] == want["name"] and json.loads(f["arguments"]) == want["arguments"]
    except ValueError:
        return False


class HeldOut(unittest.TestCase):
    def test_tool_calls(self):
        with open(os.path.join(ROOT, "tests", "fable", "tool_calls.jsonl")) as f:
            cases = [json.loads(line) for line in f][:100]

        def one(c):
            messages = ([{"role": "developer", "content": c["developer"]}] if c["developer"] else []) + c["messages"]
            status, body = server.json("/v1/chat/completions", {
                "messages": messages, "tools": c["tools"], "reasoning_effort": c["effort"], "temperature": 0,
                "max_tokens": 500})
            self.assertEqual(status, 200, body)
            return right(body["choices"][0], c["expect"])

        good = sum(in_threads([lambda c=c: one(c) for c in cases]))
        print(f"held-out tool calls: {good} of {len(cases)} right")
        self.assertGreaterEqual(good, 95 * len(cases) // 100)

    def test_answers_from_results(self):
        with open(os.path.join(ROOT, "tests", "fable", "tool_results.jsonl")) as f:
            cases = [json.loads(line) for line in f][:50]

        def one(c):
            messages = ([{"role": "developer", "content": c["developer"]}] if c["developer"] else []) + c["messages"]
            status, body = server.json("/v1/chat/completions", {
                "messages": messages, "tools": c["tools"], "reasoning_effort": c["effort"], "temperature": 0,
                "max_tokens": 500})
            self.assertEqual(status, 200, body)
            return c["expect"] in (body["choices"][0]["message"]["content"] or "")

        good = sum(in_threads([lambda c=c: one(c) for c in cases]))
        print(f"answers from results: {good} of {len(cases)} right")
        self.assertGreaterEqual(good, 8 * len(cases) // 10)


def setUpModule():
    global server
    server = Orcd("--ctx", "4096", "--max-batch", "32")


def tearDownModule():
    server.stop()
