"""What can be heard in the recorded part of the data set: named sound effects and drum samples.

Plain tables. A key is what the source calls the sound: the start of the description inside an
OpenSFX catalogue, or the file name of a Sonic Pi sample. `@` stands for "a" or "an".
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sound:
    """A recorded sound: its plain caption and other wordings of it."""

    key: str
    phrase: str
    words: tuple[str, ...] = ()


def _table(rows: tuple[tuple[str, ...], ...]) -> dict[str, Sound]:
    return {key: Sound(key=key, phrase=phrase, words=tuple(words)) for key, phrase, *words in rows}


# Only sounds under CC0 or CC-BY; a ShareAlike one is refused when the catalogue is read.
OPENSFX: dict[str, Sound] = _table(
    (
        ("Splat (building docks", "@ wet splat", "something splats into water", "@ splash"),
        ("Factory Whistle", "@ factory whistle", "@ steam whistle blowing"),
        ("Steam train station", "@ steam train whistle", "@ steam locomotive horn", "@ train horn"),
        ("Steam engine going in", "@ steam train in a tunnel", "@ steam engine whistling"),
        ("Ship horn", "@ ship horn", "@ big ship blowing its horn", "@ foghorn"),
        ("Ferry horn", "@ ferry horn", "@ ferry boat horn in a harbour"),
        ("Propeller plane start", "@ propeller plane starting", "@ small airplane engine"),
        ("Early jet take off", "@ jet taking off", "@ passenger jet departing"),
        ("Diesel/electric train", "@ diesel train horn", "@ locomotive horn"),
        ("Mining machinery", "mining machinery", "@ running elevator machine", "heavy machinery"),
        ("Electric sparking", "electric sparks", "electricity crackling", "@ buzzing electric arc"),
        ("Steam (of steam engine)", "hissing steam", "@ steam engine hissing", "steam escaping"),
        ("Level crossing", "@ level crossing bell", "@ railroad crossing bell ringing"),
        ("Road vehicle breakdown", "@ car breaking down", "@ metallic clatter"),
        ("Train/ship breakdown", "@ train breaking down", "metal crashing"),
        ("Crash", "@ crash", "something crashes", "@ car crash"),
        ("Explosion", "an explosion", "@ loud explosion", "something explodes", "@ bomb"),
        ("Big crash", "@ big crash", "@ huge crash"),
        ("Cash till", "@ cash register", "@ till opening", "@ cash till ringing"),
        ("Morse", "morse code", "@ telegraph beeping", "morse code beeps"),
        ("Plane wheels touching", "tires screeching", "@ short tire squeal"),
        ("Truck/old bus start, pull away with", "@ truck honking and driving off"),
        ("Truck/old bus start, pull away.", "@ truck starting", "@ lorry driving away"),
        ("Modern bus start", "@ bus driving off", "@ bus engine"),
        ("Old bus start", "an old bus starting", "an old engine starting"),
        ("Applause", "applause", "@ crowd clapping", "people applauding", "an audience cheering"),
        ("Oooh sound", "@ crowd saying oooh", "people saying ooh"),
        ("Splat (terraform", "@ short splat", "@ squelch"),
        ("Jackhammer", "@ jackhammer", "@ pneumatic drill", "road works with a jackhammer"),
        ("Modern car horn", "@ car horn", "@ car honking", "someone honks"),
        ("Sheep", "@ sheep bleating", "@ sheep", "@ sheep going baa"),
        ("Cow", "@ cow mooing", "@ cow", "@ cow going moo"),
        ("Horse", "@ horse neighing", "@ horse", "@ horse whinnying"),
        ("Building bridge", "hammering on metal", "@ blacksmith hammering", "@ smithy"),
        ("Sawmill", "@ circular saw", "@ sawmill", "@ saw cutting wood"),
        ("Toyland: Toy factory (2)", "@ slide whistle", "@ falling slide whistle"),
        ("Toyland: Bubble generated", "bubbles", "@ bubbling sound", "@ bubble rising"),
        ("Toyland: Bubble slurped", "@ slurp", "someone slurps a drink", "slurping"),
        ("Toyland: Plastic mine", "bubbling water", "water bubbling"),
        ("Wind", "wind", "wind blowing", "@ gentle wind", "@ breeze"),
        ("Toyland: Road vehicle", "@ comic crash", "@ cartoon crash"),
        ("Lumber mill: Crashing", "@ tree crashing down", "@ tree hitting the ground"),
        ("Lumber mill: Falling", "@ tree falling", "@ tree being cut down", "wood cracking"),
        ("Lumber mill: Chainsaw", "@ chainsaw", "@ chainsaw cutting wood", "@ motor saw"),
        ("Heavy wind", "@ strong wind", "heavy wind", "@ storm", "wind howling"),
        ("Mach 1+", "@ supersonic jet taking off", "@ fast jet flying past"),
        ("Toyland: Comedy bus start (1)", "@ bus starting with a boing", "@ comic boing"),
        ("Modern jet take off", "@ fighter jet", "fighter jets flying over", "@ jet fly-by"),
        ("Toyland: Comedy bus start (2)", "@ bus with a bike horn", "@ bike horn tooting"),
        ("Toyland: Comedy truck start (1)", "@ squeaky toy and an engine", "@ squeaky toy"),
        ("Maglev train", "@ metro train departing", "@ subway train", "an underground train"),
        ("Tropical: Bird (1)", "@ bird chirping", "@ bird", "birdsong", "@ tropical bird"),
        ("Tropical: Lion roar", "@ lion roaring", "@ lion", "@ growling lion", "@ roar"),
        ("Tropical: Monkeys", "monkeys screaming", "@ monkey", "monkeys in the jungle"),
        ("Toyland: Propeller plane", "@ propeller plane taking off", "an airplane propeller"),
        ("Monorail train", "@ train passing by", "@ passing train"),
        ("Tropical: Bird (2)", "@ bird calling", "@ jungle bird", "@ bird singing"),
    )
)

SONIC_PI: dict[str, Sound] = _table(
    (
        ("ambi_choir", "an ambient choir", "ghostly voices"),
        ("ambi_dark_woosh", "@ dark whoosh", "@ deep swoosh"),
        ("ambi_drone", "@ dark drone", "an ambient drone"),
        ("ambi_glass_hum", "@ humming glass", "glass resonating"),
        ("ambi_glass_rub", "@ finger rubbing a glass", "@ wine glass ringing"),
        ("ambi_haunted_hum", "@ haunted hum", "@ spooky humming"),
        ("ambi_lunar_land", "@ spacey ambient sound", "@ science fiction atmosphere"),
        ("ambi_sauna", "hissing in a sauna", "@ sauna"),
        ("ambi_swoosh", "@ swoosh", "@ soft whoosh"),
        ("drum_roll", "@ drum roll", "@ snare drum roll", "drums rolling"),
        ("elec_bell", "an electronic bell"),
        ("elec_blip", "an electronic blip", "@ computer blip"),
        ("elec_chime", "an electronic chime", "@ shimmering chime"),
        ("elec_fuzz_tom", "@ fuzzy electronic tom"),
        ("elec_snare", "an electronic snare", "@ synthetic snare drum"),
        ("elec_twang", "an electronic twang"),
        ("glitch_robot1", "@ glitchy robot", "@ malfunctioning robot"),
        ("glitch_robot2", "@ robot glitching", "robot noises"),
        ("guit_e_fifths", "an electric guitar playing fifths"),
        ("guit_e_slide", "an electric guitar slide", "someone slides on a guitar"),
        ("guit_em9", "@ guitar playing an E minor ninth chord"),
        ("guit_harmonics", "guitar harmonics", "@ guitar playing harmonics"),
        ("loop_3d_printer", "@ 3D printer", "@ printer working"),
        ("loop_compus", "@ electronic drum loop"),
        ("loop_electric", "an electric drum loop", "an electro beat"),
        ("loop_industrial", "an industrial drum loop", "industrial noises"),
        ("loop_tabla", "@ tabla rhythm", "Indian tabla drums", "someone plays the tabla"),
        ("mehackit_phone1", "@ phone sound", "an old telephone"),
        ("mehackit_phone3", "@ telephone", "@ phone signal"),
        ("mehackit_robot1", "@ robot", "@ robot moving"),
        ("mehackit_robot2", "@ robot arm moving", "@ small robot"),
        ("mehackit_robot4", "@ robot motor", "@ servo motor"),
        ("misc_burp", "@ burp", "someone burps"),
        ("misc_cineboom", "@ cinematic boom", "@ deep movie boom"),
        ("misc_crow", "@ crow cawing", "@ crow", "@ raven"),
        ("perc_bell", "@ bell ringing", "@ ringing bell", "@ large bell"),
        ("perc_bell2", "@ small bell", "@ high bell ringing", "@ little bell"),
        ("perc_door", "@ door closing", "@ door", "someone shuts a door"),
        ("perc_impact1", "an impact", "@ heavy impact"),
        ("perc_impact2", "@ thud", "@ dull impact"),
        ("perc_snap", "@ finger snap", "someone snaps fingers", "@ snap of the fingers"),
        ("perc_swash", "@ short swash", "@ quick brush noise"),
        ("perc_swoosh", "@ quick swoosh", "something swings past"),
        ("perc_till", "@ shop till", "an old cash register"),
        ("tabla_ghe2", "@ low tabla hit", "@ deep tabla drum"),
        ("tabla_ghe5", "@ tabla bass stroke", "@ bending tabla drum"),
        ("tabla_na", "@ tabla hit", "an Indian hand drum"),
        ("tabla_tun1", "@ ringing tabla hit", "@ tuned tabla drum"),
        ("vinyl_backspin", "@ vinyl backspin", "@ DJ spinning a record back"),
        ("vinyl_hiss", "vinyl hiss", "an old record crackling", "record noise"),
        ("vinyl_rewind", "@ vinyl rewind", "@ record being rewound"),
        ("vinyl_scratch", "@ vinyl scratch", "@ DJ scratching a record"),
    )
)

# Sonic Pi samples of drums that the soundfont also has: further takes of those drums.
DRUM_SAMPLES: dict[str, str] = {
    "drum_bass_hard": "kick drum",
    "drum_bass_soft": "kick drum",
    "drum_heavy_kick": "kick drum",
    "bd_808": "kick drum",
    "bd_haus": "kick drum",
    "bd_fat": "kick drum",
    "drum_snare_hard": "snare drum",
    "drum_snare_soft": "snare drum",
    "sn_dub": "snare drum",
    "sn_generic": "snare drum",
    "drum_tom_hi_hard": "high tom",
    "drum_tom_hi_soft": "high tom",
    "drum_tom_mid_hard": "mid tom",
    "drum_tom_mid_soft": "mid tom",
    "drum_tom_lo_hard": "low tom",
    "drum_tom_lo_soft": "low tom",
    "drum_cymbal_closed": "closed hi-hat",
    "drum_cymbal_pedal": "closed hi-hat",
    "drum_cymbal_open": "open hi-hat",
    "drum_cymbal_hard": "crash cymbal",
    "drum_cymbal_soft": "crash cymbal",
    "drum_splash_hard": "splash cymbal",
    "drum_splash_soft": "splash cymbal",
    "drum_cowbell": "cowbell",
}

SOUNDS: dict[str, Sound] = {each.phrase: each for each in (*OPENSFX.values(), *SONIC_PI.values())}
