"""What is to be seen moving: things of one clear shape and colour, each an emoji, with what people call them.

A line is the emoji, "<" or ">" where it faces to the left or to the right (it is turned round when it goes the other
way), its phrase, and other phrases for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mdiff.core.icons import code_of


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A thing that moves.

    Attributes:
        code: code points of its emoji.
        phrases: with their articles, the plain one first: "a red apple".
        faces: "left" or "right", as it is drawn; "" for neither.
    """

    code: str
    phrases: tuple[str, ...]
    faces: str = ""

    @property
    def name(self) -> str:
        """The plain phrase without its article."""
        return self.phrases[0].removeprefix("a ").removeprefix("an ").removeprefix("the ")


_TABLE = """
🐕 < a dog
🐈 < a cat
🐎 < a horse
🐄 < a cow, a black and white cow
🐖 < a pig
🐏 < a ram
🐐 < a goat
🐪 < a camel
🦒 < a giraffe
🐘 < an elephant
🦏 < a rhinoceros, a rhino
🦛 < a hippopotamus, a hippo
🐁 < a mouse
🐇 < a rabbit
🐿️ < a chipmunk
🦔 < a hedgehog
🦇 a bat
🐻 a bear, the face of a bear
🐨 a koala
🐼 a panda
🦁 a lion
🐯 a tiger face, the face of a tiger
🦊 a fox
🐒 < a monkey
🦘 < a kangaroo
🐓 < a rooster
🐤 < a baby chick, a yellow chick
🐧 a penguin
🕊️ < a dove, a white dove
🦅 < an eagle
🦆 < a duck
🦢 < a swan
🦉 an owl
🦩 < a flamingo, a pink flamingo
🦚 a peacock
🦜 < a parrot
🐸 a frog, the face of a frog
🐊 a crocodile
🐢 < a turtle
🦎 a lizard
🐍 a snake, a green snake
🦕 < a dinosaur, a long-necked dinosaur
🦖 < a tyrannosaurus rex, a t-rex
🐉 < a dragon, a green dragon
🐳 < a whale
🐬 < a dolphin
🐟 < a fish, a blue fish
🐠 < a tropical fish
🐡 < a blowfish
🦈 < a shark
🐙 an octopus
🐌 < a snail
🦋 a butterfly
🐛 < a caterpillar
🐝 < a bee, a honeybee
🐞 a ladybug
🦂 a scorpion
🦀 a crab
🦞 a lobster
🦐 < a shrimp
🌹 a rose, a red rose
🌻 a sunflower
🌷 a tulip
🌲 an evergreen tree, a fir tree
🌳 a tree, a green tree
🌴 a palm tree
🌵 a cactus
🍀 a four leaf clover
🍁 a maple leaf
🍄 a mushroom, a red mushroom
🍇 grapes, a bunch of grapes
🍉 a slice of watermelon
🍊 an orange, a tangerine
🍋 a lemon
🍌 a banana
🍍 a pineapple
🍎 a red apple, an apple
🍏 a green apple
🍐 a pear
🍑 a peach
🍒 cherries, two cherries
🍓 a strawberry
🥝 a kiwi fruit, a kiwi
🍅 a tomato
🥥 a coconut
🥑 an avocado
🍆 an eggplant
🥕 a carrot
🌽 an ear of corn
🥦 broccoli
🍞 a loaf of bread, bread
🥐 a croissant
🥨 a pretzel
🧀 a wedge of cheese, a piece of cheese
🍔 a hamburger, a burger
🍟 french fries, fries
🍕 a slice of pizza, a pizza
🌭 a hot dog
🌮 a taco
🥚 an egg
🍩 a doughnut, a donut
🍪 a cookie
🎂 a birthday cake
🧁 a cupcake
🍭 a lollipop
🍦 an ice cream cone
🍺 a mug of beer
🚗 < a car, a red car
🚕 < a taxi, a yellow taxi
🚌 < a bus
🚒 < a fire engine
🚑 < an ambulance
🚚 < a delivery truck, a truck
🚜 < a tractor
🏎️ < a racing car, a race car
🚲 a bicycle, a bike
🛵 < a motor scooter, a scooter
🚂 < a steam locomotive, a locomotive
🚀 > a rocket
✈️ > an airplane, a plane
🚁 < a helicopter
⛵ a sailboat
🚢 a ship
🛸 a flying saucer, a ufo
🎈 a balloon, a red balloon
⚓ an anchor
🏠 a house
🏰 a castle
⛺ a tent
🌍 the planet earth, a globe
🪐 a ringed planet, saturn
🌙 a crescent moon, the moon
☀️ the sun, a sun
⭐ a star, a yellow star
☁️ a cloud
⛄ a snowman
🌈 a rainbow
🔥 a fire, a flame
💧 a droplet, a drop of water
❄️ a snowflake
⚡ a lightning bolt
⚽ a soccer ball
🏀 a basketball
🏈 an american football
⚾ a baseball
🏐 a volleyball
🎃 a jack-o-lantern, a carved pumpkin
🎄 a christmas tree
🎁 a present, a wrapped gift
🏆 a trophy
🎲 a die
🧸 a teddy bear
🪁 a kite
🎯 a bullseye, a dart board
🎸 a guitar
🎺 a trumpet
🥁 a drum
👑 a crown
🎩 a top hat
👟 a running shoe, a sneaker
👢 a boot
💎 a gemstone, a diamond
🔔 a bell
📷 a camera
📺 a television
☎️ a telephone, a red telephone
📕 a red book, a closed red book
🔑 a key
🔨 a hammer
🕯️ a candle
💡 a light bulb
⏰ an alarm clock
☂️ an umbrella
🧲 a magnet
🔍 a magnifying glass
🪑 a chair
🚪 a door
🛁 a bathtub
🧦 socks, a pair of socks
👕 a t-shirt, a shirt
❤️ a red heart, a heart
💙 a blue heart
😀 a grinning face, a smiley
👻 a ghost
👽 an alien
🤖 a robot
💀 a skull
"""


_FACES = {"<": "left", ">": "right"}


def _read(table: str) -> tuple[Thing, ...]:
    found = []
    for line in table.strip().splitlines():
        emoji, _, rest = line.partition(" ")
        phrases = tuple(phrase.strip() for phrase in rest.lstrip("<>").split(","))
        found.append(Thing(code=code_of(emoji), phrases=phrases, faces=_FACES.get(rest[0], "")))
    return tuple(found)


THINGS: Sequence[Thing] = _read(_TABLE)
"""What moves in `video/motion`."""
