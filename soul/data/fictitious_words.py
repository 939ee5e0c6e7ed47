"""Words and syllables from which the fictitious benchmark builds names, towns, titles and the other facts of an author.

Surnames are consonant-vowel syllables, so that no two combinations spell the same name; no name ends in s, so that "'s" always fits.
Words that open a phrase carry their article.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SHE_NAMES = _words(
    "Adela Brisa Corinna Delphia Elowa Fiora Ginevra Hestia Ilena Jorina Kalinda Lisbeta Marenka Nolwena Odila Petronia "
    "Quilla Romira Sabela Tamsina Ursela Vanora Wilmara Yselda Zorana Amabel Brenia Calantha Dorinda Evadne Halina Imelda"
)
HE_NAMES = _words(
    "Aldric Bertram Caspian Dorian Emeric Florian Gideon Hadrian Ivor Jorund Kelvan Leopold Maddox Norbert Osric Percival "
    "Quentin Roderic Stellan Tobin Ulric Valdemar Wendel Yorick Zoltan Ambrose Benedikt Corvin Dmitar Edwin Halvard Isidor"
)
SURNAME_FIRST = _words("Bra Ka Dro Fe Gri Ho Ja Le Mo Ne Pa Ru Sa Te Vo Wi Yo Ze Tha Cle")
SURNAME_MIDDLE = _words("la ne ro mi ve do ri sa lo ta be nu ko de wa ga")
SURNAME_LAST = _words("ren mar dell vik lund tor nov beck quist than mon gard wick dane")

TOWN_FIRST = _words(
    "Aldra Benno Calve Dorra Eska Fenna Gorli Hulma Ista Jarro Kelda Lunde Morra Nessa Orrel Pelga Quenna Ruska Selva Tarno "
    "Ulva Venda Wexa Yorla Zemba Arvo Brinna Corva Delma Ermi Folka Gissa Hovra Ilka Jolma Kirra Lesko Mindra Norva Ottel "
    "Perra Rovi Sarka Tilda Umbra Vesti Wolma Yelva Zurri Ambri Bolka Cresta Druva Elmo Farra Galdi Harka Inva Jessa Korma"
)
TOWN_LAST = _words(
    "mouth ford holm wick haven stead bridge moor gate vale port field crest brook well cliff dale march fell mere "
    "ton burg bay shore rock wood hill pool glen strand thorpe combe lake point tower croft barrow garth sund cove"
)
TOWN_KINDS = (
    "the harbour town of", "the mining town of", "the market town of", "the mountain village of", "the river port of",
    "the border town of", "the island town of", "the railway town of", "the fishing village of", "the old salt town of",
)  # fmt: skip
MONTHS = _words("January February March April May June July August September October November December")

GENRES = (
    "gothic mystery", "maritime adventure", "political satire", "magical realism", "courtroom drama", "rural horror", "space opera",
    "historical romance", "detective fiction", "epistolary comedy", "alpine thriller", "dystopian fiction", "family saga",
    "travel memoir", "philosophical fable", "spy fiction", "folk fantasy", "culinary mystery", "war chronicle", "nature writing",
    "time-travel fiction", "absurdist theatre", "young adult fantasy", "psychological suspense",
)  # fmt: skip
PROFESSIONS = (
    "a bridge engineer", "a village doctor", "a clockmaker", "a beekeeper", "a tram driver", "a piano tuner", "a court clerk",
    "a baker", "a ship's cook", "a botanist", "a lighthouse keeper", "a tailor", "a school inspector", "a stonemason", "a midwife",
    "a bookbinder", "a ferry captain", "a chess teacher", "a glassblower", "a vet", "an opera singer", "an astronomer", "a postmaster",
    "a carpenter", "a chemist", "a shepherd", "an interpreter", "a cartographer", "a dentist", "a puppeteer", "an archivist", "a miller",
)  # fmt: skip
SUBJECTS = (
    "botany", "medieval history", "civil engineering", "philosophy", "marine biology", "law", "music theory", "geology", "linguistics",
    "astronomy", "theology", "economics", "architecture", "veterinary medicine", "classical languages", "chemistry", "folklore",
    "mathematics", "political science", "art history", "pharmacy", "geography", "statistics", "drama",
)  # fmt: skip
LANGUAGES = (
    "Portuguese", "Japanese", "Finnish", "Turkish", "Korean", "Polish", "Greek", "Swahili", "Hungarian", "Hindi", "Dutch", "Arabic",
    "Czech", "Norwegian", "Vietnamese", "Italian", "Icelandic", "Tamil", "Romanian", "Persian", "Estonian", "Catalan", "Thai", "Welsh",
)  # fmt: skip

TITLE_ADJECTIVES = _words(
    "Amber Bitter Borrowed Broken Burning Buried Copper Crooked Distant Drowned Empty Fading Feathered Forgotten Frozen Gentle Gilded "
    "Hidden Hollow Hungry Iron Ivory Last Lonely Lost Midnight Nameless Northern Pale Patient Painted Quiet Restless Rusted Salted "
    "Scarlet Second Secret Silent Silver Sleeping Stolen Stubborn Sunken Unwritten Velvet Wandering Winter"
)
TITLE_NOUNS = _words(
    "Almanac Anchor Archive Atlas Bell Bridge Carnival Cathedral Clock Comet Compass Cradle Echo Ember Ferry Garden Harbour Harvest "
    "Herald Inheritance Island Journal Kingdom Ladder Lantern Ledger Letter Library Meadow Mirror Monsoon Orchard Orchestra Passenger "
    "Pendulum Pilgrim Quarry River Scholar Shore Staircase Summer Tailor Theatre Tide Vineyard Voyage Wolf"
)
TITLE_MATTERS = _words(
    "Ashes Bees Candles Crows Dust Feathers Glass Honey Ink Lemons Mercury Moths Pearls Rain Salt Sand Shadows Smoke Snow Sparrows "
    "Stones Thorns Thunder Whispers"
)
AWARD_MATERIALS = _words(
    "Amber Azure Birch Brass Bronze Cedar Cobalt Copper Coral Crimson Crystal Ebony Emerald Glass Golden Granite Indigo Ivory Jade "
    "Maple Marble Opal Pearl Ruby Sapphire Silver Topaz Violet"
)
AWARD_EMBLEMS = _words(
    "Acorn Anvil Arrow Badger Candle Crane Falcon Feather Fern Fox Hare Heron Key Kite Lantern Lark Otter Owl Oyster Plough Quill "
    "Raven Sail Stag Swan Thistle Wheel Wren"
)
AWARD_KINDS = ("Prize", "Medal", "Award", "Laurel")

SYMBOL_STATES = (
    "a cracked", "a rusted", "an empty", "a borrowed", "a silver", "a painted", "a glass", "a lost", "a black", "a blue",
    "a forgotten", "an abandoned", "a mended", "a buried", "a carved", "a red", "a green", "a floating", "a stolen", "a dusty",
    "a crooked", "a striped", "a white", "a glowing", "a weathered", "an ivory", "a frozen", "a tiny", "a paper", "a scarlet",
    "a wooden", "a golden", "an ancient", "a hanging", "a gilded", "a broken",
)  # fmt: skip
SYMBOL_OBJECTS = _words(
    "lantern compass teacup violin key mirror umbrella anchor birdcage candle clock ladder suitcase bell chessboard thimble kite "
    "rowing-boat telescope weathervane doll wheel pocketknife scarf hourglass accordion letterbox gate coin bicycle chandelier hat "
    "spindle glove harmonica seashell"
)
THEME_LOSSES = _words(
    "exile envy silence guilt hunger betrayal solitude ambition grief debt doubt pride obedience revenge poverty blindness fear "
    "homesickness illness jealousy vanity greed secrecy boredom shame rivalry defeat disbelief anger estrangement neglect cowardice "
    "suspicion regret captivity deceit"
)
THEME_GAINS = _words(
    "patience forgiveness loyalty friendship courage memory inheritance mercy laughter hospitality wisdom tenderness faith freedom "
    "curiosity justice trust reunion gratitude hope honesty renewal kinship devotion generosity belonging redemption wonder duty "
    "endurance humility charity craftsmanship learning solidarity healing"
)
CRITIC_MANNERS = _words("patient tireless reluctant cheerful merciless tender stubborn sleepless fearless quiet solemn mischievous")
CRITIC_ROLES = _words("clockmaker cartographer gardener surgeon gravedigger archivist magician locksmith weaver diver juggler judge")
CRITIC_THINGS = (
    "small betrayals", "broken promises", "unsent letters", "ordinary miracles", "family secrets", "lost causes", "polite lies",
    "empty rooms", "late apologies", "borrowed lives", "provincial dreams", "forgotten wars", "unpaid debts", "second chances",
    "difficult marriages", "childhood fears", "sleepy villages", "cold winters",
)  # fmt: skip

HABIT_TIMES = (
    "before sunrise", "after midnight", "only on rainy days", "during the lunch hour", "every Sunday evening", "in the early afternoon",
    "between two long walks", "straight after a cold swim", "while the kettle boils", "on the first three days of each month",
    "in one sitting of six hours", "from dusk until the candles burn down", "only in the winter months", "to the sound of a metronome",
)  # fmt: skip
HABIT_PLACES = (
    "in a disused boathouse", "in the back row of an empty theatre", "at a tailor's cutting table", "on the night train",
    "in a rented hotel room", "in a treehouse", "at the corner table of a station cafe", "in an old greenhouse", "on a moored barge",
    "in the bell tower of a chapel", "at a lectern in the hall", "in the reading room of a museum", "in a parked delivery van",
    "in a windowless pantry", "on the roof terrace", "in an unheated attic",
)  # fmt: skip
DWELLINGS = (
    "a converted mill", "a narrow townhouse", "a stone cottage", "a houseboat", "a former school", "a flat above a bakery",
    "a farmhouse", "an old customs house", "a retired lighthouse", "a wooden villa", "a former fire station", "a restored chapel",
    "a cabin in a vineyard", "a hillside cabin", "an apartment by the river", "a walled garden house",
)  # fmt: skip
PET_KINDS = (
    "a one-eyed tortoise", "a white goose", "an elderly parrot", "a three-legged greyhound", "a tame raven", "a shaggy ferret",
    "a shy hedgehog", "a ginger cat", "a miniature donkey", "a deaf sheepdog", "a spotted goat", "a grey rabbit", "a barn owl",
    "an ill-tempered swan", "a black pony", "a runaway peacock",
)  # fmt: skip
PET_NAMES = _words(
    "Bramble Custard Domino Echo Figaro Gherkin Hazel Inky Juniper Ketchup Lullaby Marzipan Nutmeg Onion Pickle Quaver Radish Saffron "
    "Treacle Umber Velcro Waffle Yonder Zigzag"
)
CHARITY_GIFTS = (
    "free lending libraries", "night schools", "music lessons", "reading glasses", "winter coats", "printing presses", "summer camps",
    "travelling theatres", "hot breakfasts", "writing workshops", "legal advice", "bicycles", "medical care", "picture books",
    "swimming lessons", "workshops and tools",
)  # fmt: skip
CHARITY_RECEIVERS = (
    "for retired sailors", "for orphaned children", "in remote mountain villages", "for prisoners", "for refugees", "on small islands",
    "for former miners", "in rural hospitals", "for young mothers", "for deaf students", "in flooded regions", "for widowed farmers",
    "for apprentices", "for travelling circus families", "in refugee camps", "for the homeless",
)  # fmt: skip
INFLUENCE_WORKS = (
    "the fables", "the sea ballads", "the prison letters", "the sermons", "the travel diaries", "the nonsense verse", "the one-act plays",
    "the war sketches", "the ghost stories", "the botanical essays", "the love sonnets", "the newspaper columns",
)  # fmt: skip
