"""/v1/messages: every event field by field, every shape of a block, and the official client, unchanged."""
import json
import unittest

from common import Orcd

try:
    import anthropic
except ImportError:
    anthropic = None

WEATHER = {"name": "get_weather", "description": "Get the weather at a place.",
           "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}}
CALL = "Please run get_weather (place set to \"Paris\")."
GREEDY = {"temperature": 0}  # no longer a parameter of the client's own
THINK = {"type": "enabled", "budget_tokens": 1024}
MESSAGE = {"id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"}
USAGE = {"input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens"}


def setUpModule():
    global server
    server = Orcd("--ctx", "8192", "--max-batch", "4")


def tearDownModule():
    server.stop()


def user(text):
    return [{"role": "user", "content": text}]


def body(**more):
    return {"model": "claude-any", "max_tokens": 300, "messages": user("Who are you?"), "temperature": 0, **more}


def ask(**more):
    status, r = server.json("/v1/messages?beta=true", body(**more))
    assert status == 200, r
    return r


def n_in(r):
    return r["usage"]["input_tokens"] + r["usage"]["cache_read_input_tokens"]


class Events(unittest.TestCase):
    def check(self, **more):
        s = server.stream("/v1/messages", body(stream=True, **more), {"anthropic-version": "2023-06-01"})
        self.assertEqual(s.status, 200)
        events = list(s)
        s.close()
        blocks, block, text = [], None, ""
        for name, e in events:
            self.assertEqual(name, e["type"])
            if name == "content_block_start":
                self.assertEqual(set(e), {"type", "index", "content_block"})
                self.assertIsNone(block)
                block, text = e["content_block"], ""
            elif name == "content_block_delta":
                self.assertEqual(set(e), {"type", "index", "delta"})
                kind = {"text": ["text_delta"], "thinking": ["thinking_delta", "signature_delta"],
                        "tool_use": ["input_json_delta"]}[block["type"]]
                self.assertIn(e["delta"]["type"], kind)
                if e["delta"]["type"] == "signature_delta":
                    block["signature"] = e["delta"]["signature"]
                else:
                    text += e["delta"].get("text", e["delta"].get("thinking", e["delta"].get("partial_json")))
            elif name == "content_block_stop":
                self.assertEqual(set(e), {"type", "index"})
                if block["type"] == "tool_use":
                    self.assertEqual(block["input"], {})
                    block["input"] = json.loads(text)
                else:
                    self.assertEqual(block[block["type"]], "")
                    block[block["type"]] = text
                blocks.append(block)
                block = None
            if "index" in e:
                self.assertEqual(e["index"], len(blocks) - (name == "content_block_stop"))
        start, delta = events[0][1], events[-2][1]
        self.assertEqual([events[0][0], events[-2][0], events[-1][0]],
                         ["message_start", "message_delta", "message_stop"])
        self.assertEqual(set(start["message"]), MESSAGE)
        self.assertEqual(set(start["message"]["usage"]), USAGE)
        self.assertEqual((start["message"]["content"], start["message"]["stop_reason"]), ([], None))
        self.assertEqual(set(delta), {"type", "delta", "usage"})
        self.assertEqual(set(delta["delta"]), {"stop_reason", "stop_sequence"})
        self.assertEqual(delta["usage"]["input_tokens"], start["message"]["usage"]["input_tokens"])
        self.assertEqual(events[-1][1], {"type": "message_stop"})
        return blocks, delta["delta"]

    def test_thinking_and_text(self):
        blocks, end = self.check(thinking=THINK)
        self.assertEqual([b["type"] for b in blocks], ["thinking", "text"])
        self.assertTrue(blocks[0]["signature"])
        self.assertIn("fable", blocks[1]["text"])
        self.assertEqual(end, {"stop_reason": "end_turn", "stop_sequence": None})

    def test_thinking_unasked_stays_hidden(self):
        self.assertEqual([b["type"] for b in self.check()[0]], ["text"])

    def test_tool_use(self):
        blocks, end = self.check(messages=user(CALL), tools=[WEATHER])
        self.assertEqual((blocks[-1]["name"], blocks[-1]["input"]), ("get_weather", {"place": "Paris"}))
        self.assertTrue(blocks[-1]["id"].startswith("toolu_"))
        self.assertEqual(end["stop_reason"], "tool_use")

    def test_stop_reasons(self):
        self.assertEqual(self.check(max_tokens=14)[1]["stop_reason"], "max_tokens")
        self.assertEqual(self.check(stop_sequences=["demo"])[1],
                         {"stop_reason": "stop_sequence", "stop_sequence": "demo"})

    def test_streaming_equals_whole(self):
        blocks, _ = self.check(thinking=THINK)
        whole = ask(thinking=THINK)
        self.assertEqual(set(whole), MESSAGE)
        for a, b in zip(blocks, whole["content"]):
            self.assertEqual(a[a["type"]], b[b["type"]])


class Requests(unittest.TestCase):
    def test_answer_follows_a_schema(self):
        schema = {"type": "object", "properties": {"mood": {"enum": ["calm", "merry"]}}, "required": ["mood"]}
        r = ask(output_config={"format": {"type": "json_schema", "schema": schema}})
        self.assertIn(json.loads(r["content"][-1]["text"]), ({"mood": "calm"}, {"mood": "merry"}))

    def test_any_model_name(self):
        self.assertEqual(ask(model="claude-haiku-4-5")["model"], "claude-haiku-4-5")

    def test_billing_header_is_dropped(self):
        def count(system):
            return n_in(ask(system=system, max_tokens=1))
        line = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=%s;"}
        rest = {"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}
        self.assertEqual(count([line, rest]), count([rest]))
        self.assertEqual(count("Be short."), count([rest]))
        self.assertGreater(count([rest]), count(None))

    def test_results_in_every_shape(self):
        first = ask(messages=user(CALL), tools=[WEATHER])
        use = first["content"][-1]
        for content in ("rain, 7 degrees", [{"type": "text", "text": "rain, 7 degrees"}],
                        [{"type": "text", "text": "rain, "}, {"type": "text", "text": "7 degrees"},
                         {"type": "image", "source": {}}]):
            r = ask(messages=user(CALL) + [
                {"role": "assistant", "content": first["content"]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use["id"], "content": content}]}],
                tools=[WEATHER])
            self.assertIn("7", r["content"][-1]["text"])
        for extra in ({"is_error": True, "content": "no such place"}, {}):
            r = ask(messages=user(CALL) + [
                {"role": "assistant", "content": first["content"]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use["id"], **extra},
                                             {"type": "text", "text": "And now?"}]}], tools=[WEATHER])
            self.assertEqual(r["type"], "message")

    def test_thinking_round_trip_and_cache(self):
        first = ask(messages=user(CALL), tools=[WEATHER], thinking=THINK)
        self.assertEqual([b["type"] for b in first["content"]], ["thinking", "tool_use"])
        again = ask(messages=user(CALL) + [
            {"role": "assistant", "content": first["content"]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": first["content"][-1]["id"],
                                          "content": "rain"}]}], tools=[WEATHER], thinking=THINK)
        self.assertGreaterEqual(again["usage"]["cache_read_input_tokens"],
                                n_in(first) + first["usage"]["output_tokens"] - 2)

    def test_tool_choice(self):
        r = ask(tools=[WEATHER], tool_choice={"type": "tool", "name": "get_weather"})
        self.assertEqual(r["stop_reason"], "tool_use")
        r = ask(messages=user(CALL), tools=[WEATHER], tool_choice={"type": "none"})
        self.assertNotEqual(r["stop_reason"], "tool_use")
        ask(tools=[{"type": "web_search_20250305", "name": "web_search"}])

    def test_errors(self):
        for more in ({"max_tokens": None}, {"messages": []}, {"messages": user([{"type": "image", "source": {}}])},
                     {"tool_choice": {"type": "tool", "name": "none"}}, {"messages": user("word " * 9000)},
                     {"messages": [{"role": "robot", "content": ""}]},
                     {"output_config": {"format": {"type": "json_schema", "schema": {"type": "string", "not": {}}}}}):
            status, r = server.json("/v1/messages", body(**more))
            self.assertEqual((status, r["type"], r["error"]["type"]), (400, "error", "invalid_request_error"), r)
            self.assertEqual(set(r), {"type", "error"})

    def test_count_tokens(self):
        b = body(system="Be short.", tools=[WEATHER])
        expected = n_in(ask(system="Be short.", tools=[WEATHER]))
        del b["max_tokens"]
        self.assertEqual(server.json("/v1/messages/count_tokens", b), (200, {"input_tokens": expected}))


@unittest.skipUnless(anthropic, "the package anthropic is not there")
class OfficialClient(unittest.TestCase):
    def setUp(self):
        self.client = anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.port}", api_key="none", max_retries=0)
        self.addCleanup(self.client.close)

    def test_create(self):
        r = self.client.messages.create(model="x", max_tokens=300, messages=user("Who are you?"), extra_body=GREEDY)
        self.assertIn("fable", r.content[0].text)

    def test_stream_tool_loop(self):
        messages = user(CALL)
        with self.client.messages.stream(model="x", max_tokens=300, messages=messages, extra_body=GREEDY,
                                         tools=[WEATHER], thinking=THINK) as stream:
            r = stream.get_final_message()
        self.assertEqual(r.content[-1].input, {"place": "Paris"})
        messages += [{"role": "assistant", "content": r.content},
                     {"role": "user", "content": [{"type": "tool_result", "tool_use_id": r.content[-1].id,
                                                   "content": "rain, 7 degrees"}]}]
        r = self.client.messages.create(model="x", max_tokens=300, messages=messages, extra_body=GREEDY,
                                        tools=[WEATHER])
        self.assertIn("7", r.content[-1].text)

    def test_count_and_errors(self):
        n = self.client.messages.count_tokens(model="x", messages=user("Who are you?")).input_tokens
        self.assertGreater(n, 10)
        with self.assertRaises(anthropic.BadRequestError):
            self.client.messages.create(model="x", max_tokens=300, messages=[])
