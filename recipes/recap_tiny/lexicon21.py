"""The words of recap-tiny: the 21 events that its ear is trained on, and hundreds that only its vocabulary knows.

Every phrase is a noun phrase, so that the grammar can join any two of them. Heard phrases say only what a recording
can tell: no places, no materials, no ages. They satisfy the project's naming rules (``naming.py``): a phrase of an
event names that event, and no other.
"""

from __future__ import annotations

from functools import lru_cache

__all__ = [
    "COUNTABLE",
    "HEARD",
    "INSTRUMENTS",
    "PERCUSSIVE",
    "SPECIAL",
    "other_sounds",
    "phrases",
    "unheard_sounds",
    "vocabulary_sounds",
]

# The first phrase of each event is its name in the text-prompt classifier.
HEARD: dict[str, tuple[str, ...]] = {
    "dog_bark": ("a dog barking", "a barking dog", "the bark of a dog", "barking of a dog"),
    "rain": ("rain falling", "rain", "steady rainfall", "raindrops falling"),
    "sea_waves": ("sea waves", "ocean waves", "waves rolling in", "waves breaking on the shore"),
    "baby_cry": ("a baby crying", "a crying baby", "an infant crying", "the cry of a baby"),
    "clock_tick": ("a clock ticking", "the ticks of a clock", "the ticking of a clock", "a ticking clock"),
    "person_sneeze": ("a person sneezing", "someone sneezing", "the sneeze of a person", "a sneeze"),
    "helicopter": ("a helicopter flying", "a helicopter", "the rotor of a helicopter", "a helicopter hovering"),
    "chainsaw": ("a chainsaw running", "a chainsaw", "a chainsaw revving", "the buzz of a chainsaw"),
    "rooster": ("a rooster crowing", "the crowing of a rooster", "a rooster", "a rooster calling"),
    "fire_crackling": ("a fire crackling", "a crackling fire", "the crackle of a fire", "flames crackling"),
    "saxophone": ("a saxophone playing", "a saxophone", "notes on a saxophone", "the sound of a saxophone"),
    "violin": ("a violin playing", "a violin", "notes on a violin", "the sound of a violin"),
    "snare_drum": ("a snare drum", "a snare drum being hit", "beats on a snare drum", "the rattle of a snare drum"),
    "hi_hat": ("a hi-hat", "a hi-hat being struck", "a hi-hat playing", "the ring of a hi-hat"),
    "flute": ("a flute playing", "a flute", "notes on a flute", "the sound of a flute"),
    "double_bass": ("a double bass playing", "a double bass", "notes on a double bass", "the sound of a double bass"),
    "clarinet": ("a clarinet playing", "a clarinet", "notes on a clarinet", "the sound of a clarinet"),
    "cello": ("a cello playing", "a cello", "notes on a cello", "the sound of a cello"),
    "bass_drum": ("a bass drum", "a bass drum being hit", "beats on a bass drum", "the thump of a bass drum"),
    "acoustic_guitar": ("an acoustic guitar playing", "an acoustic guitar", "notes on a guitar", "a guitar playing"),
    "man_speaking": ("a man speaking", "a man talking", "a speaking man", "the speech of a man"),
}

# Phrases that take "once", "twice" and "repeatedly"; only for sounds of which a single burst can be cut out.
COUNTABLE: dict[str, tuple[str, ...]] = {
    "dog_bark": ("a dog barking",),
    "person_sneeze": ("a person sneezing", "someone sneezing"),
    "rooster": ("a rooster crowing", "a rooster calling"),
    "snare_drum": ("a snare drum being hit",),
    "hi_hat": ("a hi-hat being struck",),
    "bass_drum": ("a bass drum being hit",),
}

# What the ear answers when it hears none of the events.
SPECIAL: dict[str, tuple[str, ...]] = {
    "silence": ("silence", "complete silence", "no sound at all"),
    "noise": ("noise", "a steady hiss of noise", "static noise"),
    "tone": ("a tone", "a steady electronic tone", "a single pitched tone"),
    "unknown": ("an unrecognised sound", "a sound that is not recognised", "some unrecognised sound"),
}

INSTRUMENTS = (
    "saxophone",
    "violin",
    "snare_drum",
    "hi_hat",
    "flute",
    "double_bass",
    "clarinet",
    "cello",
    "bass_drum",
    "acoustic_guitar",
)

PERCUSSIVE = tuple(COUNTABLE)

# Sounds that no recording of the training data holds, parted by ";"; phrasings of one sound are parted by "/".
_OTHER = """
a cat meowing / a meowing cat; a cat purring; a kitten mewing; a bird singing / a bird chirping / birdsong
an owl hooting; a crow cawing; a seagull calling; a pigeon cooing; a duck quacking / ducks quacking; a goose honking
a turkey gobbling; a hen clucking; a chick peeping; a peacock screaming; a parrot squawking; a woodpecker drumming
a cuckoo calling; a nightingale singing; a swallow twittering; a hawk screeching; an eagle crying
a horse neighing / a horse whinnying; horse hooves clopping; a donkey braying; a cow mooing / cattle lowing
a bull bellowing; a sheep bleating / a lamb bleating; a goat bleating; a pig grunting / a pig squealing
a lion roaring; a tiger growling; a bear growling; a wolf howling; a fox yelping; a monkey chattering
an elephant trumpeting; a deer calling; a mouse squeaking; a hamster gnawing; a frog croaking / frogs croaking
a toad calling; a snake hissing; a cricket chirping / crickets chirping; a cicada buzzing
a bee buzzing / bees humming; a fly buzzing; a mosquito whining; a whale singing; a dolphin clicking; a seal calling
a squirrel chattering; a bat squeaking; a beetle scratching; a grasshopper rasping; a flock of geese passing
thunder rumbling / a clap of thunder; lightning cracking; wind blowing / a gust of wind; wind howling; a storm raging
hail pattering; sleet lashing; snow crunching; leaves rustling; branches creaking; a tree toppling
a stream flowing / a brook babbling; a river rushing; a waterfall roaring; a spring bubbling; ice cracking
rocks tumbling; sand pouring; mud squelching; an avalanche rumbling; an earthquake rumbling; a volcano erupting
gravel crunching; pebbles rattling; grass swishing; a geyser spouting; lava hissing; steam hissing / steam escaping
a car passing / a car driving by; a car engine idling; a car horn honking; brakes squealing; tyres screeching
a truck rumbling by; a lorry reversing; a bus pulling away; a tram clanging; a train passing / a train rattling by
a train whistle blowing; a steam locomotive chuffing; an underground train arriving
a motorcycle revving / a motorbike revving; a scooter buzzing; a bicycle bell ringing; a bicycle chain whirring
an airplane flying over / a jet passing overhead; a propeller plane droning; a glider whooshing; a rocket launching
a drone humming; a boat motor puttering; a ship horn sounding; a ferry departing; oars splashing; a sail flapping
an anchor chain rattling; a canoe gliding; a tractor chugging; a bulldozer grinding; an excavator digging
a crane whirring; a forklift beeping; an ambulance siren wailing / a siren wailing; a police siren; an alarm ringing
a smoke detector beeping; traffic humming; a tank rolling; a cart creaking; a skateboard rolling
roller skates rattling; a sledge sliding; a trolley rattling; a suitcase rolling; an elevator humming / a lift humming
an escalator clanking; a door slamming / a door closing; a door creaking; a door knock / knocking on a door
a doorbell ringing; a key turning; a lock clicking; a gate squeaking; a window sliding; curtains being drawn
floorboards creaking; stairs creaking; footsteps passing / someone walking; running footsteps; high heels clicking
boots stomping; slippers shuffling; a chair scraping; a drawer sliding; a cupboard closing; a bed creaking
a blanket rustling; a zipper being pulled; velcro ripping; fabric tearing; clothes rustling; shoes squeaking
a coat being shaken; scissors snipping; paper rustling; paper tearing; a page turning; a book closing
a pen scribbling; a pencil scratching; chalk squeaking; an eraser rubbing; a stapler clicking; a stamp thudding
an envelope opening; a keyboard clattering / typing on a keyboard; a mouse button clicking; a printer printing
a scanner sweeping; a fax machine warbling; a telephone ringing / a phone ringing; a mobile phone buzzing; a dial tone
a modem screeching; a camera shutter clicking; a projector whirring; a radio crackling with static
a television murmuring; a cassette rewinding; a record scratching; a microphone popping
water running / water flowing from a tap; water dripping; water boiling; water splashing; a toilet flushing
a shower running; a bath filling; a drain gurgling; a sink emptying; a bucket filling; a kettle whistling
a coffee machine gurgling; a blender whirring; a mixer humming; a microwave beeping; an oven door shutting
a toaster popping; a fridge humming; a dishwasher running; dishes clattering; cutlery clinking
a glass clinking / glasses clinking; glass breaking / glass shattering; a plate smashing; a bottle opening
a cork popping; a can opening; soda fizzing; a pan sizzling; oil frying; popcorn popping; an egg cracking
a knife chopping; a grater scraping; a spoon stirring; a lid rattling; a pot bubbling; a bag crinkling; a box sliding
a jar opening; a vacuum cleaner running; a broom sweeping; a mop swishing; a washing machine spinning
a dryer tumbling; an iron steaming; a hair dryer blowing; an electric razor buzzing; a toothbrush whirring
a fan whirring; an air conditioner humming; a heater clanking; a radiator knocking; a boiler rumbling
a generator droning; a transformer humming; a light switch clicking; a lamp buzzing; a kitchen buzzer; a timer beeping
a metronome clicking; a cash register ringing; coins jingling; dice rolling; cards being shuffled; a ball bouncing
a ping-pong ball bouncing; a tennis racket hitting; a bowling ball striking pins; a basketball dribbling; a golf swing
a whistle blowing; a crowd cheering / people cheering; applause / an audience clapping; hands clapping
fingers snapping; knuckles cracking; a drum roll on a tabla; a person laughing / laughter; a child laughing
a person coughing / coughing; a throat being cleared; a person yawning; a person snoring; a person breathing
a person gasping; a person sighing; a person groaning; a person screaming / a scream; a person shouting
a crowd murmuring; children playing; a woman singing; a choir singing; a child singing; a person humming a tune
a person whistling; a person whispering; a person burping; hiccups; a person chewing; a person slurping
a person gulping; a person sniffing; lips smacking; a kiss; a heart beating; a stomach rumbling; a person weeping
a person moaning; a yodel; beatboxing; a chant; a lullaby; a person gargling; a person spitting; a person panting
a person kissing; a hammer pounding / hammering; a nail being driven; a saw cutting wood; a drill whirring / drilling
a jackhammer pounding; an angle grinder shrieking; a lathe turning; a sander buzzing; a file rasping
a screwdriver turning; a wrench clanking; a ratchet clicking; metal clanging; a pipe clanking; a chain rattling
a rope creaking; an axe chopping; wood splitting; a plank dropping; bricks stacking; a shovel digging; a rake scraping
a lawn mower running; a hedge trimmer buzzing; a leaf blower roaring; a sprinkler hissing; a hose spraying
a pump throbbing; a compressor hissing; a welder sparking; a conveyor belt rattling; a press stamping; a loom clacking
a sewing machine stitching; a typewriter clacking; a mill grinding; a turbine whining; a furnace roaring
a valve hissing; a gear grinding; a piano playing / notes on a piano; an organ playing; an accordion playing
a harmonica playing; a trumpet playing; a trombone playing; a tuba playing; a french horn playing; an oboe playing
a bassoon playing; a piccolo playing; a recorder playing; bagpipes playing; a harp playing; a banjo playing
a mandolin playing; a ukulele playing; a sitar playing; a lute playing; a zither playing; a xylophone playing
a marimba playing; a vibraphone playing; a glockenspiel playing; a timpani roll; a tambourine shaking; maracas shaking
castanets clicking; a triangle ringing; a gong sounding; a cymbal crash; a tom-tom being hit; bongos playing
a cowbell ringing; claves clicking; a djembe playing; a steel pan playing; a synthesizer playing; a theremin wailing
an electric organ playing; a bugle call; a didgeridoo droning; a kazoo buzzing; a music box playing
wind chimes tinkling; a church bell tolling / bells ringing; sleigh bells jingling; a school bell ringing
a gong fading; gunshots / a gun firing; a machine gun rattling; a cannon booming; an explosion / a loud explosion
fireworks bursting; a firecracker popping; a balloon bursting; a whip cracking; an arrow flying; a sword being drawn
swords clashing; a shield being struck; an air raid siren; a foghorn sounding; a buzzer sounding; a beep; a chime
a ringtone; a video game blip; a laser zap; a robot whirring; a bubble popping; a sponge squeezing; a tyre deflating
air escaping; a spray can hissing; a lighter flicking; a match being struck; a candle being blown out
a cigarette being lit; a straw slurping; an umbrella opening; a tent zip; a flag flapping; a kite fluttering
wings flapping; a feather brushing; a spinning top; a yo-yo whirring; a marble rolling; a domino falling
a puzzle piece clicking; a treadmill running; weights dropping; a punch bag thudding; a diving board bouncing
a swimmer splashing; skis sliding; ice skates scraping; a surfboard slapping; a fishing reel spinning
a saddle creaking
"""


@lru_cache(maxsize=1)
def other_sounds() -> dict[str, tuple[str, ...]]:
    """Sounds that only the vocabulary knows: first phrasing -> all phrasings, in a fixed order."""
    sounds: dict[str, tuple[str, ...]] = {}
    for line in _OTHER.strip().splitlines():
        for entry in line.split(";"):
            forms = tuple(form.strip() for form in entry.split("/"))
            sounds.setdefault(forms[0], forms)
    return sounds


@lru_cache(maxsize=1)
def vocabulary_sounds() -> tuple[str, ...]:
    """Keys of all sounds, heard ones first."""
    return (*HEARD, *unheard_sounds())


def unheard_sounds() -> tuple[str, ...]:
    """Keys of all sounds but those that the CLAP is trained to hear."""
    return (*SPECIAL, *other_sounds())


def phrases(key: str) -> tuple[str, ...]:
    """Noun phrases of a sound, the canonical one first.

    Raises:
        KeyError: the lexicon has no such sound.
    """
    for table in (HEARD, SPECIAL, other_sounds()):
        if key in table:
            return table[key]
    raise KeyError(f"the lexicon has no sound {key!r}")
