"""Conversations without tools: sums, who-did-what, small talk, small facts, stories, instructions.

Every function returns a Turn: what the user says, what the assistant answers, and the thoughts
behind it, from the most to the least needed; the effort decides how many of them are spoken.
"""
import dataclasses
import json

from stories import story, story_request
from words import ANIMALS, COLORS, FOODS, THINGS


@dataclasses.dataclass
class Turn:
    user: str
    answer: str
    thoughts: list
    short: str = ""        # the answer in a word, if there is one
    instructions: str = ""  # the developer message that the answer obeys
    expect: str = ""        # what an evaluation looks for


DIGITS = "zero one two three four five six seven eight nine".split()
CHECKS = ["The numbers are small, so I can do it in my head.", "I read the question once more to be sure.", "Nothing else is asked.", "I write the result plainly.",
          "There is only one step to do.", "I check the sign again.", "No tool is needed for this."]
MUSINGS = ["I read the message again slowly.", "There is nothing hidden in it.", "No tool is needed for this.", "A short answer is best.", "I should be friendly and clear.",
           "I look at the instructions and keep to them.", "The words of the user are plain.", "I think about what the user needs.", "I keep to what is known.",
           "I check my answer once more before I say it.", "It is good to answer in plain English.", "I do not add what was not asked."]


def padded(src, thoughts, musings=MUSINGS):
    """Thoughts for the highest effort: the needed ones first, then the careful ones."""
    return thoughts + src.rng.sample(musings, src.rng.randint(5, 7))


def arithmetic(src):
    a, b = src.rng.randint(0, 9), src.rng.randint(0, 9)
    symbol, word, noun = src.pick((("+", "plus", "sum"), ("-", "minus", "difference"), ("x", "times", "product")))
    if symbol == "-" and b > a and src.chance(0.5):
        a, b = b, a
    value = {"+": a + b, "-": a - b, "x": a * b}[symbol]
    sign = src.pick(("x", "*", "×")) if symbol == "x" else symbol
    left, right = (DIGITS[a], DIGITS[b]) if src.chance(0.15) else (a, b)
    asks = [f"What is {a} {sign} {b}?", f"What is {left} {word} {right}?", f"{a} {sign} {b}", f"{a} {sign} {b} = ?", f"{a}{sign}{b}", f"{a}{sign}{b}=", f"Compute {a} {sign} {b}.",
            f"How much is {a} {sign} {b}?", f"How much is {left} {word} {right}?", f"Please work out {a} {word} {b}.", f"What is the {noun} of {a} and {b}?", f"Calculate {a} {sign} {b}.",
            f"Tell me what {left} {word} {right} is.", f"What's {a}{sign}{b}?", f"Solve {a} {sign} {b}.", f"I need to know {a} {word} {b}.", f"What does {left} {word} {right} make?",
            f"Can you tell me {a} {sign} {b}?", f"Quick: {a} {sign} {b}?", f"{left} {word} {right}?", f"What is {a}{sign}{b}?", f"{a} {sign} {b}?", f"{a} {word} {b} is what?"]
    who, what = src.name(), src.pick(FOODS)
    if symbol == "+":
        asks += [f"Add {a} and {b}.", f"{who} has {a} {what} and gets {b} more. How many {what} does {who} have?"]
    elif symbol == "-":
        asks += [f"Subtract {b} from {a}.", f"Take {b} away from {a}."]
        asks += [f"{who} has {a} {what} and eats {b}. How many are left?"] if a >= b else []
    else:
        asks += [f"Multiply {a} by {b}.", f"{who} has {a} baskets with {b} {what} each. How many {what} is that?"]
    thoughts = [f"{a} {symbol} {b} = {value}.", f"The user asks for {a} {word} {b}."]
    more = [f"The first number is {a}.", f"The second number is {b}.", f"The sign says {word}.", f"So {a} {word} {b} is {value}."]
    return Turn(src.pick(asks), f"{a} {symbol} {b} = {value}.", padded(src, thoughts + more, CHECKS), short=str(value), expect=str(value))


SAID = [("said", "say"), ("cried", "cry"), ("whispered", "whisper"), ("shouted", "shout"), ("sang", "sing"), ("called", "call")]
DID = [("found", "find", THINGS), ("lost", "lose", THINGS), ("bought", "buy", THINGS), ("took", "take", THINGS), ("stole", "steal", THINGS), ("ate", "eat", FOODS), ("hid", "hide", THINGS),
       ("broke", "break", THINGS), ("carried", "carry", THINGS), ("saw", "see", ANIMALS), ("fed", "feed", ANIMALS), ("sold", "sell", FOODS)]


def beings(src, n):
    """n different actors: all animals or people, or mixed."""
    actors = []
    while len(actors) < n:
        actor = src.name() if src.chance(0.5) else "the " + src.pick(ANIMALS + ["king", "miller", "queen", "witch", "farmer", "boy", "girl", "old man"])
        if actor not in actors:
            actors.append(actor)
    return actors


def start(text):
    return text[0].upper() + text[1:]


def who(src):
    return src.pick((who_said, who_said, who_did, who_did, who_gave))(src)


def who_said(src):
    a, b = beings(src, 2)
    past, now = src.pick(SAID)
    quote = src.pick((src.phrase(1, 3).capitalize() + src.pick("!.?"), src.pick(("Sing!", "Come here!", "Give me the cheese.", "Good morning!", "Run!", "I am hungry.", "Open the door!"))))
    mark = src.pick("'\"")
    scene = src.pick((f"{start(a)} {past} to {b}: {mark}{quote}{mark}", f"{mark}{quote}{mark} {past} {a} to {b}.", f"{start(a)} {past} to {b}, {mark}{quote}{mark}",
                      f"{start(a)} met {b} and {past}: {mark}{quote}{mark}"))
    kind = src.rng.randint(0, 4)
    if kind <= 1:
        return answered(src, scene, src.pick((f"Who {past} this?", f"Who {past} that?", f"Who spoke?", f"Who {past} {mark}{quote}{mark}?", f"Who {past} it?")), a, [f"{start(a)} {past} it to {b}."])
    if kind == 2:
        return answered(src, scene, src.pick((f"To whom did {a} speak?", f"Who heard it?", f"To whom did {a} {now} this?")), b, [f"{start(a)} spoke to {b}."])
    if kind == 3:
        other = src.pick(("was silent", "said nothing", "went away", "laughed"))
        return answered(src, f"{scene} {start(b)} {other}.", f"Who {other}?", b, [f"{start(b)} {other}, and {a} spoke."])
    return answered(src, scene, f"What did {a} {now}?", quote, [f"The words in the marks are the words of {a}."], quoted=True)


def who_did(src):
    n = src.pick((2, 2, 3))
    actors, deeds = beings(src, n), src.rng.sample(DID, n)
    facts = []
    for actor, (past, now, objects) in zip(actors, deeds):
        thing = src.pick(objects)
        color = src.pick(COLORS) + " " if objects is THINGS and src.chance(0.4) else ""
        facts.append((actor, past, now, f"the {color}{thing}"))
    join = src.pick((". ", ". Then ", " and ", ", but ", ", and then "))
    scene = f"{join}".join((start(f"{a} {p} {t}") if i == 0 or join == ". " else f"{a} {p} {t}") for i, (a, p, _, t) in enumerate(facts)) + "."
    actor, past, now, thing = src.pick(facts)
    if src.chance(0.7):
        return answered(src, scene, f"Who {past} {thing}?", actor, [f"It says that {actor} {past} {thing}."])
    return answered(src, scene, f"What did {actor} {now}?", thing, [f"It says that {actor} {past} {thing}."])


def who_gave(src):
    a, b = beings(src, 2)
    thing, past, now = src.pick(THINGS), *src.pick((("gave", "give"), ("showed", "show"), ("brought", "bring"), ("sent", "send"), ("sold", "sell")))
    scene = src.pick((f"{start(a)} {past} {b} a {thing}.", f"{start(a)} {past} a {thing} to {b}."))
    ask, answer = src.pick(((f"Who {past} the {thing}?", a), (f"Who {past} a {thing} to {b}?", a), (f"Who got the {thing}?", b), (f"To whom did {a} {now} the {thing}?", b),
                            (f"What did {a} {now} {b}?", f"the {thing}")))
    return answered(src, scene, ask, answer, [f"It says that {a} {past} the {thing} to {b}."])


def answered(src, scene, question, answer, thoughts, quoted=False):
    user = src.pick((f"{scene} {question}", f"{scene} {question}", f"{scene}\n{question}", f"{question} {scene}", f"Read this: {scene} {question}", f"{scene}\n\nQuestion: {question}"))
    said = start(answer) if quoted else start(answer) + "."
    thoughts = thoughts + [f"The question is: {question}"]
    return Turn(user, said, padded(src, thoughts + [f"The answer is {answer}"], MUSINGS), short=start(answer), expect=answer.removeprefix("the "))


CAPITALS = dict(France="Paris", England="London", Italy="Rome", Germany="Berlin", Spain="Madrid", Austria="Vienna", Norway="Oslo", Portugal="Lisbon", Greece="Athens", Ireland="Dublin",
                Poland="Warsaw", Hungary="Budapest", Finland="Helsinki", Japan="Tokyo", China="Beijing", Egypt="Cairo", Russia="Moscow", Sweden="Stockholm", Denmark="Copenhagen",
                Belgium="Brussels", Turkey="Ankara", Canada="Ottawa", Cuba="Havana", Peru="Lima", Kenya="Nairobi", India="New Delhi")
OPPOSITES = dict(hot="cold", big="small", day="night", good="bad", old="young", fast="slow", light="dark", up="down", rich="poor", happy="sad", wet="dry", open="closed", long="short", black="white",
                 left="right", early="late", full="empty", hard="soft", high="low", strong="weak")
SOUNDS = dict(dog="barks", cat="meows", cow="moos", sheep="bleats", duck="quacks", lion="roars", horse="neighs", pig="grunts", owl="hoots", frog="croaks", snake="hisses", wolf="howls")
FACTS = [("What color is the sky?", "The sky is blue.", "Blue"), ("What color is grass?", "Grass is green.", "Green"), ("What color is snow?", "Snow is white.", "White"),
         ("How many days are in a week?", "A week has seven days.", "Seven"), ("How many legs does a dog have?", "A dog has four legs.", "Four"), ("How many months are in a year?", "A year has twelve months.", "Twelve"),
         ("What do bees make?", "Bees make honey.", "Honey"), ("Where do fish live?", "Fish live in water.", "Water"), ("Is fire hot?", "Yes, fire is hot.", "Yes"), ("Is ice warm?", "No, ice is cold.", "No"),
         ("Can a stone swim?", "No, a stone sinks.", "No"), ("Name a prime.", "Seven is a prime number.", "Seven"), ("Name a prime number.", "Seven is a prime number.", "Seven"), ("Name a color.", "Blue is a color.", "Blue"), ("Name an animal.", "The fox is an animal.", "Fox"),
         ("What comes after Monday?", "Tuesday comes after Monday.", "Tuesday"), ("What comes after A?", "B comes after A.", "B"), ("Count to five.", "1, 2, 3, 4, 5.", "1, 2, 3, 4, 5"), ("Count to three.", "1, 2, 3.", "1, 2, 3"),
         ("Count from 1 to 5.", "1, 2, 3, 4, 5.", "1, 2, 3, 4, 5"), ("Count to ten.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"), ("What is the first letter of the alphabet?", "The first letter is A.", "A"), ("Where does the sun rise?", "The sun rises in the east.", "East"),
         ("Is water wet?", "Yes, water is wet.", "Yes"), ("Name a fruit.", "An apple is a fruit.", "Apple"), ("Name a day of the week.", "Monday is a day of the week.", "Monday"), ("Is the sun hot?", "Yes, the sun is very hot.", "Yes")]


def fact(src):
    kind = src.rng.randint(0, 3)
    if kind == 0:
        land, city = src.pick(list(CAPITALS.items()))
        turn = (src.pick((f"What is the capital of {land}?", f"Which city is the capital of {land}?", f"Capital of {land}?", f"What's the capital of {land}?")), f"The capital of {land} is {city}.", city)
    elif kind == 1:
        word, other = src.pick(list(OPPOSITES.items()))
        turn = (src.pick((f"What is the opposite of {word}?", f"Give me the opposite of {word}.", f"Opposite of {word}?")), f"The opposite of {word} is {other}.", start(other))
    elif kind == 2:
        animal, sound = src.pick(list(SOUNDS.items()))
        turn = (src.pick((f"What does a {animal} do?", f"What sound does a {animal} make?")), f"A {animal} {sound}.", start(sound))
    else:
        turn = src.pick(FACTS)
    user, answer, short = turn
    return Turn(user, answer, padded(src, [f"The answer is: {short}.", src.pick(("This is a simple question.", "The user asks a simple question.", "The user wants to know a small thing."))]), short=short)


def unknown(src):
    """What only a tool could know."""
    city = src.city()
    ask = src.pick((f"What is the weather in {city}?", f"What time is it in {city}?", "What time is it?", f"What is the price of a ticket to {city}?", "What is in the news today?", f"Who won the game in {city}?",
                    f"What's the weather like in {city}?"))
    return Turn(ask, "I do not know that, and I have no tool for it.", padded(src, ["I have no tool that knows this.", "The user asks for something new."]))


def greeting(src):
    user, answer = src.pick(((("Hello!", "Hello", "Hi", "Hi!", "Hey", "Hi there", "Good morning", "Good evening!", "hello", "hi", "Say hello.", "Say hello", "Say hi", "Say hi."), "Hello! How can I help you?"),
                             (("How are you?", "How do you do?", "How are you today?"), "I am well, thank you. How can I help you?"),
                             (("Thank you!", "Thanks", "Thanks a lot.", "thank you"), "You are welcome!"), (("Goodbye", "Bye!", "See you later."), "Goodbye!"),
                             (("What can you do?", "Help", "How can you help me?"), "I can tell short stories, do small sums, answer simple questions and call tools."),
                             (("Who made you?", "Where do you come from?"), "I was made for the orcd project as a small demo model."),
                             (("ping", "Ping"), "pong"), (("test", "Test", "This is a test."), "The test works. How can I help you?"),
                             (("Tell me a joke.", "A joke, please."), "Why did the hen sit on the clock? She wanted to be on time."),
                             (("Who are you?", "What are you?", "What is your name?", "Are you a human?", "Tell me who you are.", "Introduce yourself.", "Are you ChatGPT?"),
                              "I am fable, a small demo model. I tell tales and call tools.")))
    return Turn(src.pick(user), answer, padded(src, [src.pick(("A short friendly answer is right.", "I answer in a friendly way.")), src.pick(("The user speaks to me.", "The user wants to talk.", "This is small talk."))]))


def tale(src):
    ask, hero = story_request(src)
    return Turn(ask, story(src, hero), padded(src, [f"I tell a short story about {hero}.", "The user wants a story.", f"It needs a beginning, a trouble and a good end.", "A friend can help in the middle."]))


def repeat(src):
    text = src.pick((src.phrase(1, 5), src.phrase(3, 9), src.phrase(3, 9), src.word(), src.name(), "this is a test"))
    mark = src.pick(("\"", "'"))
    if src.chance(0.2):
        n = src.rng.randint(2, 4)
        many = {2: "two times", 3: "three times", 4: "four times"}[n]
        text = src.word()
        return Turn(src.pick((f"Say {text} {many}.", f"Write {text} {many}.")), " ".join([text] * n), padded(src, [f"I say {text} {many}.", "The user wants a word again and again."]))
    user = src.pick((f"Say {mark}{text}{mark}.", f"Repeat: {text}", f"Repeat after me: {text}", f"Please say {mark}{text}{mark}", f"Write {mark}{text}{mark}.", f"Say exactly: {text}", f"Say {text}", f"Say {text}.", f"Copy this: {text}", f"Say {mark}{text}{mark} and nothing else.", f"Reply with exactly: {text}"))
    return Turn(user, text, padded(src, ["I repeat the words.", "The user wants to hear the same words."]))


def plain(src):
    """Any single turn without tools or instructions."""
    return src.pick((arithmetic, arithmetic, arithmetic, who, who, who, who, fact, fact, greeting, greeting, tale, repeat, repeat, unknown))(src)


PERSONAS = "pirate wizard king teacher butler robot farmer knight cook sailor".split()


def instructed(src):
    """A turn under a developer message that changes the answer."""
    turn = src.pick((arithmetic, who, fact, fact, greeting))(src)
    style = src.rng.randint(0, 8)
    word = src.pick(("Amen", "Hurrah", "Over", "Meow", "Sir", src.word().capitalize()))
    if style in (0, 1) and turn.short:
        turn.instructions, turn.answer = src.pick(("Answer in one word.", "Answer with one word only.", "Reply with a single word.", "Be as short as possible.")), turn.short
    elif style == 2:
        turn.instructions, turn.answer = src.pick((f"Always end with the word {word}.", f"End every answer with {word}.", f"Always end your answer with the word {word}.")), f"{turn.answer} {word}."
    elif style == 3:
        turn.instructions, turn.answer = src.pick((f"Begin every answer with '{word}!'", f"Always start with '{word}!'", f"Start every answer with the word {word}!")), f"{word}! {turn.answer}"
    elif style == 4:
        turn.instructions, turn.answer = src.pick(("Answer in capital letters.", "Write everything in capital letters.", "Use only capital letters.")), turn.answer.upper()
    elif style == 5:
        name, role = src.name(), src.pick(PERSONAS)
        turn = Turn(src.pick(("Who are you?", "What is your name?", "Tell me who you are.")), f"I am {name}, a {role}.", padded(src, [f"My instructions say that I am {name}, a {role}.", "The user asks who I am."]),
                    instructions=src.pick((f"You are {name}, a {role}.", f"You are a {role} named {name}.", f"Your name is {name}. You are a {role}.")))
    elif style == 6:
        name = src.name()
        turn.instructions, turn.answer = src.pick((f"The user is called {name}. Always use the name.", f"Address the user as {name}.", f"Call the user {name}.")), f"{name}, {turn.answer[0].lower() if turn.answer.split()[0] in ('The', 'A', 'Hello!') else turn.answer[0]}{turn.answer[1:]}"
    else:
        turn.instructions = src.pick(("You are a helpful assistant.", "You are a helpful assistant.", "Be helpful.", "Be kind and brief.", "You are a helpful demo.", "Answer truthfully.", f"You are an assistant for {src.word()}s.", "Use the tools if they help.", "Use plain English."))
    if style < 7:
        turn.thoughts.insert(1, f"The instructions say: {turn.instructions}")
    return turn


def memory(src):
    """(what the user tells, the reply, the later question as a Turn)."""
    key, value = src.pick((("name", src.name()), ("city", src.city()), ("favorite color", src.pick(COLORS)), ("dog's name", src.name()), ("favorite animal", src.pick(ANIMALS)), ("secret word", src.word()), ("number", str(src.integer())), ("age", str(src.rng.randint(5, 90)))))
    told = src.pick((f"My {key} is {value}.", f"Hi, my {key} is {value}.", f"Remember that my {key} is {value}.", f"Please remember: my {key} is {value}."))
    reply = src.pick((f"I will remember that your {key} is {value}.", f"Thank you. Your {key} is {value}."))
    ask = src.pick((f"What is my {key}?", f"Do you remember my {key}?", f"Tell me my {key}.", f"What was my {key}?"))
    return told, reply, Turn(ask, f"Your {key} is {value}.", padded(src, [f"The user said that the {key} is {value}.", f"The user asks for the {key}."]), short=value, expect=value)


def extraction(src):
    """A turn whose answer is JSON after a response format: (turn, format)."""
    name, age, city, thing = src.name(), src.rng.randint(3, 95), src.city().split(",")[0], src.pick(THINGS)
    fields = src.rng.sample([("name", "string", name, f"{name} is here"), ("age", "integer", age, f"the age is {age}"), ("city", "string", city, f"the city is {city}"), ("item", "string", thing, f"the item is a {thing}")], src.rng.randint(1, 3))
    properties = {key: {"type": kind} for key, kind, _, _ in fields}
    form = {"name": src.pick(("person", "answer", "record", "data", src.word())), "schema": {"type": "object", "properties": properties, "required": list(properties)}}
    if src.chance(0.5):
        form["schema"]["additionalProperties"] = False
    text = start(", ".join(said for _, _, _, said in fields)) + "."
    answer = json.dumps({key: value for key, _, value, _ in fields}, ensure_ascii=False, separators=(",", ":"))
    return Turn(src.pick((text, f"Extract the data: {text}", f"{text} Answer as JSON.")), answer, padded(src, ["The answer must be JSON in the given form.", "I take the values from the text."])), form
