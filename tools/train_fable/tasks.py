"""Tools for the generated conversations, and the requests that call them.

A Request says what the user writes, which tool has to be called with which arguments, what the
tool answers and what the assistant says then. Half of the requests use everyday tools (weather,
calculator, mail...), half use tools put together at random, so that names and arguments can only
be copied from the context.
"""
import dataclasses
import json

from words import COLORS, NOUNS, VERBS, held_out


@dataclasses.dataclass
class Request:
    tool: dict
    user: str
    arguments: dict
    result: str
    answer: str
    key: str = ""       # the part of the answer that comes from the result
    family: str = ""    # tools whose families are prefixes of each other would be ambiguous together


def function(name, description, properties, required):
    body = {"name": name}
    if description:
        body["description"] = description
    body["parameters"] = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": body}


def compact(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def schema(kind, description=None, **more):
    return {"type": kind, **({"description": description} if description else {}), **more}


# ---------------------------------------------------------------- everyday tools

def weather(src):
    name = src.pick(("get_weather", "get_weather", "get_weather", "get_current_weather", "weather", "fetch_weather", "weather_lookup",
                     "getWeather", "current_weather", "get_forecast", "forecast"))
    key = src.pick(("city", "location", "city", "location", "place", "town", "city_name"))
    city = src.city()
    props = {key: schema("string", src.pick((None, "City name", "The city", "The city and state, e.g. San Francisco, CA", "Name of the place",
                                             f"The {key} to look up", "e.g. Paris", "The city name, e.g. Paris")))}
    arguments, tail, required = {key: city}, "", [key]
    unit = src.pick(("celsius", "fahrenheit"))
    if src.chance(0.5):
        enum = src.pick((["celsius", "fahrenheit"], ["celsius", "fahrenheit"], ["fahrenheit", "celsius"], ["celsius", "fahrenheit", "kelvin"]))
        props["unit"] = schema("string", src.pick((None, None, "Temperature unit")), enum=enum)
        if src.chance(0.3):
            required.append("unit")
        if "unit" in required or src.chance(0.5):
            arguments["unit"] = unit
            tail = src.pick((f" in {unit}", f" in degrees {unit}", f", in {unit}", f" (unit {unit})", f" in {unit.capitalize()}"))
    user = src.pick((f"What is the weather in {city}{tail}?", f"What's the weather like in {city}{tail}?", f"Weather in {city}{tail}?",
                     f"What's the weather like in {city} today{tail}?", f"How is the weather in {city}{tail}?", f"Is it cold in {city}{tail}?",
                     f"Tell me the weather in {city}{tail}.", f"What is the weather in {city} right now{tail}?", f"Will it rain in {city}{tail}?",
                     f"Please check the weather in {city}{tail}.", f"How warm is it in {city}{tail}?", f"What's the weather in {city}{tail}?",
                     f"Get the weather for {city}{tail}.", f"What is the temperature in {city}{tail}?", f"What is the current weather in {city}{tail}?",
                     f"Use {name} to tell me the weather in {city}{tail}.", f"I am going to {city}. What is the weather there{tail}?",
                     f"Can you tell me the weather in {city}{tail}?", f"weather {city}{tail}", f"Do I need an umbrella in {city}{tail}?"))
    degrees, sky = src.rng.randint(-15, 38), src.pick(("sunny", "cloudy", "rainy", "windy", "clear", "snowy", "foggy", "stormy"))
    where = city.split(",")[0]
    result, answer, copied = src.pick((
        (compact({"temperature": degrees, "condition": sky}), f"It is {degrees} degrees and {sky} in {where}.", str(degrees)),
        (compact({"temperature": degrees, "unit": unit}), f"It is {degrees} degrees {unit} in {where}.", str(degrees)),
        (compact({"temp": degrees, "sky": sky}), f"It is {degrees} degrees and {sky} in {where}.", str(degrees)),
        (compact({key: city, "temperature": degrees, "condition": sky}), f"It is {degrees} degrees and {sky} in {where}.", str(degrees)),
        (compact({"temperature": degrees}), f"It is {degrees} degrees in {where}.", str(degrees)),
        (compact({"temp_c": degrees}), f"It is {degrees} degrees in {where}.", str(degrees)),
        (f"{sky}, {degrees} degrees", f"It is {sky}, {degrees} degrees in {where}.", str(degrees)),
        (f"{degrees}°C", f"It is {degrees}°C in {where}.", str(degrees)),
        (f"{degrees} C and {sky}", f"It is {degrees} C and {sky} in {where}.", str(degrees)),
        (f"{sky}", f"It is {sky} in {where}.", sky)))
    about = src.pick(("Get the weather.", "Get the current weather for a city.", "Gets the weather in a place.", "Current weather.",
                      "Get the current weather in a given location", "Returns the weather of a city.", "Get weather", "Get current weather for a location.", None))
    return Request(function(name, about, props, required), user, arguments, result, answer, copied)


def arithmetic_tool(src):
    op, symbol, words = src.pick((("add", "+", "plus"), ("add", "+", "plus"), ("multiply", "*", "times"), ("subtract", "-", "minus"), ("divide", "/", "divided by")))
    name = src.pick((op, op, op, f"{op}_numbers", f"{op}_two_numbers", f"calc_{op}"))
    a, b = src.integer(), src.integer()
    if src.chance(0.15):
        a = src.number()
    first, second = src.pick((("a", "b"), ("a", "b"), ("a", "b"), ("x", "y"), ("first", "second"), ("left", "right"), ("num1", "num2")))
    kind = "number" if isinstance(a, float) or src.chance(0.5) else "integer"
    props = {first: schema(kind, src.pick((None, "First number"))), second: schema(kind, src.pick((None, "Second number")))}
    verb = {"add": f"Add {a} and {b}", "multiply": f"Multiply {a} by {b}", "subtract": f"Compute {a} minus {b}", "divide": f"Divide {a} by {b}"}[op]
    user = src.pick((f"What is {a} {symbol} {b}?", f"What is {a} {words} {b}?", f"{verb}.", f"{verb}, please.", f"{a} {symbol} {b}", f"Compute {a} {symbol} {b}.",
                     f"Use the {name} tool: {a} {symbol} {b}.", f"How much is {a} {words} {b}?", f"Use {name} to work out {a} {words} {b}.",
                     f"Please use the tool to {verb[0].lower()}{verb[1:]}.", f"Can you {verb[0].lower()}{verb[1:]}?"))
    value = {"add": a + b, "multiply": a * b, "subtract": a - b, "divide": a / (b or 1)}[op]
    value = round(value, 2) if isinstance(value, float) else value
    result = src.pick((str(value), str(value), compact({"result": value}), compact({"value": value}), compact({"sum": value}) if op == "add" else compact({"answer": value})))
    answer = src.pick((f"{a} {words} {b} is {value}.", f"The result is {value}."))
    about = src.pick((f"{op.capitalize()} two numbers.", f"{op.capitalize()}s two numbers", f"Computes {first} {symbol} {second}.", None))
    return Request(function(name, about, props, [first, second]), user, {first: a, second: b}, result, answer, str(value))


def calculator(src):
    name, key = src.pick(("calculate", "calculator", "evaluate", "compute", "math", "calc")), src.pick(("expression", "expression", "expr", "formula", "input"))
    a, b, symbol = src.integer(), src.integer(), src.pick("+-*/")
    text = f"{a} {symbol} {b}" if src.chance(0.7) else f"{a}{symbol}{b}"
    if src.chance(0.2):
        text = f"({text}) {src.pick('+-*/')} {src.rng.randint(1, 99)}"
    user = src.pick((f"What is {text}?", f"Calculate {text}.", f"Compute {text}", f"{text} = ?", f"Please work out {text}.", f"Use {name} for {text}.", f"How much is {text}?",
                     f"Evaluate {text}.", f"{text}"))
    value = src.integer()
    result = src.pick((str(value), compact({"result": value})))
    about = src.pick(("Evaluates an expression.", "Evaluate a mathematical expression.", "A calculator.", "Calculates the value of an expression.", None))
    props = {key: schema("string", src.pick((None, "The expression to evaluate", "e.g. 2 + 2")))}
    return Request(function(name, about, props, [key]), user, {key: text}, result, src.pick((f"The result is {value}.", f"{text} is {value}.")), str(value))


def clock(src):
    hour = f"{src.rng.randint(0, 23):02d}:{src.rng.randint(0, 59):02d}"
    name = src.pick(("get_time", "get_time", "get_current_time", "current_time", "time", "now", "clock", "get_datetime"))
    about = src.pick(("Get the current time.", "Get the time in a timezone.", "Current time.", "Returns the current time.", None))
    result = src.pick((hour, compact({"time": hour}), compact({"now": hour})))
    if src.chance(0.2):
        user = src.pick(("What time is it?", "What is the time?", "Tell me the time.", "What time is it now?", "Do you know what time it is?"))
        return Request(function(name, about, {}, []), user, {}, result, f"It is {hour}.", hour)
    city = src.city().split(",")[0]
    if src.chance(0.5):
        key, zone = src.pick(("timezone", "timezone", "tz", "zone")), src.pick((
            f"{src.pick(('Europe', 'Asia', 'America', 'Africa', 'Australia'))}/{city.replace(' ', '_')}", src.pick(("UTC", "CET", "EST", "PST", "GMT", "JST", "UTC+2", "UTC-5"))))
    else:
        key, zone = src.pick(("city", "location", "place")), city
    user = src.pick((f"What time is it in {zone}?", f"What is the time in {zone}?", f"Tell me the time in {zone}.", f"What time is it now in {zone}?", f"Current time in {zone}?",
                     f"time {zone}", f"Do you know the time in {zone}?", f"Get the time for {zone}.", f"Use {name} for {zone}."))
    props = {key: schema("string", src.pick((None, "Timezone name", "IANA timezone, e.g. Europe/Paris", f"The {key}")))}
    return Request(function(name, about, props, [key]), user, {key: zone}, result, f"It is {hour} in {zone}.", hour)


def search(src):
    name = src.pick(("search", "search", "web_search", "search_web", "find", "search_documents", "lookup", "search_books", "query_database"))
    key, text = src.pick(("query", "query", "query", "q", "text", "keywords", "search_term")), src.phrase(1, 4)
    props, arguments, tail = {key: schema("string", src.pick((None, "The search query", "What to search for")))}, {key: text}, ""
    if src.chance(0.3):
        limit = src.pick(("limit", "max_results", "count", "top_k", "n"))
        props[limit] = schema("integer", src.pick((None, "How many results")))
        if src.chance(0.5):
            arguments[limit] = src.rng.randint(1, 50)
            tail = src.pick((f", {arguments[limit]} results", f" and show {arguments[limit]} results", f" ({limit} {arguments[limit]})"))
    user = src.pick((f"Search for {text}{tail}.", f"Search for \"{text}\"{tail}.", f"Please search for {text}{tail}.", f"Find {text}{tail}.", f"Look for \"{text}\"{tail}.",
                     f"Search the web for {text}{tail}.", f"Can you search for {text}{tail}?", f"Use {name} to find \"{text}\"{tail}.", f"search {text}{tail}"))
    found = src.phrase(2, 5)
    result = src.pick((found, compact({"results": [found]}), compact([found]), compact({"title": found}), compact({"result": found})))
    about = src.pick(("Search the web.", "Searches for documents.", "Search.", "Find pages by a query.", None))
    return Request(function(name, about, props, [key]), user, arguments, result, src.pick((f"I found this: {found}", f"I found this: {found}.")), found)


def message(src):
    name = src.pick(("send_message", "send_message", "send_email", "send_mail", "message", "send_text", "sendMessage", "post_message", "send_sms"))
    key = src.pick(("to", "to", "recipient", "name", "user", "person", "contact"))
    body = src.pick(("text", "text", "message", "body", "content", "msg"))
    person, text = src.name(), src.pick((src.phrase(2, 6), "Hello!", "I am late.", "See you soon.", f"Come at {src.rng.randint(1, 12)}.", "Happy birthday!", "Good night", f"Where is the {src.word()}?"))
    if "mail" in name and src.chance(0.4):
        person = f"{person.lower()}@{src.word()}.{src.pick(('com', 'org', 'net'))}"
    props, arguments = {key: schema("string", src.pick((None, "Who gets it", "Recipient"))), body: schema("string", src.pick((None, "The text")))}, {key: person, body: text}
    required = [key, body]
    subject_text = ""
    if "mail" in name and src.chance(0.4):
        subject = src.phrase(1, 3)
        props["subject"] = schema("string")
        arguments["subject"] = subject
        required.append("subject")
        subject_text = f" with the subject \"{subject}\""
    user = src.pick((f"Send \"{text}\" to {person}{subject_text}.", f"Send {person} the message \"{text}\"{subject_text}.", f"Tell {person}: \"{text}\"{subject_text}",
                     f"Send a message to {person}{subject_text}: {text}", f"Please write to {person}{subject_text}: \"{text}\"", f"Message {person}{subject_text}: {text}",
                     f"Send a message to {person}{subject_text} saying \"{text}\"", f"Use {name} to tell {person} \"{text}\"{subject_text}."))
    result, answer, copied = src.pick((("ok", f"The message to {person} was sent.", person), (compact({"status": "sent"}), f"The message to {person} was sent.", person),
                                       (compact({"ok": True}), f"The message to {person} was sent.", person), ("sent", f"The message to {person} was sent.", person)))
    about = src.pick(("Send a message.", "Sends a text message to a person.", "Sends a message to someone.", None))
    return Request(function(name, about, props, required), user, arguments, result, answer, copied)


def dictionary(src):
    name, key, word = src.pick(("lookup_word", "lookup_word", "define", "define_word", "dictionary", "get_definition", "look_up")), src.pick(("word", "word", "term", "text")), src.word()
    user = src.pick((f"What does {word} mean?", f"What does \"{word}\" mean?", f"Look up {word}.", f"Look up the word {word}.", f"Look up the word '{word}'.", f"Define {word}.",
                     f"What is the meaning of \"{word}\"?", f"Please look up \"{word}\".", f"Use {name} for the word {word}.", f"What is a {word}?"))
    meaning = src.phrase(2, 6)
    result = src.pick((meaning, compact({"definition": meaning}), compact({"word": word, "meaning": meaning}), compact({key: word, "definition": meaning})))
    about = src.pick(("Look up a word.", "Look up a word in the dictionary.", "Gives the meaning of a word.", None))
    return Request(function(name, about, {key: schema("string", src.pick((None, "The word")))}, [key]), user, {key: word}, result, f"{word} means: {meaning}", meaning)


def translator(src):
    name, text = src.pick(("translate", "translate_text", "translate")), src.phrase(1, 4)
    key, to = src.pick(("text", "sentence", "phrase")), src.pick(("target_language", "language", "to", "target"))
    language = src.pick(("French", "German", "Spanish", "Italian", "Latin", "Greek", "Polish", "Dutch", "Japanese", "Danish", "Welsh", "Swedish"))
    user = src.pick((f"Translate \"{text}\" into {language}.", f"Translate '{text}' to {language}.", f"How do you say \"{text}\" in {language}?", f"Say \"{text}\" in {language}.",
                     f"Please translate \"{text}\" to {language}."))
    said = f"{src.pseudo()} {src.pseudo()}"
    result = src.pick((said, compact({"translation": said})))
    props = {key: schema("string"), to: schema("string")}
    return Request(function(name, src.pick(("Translate a text.", "Translates text into a language.", None)), props, [key, to]), user,
                   {key: text, to: language}, result, f"In {language}: {said}", said)


def timer(src):
    minutes = src.rng.randint(1, 90)
    unit = src.pick(("minutes", "seconds", "minutes"))
    name = src.pick(("set_timer", "start_timer", "timer"))
    user = src.pick((f"Set a timer for {minutes} {unit}.", f"Start a timer of {minutes} {unit}.", f"Timer, {minutes} {unit}, please.", f"Wake me in {minutes} {unit}."))
    label = {}
    props = {unit: schema("integer")}
    if src.chance(0.3):
        props["label"] = schema("string")
    return Request(function(name, src.pick(("Set a timer.", f"Starts a timer, in {unit}.", None)), props, [unit]), user, {unit: minutes, **label},
                   src.pick(("ok", compact({"status": "started"}))), f"The timer is set for {minutes} {unit}.", str(minutes))


def reminder(src):
    text, time = src.phrase(2, 4), f"{src.rng.randint(0, 23):02d}:{src.rng.choice((0, 15, 30, 45)):02d}"
    name = src.pick(("add_reminder", "create_reminder", "set_reminder", "remind_me"))
    key, when = src.pick(("text", "title", "what", "task")), src.pick(("time", "when", "at"))
    user = src.pick((f"Remind me at {time}: {text}", f"Set a reminder \"{text}\" for {time}.", f"Add a reminder at {time} with the text \"{text}\".", f"At {time} remind me: \"{text}\"."))
    number = src.integer()
    result, answer, copied = src.pick((("ok", f"I will remind you at {time}.", time), (compact({"id": number}), f"The reminder for {time} has the id {number}.", str(number))))
    return Request(function(name, src.pick(("Add a reminder.", "Creates a reminder.", None)), {key: schema("string"), when: schema("string")}, [key, when]),
                   user, {key: text, when: time}, result, answer, copied)


def light(src):
    room, on = src.pick(("kitchen", "hall", "bedroom", "garden", "cellar", "bathroom", "attic", "garage", src.word())), src.chance(0.5)
    name, flag = src.pick(("set_light", "switch_light", "light", "toggle_light")), src.pick(("on", "state", "enabled", "is_on"))
    word = "on" if on else "off"
    user = src.pick((f"Turn {word} the light in the {room}.", f"Turn the {room} light {word}.", f"Switch {word} the {room} light.", f"Please switch the light in the {room} {word}.", f"{room} light {word}"))
    return Request(function(name, src.pick(("Switch a light.", "Turns the light in a room on or off.", None)), {"room": schema("string"), flag: schema("boolean")}, ["room", flag]),
                   user, {"room": room, flag: on}, src.pick(("ok", compact({"ok": True}), "done")), f"The light in the {room} is {word}.", word)


def stock(src):
    symbol = src.pick(("".join(src.pick("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(src.rng.randint(3, 4))), src.pick(("AAPL", "MSFT", "NVDA", "GOOG", "TSLA", "IBM"))))
    key, name = src.pick(("symbol", "ticker", "stock")), src.pick(("get_stock_price", "stock_price", "get_price", "get_quote"))
    price = round(src.rng.uniform(1, 900), 2)
    user = src.pick((f"What is the price of {symbol}?", f"What is the stock price of {symbol}?", f"How much is {symbol} now?", f"Get the price of {symbol}.", f"Price of {symbol}?"))
    result = src.pick((str(price), compact({"price": price}), compact({key: symbol, "price": price})))
    return Request(function(name, src.pick(("Get a stock price.", "Price of a stock.", None)), {key: schema("string")}, [key]), user, {key: symbol}, result,
                   f"The price of {symbol} is {price}.", str(price))


def booking(src):
    place, people, hour = src.phrase(1, 2).title(), src.rng.randint(1, 12), f"{src.rng.randint(11, 22)}:{src.pick(('00', '15', '30'))}"
    name = src.pick(("book_table", "reserve_table", "make_reservation"))
    where, many = src.pick(("restaurant", "place", "name")), src.pick(("people", "guests", "party_size", "seats"))
    props, arguments, tail, required = {where: schema("string"), many: schema("integer"), "time": schema("string")}, {where: place, many: people}, "", [where, many]
    if src.chance(0.6):
        arguments["time"] = hour
        tail = f" at {hour}"
    user = src.pick((f"Book a table for {people} at {place}{tail}.", f"Reserve a table at {place} for {people} people{tail}.", f"Please book {place}{tail} for {people}.", f"I need a table for {people}{tail} at {place}."))
    number = src.integer()
    return Request(function(name, src.pick(("Book a table.", "Books a table in a restaurant.", None)), props, required), user, arguments,
                   compact({"booking": number}), f"The table at {place} is booked. The number is {number}.", str(number))


EVERYDAY = (weather, weather, weather, arithmetic_tool, arithmetic_tool, calculator, clock, clock, search, search, message, message, dictionary, dictionary,
            translator, timer, reminder, light, stock, booking)

# ---------------------------------------------------------------- tools put together at random

PEOPLE_KEYS = "name person user friend owner author to recipient customer player patient student".split()
PLACE_KEYS = "city place town location country destination origin address room".split()
TEXT_KEYS = "title subject topic text query label message note phrase word reason description comment key value".split()
INT_KEYS = "count days limit amount age number id year size level page rank hours minutes quantity seats index".split()
NUMBER_KEYS = "price weight temperature rate height distance factor width length score".split()
BOOL_KEYS = "urgent verbose loud public exact force silent hidden active dry_run recursive".split()
ARRAY_KEYS = "tags items names words colors labels keys topics guests".split()
ENUMS = {"color": COLORS, "unit": ["celsius", "fahrenheit", "kelvin"], "size": ["small", "medium", "large", "huge"], "priority": ["low", "normal", "high"],
         "format": ["json", "csv", "xml", "text"], "style": ["plain", "bold", "fancy", "short"], "mode": ["fast", "slow", "safe", "auto"], "order": ["asc", "desc"],
         "currency": ["EUR", "USD", "GBP", "JPY"], "day": ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]}


def parameter(src):
    """(key, schema, value) of a random parameter."""
    kind = src.pick(("person", "place", "text", "text", "text", "integer", "integer", "number", "boolean", "enum", "array", "pseudo", "pseudo"))
    about = src.pick((None, None, "The value to use", f"The {src.any_word()}", "Optional note", f"{src.any_word().capitalize()} of the {src.any_word()}"))
    if kind == "person":
        return src.pick(PEOPLE_KEYS), schema("string", about), src.name()
    if kind == "place":
        return src.pick(PLACE_KEYS), schema("string", about), src.city()
    if kind == "text":
        return src.pick(TEXT_KEYS), schema("string", about), src.phrase()
    if kind == "integer":
        return src.pick(INT_KEYS), schema("integer", about), src.integer()
    if kind == "number":
        return src.pick(NUMBER_KEYS), schema("number", about), src.number()
    if kind == "boolean":
        return src.pick(BOOL_KEYS), schema("boolean", about), src.chance(0.5)
    if kind == "enum":
        key = src.pick(list(ENUMS) + [""])
        options = ENUMS[key] if key else [src.word() for _ in range(4)]
        options = src.rng.sample(options, src.rng.randint(2, min(4, len(options))))
        return key or src.word(), schema("string", about, enum=options), src.pick(options)
    if kind == "array":
        return src.pick(ARRAY_KEYS), schema("array", about, items={"type": "string"}), [src.word() for _ in range(src.rng.randint(1, 3))]
    key = src.pick((src.pseudo(), src.word(), f"{src.any_word()}_{src.pick(TEXT_KEYS)}"))
    if src.chance(0.4):
        return key, schema(src.pick(("integer", "number")), about), src.integer()
    return key, schema("string", about), src.phrase(1, 2)


def tool_name(src):
    """(name, verb, noun): verb and noun are what a user calls it, empty for a made-up name."""
    style = src.rng.random()
    verb, noun = src.pick(VERBS), src.pick(NOUNS) if src.chance(0.6) else src.any_word()
    if style < 0.45:
        return f"{verb}_{noun}", verb, noun
    if style < 0.55:
        return f"{verb}{noun.capitalize()}", verb, noun
    if style < 0.62:
        return f"{noun}_{verb}", verb, noun
    if style < 0.72:
        other = src.any_word()
        return f"{verb}_{other}_{noun}", verb, f"{other} {noun}"
    if style < 0.85:
        return src.pseudo(), "", ""
    return f"{src.pseudo()}_{src.any_word()}", "", ""


def spoken_value(src, value):
    """How a user writes a value in a sentence."""
    if isinstance(value, bool):
        return src.pick(("true", "yes")) if value else src.pick(("false", "no"))
    if isinstance(value, list):
        return value[0] if len(value) == 1 else ", ".join(value[:-1]) + " and " + value[-1]
    if isinstance(value, str) and (" " in value or src.chance(0.25)):
        return src.pick((f'"{value}"', f'"{value}"', f"'{value}'", value))
    return str(value)


def spoken_arguments(src, arguments):
    style = src.rng.randint(0, 5)
    spoken = []
    for key, value in arguments.items():
        said, key = spoken_value(src, value), key.replace("_", " ") if src.chance(0.5) else key
        spoken.append((f"{key} {said}", f"{key} = {said}", f"{key}: {said}", f"the {key} {said}", f"{said} as the {key}", f"{key} set to {said}")[style])
    if style in (1, 2):
        return ", ".join(spoken)
    return spoken[0] if len(spoken) == 1 else ", ".join(spoken[:-1]) + " and " + spoken[-1]


def random_request(src):
    name, verb, noun = tool_name(src)
    while held_out(name) != src.evaluation:
        name, verb, noun = tool_name(src)
    properties, arguments, required = {}, {}, []
    for _ in range(src.pick((0, 1, 1, 1, 2, 2, 2, 3, 3, 4))):
        key, spec, value = parameter(src)
        if key in properties:
            continue
        properties[key] = spec
        if src.chance(0.75):
            required.append(key)
        if key in required or src.chance(0.5):
            arguments[key] = value
    about = description(src, verb, noun)
    said = spoken_arguments(src, arguments) if arguments else ""
    user = request_sentence(src, name, verb, noun, said)
    result, answer, copied = random_result(src, name)
    return Request(function(name, about, properties, required), user, arguments, result, answer, copied)


def description(src, verb, noun):
    if not verb:
        return src.pick((None, f"The {src.any_word()} tool.", f"{src.any_word().capitalize()} and {src.any_word()}.", f"Runs the {src.any_word()}."))
    return src.pick((f"{verb.capitalize()} the {noun}.", f"{verb.capitalize()} a {noun}", f"{verb.capitalize()}s the {noun} of a {src.any_word()}.", f"Use this to {verb} a {noun}.", None,
                     f"{verb.capitalize()} the {noun}.\nReturns a {src.any_word()}."))


def request_sentence(src, name, verb, noun, said):
    plain = [f"Use {name}", f"Call {name}", f"Please run {name}", f"Run the tool {name}", f"I want you to call {name}", f"Use the {name} tool", f"Please use {name}"]
    if verb and src.chance(0.6):
        plain = [f"{verb.capitalize()} the {noun}", f"Please {verb} the {noun}", f"I need to {verb} a {noun}", f"{verb.capitalize()} a {noun}", f"Help me {verb} the {noun}"]
        if src.chance(0.25):
            return f"Can you {verb} the {noun}{' with ' + said if said else ''}?"
    opening = src.pick(plain)
    if not said:
        return opening + src.pick((".", ".", "", " now.", " please."))
    return src.pick((f"{opening} with {said}.", f"{opening}: {said}.", f"{opening} with {said}", f"{opening} ({said}).", f"{opening}, {said}.", f"{said}. {opening}."))


def random_result(src, name):
    """What the tool answers, the final answer, and the copied part."""
    style = src.rng.randint(0, 7)
    value = src.pick((src.integer, src.word, src.phrase, src.name, src.number, src.city))()
    if style == 0:
        return "ok", f"Done. {name} says ok.", "ok"
    if style == 1:
        return str(value), f"The result is {value}.", str(value)
    if style == 2:
        return compact({"result": value}), f"The result is {value}.", str(value)
    key = src.pick(TEXT_KEYS + INT_KEYS + ["status", "total", "code", src.word()])
    if style in (3, 4):
        return compact({key: value}), f"The {key} is {value}.", str(value)
    if style == 5:
        return f"{key}: {value}", f"The {key} is {value}.", str(value)
    if style == 6:
        other, more = src.pick(("status", "note", src.word())), src.pick((src.word, src.integer))()
        if other == key:
            other = "extra"
        return compact({key: value, other: more}), f"The {key} is {value} and the {other} is {more}.", str(value)
    problem = src.pick(("not found", "no access", "timeout", f"no such {src.word()}", "wrong id"))
    return compact({"error": problem}), f"That did not work: {problem}.", problem


FAMILIES = {"calculator": "sum", "dictionary": "search", "reminder": "timer"}


def request(src):
    """Any request; its tool is new each time."""
    if src.chance(0.6):
        made = random_request(src)
        made.family = "random " + made.tool["function"]["name"]
        return made
    maker = src.pick(EVERYDAY)
    made = maker(src)
    made.family = FAMILIES.get(maker.__name__, maker.__name__)
    if maker is arithmetic_tool:
        made.family = "sum " + made.tool["function"]["description"].split()[0] if made.tool["function"].get("description") else "sum"
    return made


def fits_beside(made, others):
    """True if no sentence could mean both this tool and one of the others."""
    names = [o.tool["function"]["name"] for o in others]
    clash = any(made.family.startswith(o.family) or o.family.startswith(made.family) for o in others)
    return made.tool["function"]["name"] not in names and not clash


def toolbox(src, wanted, most=4):
    """The tools of the wanted requests among others, in any order."""
    chosen = list(wanted)
    for _ in range(src.pick((0, 0, 1, 1, 2, 3))):
        other = request(src)
        if len(chosen) < most and fits_beside(other, chosen):
            chosen.append(other)
    src.rng.shuffle(chosen)
    return [c.tool for c in chosen]
