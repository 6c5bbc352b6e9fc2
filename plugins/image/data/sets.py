"""The icon sets: which picture of a set shows which concept."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mdiff.core.icons import Draw, Icons, codes, drawer, files, vectors
from mdiff.plugins.image.data import SETS
from mdiff.plugins.image.data.captions import STYLES, Style
from mdiff.plugins.image.data.concepts import Concept

Known = Mapping[str, Concept]


def sets(name: str, at: Mapping[str, Path], known: Known) -> Sequence[tuple[Style, str, Icons]]:
    """(style, name of the icon set, its pictures): what a data set is made of.

    Args:
        name: of the data set.
        at: name of a package -> its folder.
    """
    draw = drawer(at["resvg"])
    styles = {style.word: style for style in STYLES}
    return [
        (styles[word], source, OPENED[source](at[source], known, draw))
        for source, word in SETS[name].items()
    ]


def _files(package: Path, known: Known, draw: Draw) -> Icons:
    return files(package / "assets")


def _coded(package: Path, known: Known, draw: Draw) -> Icons:
    return vectors(package, codes(package), draw)


def _named(package: Path, known: Known, draw: Draw) -> Icons:
    return vectors(package, _by_name(known), draw)


def _joined(package: Path, known: Known, draw: Draw) -> Icons:
    return vectors(package, _by_joined_name(known), draw)


OPENED: Mapping[str, Callable[[Path, Known, Draw], Icons]] = {
    "fluent-3d": _files,
    "fluent-flat": _coded,
    "fluent-contrast": _coded,
    "noto": _coded,
    "noto-v1": _named,
    "fxemoji": _joined,
    "fluent-gradient": _named,
    "twemoji": _named,
    "emojione": _named,
    "emojione-monotone": _named,
}
"""Icon set -> what finds its pictures in the package."""


def _by_name(known: Known) -> dict[str, str]:
    """Code -> key, of a set whose keys are Unicode's names: "red-apple"."""
    plain = {code: re.sub("[’'.]", "", concept.official) for code, concept in known.items()}
    return {
        code: re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for code, name in plain.items()
    }


def _by_joined_name(known: Known) -> dict[str, str]:
    """Code -> key, of FxEmoji, whose keys are names without spaces, many of them its own."""
    joined = {
        code: re.sub(r"[^a-z0-9]", "", concept.official.lower()) for code, concept in known.items()
    }
    own = {name: key for key, name in FXEMOJI.items()}
    taken = set(FXEMOJI)
    return {
        code: own.get(known[code].official, name)
        for code, name in joined.items()
        if known[code].official in own or name not in taken
    }


_FXEMOJI = """
    dog = dog face; dogside = dog; cat = cat face; catside = cat; mouse = mouse face; mouseside = mouse; pig =
    pig face; pigside = pig; tiger = tiger face; tigerside = tiger; bunny = rabbit face; bunnyside = rabbit;
    leopardside = leopard; dragonhead = dragon face; dragonside = dragon; acorn = chestnut; aubergine =
    eggplant; billiards = pool 8 ball; americasglobe = globe showing Americas; asiaaustraliaglobe = globe
    showing Asia-Australia; europeafricaglobe = globe showing Europe-Africa; meridianglobe = globe with
    meridians; angry = angry face; anguish = anguished face; astonished = astonished face; bactriancamel =
    two-hump camel; dromedarycamel = camel; ballottboxwithballott = ballot box with ballot; banknotedollar =
    dollar banknote; banknoteeuro = euro banknote; banknotepound = pound banknote; banknoteyen = yen banknote;
    basketballandhoop = basketball; bath = person taking bath; beachumbrella = beach with umbrella;
    beating-heart = beating heart; bellcancellation = bell with slash; blackskullcrossbones = skull and
    crossbones; blackscissors = scissors; blacktelephone = telephone; bolt = high voltage; bookmarktab =
    bookmark tabs; bow = bow and arrow; cellphone = mobile phone; chartdownwardstrend = chart decreasing;
    chartupwardstrend = chart increasing; chartupwardstrendyen = chart increasing with yen; chilipepper = hot
    pepper; cop = police officer; clap = clapping hands; closedmailboxlowered = closed mailbox with lowered
    flag; closedmailboxraised = closed mailbox with raised flag; openmailboxlowered = open mailbox with lowered
    flag; openmailboxraised = open mailbox with raised flag; coldsweat = anxious face with sweat; confetti =
    confetti ball; confounded = confounded face; confused = confused face; construct = construction worker;
    controlknob = control knobs; couple = woman and man holding hands; curryandrice = curry rice; daggerknife =
    dagger; dancer = woman dancing; devilhorns = smiling face with horns; imp = angry face with horns; directhit
    = bullseye; disappointed = disappointed face; dissapointedrelief = sad but relieved face; dizzyface = face
    with crossed-out eyes; doveofpeace = dove; earofmaize = ear of corn; earofrice = sheaf of rice;
    electrictorch = flashlight; envelopedownarrowabove = envelope with arrow; europeancastle = castle;
    europeanpostoffice = post office; evergreen = evergreen tree; expressionless = expressionless face;
    fallingleaf = fallen leaf; fatherchristmas = Santa Claus; fearful = fearful face; fireworksparkler =
    sparkler; fishcakeswirl = fish cake with swirl; fishingpoleandfish = fishing pole; fistedhand = oncoming
    fist; flexbicep = flexed biceps; floppydisk2 = floppy disk; flushed = flushed face; framewithpicture =
    framed picture; frontfacingchick = front-facing baby chick; fullmoonwithface = full moon face;
    newmoonwithface = new moon face; gem = gem stone; gma = old woman; gpa = old man; golfer = person golfing;
    grimacing = grimacing face; grin = grinning face; grintears = face with tears of joy; grinsweat = grinning
    face with sweat; grinsquint = grinning squinting face; grineyes = beaming face with smiling eyes; grinwide =
    grinning face with big eyes; grinwideeyes = grinning face with smiling eyes; guardsman = guard; haircut =
    person getting haircut; headmassage = person getting massage; halo = smiling face with halo; hampster =
    hamster; handheldvideocamera = video camera; heartarrow = heart with arrow; heartblue = blue heart;
    heartgreen = green heart; heartpurple = purple heart; heartyellow = yellow heart; heartribbon = heart with
    ribbon; hearteyes = smiling face with heart-eyes; 2hearts = two hearts; heels = high-heeled shoe; hocho =
    kitchen knife; hourglass = hourglass done; hourglassflowingsand = hourglass not done;
    highspeedtrainbulletnose = bullet train; housebuilding = house; housebuildings = houses; hushed = hushed
    face; izakayalantern = red paper lantern; japaneseangrymask = goblin; kissclosedeyes = kissing face with
    closed eyes; kisseyes = kissing face with smiling eyes; kissing = kissing face; leaffluttering = leaf
    fluttering in wind; leftmagnifyingglass = magnifying glass tilted left; rightmagnifyingglass = magnifying
    glass tilted right; leftwritinghand = writing hand; lock = locked; openlock = unlocked; lockandkey = locked
    with key; lockwithinkpen = locked with pen; loudlycrying = loudly crying face; crying = crying face;
    lowerleftcrayon = crayon; lowerleftfountainpen = fountain pen; lowerleftpaintbrush = paintbrush;
    lowerleftpen = pen; maninbusinesssuitlevitating = person in suit levitating; manltepiececlock = mantelpiece
    clock; mansshirt = t-shirt; medicalmask = face with medical mask; mensrunner = running shoe; mensshoe =
    man’s shoe; minidisc = computer disk; opticaldisc = optical disk; monkeyhear = hear-no-evil monkey;
    monkeysee = see-no-evil monkey; monkeyspeak = speak-no-evil monkey; moyai = moai; multiplemusicalnotes =
    musical notes; neutral = neutral face; nomouth = face without mouth; notebookdecorativecover = notebook with
    decorative cover; okgesture = person gesturing OK; nogesture = person gesturing NO; openmouth = face with
    open mouth; outbox = outbox tray; pandaface = panda; wolfface = wolf; pensive = pensive face; perservere =
    persevering face; personalcomputer = laptop; pigsnout = pig nose; pinkwallet = purse;
    policecarsrevolvinglight = police car light; poo = pile of poo; pout = enraged face; present = wrapped gift;
    pray = folded hands; racecar = racing car; raincloud = cloud with rain; raisedhandsfingerssplayed = hand
    with fingers splayed; recreationalvehicle = sport utility vehicle; relieved = relieved face; reminder =
    reminder ribbon; rowboat = person rowing boat; running = person running; sakebottleandcup = sake; sandals =
    woman’s sandal; schoolsatchel = backpack; screamfear = face screaming in fear; sheep = ewe; skiandskiboot =
    skis; sleeping = sleeping face; sleepy = sleepy face; sleuthspy = detective; sliceofpizza = pizza; smileeyes
    = smiling face with smiling eyes; whitesmilingface = smiling face; smiletongue = face with tongue;
    tongueoutwink = winking face with tongue; smirk = smirking face; snowcloud = cloud with snow; snowmountains
    = snow-capped mountain; stormcloud = cloud with lightning and rain; speakercancellation = muted speaker;
    speakeronesoundwave = speaker medium volume; speakingheadinsilhouette = speaking head; spiralcalendarpad =
    spiral calendar; spurtingwhale = spouting whale; steamlocomotive = locomotive; studiomic = studio
    microphone; sunraincloud = sun behind rain cloud; sunrays = sun; sunsetoverbuildings = sunset; surfer =
    person surfing; sweat = downcast face with sweat; sweatsplash = sweat droplets; swimming = person swimming;
    tennisball = tennis; tie = necktie; tired = tired face; toykotower = Tokyo tower; triumph = face with steam
    from nose; turban = person wearing turban; unamused = unamused face; videocasette = videocassette; walking =
    person walking; waningbibbousmoon = waning gibbous moon; wave = water wave; waving = waving hand; weary =
    weary face; weightlifter = person lifting weights; whitesunbehindcloud = sun behind large cloud;
    whitesunsmallcloud = sun behind small cloud; winking = winking face; womansshirt = woman’s clothes; worried
    = worried face; bicyclist = person biking; bowing = person bowing; handup = person raising hand; bride =
    person with veil; dash = dashing away; whitemediumstar = star; star = glowing star; playingcardblackjoker =
    joker; boot = woman’s boot
"""
FXEMOJI: Mapping[str, str] = {
    key.strip(): " ".join(name.split())
    for key, name in (pair.split("=") for pair in _FXEMOJI.split(";"))
}
"""FxEmoji's own keys -> Unicode's names, where joining the name's words does not give the key or gives another."""
