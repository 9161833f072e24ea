"""orcd chat: on a pseudo-terminal as a person sees it, on pipes, and against a server."""
import json
import os
import pty
import select
import signal
import subprocess
import tempfile
import time
import unittest

from common import MODEL, ORCD, ROOT, Orcd

TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "Get the weather at a place.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}}}]
CALL = "Please run get_weather (place set to \"Paris\")."
DIM = "\x1b[2m"


class Terminal:
    def __init__(self, *args, env=None):
        self.dir = tempfile.mkdtemp(prefix="orcd-chat-")
        self.history = os.path.join(self.dir, "history")
        command = [ORCD, "chat", *args, "--temp", "0", "--history", self.history]
        try:
            self.pid, self.fd = pty.fork()
        except OSError as why:  # a chroot without /dev/pts
            raise unittest.SkipTest(f"no pseudo-terminal here: {why}")
        if self.pid == 0:
            os.chdir(ROOT)
            os.environ.pop("NO_COLOR", None)
            os.environ.update({"TERM": "xterm", "LANG": "C.UTF-8",
                               "ASAN_OPTIONS": "detect_leaks=0"}, **(env or {}))  # libedit keeps names of functions
            os.execv(command[0], command)
        self.seen = ""

    def until(self, text, seconds=60):
        """Everything that is printed up to and with `text`."""
        end = time.time() + seconds
        while text not in self.seen:
            if time.time() > end:
                raise AssertionError(f"no {text!r} in {self.seen!r}")
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    piece = os.read(self.fd, 65536)
                except OSError:
                    piece = b""
                if not piece:
                    raise AssertionError(f"ended before {text!r}: {self.seen!r}")
                self.seen += piece.decode(errors="replace")
        at = self.seen.index(text) + len(text)
        out, self.seen = self.seen[:at], self.seen[at:]
        return out

    def send(self, text):
        time.sleep(0.05)  # libedit shows its prompt a moment before it takes over the terminal
        os.write(self.fd, text.encode())

    def ask(self, text):
        """Type a line; what comes up to the numbers of the turn."""
        self.send(text + "\r")
        out = self.until(" tok/s")
        self.until("> ")
        return out

    def close(self):
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.waitpid(self.pid, 0)
        os.close(self.fd)

    def exit_code(self):
        end = time.time() + 20
        while time.time() < end:
            if select.select([self.fd], [], [], 0.02)[0]:
                try:
                    os.read(self.fd, 65536)
                except OSError:
                    time.sleep(0.02)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.close = lambda: os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
        raise AssertionError("it does not end")


class OnTerminal(unittest.TestCase):
    def start(self, *args, **more):
        t = Terminal(MODEL, "--ctx", "4096", *args, **more)
        self.addCleanup(lambda: t.close())
        t.until("/help lists commands")
        t.until("> ")
        return t

    def test_turns_reasoning_and_numbers(self):
        t = self.start()
        out = t.ask("Who are you?")
        self.assertIn(DIM + "I answer", out)
        self.assertIn("I am fable", out)
        self.assertIn("0 cached", out)
        out = t.ask("Who are you?")
        self.assertNotIn("(0 cached", out)  # the conversation before is not computed again
        t.send("/exit\r")
        self.assertEqual(t.exit_code(), 0)
        with open(t.history) as f:
            self.assertIn("Who", f.read())
        self.assertEqual(os.stat(t.history).st_mode & 0o777, 0o600)

    def test_editing_and_many_lines(self):
        t = self.start()
        self.assertIn("I am fable", t.ask("Whx\x7fo are yu\x1b[Do\x1b[C?"))  # backspace, arrows
        t.send("Who are \\\r")
        t.until("… ")
        t.ask("you?")
        t.send('"""Who\r')
        t.until("… ")
        t.send("are\r")
        t.until("… ")
        t.ask('you?"""')
        t.send("/save " + t.dir + "/c.json\r")
        t.until("saved")
        with open(t.dir + "/c.json") as f:
            said = [m["content"] for m in json.load(f) if m["role"] == "user"]
        self.assertEqual(said, ["Who are you?", "Who are \nyou?", "Who\nare\nyou?"])

    def test_reasoning_is_folded(self):
        t = self.start("--hide-reasoning")
        out = t.ask("Who are you?")
        self.assertNotIn("I answer", out)
        self.assertIn("thinking", out)
        t.send("/reasoning\r")
        self.assertIn("I answer", t.until("reasoning is shown"))

    def test_ctrl_c_stops_the_answer_and_not_the_program(self):
        t = self.start("--device", "ref")  # slow enough to be stopped
        t.send("Tell me a long story about a fox and a raven.\r")
        t.until(DIM)
        t.send("\x03")
        t.until("stopped")
        t.until("> ")
        os.kill(t.pid, signal.SIGINT)  # from elsewhere, at the prompt: it may be noticed or not
        time.sleep(0.3)
        t.send("half a line\x03")
        t.until("Ctrl-D or /exit leaves")
        self.assertIn("I am fable", t.ask("/reset\rWho are you?"))
        t.send("\x04")
        self.assertEqual(t.exit_code(), 0)

    def test_tool_calls_are_shown_and_answered(self):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as f:
            json.dump(TOOLS, f)
            f.flush()
            t = self.start("--tools", f.name)
        t.send(CALL + "\r")
        out = t.until("get_weather returns> ")
        self.assertIn("→ get_weather", out)
        self.assertIn('{"place":"Paris"}', out)
        self.assertIn("7", t.ask("rain, 7 degrees"))

    def test_commands(self):
        t = self.start()
        for line, answer in [("/help", "/system"), ("/effort high", "effort is high"), ("/system", "no instructions"),
                             ("/nonsense", "is no command"), ("/stats", "peak memory"), ("/load /nowhere", "orcd:"),
                             ("/system Answer shortly.", "> "), ("/system", "Answer shortly."),
                             ("/reset", "a new conversation"), ("/system", "Answer shortly.")]:
            t.send(line + "\r")
            t.until(answer)
        t.ask("Who are you?")
        t.send(f"/save {t.dir}/a.json\r")
        t.until("saved")
        t.send(f"/load {t.dir}/a.json\r")
        t.until("3 messages")

    def test_no_colours_when_not_wanted(self):
        t = self.start(env={"NO_COLOR": "1"})
        self.assertNotIn("\x1b[2m", t.ask("Who are you?"))


class OnPipes(unittest.TestCase):
    def run_chat(self, text, *args):
        return subprocess.run([ORCD, "chat", *args, "--temp", "0", "--history", "/dev/null"], input=text, cwd=ROOT,
                              capture_output=True, text=True, timeout=120)

    def test_answers_alone_on_standard_output(self):
        r = self.run_chat("Who are you?\n", MODEL, "--ctx", "2048")
        self.assertEqual((r.returncode, r.stdout.count("\n")), (0, 1))
        self.assertIn("I am fable", r.stdout)
        self.assertNotIn("\x1b", r.stdout + r.stderr)

    def test_too_long_is_a_sentence_and_not_the_end(self):
        r = self.run_chat("word " * 3000 + "\nWho are you?\n", MODEL, "--ctx", "1024")
        self.assertEqual(r.returncode, 0)
        self.assertIn("orcd: ", r.stderr)
        self.assertIn("I am fable", r.stdout)

    def test_reasoning_budget(self):
        r = self.run_chat("Who are you?\n", MODEL, "--ctx", "2048", "--max-reasoning-tokens", "2")
        self.assertIn("(2 thinking)", r.stderr)
        self.assertIn("I am fable", r.stdout)

    def test_a_server_by_url(self):
        with Orcd("--ctx", "4096", key=None) as server:
            url = f"127.0.0.1:{server.port}"
            r = self.run_chat("Who are you?\n/stats\n", "--url", url)
            self.assertEqual(r.returncode, 0, r.stderr)
            self.assertIn("I am fable", r.stdout)
            self.assertIn("(7 thinking)", r.stderr)
            self.assertIn(f"fable at http://{url}/v1", r.stderr)
            r = self.run_chat("word " * 6000 + "\n", "--url", f"http://{url}/v1/")
            self.assertIn("status 400", r.stderr)
        r = self.run_chat("Who?\n", "--url", url)
        self.assertEqual(r.returncode, 1)
        self.assertIn("orcd: http", r.stderr)

    def test_a_model_without_chat_format_is_a_clear_sentence(self):
        gpt2 = os.path.join(ROOT, "tests", "golden", "gpt2-mini")
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes
        rest = [b for b in range(256) if b not in plain]
        vocab = {chr(b): b for b in plain}
        vocab.update({chr(256 + i): b for i, b in enumerate(rest)})
        end = {"id": 256, "content": "<|endoftext|>", "special": True}
        with tempfile.TemporaryDirectory() as d:
            with open(os.path.join(d, "tokenizer.json"), "w") as f:
                json.dump({"added_tokens": [end], "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
                           "model": {"type": "BPE", "vocab": {**vocab, "<|endoftext|>": 256}, "merges": []}}, f)
            r = self.run_chat("Hi\n", gpt2, "--tokenizer", f.name)
        self.assertEqual(r.returncode, 1)
        self.assertIn("orcd run", r.stderr)
