"""Short stories out of templates: a hero, a place, a trouble, a turn and an end that fit together."""
import re

from words import ANIMALS, COLORS, FOODS, THINGS

PLACES = ["a deep wood", "a small village", "an old castle", "a green valley", "a quiet lake", "a high mountain", "a busy town", "a lonely farm",
          "a little island", "a wide field", "an old mill", "a sunny garden"]
TRAITS = "clever proud kind lazy brave greedy gentle merry old young shy hungry patient vain".split()
OPENINGS = ["Once upon a time there was a {trait} {hero} who lived near {place}.", "Long ago, near {place}, there lived a {trait} {hero}.",
            "There was once a {trait} {hero} who had a home near {place}.", "A {trait} {hero} once lived near {place}."]

PLOTS = [
    # a lost thing
    ["One morning {the} could not find the {color} {thing}.", "{The} looked under the bed, behind the door and in the grass, but the {thing} was not there.",
     "Then {the} met a {other} on the road.", "\"Have you seen my {thing}?\" asked {the}.", "\"I saw it by the well,\" said the {other}.",
     "They ran to the well together, and there lay the {color} {thing} in the sun.", "{The} thanked the {other}, and from that day they were friends."],
    # a trick
    ["One day {the} saw a {other} with a basket of {food}.", "\"What fine {food} you have!\" said {the}. \"But I hear that you cannot sing.\"",
     "\"Not sing?\" cried the {other}, and put down the basket and began to sing.", "While the {other} sang, {the} took the {food} and ran away.",
     "When the song was over, the basket was empty.", "\"Now I know,\" said the {other}, \"that he who praises me too much wants something.\""],
    # help returned
    ["One cold night {the} heard a cry for help.", "A little {other} had fallen into the river.", "{The} held out a long branch and pulled the {other} out of the water.",
     "\"Thank you,\" said the {other}. \"One day I will help you too.\"", "In the summer {the} was caught in a net.",
     "The {other} heard it, came quickly and cut the net with a {thing}.", "\"A small friend can be a great friend,\" said {the}."],
    # a race
    ["{The} was proud of being fast, and said so every day.", "\"Let us race to the old oak,\" said a {other} at last.", "All the animals came to see it.",
     "{The} ran far ahead, and then lay down to eat some {food} and fell asleep.", "The {other} went on, step by step, and did not stop.",
     "When {the} woke up, the {other} was already sitting under the oak.", "\"Slow and steady wins the race,\" said the {other}."],
    # sharing
    ["One winter there was very little to eat.", "{The} had a house full of {food}, but did not want to share them.", "A hungry {other} knocked at the door.",
     "\"Please give me a few {food},\" said the {other}.", "At first {the} said no, but the house was silent and lonely.",
     "So {the} opened the door, and they ate the {food} together by the fire.", "\"They taste better with a friend,\" said {the}."],
    # a wish
    ["One evening {the} found a {color} {thing} in the grass.", "When {the} touched it, a voice said: \"You have one wish.\"", "{The} thought of gold and of a great house.",
     "But then a poor {other} came by, who was cold and hungry.", "\"I wish that the {other} may be warm and have enough to eat,\" said {the}.",
     "At once there stood a warm house with a table full of {food}.", "The {other} asked {the} to stay, and they lived there happily."],
]
MORALS = ["So they lived happily ever after.", "And if they have not moved away, they live there still.", "That is the end of the story.", "Everyone in that place tells this story to this day."]


def story(src, hero=None):
    """A story about the hero: an animal, a thing someone is, or a capitalised name."""
    hero = hero or src.pick(ANIMALS)
    named = hero[0].isupper()
    other = src.pick([a for a in ANIMALS if a != hero])
    fill = dict(trait=src.pick(TRAITS), hero=hero, place=src.pick(PLACES), other=other, color=src.pick(COLORS), thing=src.pick(THINGS), food=src.pick(FOODS),
                the=hero if named else f"the {hero}", The=hero if named else f"The {hero}")
    opening = src.pick(OPENINGS)
    if named:
        opening = src.pick(("Once upon a time {hero} lived near {place}.", "Long ago {hero} had a house near {place}."))
    sentences = [opening, *src.pick(PLOTS), src.pick(MORALS)]
    text = " ".join(sentences).format(**fill)
    return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)


def story_request(src):
    """(what the user asks, the hero)."""
    hero = src.name() if src.chance(0.2) else src.pick(ANIMALS + ["king", "princess", "miller", "witch", "giant", "farmer", "tailor", "dragon", "girl", "boy"])
    about = hero if hero[0].isupper() else f"an {hero}" if hero[0] in "aeiou" else f"a {hero}"
    ask = src.pick((f"Tell me a story about {about}.", f"Tell me a story about {about}", f"Tell a short story about {about}.", f"Please tell me a tale of {about}.", f"Write a story about {about}.",
                    f"I want to hear a story about {about}.", f"Can you tell me a story about {about}?", f"Write a short tale about {about}.", f"A story about {about}, please.",
                    f"Tell me a short tale about {about}."))
    return ask, hero
