"""/v1/responses: every event field by field, then the official clients, unchanged, and Codex's own request."""
import asyncio
import json
import unittest

from common import Orcd

try:
    import openai
except ImportError:
    openai = None
try:
    import agents
except ImportError:
    agents = None

WEATHER = {"type": "function", "name": "get_weather", "description": "Get the weather at a place.", "strict": False,
           "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}}
CALL = "Please run get_weather (place set to \"Paris\")."
ENVELOPE = {"id", "object", "created_at", "status", "background", "error", "incomplete_details", "model", "output",
            "previous_response_id", "store", "max_output_tokens", "reasoning", "text", "temperature", "top_p", "usage",
            "metadata", "parallel_tool_calls", "tool_choice", "truncation", "max_tool_calls", "user",
            "prompt_cache_key", "service_tier", "top_logprobs", "instructions", "tools"}
FIELDS = {  # beside type and sequence_number
    "response.created": {"response"}, "response.in_progress": {"response"}, "response.completed": {"response"},
    "response.incomplete": {"response"}, "response.failed": {"response"},
    "response.output_item.added": {"output_index", "item"}, "response.output_item.done": {"output_index", "item"},
    "response.content_part.added": {"item_id", "output_index", "content_index", "part"},
    "response.content_part.done": {"item_id", "output_index", "content_index", "part"},
    "response.reasoning_text.delta": {"item_id", "output_index", "content_index", "delta"},
    "response.reasoning_text.done": {"item_id", "output_index", "content_index", "text"},
    "response.output_text.delta": {"item_id", "output_index", "content_index", "delta", "logprobs"},
    "response.output_text.done": {"item_id", "output_index", "content_index", "text", "logprobs"},
    "response.function_call_arguments.delta": {"item_id", "output_index", "delta"},
    "response.function_call_arguments.done": {"item_id", "output_index", "arguments", "name"},
    "response.custom_tool_call_input.delta": {"item_id", "output_index", "delta"},
    "response.custom_tool_call_input.done": {"item_id", "output_index", "input"},
}


def setUpModule():
    global server
    server = Orcd("--ctx", "8192", "--max-batch", "4")


def tearDownModule():
    server.stop()


def body(**more):
    return {"model": "any", "input": "Who are you?", "temperature": 0, **more}


def ask(**more):
    status, r = server.json("/v1/responses", body(**more))
    assert status == 200, r
    return r


def texts(r, kind):
    return "".join(p["text"] for o in r["output"] if o["type"] == kind for p in o["content"])


class Events(unittest.TestCase):
    """Replays the events into items and compares with what the last event and the unstreamed answer say."""

    def events(self, **more):
        s = server.stream("/v1/responses", body(stream=True, **more))
        self.assertEqual(s.status, 200)
        out = list(s)
        s.close()
        return out

    def check(self, events):
        items, open_item, text, parts = [], None, "", 0
        for i, (name, e) in enumerate(events):
            kind = e["type"]
            self.assertEqual(name, kind)
            self.assertEqual(e["sequence_number"], i)
            self.assertEqual(set(e) - {"type", "sequence_number"}, FIELDS[kind], kind)
            if "response" in e:
                self.assertEqual(set(e["response"]), ENVELOPE)
                continue
            self.assertEqual(e["output_index"], len(items))
            if kind == "response.output_item.added":
                self.assertIsNone(open_item)
                open_item, text, parts = e["item"], "", 0
                if open_item["type"] in ("message", "reasoning"):
                    self.assertEqual(open_item["content"], [])
                self.assertEqual(open_item["status"], "in_progress")
                continue
            if kind == "response.output_item.done":
                done = e["item"]
                for key in ("id", "type", "call_id", "name"):
                    self.assertEqual(done.get(key), open_item.get(key))
                if "content" in done:
                    self.assertEqual([p["text"] for p in done["content"]], [text])
                    self.assertEqual(parts, 2)
                else:
                    self.assertEqual(done.get("arguments", done.get("input")), text)
                items.append(done)
                open_item = None
                continue
            self.assertEqual(e["item_id"], open_item["id"])
            if "content_index" in e:
                self.assertEqual(e["content_index"], 0)
            if kind.endswith(".delta"):
                self.assertTrue(e["delta"])
                text += e["delta"]
            elif "part" in e:
                parts += 1
                self.assertEqual(e["part"]["text"], text)
                self.assertEqual(e["part"]["type"], "reasoning_text" if open_item["type"] == "reasoning" else
                                 "output_text")
            else:
                self.assertEqual(e.get("text", e.get("arguments", e.get("input"))), text)
        self.assertIsNone(open_item)
        first, last = events[0][1], events[-1][1]
        self.assertEqual([n for n, _ in events[:2]], ["response.created", "response.in_progress"])
        self.assertEqual(first["response"]["output"], [])
        self.assertEqual(last["response"]["output"], items)
        self.assertEqual(first["response"]["id"], last["response"]["id"])
        self.assertEqual(len({i["id"] for i in items}), len(items))
        return last["response"]

    def test_reasoning_and_message(self):
        events = self.events()
        r = self.check(events)
        self.assertEqual([o["type"] for o in r["output"]], ["reasoning", "message"])
        self.assertEqual(events[-1][0], "response.completed")
        self.assertEqual(r["status"], "completed")
        names = [n for n, _ in events]
        for n in ("response.reasoning_text.delta", "response.reasoning_text.done", "response.output_text.done"):
            self.assertIn(n, names)

    def test_function_call(self):
        r = self.check(self.events(input=CALL, tools=[WEATHER]))
        call = r["output"][-1]
        self.assertEqual((call["type"], call["name"], json.loads(call["arguments"])),
                         ("function_call", "get_weather", {"place": "Paris"}))
        self.assertTrue(call["call_id"].startswith("call_") and call["id"].startswith("fc_"))
        self.assertEqual(set(call), {"id", "type", "call_id", "name", "arguments", "status"})

    def test_namespace_tool_comes_back_under_its_own_name(self):
        space = {"type": "namespace", "name": "mcp__weather__", "tools": [WEATHER]}
        r = self.check(self.events(input="Get the weather in Paris.", tools=[space], tool_choice="required"))
        call = r["output"][-1]
        self.assertEqual((call["name"], call["namespace"]), ("get_weather", "mcp__weather__"))

    def test_custom_tool(self):
        patch = {"type": "custom", "name": "apply_patch", "description": "Changes files.",
                 "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}}
        r = self.check(self.events(input="Please run apply_patch (input set to \"hello\").", tools=[patch],
                                   tool_choice={"type": "custom", "name": "apply_patch"}))
        call = r["output"][-1]
        self.assertEqual((call["type"], call["name"]), ("custom_tool_call", "apply_patch"))
        self.assertIsInstance(call["input"], str)
        self.assertTrue(call["id"].startswith("ctc_"))

    def test_cut_answer_is_incomplete(self):
        events = self.events(max_output_tokens=6)
        r = self.check(events)
        self.assertEqual(events[-1][0], "response.incomplete")
        self.assertEqual((r["status"], r["incomplete_details"]), ("incomplete", {"reason": "max_output_tokens"}))
        self.assertEqual(r["output"][-1]["status"], "incomplete")
        self.assertEqual(r["usage"]["output_tokens"], 6)

    def test_streaming_equals_whole(self):
        a, b = self.check(self.events()), ask()
        for kind in ("reasoning", "message"):
            self.assertEqual(texts(a, kind), texts(b, kind))
        self.assertEqual(set(a), set(b))

    def test_reasoning_can_be_hidden_and_bounded(self):
        self.assertEqual([o["type"] for o in ask(reasoning={"exclude": True})["output"]], ["message"])
        r = ask(max_reasoning_tokens=3)
        self.assertEqual(r["usage"]["output_tokens_details"]["reasoning_tokens"], 3)
        self.assertIn("fable", texts(r, "message"))
        self.assertEqual(r["status"], "completed")


class Guards(unittest.TestCase):
    def test_endless_repetition_is_cut(self):
        word = server.json("/tokenize", {"content": " the"})[1]["tokens"][0]
        r = ask(logit_bias={str(word): 100}, max_output_tokens=6000)
        self.assertEqual((r["status"], r["incomplete_details"]["reason"]), ("incomplete", "max_output_tokens"))
        self.assertLess(r["usage"]["output_tokens"], 5000)
        self.assertIn(" loop ", server.log())

    def test_budget_leads_to_a_call_where_only_a_call_is_allowed(self):
        r = ask(input=CALL, tools=[WEATHER], tool_choice="required", max_reasoning_tokens=2)
        self.assertEqual([o["type"] for o in r["output"]], ["reasoning", "function_call"])
        self.assertEqual(r["usage"]["output_tokens_details"]["reasoning_tokens"], 2)

    def test_server_wide_budget_yields_to_the_request(self):
        with Orcd("--ctx", "4096", "--max-reasoning-tokens", "2") as other:
            for more, n in (({}, 2), ({"max_reasoning_tokens": 4}, 4), ({"reasoning": {"max_tokens": 5}}, 5)):
                r = other.json("/v1/responses", body(**more))[1]
                self.assertEqual(r["usage"]["output_tokens_details"]["reasoning_tokens"], n)
                self.assertIn("fable", texts(r, "message"))


class Requests(unittest.TestCase):
    def fails(self, status, code, **more):
        got, r = server.json("/v1/responses", body(**more))
        self.assertEqual((got, r["error"]["code"]), (status, code), r)
        self.assertEqual(set(r["error"]), {"message", "type", "param", "code"})

    def test_previous_response(self):
        first = ask(input="My name is Ada.")
        second = ask(input="Who are you?", previous_response_id=first["id"])
        self.assertEqual(second["previous_response_id"], first["id"])
        self.assertGreater(second["usage"]["input_tokens"], ask()["usage"]["input_tokens"])
        self.fails(400, "previous_response_not_found", previous_response_id="resp_none")
        unstored = ask(store=False)
        self.fails(400, "previous_response_not_found", previous_response_id=unstored["id"])

    def test_call_continued_by_previous_response(self):
        r = ask(input=CALL, tools=[WEATHER])
        call = r["output"][-1]
        out = [{"type": "function_call_output", "call_id": call["call_id"], "output": "rain, 7 degrees"}]
        again = ask(input=out, previous_response_id=r["id"], tools=[WEATHER])
        self.assertIn("7", texts(again, "message"))

    def test_sampled_tokens_come_back_for_a_known_call(self):
        """With its reasoning dropped by the client, the prefix is still what was computed."""
        r = ask(input=CALL, tools=[WEATHER])
        call = r["output"][-1]
        again = ask(input=[{"role": "user", "content": CALL}, call,
                           {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}],
                    tools=[WEATHER])
        u = again["usage"]
        self.assertGreaterEqual(u["input_tokens_details"]["cached_tokens"],
                                r["usage"]["total_tokens"] - 2)

    def test_tolerated(self):
        r = ask(tools=[{"type": "web_search"}, {"type": "local_shell"}, WEATHER], truncation="auto",
                text={"verbosity": "low", "format": {"type": "text"}}, include=["reasoning.encrypted_content"],
                prompt_cache_key="k", metadata={"a": "b"}, service_tier="auto", user="u",
                input=[{"type": "item_reference", "id": "x"}, {"type": "reasoning", "id": "rs_1", "summary": []},
                       {"role": "user", "content": [{"type": "input_text", "text": "Who are you?"}]}])
        self.assertEqual((r["text"]["verbosity"], r["truncation"], r["metadata"]), ("low", "auto", {"a": "b"}))
        self.assertIn("ignored", server.log())

    def test_answer_follows_a_schema(self):
        form = {"type": "json_schema", "name": "mood", "schema": {
            "type": "object", "properties": {"mood": {"enum": ["calm", "merry"]}}, "required": ["mood"]}}
        r = ask(text={"format": form})
        self.assertIn(json.loads(texts(r, "message")), ({"mood": "calm"}, {"mood": "merry"}))
        self.assertEqual(r["text"]["format"], form)

    def test_refused(self):
        self.fails(400, "missing_required_parameter", input=None)
        self.fails(400, "invalid_value", tools=[WEATHER], tool_choice={"type": "function", "name": "other"})
        self.fails(400, "context_length_exceeded", input="word " * 9000)
        self.fails(400, "invalid_value", max_output_tokens=0)
        self.fails(400, "invalid_value", input=[{"type": "function_call_output", "call_id": "nope", "output": ""}])

    def test_input_tokens(self):
        status, r = server.json("/v1/responses/input_tokens", {"model": "x", "input": "Who are you?"})
        self.assertEqual((status, r), (200, {"object": "response.input_tokens",
                                             "input_tokens": ask()["usage"]["input_tokens"]}))


class Codex(unittest.TestCase):
    """Codex's request as captured: everything again every turn, reasoning without content, store false."""

    def turn(self, items):
        request = {
            "model": "gpt-oss", "instructions": "You are a coding agent. " * 40, "input": items,
            "tools": [{"type": "function", "name": "read_file", "description": "Read a file.", "strict": False,
                       "parameters": {"type": "object", "properties": {"path": {"type": "string"}},
                                      "required": ["path"]}},
                      {"type": "custom", "name": "apply_patch", "description": "Edits files.",
                       "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}},
                      {"type": "namespace", "name": "mcp__x__", "tools": [WEATHER]}, {"type": "web_search"},
                      {"type": "local_shell"}],
            "tool_choice": "auto", "parallel_tool_calls": False, "reasoning": {"effort": "medium", "summary": "auto"},
            "store": False, "stream": True, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "thread",
            "text": {"verbosity": "medium"}, "temperature": 0}
        s = server.stream("/v1/responses", request)
        self.assertEqual(s.status, 200)
        events = [e for _, e in s]
        s.close()
        self.assertEqual(events[-1]["type"], "response.completed", events[-1])
        for e in events:
            self.assertIn("type", e)
        done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
        return done, events[-1]["response"]["usage"]

    def test_edit_loop(self):
        items = [{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions>"}]},
                 {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "<environment>"}]}]
        asks = ["Please run read_file (path set to \"a.txt\").", "Please run apply_patch (input set to \"fix\").",
                "Please run read_file (path set to \"b.txt\")."]
        last_in, calls = 0, 0
        for text in asks:
            items.append({"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]})
            for _ in range(4):
                done, usage = self.turn(items)
                if last_in:  # the whole history is in the cache but what is new
                    self.assertGreater(usage["input_tokens_details"]["cached_tokens"], last_in * 0.8)
                last_in = usage["input_tokens"]
                called = None
                for item in done:
                    item = dict(item)
                    if item["type"] == "reasoning":
                        item["content"] = None  # as Codex sends it back
                    item.pop("status", None)
                    items.append(item)
                    if item["type"].endswith("_call"):
                        called = item
                if not called:
                    break
                calls += 1
                items.append({"type": called["type"] + "_output", "call_id": called["call_id"], "output": "done, 7"})
        self.assertGreaterEqual(calls, 2)


@unittest.skipUnless(openai, "the package openai is not there")
class OfficialClient(unittest.TestCase):
    def setUp(self):
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
        self.addCleanup(self.client.close)

    def test_create(self):
        r = self.client.responses.create(model="x", input="Who are you?", temperature=0)
        self.assertIn("fable", r.output_text)
        self.assertTrue(r.output[0].content[0].text)

    def test_stream_with_tools(self):
        with self.client.responses.stream(model="x", input=CALL, temperature=0, tools=[WEATHER]) as stream:
            for _ in stream:
                pass
            r = stream.get_final_response()
        self.assertEqual(r.output[-1].name, "get_weather")
        self.assertEqual(json.loads(r.output[-1].arguments), {"place": "Paris"})


@unittest.skipUnless(openai and agents, "the package openai-agents is not there")
class Agents(unittest.TestCase):
    def run_agent(self, streamed):
        seen = []

        @agents.function_tool
        def get_weather(place: str) -> str:
            """Get the weather at a place."""
            seen.append(place)
            return "rain, 7 degrees"

        agents.set_tracing_disabled(True)
        client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
        agent = agents.Agent(name="a", instructions="Be short.", tools=[get_weather],
                             model=agents.OpenAIResponsesModel(model="x", openai_client=client),
                             model_settings=agents.ModelSettings(temperature=0))

        async def go():
            if not streamed:
                return (await agents.Runner.run(agent, CALL)).final_output
            r = agents.Runner.run_streamed(agent, CALL)
            async for _ in r.stream_events():
                pass
            return r.final_output

        answer = asyncio.run(go())
        self.assertEqual(seen, ["Paris"])
        self.assertIn("7", answer)

    def test_tool_loop(self):
        self.run_agent(False)

    def test_tool_loop_streamed(self):
        self.run_agent(True)
