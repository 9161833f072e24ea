"""The prefix cache on disk: what one process computed, the next one resumes."""
import json
import os
import shutil
import signal
import tempfile
import time
import unittest

from common import Orcd

SYSTEM = "You are a helpful storyteller. " + " ".join(
    f"Rule {i}: tell of the fox, the crow and the {animal}." for i, animal in
    enumerate(["lion", "mouse", "wolf", "crane", "dog", "cat", "ant", "hare", "tortoise", "frog"] * 3))


class Restart(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="orcd-test-cache-")

    def tearDown(self):
        shutil.rmtree(self.dir)

    def ask(self, orcd, path="/v1/chat/completions"):
        body = {"model": "orcd", "temperature": 0, "max_tokens": 16, "max_output_tokens": 16}
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Tell me a tale."}]
        if path == "/v1/responses":
            del body["max_tokens"]
            status, r = orcd.json(path, {**body, "input": messages})
            details, text = "input_tokens_details", r.get("output")
            text = [[c["text"] for c in item.get("content", [])] for item in text or []]
        else:
            del body["max_output_tokens"]
            status, r = orcd.json(path, {**body, "messages": messages})
            details, text = "prompt_tokens_details", r["choices"][0]["message"]
        self.assertEqual(status, 200, r)
        return text, r["usage"][details]["cached_tokens"], r["usage"].get("prompt_tokens", r["usage"].get("input_tokens"))

    def files(self):
        return [f for f in os.listdir(self.dir) if f.endswith((".page", ".point"))]

    def check(self, path):
        with Orcd("--cache-dir", self.dir) as orcd:
            want, cached, _ = self.ask(orcd, path)
            self.assertEqual(cached, 0)
        with Orcd("--cache-dir", self.dir) as orcd:
            text, cached, n = self.ask(orcd, path)
            self.assertGreater(n, 256)
            self.assertEqual(cached, n - 1)
            self.assertEqual(text, want)
            self.assertIn("came back", orcd.log())

    def test_serve_resumes_after_a_restart(self):
        self.check("/v1/chat/completions")

    def test_worker_resumes_after_a_restart(self):
        texts = []
        for _ in range(2):
            with Orcd("--cache-dir", self.dir, kind="worker") as worker:
                s = worker.stream("/execute", {"job_id": "j", "prompt": SYSTEM, "max_tokens": 16, "temperature": 0})
                texts.append("".join(d["t"] for name, d in s if name == "token"))
                s.close()
        self.assertEqual(texts[0], texts[1])
        with Orcd("--cache-dir", self.dir, kind="worker") as worker:
            self.assertIn("came back", worker.log())

    def test_responses_tells_of_it(self):
        self.check("/v1/responses")

    def test_resumes_after_a_kill(self):
        with Orcd("--cache-dir", self.dir) as orcd:
            want, _, _ = self.ask(orcd)
            end = time.time() + 20
            while not [f for f in self.files() if f.endswith(".point")] and time.time() < end:
                time.sleep(0.05)
            os.kill(orcd.pid, signal.SIGKILL)
            orcd.process.wait()
        with Orcd("--cache-dir", self.dir) as orcd:
            text, cached, _ = self.ask(orcd)
            self.assertGreater(cached, 256)
            self.assertEqual(text, want)

    def test_damaged_files_are_logged_and_computed_anew(self):
        with Orcd("--cache-dir", self.dir) as orcd:
            want, _, _ = self.ask(orcd)
        for name in self.files():
            with open(os.path.join(self.dir, name), "r+b") as f:
                f.seek(200)
                f.write(b"damage")
        with Orcd("--cache-dir", self.dir, "--log-json") as orcd:
            text, cached, _ = self.ask(orcd)
            self.assertEqual((text, cached), (want, 0))
            notes = [json.loads(line) for line in orcd.log().splitlines() if '"note"' in line]
            self.assertTrue(any("is ignored" in n["message"] for n in notes), notes)

    def test_keys_stay_apart(self):
        keys = os.path.join(self.dir, "keys")
        with open(keys, "w") as f:
            f.write("a\nb\n")
        for key, least, most in (("a", 0, 0), ("b", 0, 0), ("a", 256, 1 << 20)):
            with Orcd("--cache-dir", self.dir, "--api-key-file", keys, key=key) as orcd:
                _, cached, _ = self.ask(orcd)
                self.assertTrue(least <= cached <= most, (key, cached))


if __name__ == "__main__":
    unittest.main()
