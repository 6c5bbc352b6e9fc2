"""What can be heard in the soundfont part of the data set: instruments, drums and drum patterns.

Plain tables. Notes are MIDI numbers (60 is C4), programs are General MIDI programs counted from 0.
In a phrase `@` stands for the article "a" or "an"; `captions` fills it in.
"""

from dataclasses import dataclass

LOWEST, HIGHEST = 36, 84  # C2 .. C6


@dataclass(frozen=True, kw_only=True)
class Instrument:
    """A pitched instrument: its General MIDI program, its range, and what people call it."""

    name: str
    program: int
    low: int
    high: int
    words: tuple[str, ...] = ()  # other names, as noun phrases
    subject: str = ""  # the noun phrase of the plain caption; "" means "@ <name>"
    verb: str = "playing"

    @property
    def phrase(self) -> str:
        return self.subject or f"@ {self.name}"

    @property
    def notes(self) -> range:
        return range(self.low, self.high + 1)


def _instruments() -> tuple[Instrument, ...]:
    rows: tuple[tuple[str, int, int, int, tuple[str, ...]], ...] = (
        ("grand piano", 0, 36, 84, ("@ piano", "@ piano", "@ concert piano")),
        ("electric piano", 4, 40, 76, ("@ Rhodes piano", "an e-piano", "@ keyboard")),
        ("harpsichord", 6, 41, 77, ("@ baroque harpsichord", "@ cembalo")),
        ("music box", 10, 60, 84, ("@ wind-up music box", "@ toy music box")),
        ("vibraphone", 11, 53, 84, ("vibes", "@ jazz vibraphone")),
        ("marimba", 12, 48, 84, ("@ wooden marimba",)),
        ("xylophone", 13, 58, 84, ("@ wooden xylophone",)),
        ("church organ", 19, 36, 72, ("@ pipe organ", "an organ", "@ cathedral organ")),
        ("accordion", 21, 53, 84, ("@ squeezebox", "@ piano accordion")),
        ("harmonica", 22, 60, 84, ("@ mouth organ", "@ blues harp")),
        ("nylon guitar", 24, 40, 76, ("@ classical guitar", "an acoustic guitar", "@ guitar")),
        (
            "distorted electric guitar",
            30,
            40,
            72,
            ("@ distorted guitar", "@ heavy metal guitar", "an electric guitar with distortion"),
        ),
        ("bass guitar", 33, 36, 60, ("an electric bass", "@ bass", "@ fingered bass guitar")),
        ("synth bass", 38, 36, 60, ("@ synthesizer bass", "an electronic bass")),
        ("violin", 40, 55, 84, ("@ bowed violin", "@ solo violin")),
        ("cello", 42, 36, 69, ("@ bowed cello", "@ violoncello")),
        ("pizzicato strings", 45, 43, 79, ("plucked strings", "@ plucked violin section")),
        ("harp", 46, 40, 79, ("@ concert harp", "@ plucked harp")),
        (
            "string orchestra",
            48,
            43,
            84,
            ("@ string section", "strings", "an orchestra of strings"),
        ),
        ("choir", 52, 48, 79, ("@ group of singers", "@ choir of voices", "voices")),
        ("trumpet", 56, 54, 82, ("@ brass trumpet",)),
        ("trombone", 57, 40, 70, ("@ slide trombone",)),
        ("tuba", 58, 36, 60, ("@ brass tuba", "@ bass tuba")),
        ("french horn", 60, 41, 77, ("@ horn", "@ brass horn")),
        ("saxophone", 65, 50, 80, ("@ sax", "an alto sax", "@ jazz saxophone")),
        ("oboe", 68, 58, 84, ("an orchestral oboe",)),
        ("bassoon", 70, 36, 70, ("@ deep bassoon", "an orchestral bassoon")),
        ("clarinet", 71, 50, 84, ("@ woodwind clarinet",)),
        ("flute", 73, 60, 84, ("@ concert flute", "@ silver flute")),
        ("pan flute", 75, 60, 84, ("pan pipes", "@ panpipe")),
        ("ocarina", 79, 58, 84, ("@ clay ocarina",)),
        ("sitar", 104, 48, 74, ("an Indian sitar",)),
        ("banjo", 105, 48, 79, ("@ bluegrass banjo", "@ country banjo")),
        ("koto", 107, 48, 79, ("@ Japanese koto", "@ Japanese zither")),
        ("kalimba", 108, 53, 79, ("@ thumb piano", "an African thumb piano", "an mbira")),
        ("bagpipes", 109, 55, 79, ("@ bagpipe", "Scottish bagpipes")),
        ("steel drums", 114, 52, 84, ("@ steel pan", "@ Caribbean steel drum")),
        ("synth lead", 81, 48, 84, ("@ synthesizer", "@ sawtooth synth", "an electronic synth")),
    )
    plural = ("pizzicato strings", "bagpipes", "steel drums")
    verbs = {"choir": "singing"}
    plain = tuple(
        Instrument(
            name=name,
            program=program,
            low=low,
            high=high,
            words=words,
            subject=name if name in plural else "",
            verb=verbs.get(name, "playing"),
        )
        for name, program, low, high, words in rows
    )
    whistle = Instrument(
        name="whistle",
        program=78,
        low=60,
        high=84,
        words=("@ human whistle", "@ whistled tone"),
        subject="@ person",
        verb="whistling",
    )
    return (*plain, whistle)


INSTRUMENTS: dict[str, Instrument] = {each.name: each for each in _instruments()}

CHORD_INSTRUMENTS: tuple[str, ...] = (
    "grand piano",
    "electric piano",
    "harpsichord",
    "music box",
    "vibraphone",
    "church organ",
    "accordion",
    "nylon guitar",
    "harp",
    "choir",
)
ARPEGGIO_INSTRUMENTS: tuple[str, ...] = (
    "grand piano",
    "harp",
    "nylon guitar",
    "flute",
    "violin",
    "trumpet",
    "clarinet",
    "marimba",
    "music box",
    "banjo",
)
TRIADS: dict[str, tuple[int, ...]] = {"major": (0, 4, 7), "minor": (0, 3, 7)}


KITS: dict[str, int] = {"standard": 0, "room": 8, "power": 16, "808": 25}


@dataclass(frozen=True, kw_only=True)
class Drum:
    """An unpitched percussion sound: keys of the General MIDI drum map and its wordings."""

    name: str
    keys: tuple[int, ...]
    phrase: str
    words: tuple[str, ...] = ()

    @property
    def kits(self) -> int:
        """How many of `KITS` have a sound of their own for it: only the drum set differs much."""
        return len(KITS) if min(self.keys) < 54 else 2


def _drums() -> tuple[Drum, ...]:
    rows: tuple[tuple[str, tuple[int, ...], str, tuple[str, ...]], ...] = (
        (
            "kick drum",
            (36, 35),
            "@ kick drum hit",
            ("@ bass drum", "@ deep drum hit", "@ bass drum thump", "@ kick", "one low drum beat"),
        ),
        (
            "snare drum",
            (38, 40),
            "@ snare drum hit",
            ("@ snare", "@ hit on the snare", "a sharp snare hit", "one snare drum beat"),
        ),
        ("rim click", (37,), "@ rim click", ("@ side stick", "@ click on the rim of a drum")),
        (
            "hand clap",
            (39,),
            "@ hand clap",
            ("someone claps once", "@ clap", "hands clapping once", "@ single clap"),
        ),
        ("low tom", (41, 43), "@ low tom hit", ("@ floor tom", "@ low drum", "@ deep tom drum")),
        ("mid tom", (45, 47), "@ mid tom hit", ("@ tom-tom", "@ tom drum", "a middle tom")),
        ("high tom", (48, 50), "@ high tom hit", ("@ high tom-tom", "@ small tom drum")),
        (
            "closed hi-hat",
            (42, 44),
            "@ closed hi-hat hit",
            ("@ hi-hat tick", "@ closed hat", "@ short hi-hat"),
        ),
        (
            "open hi-hat",
            (46,),
            "an open hi-hat hit",
            ("an open hat", "@ ringing hi-hat", "@ long hi-hat"),
        ),
        (
            "crash cymbal",
            (49, 57),
            "@ crash cymbal hit",
            ("@ cymbal crash", "@ loud cymbal", "someone hits a crash cymbal"),
        ),
        (
            "ride cymbal",
            (51, 59),
            "@ ride cymbal hit",
            ("@ ride", "@ ping on the ride cymbal", "@ jazz ride cymbal"),
        ),
        ("splash cymbal", (55,), "@ splash cymbal hit", ("@ small cymbal", "@ cymbal splash")),
        ("chinese cymbal", (52,), "@ chinese cymbal hit", ("@ china cymbal", "@ trashy cymbal")),
        ("ride bell", (53,), "@ ride bell hit", ("@ bell of the ride cymbal",)),
        (
            "tambourine",
            (54,),
            "@ tambourine hit",
            ("@ tambourine", "@ jingling tambourine", "someone shakes a tambourine once"),
        ),
        ("cowbell", (56,), "@ cowbell hit", ("@ cowbell", "someone hits a cowbell")),
        ("vibraslap", (58,), "@ vibraslap hit", ("@ rattling vibraslap",)),
        ("bongo", (60, 61), "@ bongo hit", ("@ bongo drum", "@ small hand drum")),
        ("conga", (62, 63, 64), "@ conga hit", ("@ conga drum", "@ hand drum", "@ conga slap")),
        ("timbale", (65, 66), "@ timbale hit", ("@ timbale", "@ metallic latin drum")),
        ("agogo bell", (67, 68), "an agogo bell hit", ("an agogo", "@ samba bell")),
        ("cabasa", (69,), "@ cabasa shake", ("@ cabasa", "@ scraping shaker")),
        ("maracas", (70,), "@ maracas shake", ("maracas", "@ shaker", "one shake of maracas")),
        ("guiro", (73, 74), "@ guiro scrape", ("@ guiro", "@ wooden scraper")),
        ("claves", (75,), "@ claves hit", ("claves", "two wooden sticks hit together")),
        (
            "wood block",
            (76, 77),
            "@ wood block hit",
            ("@ woodblock", "@ knock on a wood block", "@ hollow wooden knock"),
        ),
        ("cuica", (78, 79), "@ cuica", ("@ squeaking cuica", "@ Brazilian friction drum")),
        (
            "triangle",
            (81, 80),
            "@ triangle hit",
            ("@ triangle", "@ ringing triangle", "someone strikes a triangle"),
        ),
    )
    return tuple(
        Drum(name=name, keys=keys, phrase=phrase, words=words) for name, keys, phrase, words in rows
    )


DRUMS: dict[str, Drum] = {each.name: each for each in _drums()}


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A drum pattern: per key, a bar as text (`X` accent, `x` hit, `.` rest), a step a quarter of
    a beat long unless `steps_per_beat` says otherwise."""

    name: str
    lines: dict[int, str]
    phrase: str
    words: tuple[str, ...] = ()
    steps_per_beat: int = 4


def _patterns() -> tuple[Pattern, ...]:
    rows: tuple[tuple[str, dict[int, str], tuple[str, ...], int], ...] = (
        (
            "rock",
            {42: "x.x.x.x.x.x.x.x.", 36: "X.......X.x.....", 38: "....X.......X..."},
            ("@ rock beat", "rock drums", "@ rock drum groove", "@ drummer playing rock"),
            4,
        ),
        (
            "hip hop",
            {42: "x.xxx.x.x.xxx.x.", 36: "X.....x..xX.....", 38: "....X.......X..."},
            ("@ hip hop beat", "hip-hop drums", "@ rap beat", "@ boom bap beat"),
            4,
        ),
        (
            "disco",
            {46: "..x...x...x...x.", 36: "X...X...X...X...", 38: "....X.......X..."},
            ("@ disco beat", "disco drums", "@ dance beat"),
            4,
        ),
        (
            "techno",
            {42: "..X...X...X...X.", 36: "X...X...X...X...", 39: "....x.......x..."},
            ("@ techno beat", "@ four on the floor beat", "@ house beat"),
            4,
        ),
        (
            "waltz",
            {36: "X.....", 38: "..x.x.", 42: "x.x.x."},
            ("@ waltz rhythm", "waltz drums", "@ three four drum beat"),
            2,
        ),
        (
            "samba",
            {36: "X..xX..xX..xX..x", 70: "xxxxxxxxxxxxxxxx", 67: "X.X..X.X.X..X.X."},
            ("@ samba rhythm", "samba drums", "@ Brazilian drum rhythm"),
            4,
        ),
        (
            "bossa nova",
            {36: "X..xX..xX..xX..x", 37: "X..X..X...X..X..", 42: "x.x.x.x.x.x.x.x."},
            ("@ bossa nova rhythm", "bossa nova drums"),
            4,
        ),
        (
            "march",
            {38: "X.xxX.xxX.xxXxxx", 36: "X...X...X...X..."},
            ("@ marching drum rhythm", "@ military march on drums", "marching snare drums"),
            4,
        ),
        (
            "swing",
            {51: "X..x.xX..x.x", 44: "...x.....x..", 36: "X.....x....."},
            ("@ jazz drum rhythm", "@ swing beat", "@ jazz swing on the ride cymbal"),
            3,
        ),
        (
            "reggae",
            {42: "x.x.x.x.x.x.x.x.", 36: "........X.......", 37: "........X......."},
            ("@ reggae beat", "@ reggae one drop on drums"),
            4,
        ),
        (
            "drum and bass",
            {42: "x.x.x.x.x.x.x.x.", 36: "X.........X.....", 38: "....X..x.x..X..."},
            ("@ fast breakbeat", "drum and bass drums", "@ jungle beat"),
            4,
        ),
        (
            "metal",
            {36: "xxxxxxxxxxxxxxxx", 38: "....X.......X...", 49: "X..............."},
            ("heavy metal drums", "@ double bass drum metal beat"),
            4,
        ),
        (
            "bongo",
            {60: "X.xxX.xxX.xxX.xx", 61: ".x....x..x....x."},
            ("@ bongo rhythm", "someone plays the bongos", "bongo drums"),
            4,
        ),
        (
            "conga",
            {63: "..XX....X.XX....", 64: "......XX......XX", 62: "x...x...x...x..."},
            ("@ conga rhythm", "someone plays the congas", "@ latin conga groove"),
            4,
        ),
    )
    return tuple(
        Pattern(
            name=name,
            lines=lines,
            phrase=f"@ {name} drum beat",
            words=words,
            steps_per_beat=steps,
        )
        for name, lines, words, steps in rows
    )


PATTERNS: dict[str, Pattern] = {each.name: each for each in _patterns()}
