"""Endless generated conversations in harmony format, and the held-out evaluation files.

    conversations.py TALES.txt.gz TOKENIZER.json OUT_DIR [SEED]     writes the evaluation files
"""
import copy
import datetime
import json
import os
import random
import sys

import chats
import tasks
from harmony import prompt, render
from stories import story
from words import Source, tale_words

EFFORTS = ("low", "medium", "high")


def dated(src):
    if src.chance(0.1):
        return None
    return (datetime.date(2024, 1, 1) + datetime.timedelta(days=src.rng.randint(0, 1500))).isoformat()


def thinking(src, effort, thoughts):
    """The analysis: nothing or a few words, one or two sentences, or all there is to say."""
    if effort == "low":
        return src.pick(("", "", "", "Easy.", "A short answer."))
    if effort == "medium":
        return " ".join(thoughts[:src.pick((1, 2))])
    return " ".join(thoughts)


def said(src, effort, turn):
    message = {"role": "assistant", "content": turn.answer}
    reasoning = thinking(src, effort, turn.thoughts)
    return {**message, "reasoning": reasoning} if reasoning else message


def call_thoughts(src, request, tools):
    """Why this tool and why these arguments."""
    function = request.tool["function"]
    thoughts = [f"The request fits {function['name']}.", "I call it with the given values."]
    if len(tools) > 1:
        thoughts.append("The tools are " + ", ".join(t["function"]["name"] for t in tools) + ".")
    for key in function["parameters"]["properties"]:
        value = request.arguments.get(key)
        thoughts.append(f"{key} is not given, so I leave it out." if value is None else f"{key} is {tasks.compact(value)}.")
    return chats.padded(src, thoughts, ["The tool knows the answer, I do not.", "I must not guess the answer.", "I use the words of the user exactly.", "The arguments must be JSON.",
                                        "I add nothing that was not given.", "After the result I will tell the user.", "The other tools do not matter here.", "First I read the request again."])


def result_thoughts(src):
    return chats.padded(src, ["The tool has answered, so I tell the user."], ["I keep the value exactly as it is.", "I do not change the numbers.", "The user wants only the result.", "One sentence is enough.",
                                                                           "No more calls are needed.", "The result looks complete.", "I write it in plain English."])


def called(src, effort, request, tools, number):
    """The assistant's call and the tool's answer."""
    function = request.tool["function"]
    call = {"id": f"call_{number}", "type": "function", "function": {"name": function["name"], "arguments": tasks.compact(request.arguments)}}
    message = {"role": "assistant", "tool_calls": [call]}
    reasoning = "" if effort == "low" else thinking(src, effort, call_thoughts(src, request, tools))
    if reasoning:
        message["reasoning"] = reasoning
    if effort != "low" and src.chance(0.05):
        message["content"] = src.pick(("I will look that up.", "One moment, I ask the tool.", "Let me check."))
    return [message, {"role": "tool", "tool_call_id": call["id"], "content": request.result}]


def reported(src, effort, answer):
    message = {"role": "assistant", "content": answer}
    if effort == "high" or (effort == "medium" and src.chance(0.2)):
        message["reasoning"] = thinking(src, effort, result_thoughts(src))
    return message


def tool_turn(src, effort, requests, tools, user=None):
    """One user message and all calls that serve it."""
    messages = [{"role": "user", "content": user or joined_request(src, requests)}]
    for number, request in enumerate(requests):
        messages += called(src, effort, request, tools, src.rng.randint(1, 10 ** 6) * 10 + number)
    return messages + [reported(src, effort, " ".join(r.answer for r in requests))]


def joined_request(src, requests):
    return src.pick((" Then: ", " And then: ", " Also: ", "\n", " After that: ")).join(r.user for r in requests)


def two_cities(src):
    """The same tool twice: requests and the sentence that asks for both."""
    first = tasks.weather(src)
    while len(first.arguments) != 1:
        first = tasks.weather(src)
    (key, city), = first.arguments.items()
    other = src.city()
    sky, degrees = src.pick(("sunny", "cloudy", "rainy")), src.rng.randint(-10, 35)
    second = copy.deepcopy(first)
    second.arguments, second.result = {key: other}, tasks.compact({"temperature": degrees, "condition": sky})
    second.answer = f"It is {degrees} degrees and {sky} in {other.split(',')[0]}."
    first.family = "weather"
    user = src.pick((f"What is the weather in {city} and in {other}?", f"Weather in {city} and {other}?", f"Compare the weather in {city} and {other}.", f"What's the weather like in {city} and {other}?"))
    return [first, second], user


def answered_turn(src, effort, turn):
    return [{"role": "user", "content": turn.user}, said(src, effort, turn)]


def settings(src, tools=None, instructions=None, response_format=None, effort=None):
    return dict(effort=effort or src.pick(EFFORTS), date=dated(src), instructions=instructions, tools=tools, response_format=response_format)


def house_rules(src, p=0.3):
    """A developer message that changes nothing."""
    return src.pick(("You are a helpful assistant.", "Use the tools if they help.", "You can call tools.", "Be brief.", "You are a helpful demo.")) if src.chance(p) else None


MATH = ("add", "mult", "subtr", "divid", "calc", "comput", "evaluat", "math", "sum", "count", "measure")


def harmless(src, tools):
    """A turn that none of the tools is for."""
    makers = [chats.who, chats.who, chats.greeting, chats.greeting, chats.fact, chats.repeat, chats.tale]
    if not any(word in t["function"]["name"].lower() for t in tools for word in MATH):
        makers.append(chats.arithmetic)
    return src.pick(makers)(src)


# Each of these returns (messages, settings, index of the first message that may be trained).

def one_call(src):
    request = tasks.request(src)
    conf = settings(src, tasks.toolbox(src, [request]), house_rules(src))
    return finish(src, [], tool_turn(src, conf["effort"], [request], conf["tools"]), conf)


def two_calls(src):
    if src.chance(0.4):
        requests, user = two_cities(src)
        conf = settings(src, tasks.toolbox(src, requests[:1]), house_rules(src))
        return finish(src, [], tool_turn(src, conf["effort"], requests, conf["tools"], user), conf)
    requests = [tasks.request(src)]
    while len(requests) < 2:
        other = tasks.request(src)
        requests += [other] if tasks.fits_beside(other, requests) else []
    conf = settings(src, tasks.toolbox(src, requests), house_rules(src))
    return finish(src, [], tool_turn(src, conf["effort"], requests, conf["tools"]), conf)


def no_call(src):
    conf = settings(src, tasks.toolbox(src, [tasks.request(src)]), house_rules(src))
    return finish(src, [], answered_turn(src, conf["effort"], harmless(src, conf["tools"])), conf)


def single(src):
    conf = settings(src, None, house_rules(src, 0.2))
    return finish(src, [], answered_turn(src, conf["effort"], chats.plain(src)), conf)


def sums(src):
    conf = settings(src, None, house_rules(src, 0.1))
    return finish(src, [], answered_turn(src, conf["effort"], chats.arithmetic(src)), conf)


def asked(src):
    conf = settings(src, None, house_rules(src, 0.1))
    return finish(src, [], answered_turn(src, conf["effort"], src.pick((chats.who, chats.who, chats.repeat))(src)), conf)


def instructed(src):
    turn = chats.instructed(src)
    conf = settings(src, None, turn.instructions)
    return finish(src, [], answered_turn(src, conf["effort"], turn), conf)


def several(src):
    """Two to six turns of talk."""
    conf = settings(src, None, house_rules(src, 0.2))
    before = [m for _ in range(src.rng.randint(1, 5)) for m in answered_turn(src, conf["effort"], chats.plain(src))]
    return finish(src, before, answered_turn(src, conf["effort"], chats.plain(src)), conf)


def remembered(src):
    told, reply, turn = chats.memory(src)
    conf = settings(src, None, house_rules(src, 0.2))
    before = [{"role": "user", "content": told}, {"role": "assistant", "content": reply}]
    if src.chance(0.3):
        turn_told = chats.Turn(told, reply, chats.padded(src, ["The user tells me something.", "I should remember it."]))
        return finish(src, [], answered_turn(src, conf["effort"], turn_told), conf)
    for _ in range(src.rng.randint(0, 2)):
        before += answered_turn(src, conf["effort"], chats.plain(src))
    return finish(src, before, answered_turn(src, conf["effort"], turn), conf)


def several_with_tools(src):
    """A tool conversation that goes on."""
    requests = [tasks.request(src)]
    other = tasks.request(src)
    requests += [other] if tasks.fits_beside(other, requests) else []
    conf = settings(src, tasks.toolbox(src, requests), house_rules(src))
    src.rng.shuffle(requests)
    turns = [tool_turn(src, conf["effort"], [r], conf["tools"]) for r in requests]
    for _ in range(src.rng.randint(0 if len(requests) > 1 else 1, 2)):
        turns.insert(src.rng.randint(0, len(turns)), answered_turn(src, conf["effort"], harmless(src, conf["tools"])))
    return finish(src, [m for turn in turns[:-1] for m in turn], turns[-1], conf)


def extracted(src):
    turn, form = chats.extraction(src)
    conf = settings(src, None, house_rules(src, 0.5), form)
    return finish(src, [], answered_turn(src, conf["effort"], turn), conf)


def finish(src, before, last, conf):
    """Sometimes the call lies in the past and lost its analysis, as clients send it."""
    messages, first = before + last, len(before) + 1
    if len(last) > 2 and src.chance(0.25):
        first = len(messages) - 1
        for message in messages[len(before):first]:
            message.pop("reasoning", None)
    return messages, conf, first


KINDS = [(one_call, 34), (two_calls, 6), (no_call, 6), (single, 16), (sums, 3), (asked, 12), (instructed, 9), (several, 9), (remembered, 4), (several_with_tools, 8), (extracted, 3)]


def pieces(src):
    """One training document: a conversation, now and then a story as plain text."""
    if src.chance(0.04):
        return [(story(src) + "<|endoftext|>", True)]
    maker = src.rng.choices([k for k, _ in KINDS], [w for _, w in KINDS])[0]
    messages, conf, first = maker(src)
    return render(messages, trained_from=first, **conf)


# ---------------------------------------------------------------- evaluation files

def record(tokenizer, messages, conf, expect):
    public = [{k: v for k, v in m.items() if k != "reasoning"} for m in messages]
    text = prompt(messages, **{k: v for k, v in conf.items() if k != "response_format"})
    return {"effort": conf["effort"], "date": conf["date"], "developer": conf["instructions"], "tools": conf["tools"] or [], "messages": public,
            "prompt_text": text, "prompt_ids": tokenizer.encode(text, add_special_tokens=False).ids, "expect": expect}


def evaluation_sets(src, tokenizer):
    sets = {"tool_calls": [], "arithmetic": [], "who": [], "tool_results": [], "effort": []}
    while len(sets["tool_calls"]) < 100:
        request = tasks.request(src)
        conf = settings(src, tasks.toolbox(src, [request]), house_rules(src))
        sets["tool_calls"].append(record(tokenizer, [{"role": "user", "content": request.user}], conf, {"name": request.tool["function"]["name"], "arguments": request.arguments}))
    for kind, count in (("arithmetic", 100), ("who", 50)):
        while len(sets[kind]) < count:
            turn, conf = getattr(chats, kind)(src), settings(src)
            before = answered_turn(src, "low", chats.plain(src)) if src.chance(0.3) else []
            sets[kind].append(record(tokenizer, [{k: v for k, v in m.items() if k != "reasoning"} for m in before] + [{"role": "user", "content": turn.user}], conf, turn.expect))
    while len(sets["tool_results"]) < 50:
        request = tasks.request(src)
        conf = settings(src, tasks.toolbox(src, [request]), house_rules(src))
        turn = tool_turn(src, "low", [request], conf["tools"])[:-1]
        sets["tool_results"].append(record(tokenizer, turn, conf, request.key))
    for _ in range(10):
        turn = src.pick((chats.arithmetic, chats.who, chats.fact))(src)
        date = dated(src)
        for effort in EFFORTS:
            conf = dict(settings(src, effort=effort), date=date)
            sets["effort"].append(record(tokenizer, [{"role": "user", "content": turn.user}], conf, effort))
    return sets


def main(tales, tokenizer_path, out, seed=20260131):
    from tokenizers import Tokenizer
    src = Source(random.Random(int(seed)), tale_words(tales), evaluation=True)
    os.makedirs(out, exist_ok=True)
    for name, rows in evaluation_sets(src, Tokenizer.from_file(tokenizer_path)).items():
        with open(f"{out}/{name}.jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
