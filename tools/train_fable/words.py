"""Word pools for the generated conversations, split into a training part and a held-out part.

The split is by hash of the whole string: a tool name or argument of an evaluation file was never
one of the training generator's, though its single words may have been part of longer ones.
"""
import collections
import gzip
import re
import zlib

NAMES = """Anna Tom Mary John Peter Paul Lucy Jack Jill Emma Oliver Sophia Liam Noah Mia Ava Leo Max Ella Grace
Henry Alice Bob Carol Dave Eve Frank Heidi Ivan Judy Karl Lena Maria Nina Oscar Petra Quinn Rosa Sam Tina Uma Victor
Wendy Xavier Yara Zoe Hugo Iris Jonas Kira Luis Mona Nils Olga Pavel Rita Stefan Thea Ursula Vera Walter Ali Fatima
Hassan Layla Omar Yusuf Aisha Chen Wei Ming Hiro Yuki Kenji Sakura Raj Priya Arjun Anil Deepa Kofi Ama Kwame Zola
Pedro Juan Carlos Elena Lucia Diego Sofia Mateo Camila Pierre Marie Claude Louis Amelie Hans Greta Fritz Klaus Heike
Ingrid Sven Lars Astrid Bjorn Freya Giulia Marco Luca Paolo Chiara Dmitri Natasha Boris Anya Sergei George Martha
Arthur Edith Ralph Agnes Simon Judith Martin Clara Felix Ida Bruno Dora Edgar Flora Gustav Hilda Igor Joan Kurt
Linda Moritz Nora Otto Pia Ruben Selma Theo Vivian Willem Ruth David Sarah Daniel Rachel Michael Laura""".split()
CITIES = """Paris|London|Rome|Berlin|Madrid|Vienna|Oslo|Lisbon|Prague|Athens|Dublin|Warsaw|Budapest|Helsinki|Tokyo|Kyoto
Osaka|Beijing|Shanghai|Seoul|Delhi|Mumbai|Cairo|Lagos|Nairobi|Accra|Tunis|Boston|Chicago|Denver|Seattle|Dallas|Austin
Miami|Toronto|Montreal|Lima|Quito|Bogota|Santiago|Sydney|Perth|Auckland|Moscow|Kiev|Riga|Tallinn|Vilnius|Sofia|Bucharest
Belgrade|Zagreb|Milan|Naples|Turin|Venice|Florence|Lyon|Nice|Marseille|Toulouse|Geneva|Basel|Bern|Hamburg|Munich|Cologne
Dresden|Leipzig|Bremen|Seville|Valencia|Porto|Ghent|Bruges|Antwerp|Rotterdam|Utrecht|Amsterdam|Brussels|Copenhagen
Stockholm|Bergen|Reykjavik|Edinburgh|Glasgow|Leeds|York|Bath|Oxford|Cambridge|New York|Los Angeles|San Francisco|New Delhi
Hong Kong|Buenos Aires|Mexico City|Cape Town|Tel Aviv|Salt Lake City|São Paulo|Zürich|Málaga|Kraków|Rio de Janeiro
San Diego|Las Vegas|Kuala Lumpur|St. Louis|Singapore|Bangkok|Hanoi|Jakarta|Manila|Istanbul|Ankara|Dubai|Doha|Riyadh
Baghdad|Tehran|Kabul|Karachi|Lahore|Dhaka|Colombo|Houston|Phoenix|Portland|Atlanta|Detroit|Memphis|Nashville|Havana
San Francisco, CA|Boston, MA|Portland, OR|Austin, TX|Paris, France|Rome, Italy|Tokyo, Japan|Denver, CO|Lyon, France
Springfield, IL|Oslo, Norway|Madrid, Spain|Seattle, WA|Miami, FL|Berlin, Germany|London, UK""".replace("\n", "|").split("|")
ANIMALS = """fox crow wolf lamb lion mouse hare tortoise goose cat dog bear frog owl eagle donkey goat horse cow hen duck
stork crane swan sparrow raven deer rabbit badger hedgehog squirrel snake ant bee spider camel monkey tiger elephant pig
rooster peacock beaver otter mole rat""".split()
THINGS = """key ring hat lamp book cup shoe basket coin bell drum rope knife mirror box candle letter cloak stone feather
apple loaf crown needle sword bag spoon bottle chair flute map comb kettle button wheel ladder hammer broom""".split()
FOODS = """apples pears plums nuts cherries eggs cakes loaves berries figs grapes beans carrots pies oranges peaches""".split()
COLORS = "red blue green yellow white black brown grey golden silver purple pink orange".split()
VERBS = """get find fetch list show read load open check make create add update set change move copy send post save
delete remove start stop run play draw print count measure compute convert compare rank sort merge split book order buy
sell pay plan track watch report test clean lock scan mark log rate pick draft invite assign rename archive export import""".split()
NOUNS = """user order book ticket invoice file folder note list task event meeting message mail letter photo picture song
movie recipe menu table room house garden car train flight hotel ship route map price stock account card payment bill
report chart record score game player team match lesson course exam student teacher patient doctor drug test device
sensor light lamp door window alarm clock timer camera robot engine server database backup log job queue branch commit
issue page site link tag label product item cart parcel shop store animal bird horse flower tree seed field river
mountain castle story poem word sentence language color shape number password profile contact group channel""".split()

_ONSETS = "b c d f g h j k l m n p r s t v w z br cr dr fl gr kl pl pr st tr sh th qu".split()
_VOWELS = "a e i o u a e i o ai ee oo ou".split()
_UNWANTED = re.compile("sex|fuck|cock|dick|shit|cunt|nig|rape|tit|slut|whor|fag|coon|naz")
_CODAS = ["", "", "", "n", "r", "l", "s", "m", "x", "nd", "rk", "t", "ck"]


def held_out(text):
    """One word in ten belongs to the evaluation."""
    return zlib.crc32(text.lower().encode()) % 10 == 0


def tale_words(path):
    """The distinct lower-case words of the tales, the rare ones left out."""
    with gzip.open(path, "rt", encoding="utf-8") as f:
        counts = collections.Counter(re.findall(r"\b[a-z]{3,11}\b", f.read()))
    return sorted(w for w, n in counts.items() if n >= 4)


class Source:
    """Random draws for one conversation generator; `evaluation` selects the held-out half of the pools."""

    def __init__(self, rng, words, evaluation=False):
        self.rng, self.words, self.evaluation = rng, words, evaluation

    def draw(self, make):
        """Repeats make() until its result lies on our side of the split."""
        for _ in range(300):
            text = make()
            if held_out(text) == self.evaluation:
                return text
        return text

    def pick(self, options):
        return self.rng.choice(options)

    def chance(self, p):
        return self.rng.random() < p

    def pseudo(self):
        """A word nobody has seen: two or three syllables."""
        def make():
            syllables = self.rng.choice((2, 2, 3))
            made = "".join(self.pick(_ONSETS) + self.pick(_VOWELS) + self.pick(_CODAS) for _ in range(syllables))
            return make() if _UNWANTED.search(made) else made
        return self.draw(make)

    def any_word(self):
        """A word of either side, as a part of something longer."""
        return self.pseudo() if self.chance(0.2) else self.pick(self.words)

    def word(self):
        return self.draw(self.any_word)

    def name(self):
        if self.chance(0.3):
            return (self.pseudo() if self.chance(0.7) else self.word()).capitalize()
        return self.draw(lambda: self.pick(NAMES))

    def city(self):
        if self.chance(0.2):
            return self.pseudo().capitalize()
        return self.draw(lambda: self.pick(CITIES))

    def phrase(self, low=1, high=4):
        """A few words, sometimes capitalised like a title."""
        return self.draw(lambda: self.any_phrase(low, high))

    def any_phrase(self, low, high):
        words = [self.any_word() for _ in range(self.rng.randint(low, high))]
        style = self.rng.random()
        if style < 0.2:
            return " ".join(words).capitalize()
        if style < 0.35:
            return " ".join(w.capitalize() for w in words)
        return " ".join(words)

    def integer(self):
        top = self.pick((9, 20, 100, 100, 1000, 10000, 100000))
        return self.rng.randint(0 if self.chance(0.1) else 1, top)

    def number(self):
        if self.chance(0.4):
            return self.integer()
        value = round(self.rng.uniform(0, self.pick((2, 10, 100, 1000))), self.pick((1, 1, 2)))
        return -value if self.chance(0.05) and value else value
