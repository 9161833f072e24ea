"""Renders conversations in the harmony chat format of gpt-oss.

Messages are OpenAI chat messages; an assistant message may also carry "reasoning" (the analysis
channel). render() returns pieces (text, trained): trained text is what the model itself has to say.
"""
import json

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06"
CHANNELS = "# Valid channels: analysis, commentary, final. Channel must be included for every message."
FUNCTIONS = "\nCalls to these tools must go to the commentary channel: 'functions'."


def schema_type(schema, indent=""):
    """The TypeScript spelling of the part of JSON schema that the generator uses."""
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join("number" if k == "integer" else k for k in kind)
    if kind == "object":
        return "{\n" + "".join(_property(n, s, schema, indent) for n, s in schema.get("properties", {}).items()) + indent + "}"
    if kind == "string":
        return " | ".join(f'"{v}"' for v in schema["enum"]) if schema.get("enum") else "string"
    if kind in ("number", "integer"):
        return "number"
    if kind == "boolean":
        return "boolean"
    if kind == "array":
        return schema_type(schema["items"], indent) + "[]" if "items" in schema else "Array<any>"
    return "any"


def _property(name, schema, parent, indent):
    comment = f"{indent}// {schema['description']}\n" if schema.get("description") else ""
    mark = "" if name in parent.get("required", ()) else "?"
    default = ""
    if "default" in schema:
        value = schema["default"]
        bare = isinstance(value, str) and "enum" in schema
        default = f" // default: {value if bare else json.dumps(value, ensure_ascii=False, separators=(',', ':'))}"
    return f"{comment}{indent}{name}{mark}: {schema_type(schema, indent + '    ')},{default}\n"


def tool_block(tools):
    parts = ["# Tools\n\n## functions\n\nnamespace functions {\n\n"]
    for tool in tools:
        function = tool["function"]
        if function.get("description"):
            parts += [f"// {line}\n" for line in function["description"].split("\n")]
        parameters = function.get("parameters") or {}
        arguments = f"_: {schema_type(parameters)}" if parameters.get("properties") else ""
        parts.append(f"type {function['name']} = ({arguments}) => any;\n\n")
    return "".join(parts) + "} // namespace functions"


def system_text(effort, date, has_tools):
    dated = f"\nCurrent date: {date}" if date else ""
    return f"{IDENTITY}{dated}\n\nReasoning: {effort}\n\n{CHANNELS}{FUNCTIONS if has_tools else ''}"


def developer_text(instructions, tools, response_format=None):
    blocks = [f"# Instructions\n\n{instructions}"] if instructions else []
    if tools:
        blocks.append(tool_block(tools))
    if response_format:
        schema = json.dumps(response_format["schema"], ensure_ascii=False, separators=(",", ":"))
        blocks.append(f"# Response Formats\n\n## {response_format['name']}\n\n{schema}")
    return "\n\n".join(blocks)


def _assistant(message, keep_reasoning, end):
    """The text after `<|start|>assistant`, up to and with the last control token."""
    parts = []
    if keep_reasoning and message.get("reasoning"):
        parts.append(f"<|channel|>analysis<|message|>{message['reasoning']}<|end|>")
    calls = message.get("tool_calls") or []
    if message.get("content"):
        channel, close = ("commentary", "<|end|>") if calls else ("final", end)
        parts.append(f"<|channel|>{channel}<|message|>{message['content']}{close}")
    for call in calls:
        function = call["function"]
        parts.append(f"<|channel|>commentary to=functions.{function['name']} <|constrain|>json"
                     f"<|message|>{function['arguments']}<|call|>")
    return "<|start|>assistant".join(parts)


def render(messages, effort="medium", date=None, instructions=None, tools=None, response_format=None, trained_from=None):
    """Pieces of the conversation; assistant messages from index trained_from on are trained, all others are context."""
    trained_from = len(messages) if trained_from is None else trained_from
    text = f"<|start|>system<|message|>{system_text(effort, date, bool(tools))}<|end|>"
    developer = developer_text(instructions, tools, response_format)
    if developer:
        text += f"<|start|>developer<|message|>{developer}<|end|>"
    finals = [i for i, m in enumerate(messages[:trained_from]) if m["role"] == "assistant" and not m.get("tool_calls")]
    last_final = finals[-1] if finals else -1
    names, pieces = {}, []
    for i, message in enumerate(messages):
        if message["role"] == "user":
            text += f"<|start|>user<|message|>{message['content']}<|end|>"
        elif message["role"] == "tool":
            text += (f"<|start|>functions.{names[message['tool_call_id']]} to=assistant<|channel|>commentary"
                     f"<|message|>{message['content']}<|end|>")
        else:
            names.update({c["id"]: c["function"]["name"] for c in message.get("tool_calls") or []})
            text += "<|start|>assistant"
            trained = i >= trained_from
            said = _assistant(message, keep_reasoning=i > last_final, end="<|return|>" if trained else "<|end|>")
            if trained:
                pieces += [(text, False), (said, True)]
                text = ""
            else:
                text += said
    if text:
        pieces.append((text, False))
    return pieces


def prompt(messages, **settings):
    """The whole prompt with the suffix after which the model speaks."""
    return "".join(text for text, _ in render(messages, **settings)) + "<|start|>assistant"
